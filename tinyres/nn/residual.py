"""Residual units, the shortcuts of He et al. 2015, section 3.3, and the joins of He et al. 2016, section 3.1."""

from __future__ import annotations

import numpy as np

from tinyres import ops
from tinyres.autograd import Tensor
from tinyres.errors import ArgumentError, DtypeError, expect
from tinyres.nn.layers import BatchNorm2d, Conv2d, ReLU
from tinyres.nn.module import Module, Parameter, Sequential
from tinyres.ops import checks

_RELU = ReLU()  # stands for the default: each unit gets a ReLU of its own


class Residual(Module):
    """A residual unit: y = activation(join(branch(h), shortcut(h))), where h = pre(x).

    branch      modules applied in order: the residual function F
    shortcut    a Module; None is the identity
    activation  applied after the join; None leaves it out
    pre         applied before the split, so that both paths see it; None leaves it out
    join        a Module called with (branch output, shortcut output); None adds them

    The original unit (2015, Fig. 2) is Residual(conv, bn, relu, conv, bn). The pre-activation unit (2016, Fig. 1b)
    is Residual(bn, relu, conv, bn, relu, conv, activation=None); with `pre=Sequential(bn, relu)` both paths share
    the first activation.
    """

    def __init__(
        self,
        *branch: Module,
        shortcut: Module | None = None,
        activation: Module | None = _RELU,
        pre: Module | None = None,
        join: Module | None = None,
    ) -> None:
        super().__init__()
        activation = ReLU() if activation is _RELU else activation
        for name, part in (("shortcut", shortcut), ("activation", activation), ("pre", pre), ("join", join)):
            expect(
                part is None or isinstance(part, Module),
                "Residual",
                f"{name} must be a Module or None",
                DtypeError,
                **{name: type(part).__name__},
            )
        expect(len(branch) > 0, "Residual", "the branch needs at least one module", ArgumentError)
        self.pre = pre
        self.branch = Sequential(*branch)
        self.shortcut = shortcut
        self.join = join
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        branch = self.branch(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = branch + shortcut if self.join is None else self.join(branch, shortcut)
        return y if self.activation is None else self.activation(y)


class ZeroPadShortcut(Module):
    """Option A: every stride-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        in_channels = checks.integer("ZeroPadShortcut", "in_channels", in_channels, 1)
        out_channels = checks.integer("ZeroPadShortcut", "out_channels", out_channels, 1)
        expect(
            out_channels >= in_channels,
            "ZeroPadShortcut",
            "channels can only be added",
            ArgumentError,
            in_channels=in_channels,
            out_channels=out_channels,
        )
        self.stride = checks.integer("ZeroPadShortcut", "stride", stride, 1)
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = ops.getitem(x, (slice(None), slice(None, None, self.stride), slice(None, None, self.stride)))
        return ops.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.new_channels - before)))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, new_channels={self.new_channels}"


def shortcut(option: str, in_channels: int, out_channels: int, stride: int, norm: bool = True) -> Module | None:
    """The shortcut module of a unit, None for the identity (He et al. 2015, section 3.3 and Table 3).

    option  "A": zero padding where the dimensions change; "B": a projection there (1x1 convolution and batch norm);
            "C": a projection everywhere
    norm    whether a projection has its batch norm
    Raises ArgumentError for another option.
    """
    option = checks.choice("shortcut", "option", option, ("A", "B", "C"))
    in_channels = checks.integer("shortcut", "in_channels", in_channels, 1)
    out_channels = checks.integer("shortcut", "out_channels", out_channels, 1)
    stride, norm = checks.integer("shortcut", "stride", stride, 1), checks.flag("shortcut", "norm", norm)
    if option != "C" and stride == 1 and in_channels == out_channels:
        return None
    if option == "A":
        return ZeroPadShortcut(in_channels, out_channels, stride)
    projection = Conv2d(in_channels, out_channels, 1, stride)
    return Sequential(projection, BatchNorm2d(out_channels)) if norm else projection


class ConstantScale(Module):
    """A join: shortcut_scale * shortcut + branch_scale * branch, of equal shapes (2016, Fig. 2b, Eqn. 6).

    Raises ArgumentError for a scale that is no finite number.
    """

    def __init__(self, shortcut_scale: float, branch_scale: float) -> None:
        super().__init__()
        self.shortcut_scale = checks.real("ConstantScale", "shortcut_scale", shortcut_scale)
        self.branch_scale = checks.real("ConstantScale", "branch_scale", branch_scale)

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return ops.add(ops.mul(self.shortcut_scale, shortcut), ops.mul(self.branch_scale, branch))

    def extra_repr(self) -> str:
        return f"{self.shortcut_scale}, {self.branch_scale}"


class Gate(Module):
    """A join: (1 - g) * shortcut + branch, or + g * branch where `exclusive` (2016, Fig. 2d and 2c).

    g = sigmoid(1x1 convolution of the shortcut's output), which is x itself where the dimensions do not change.
    channels  C of branch and shortcut, both (N, H, W, C)
    bias      what the convolution's biases start from: the lower, the closer the shortcut is to the identity
    Raises ArgumentError or DtypeError for a size or a bias out of range.
    """

    def __init__(self, channels: int, bias: float, exclusive: bool) -> None:
        super().__init__()
        bias = checks.real("Gate", "bias", bias)
        self.exclusive = checks.flag("Gate", "exclusive", exclusive)
        self.conv = Conv2d(channels, channels, 1, bias=True)
        with np.errstate(over="ignore"):  # a gate may be as good as closed
            self.conv.bias = Parameter(np.full(channels, bias, np.float32))

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        g = ops.sigmoid(self.conv(shortcut))
        return (1 - g) * shortcut + (g * branch if self.exclusive else branch)

    def extra_repr(self) -> str:
        return f"exclusive={self.exclusive}"
