"""The CIFAR networks of He et al. 2015, section 4.2: depth 6n + 2, three stages of 2n layers.

stage          1         2         3
output size    32 x 32   16 x 16   8 x 8
filters        16        32        64
"""

from __future__ import annotations

from tinyres.errors import ArgumentError, expect
from tinyres.models.blocks import basic, stages
from tinyres.nn import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential
from tinyres.ops import checks

FILTERS = (16, 32, 64)


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
    option = None if checks.flag(op, "plain", plain) else checks.choice(op, "shortcut", shortcut, ("A", "B", "C"))
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    return Sequential(
        Conv2d(3, FILTERS[0], 3, padding=1),
        BatchNorm2d(FILTERS[0]),
        ReLU(),
        *stages(FILTERS[0], FILTERS, [(depth - 2) // 6] * 3, basic, option),
        GlobalAvgPool2d(),
        Linear(FILTERS[-1], num_classes),
    )
