"""What the papers' networks are stacked from: the two residual functions of He et al. 2015, Fig. 5, and stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinyres.nn import BatchNorm2d, Conv2d, Module, ReLU, Residual, shortcut

Branch = Callable[[int, int, int], list[Module]]  # (channels, filters, stride) -> the residual function, in order


def basic(channels: int, filters: int, stride: int) -> list[Module]:
    """Two 3x3 convolutions."""
    return [
        *_conv(channels, filters, 3, stride),
        ReLU(),
        *_conv(filters, filters, 3),
    ]


def bottleneck(channels: int, filters: int, stride: int, stride_in: str = "1x1") -> list[Module]:
    """1x1, 3x3 and 1x1 convolutions, the first two with a quarter of `filters`.

    stride_in  which of them takes the stride: the first, "1x1", as in the paper, or the "3x3"
    """
    first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
    return [
        *_conv(channels, filters // 4, 1, first),
        ReLU(),
        *_conv(filters // 4, filters // 4, 3, second),
        ReLU(),
        *_conv(filters // 4, filters, 1),
    ]


def _conv(channels, filters, window, stride=1):
    return Conv2d(channels, filters, window, stride, padding=window // 2), BatchNorm2d(filters)


def stages(
    channels: int, filters: Sequence[int], units: Sequence[int], branch: Branch, option: str | None
) -> list[Module]:
    """units[i] residual units of filters[i] in stage i; the first unit of every stage but the first halves the image.

    option  the shortcut's, "A", "B" or "C"; None leaves shortcuts out: plain layers
    """
    layers: list[Module] = []
    for stage, (width, count) in enumerate(zip(filters, units, strict=True)):
        for unit in range(count):
            stride = 2 if stage > 0 and unit == 0 else 1
            modules = branch(channels, width, stride)
            if option is None:
                layers += [*modules, ReLU()]
            else:
                layers.append(Residual(*modules, shortcut=shortcut(option, channels, width, stride)))
            channels = width
    return layers
