"""The CIFAR networks of He et al. 2015, section 4.2: depth 6n + 2, three stages of 2n layers.

stage          1         2         3
output size    32 x 32   16 x 16   8 x 8
filters        16        32        64
"""

from __future__ import annotations

from tinyres.errors import ArgumentError, expect
from tinyres.nn import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential, shortcut
from tinyres.ops import checks

WIDTHS = (16, 32, 64)


def cifar_resnet(depth: int, shortcut: str = "A", plain: bool = False, num_classes: int = 10) -> Sequential:
    """The network of `depth` layers for (N, 32, 32, 3) images; logits (N, num_classes).

    depth     6n + 2: 20, 32, 44, 56, 110, 1202 in the paper
    shortcut  "A", "B" or "C" (section 3.3)
    plain     the same layers without shortcuts
    Raises ArgumentError for anything else.
    """
    op = "cifar_resnet"
    depth = checks.integer(op, "depth", depth, 1)
    expect(depth >= 8 and depth % 6 == 2, op, "depth must be 6n + 2: 8, 14, 20, 26, ...", ArgumentError, depth=depth)
    plain = checks.flag(op, "plain", plain)
    known = isinstance(shortcut, str) and shortcut in ("A", "B", "C")
    expect(known, op, "the shortcut must be A, B or C", ArgumentError, shortcut=shortcut)
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    layers = [Conv2d(3, WIDTHS[0], 3, padding=1), BatchNorm2d(WIDTHS[0]), ReLU()]
    channels = WIDTHS[0]
    for width in WIDTHS:
        for i in range((depth - 2) // 6):
            stride = 2 if i == 0 and width != WIDTHS[0] else 1
            layers += _unit(channels, width, stride, None if plain else shortcut)
            channels = width
    return Sequential(*layers, GlobalAvgPool2d(), Linear(channels, num_classes))


def _unit(in_channels, width, stride, option):
    """Two 3x3 convolutions; a residual unit, or plain layers where `option` is None."""
    branch = [
        Conv2d(in_channels, width, 3, stride, padding=1),
        BatchNorm2d(width),
        ReLU(),
        Conv2d(width, width, 3, padding=1),
        BatchNorm2d(width),
    ]
    if option is None:
        return [*branch, ReLU()]
    return [Residual(*branch, shortcut=shortcut(option, in_channels, width, stride))]
