"""The ImageNet networks of He et al. 2015, Table 1: a 7x7 convolution, four stages, a linear layer.

stage                conv2_x   conv3_x   conv4_x   conv5_x
output size          56 x 56   28 x 28   14 x 14   7 x 7      of 224 x 224 images
filters, basic       64        128       256       512        depths 18 and 34
filters, bottleneck  256       512       1024      2048       depths 50, 101 and 152
"""

from __future__ import annotations

import functools

from tinyres.models.blocks import basic, bottleneck, stages
from tinyres.nn import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Sequential
from tinyres.ops import checks

BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def imagenet_resnet(depth: int, shortcut: str = "B", stride_in: str = "1x1", num_classes: int = 1000) -> Sequential:
    """The network of `depth` layers for (N, 224, 224, 3) images, or other sizes; logits (N, num_classes).

    depth      18, 34, 50, 101 or 152
    shortcut   "A", "B" or "C" (section 3.3)
    stride_in  which convolution of a bottleneck halves the image: the first "1x1" (the paper), or the "3x3" (common
               since; a sixteenth more multiply-adds in ResNet-50)
    Raises ArgumentError for anything else.
    """
    op = "imagenet_resnet"
    depth = checks.choice(op, "depth", checks.integer(op, "depth", depth, 1), tuple(UNITS))
    option = checks.choice(op, "shortcut", shortcut, ("A", "B", "C"))
    stride_in = checks.choice(op, "stride_in", stride_in, ("1x1", "3x3"))
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    filters, branch = BASIC, basic
    if depth >= 50:
        filters, branch = BOTTLENECK, functools.partial(bottleneck, stride_in=stride_in)
    return Sequential(
        Conv2d(3, 64, 7, stride=2, padding=3),
        BatchNorm2d(64),
        ReLU(),
        MaxPool2d(3, stride=2, padding=1),
        *stages(64, filters, UNITS[depth], branch, option),
        GlobalAvgPool2d(),
        Linear(filters[-1], num_classes),
    )


resnet18, resnet34, resnet50, resnet101, resnet152 = (functools.partial(imagenet_resnet, depth) for depth in UNITS)
