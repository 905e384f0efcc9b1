"""What the papers' networks are stacked from: residual functions of one to three convolutions, and units around them.

A residual unit is x -> f(h(x) + F(x)). Three choices make one:
  - the convolutions of F: `single`, `basic` or `bottleneck`;
  - the order of F's and f's activations (He et al. 2016, Fig. 4 and Table 2), `unit`:

      original             conv BN ReLU conv BN  (+) ReLU     He et al. 2015, Fig. 2
      bn_after_add         conv BN ReLU conv     (+) BN ReLU
      relu_before_add      conv BN ReLU conv BN ReLU (+)
      relu_preactivation   ReLU conv BN ReLU conv BN (+)
      full_preactivation   BN ReLU conv BN ReLU conv (+)

  - the skip connection h: how dimensions are matched where they change (`shortcut`, see nn.shortcut), and what is done
    to the signal in every unit (2016, Fig. 2 and Table 1), `skip`:

      identity        h = x, F
      constant        s x + b F, with scales (s, b)
      exclusive_gate  (1 - g) x + g F, with g = sigmoid(1x1 convolution of x)
      shortcut_gate   (1 - g) x + F
      conv1x1         a projection in every unit, which is shortcut C
      dropout         dropout(x) + F, where what is kept is doubled in training, as in the paper's framework (Caffe)

The paper says neither what a gate sees where dimensions change (here: the matched x), nor how skips and pre-activation
go together (here: a skip takes x as it is, a projection the activated x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tinyres.errors import ArgumentError, expect
from tinyres.nn import BatchNorm2d, ConstantScale, Conv2d, Dropout, Gate, Module, ReLU, Residual, Sequential, shortcut
from tinyres.ops import checks

UNITS = ("original", "bn_after_add", "relu_before_add", "relu_preactivation", "full_preactivation")
SKIPS = ("identity", "constant", "exclusive_gate", "shortcut_gate", "conv1x1", "dropout")

# What a skip's parameter is called, and what it is unless given: the paper's best.
PARAMETERS = {
    "constant": ("scales", (0.5, 0.5)),
    "exclusive_gate": ("gate_bias", -6.0),
    "shortcut_gate": ("gate_bias", -6.0),
    "dropout": ("dropout", 0.5),
}

Convs = Callable[[int, int, int], list[Conv2d]]  # (channels, filters, stride) -> the convolutions of F, in order


def single(channels: int, filters: int, stride: int) -> list[Conv2d]:
    """One 3x3 convolution (2016, Table 3: "1layer skip")."""
    return [_conv(channels, filters, 3, stride)]


def basic(channels: int, filters: int, stride: int) -> list[Conv2d]:
    """Two 3x3 convolutions (2015, Fig. 5 left)."""
    return [_conv(channels, filters, 3, stride), _conv(filters, filters, 3)]


def bottleneck(channels: int, filters: int, stride: int, stride_in: str = "1x1") -> list[Conv2d]:
    """1x1, 3x3 and 1x1 convolutions, the first two with a quarter of `filters` (2015, Fig. 5 right).

    stride_in  which of them takes the stride: the first, "1x1", as in the paper, or the "3x3"
    """
    first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
    inner = filters // 4
    return [_conv(channels, inner, 1, first), _conv(inner, inner, 3, second), _conv(inner, filters, 1)]


def _conv(channels, filters, window, stride=1):
    return Conv2d(channels, filters, window, stride, padding=window // 2)


class Design(NamedTuple):
    """How the units of a network are made."""

    convs: Convs
    option: str | None  # the shortcut's, "A", "B" or "C"; None leaves shortcuts out: plain layers
    unit: str
    skip: str
    parameter: Any  # the skip's


def design(op: str, convs: Convs, option: str, plain: bool, unit: str, skip: str, **parameters: object) -> Design:
    """A Design of checked choices. `parameters` are scales, gate_bias and dropout, None where not given.

    Raises ArgumentError or DtypeError, saying what is possible.
    """
    option = checks.choice(op, "shortcut", option, ("A", "B", "C"))
    unit, skip = checks.choice(op, "unit", unit, UNITS), checks.choice(op, "skip", skip, SKIPS)
    name: str | None
    parameter: Any
    name, parameter = PARAMETERS.get(skip, (None, None))
    for given, value in parameters.items():
        if value is not None:
            takers = " or ".join(skip for skip, (taken, _) in PARAMETERS.items() if taken == given)
            expect(given == name, op, f"{given} is for skip {takers}", ArgumentError, skip=skip, **{given: value})
            parameter = value
    if name == "scales":
        pair = isinstance(parameter, (tuple, list)) and len(parameter) == 2
        expect(pair, op, "scales are (of the shortcut, of the branch)", ArgumentError, scales=parameter)
        parameter = tuple([checks.real(op, "scales", scale) for scale in parameter])
    elif name == "gate_bias":
        parameter = checks.real(op, name, parameter)
    elif name == "dropout":
        parameter = checks.fraction(op, name, parameter)
    if not checks.flag(op, "plain", plain):
        return Design(convs, "C" if skip == "conv1x1" else option, unit, skip, parameter)
    rule = "a plain network has the unit original and the skip identity"
    expect((unit, skip) == ("original", "identity"), op, rule, ArgumentError, unit=unit, skip=skip)
    return Design(convs, None, unit, skip, None)


def stages(channels: int, filters: Sequence[int], units: Sequence[int], d: Design) -> list[Module]:
    """units[i] residual units of filters[i] in stage i; the first unit of every stage but the first halves the image.

    The layers before are expected to end in BN and ReLU: with pre-activation this is "the first activation right after
    conv1 and before splitting into two paths", and one more activation follows the last unit (2016, appendix).
    """
    layers: list[Module] = []
    for stage, (width, count) in enumerate(zip(filters, units, strict=True)):
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            if d.option is None:
                layers += [*_activated("original", d.convs(channels, width, stride)), ReLU()]
            else:
                layers.append(_unit(d, channels, width, stride, first=not layers))
            channels = width
    return layers + _pre_activation(d.unit, channels)


def _unit(d, channels, filters, stride, first):
    branch = _activated(d.unit, d.convs(channels, filters, stride))
    # A projection has its BN where F's convolutions have theirs: behind it, or before both paths in `pre`.
    skip = shortcut(d.option, channels, filters, stride, norm=d.unit != "full_preactivation")
    before = _pre_activation(d.unit, channels)
    pre = None
    if before and not first:
        if d.option != "A" and skip is not None:  # "these projection shortcuts are also with pre-activation"
            pre = Sequential(*before)
        else:
            branch = before + branch
    if d.skip == "dropout":
        skip = Dropout(d.parameter) if skip is None else Sequential(skip, Dropout(d.parameter))
    activation = None
    if d.unit == "original":
        activation = ReLU()
    elif d.unit == "bn_after_add":
        activation = Sequential(BatchNorm2d(filters), ReLU())
    return Residual(*branch, shortcut=skip, activation=activation, pre=pre, join=_join(d, filters))


def _join(d, filters):
    if d.skip == "constant":
        return ConstantScale(*d.parameter)
    if d.skip in ("exclusive_gate", "shortcut_gate"):
        return Gate(filters, d.parameter, d.skip == "exclusive_gate")
    return None


def _activated(unit, convs):
    """The residual function in the order of `unit`, without what comes before its first convolution."""
    modules: list[Module] = []
    for conv, following in zip(convs, [*convs[1:], None], strict=True):
        filters = conv.weight.shape[3]
        modules.append(conv)
        if following is not None:
            modules += [BatchNorm2d(filters), ReLU()]
        elif unit == "relu_before_add":
            modules += [BatchNorm2d(filters), ReLU()]
        elif unit in ("original", "relu_preactivation"):
            modules.append(BatchNorm2d(filters))
    return modules


def _pre_activation(unit, channels):
    """What a unit does to its input before the first convolution."""
    if unit == "full_preactivation":
        return [BatchNorm2d(channels), ReLU()]
    return [ReLU()] if unit == "relu_preactivation" else []
