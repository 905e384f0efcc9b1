"""The ImageNet networks of both papers: a 7x7 convolution, four stages, a linear layer (2015, Table 1).

stage                conv2_x   conv3_x   conv4_x   conv5_x
output size          56 x 56   28 x 28   14 x 14   7 x 7      of 224 x 224 images
filters, basic       64        128       256       512        depths 18 and 34
filters, bottleneck  256       512       1024      2048       depths 50, 101, 152; 200 (2016, Table 5)
"""

from __future__ import annotations

import functools

from tinyres.models.blocks import basic, bottleneck, design, stages
from tinyres.nn import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Sequential
from tinyres.ops import checks

UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def imagenet_resnet(
    depth: int,
    shortcut: str = "B",
    stride_in: str = "1x1",
    num_classes: int = 1000,
    *,
    plain: bool = False,
    unit: str = "original",
    skip: str = "identity",
    scales: tuple[float, float] | None = None,
    gate_bias: float | None = None,
    dropout: float | None = None,
    filters: int = 64,
) -> Sequential:
    """The network of `depth` layers for (N, 224, 224, 3) images, or other sizes; logits (N, num_classes).

    depth      18, 34, 50, 101, 152 or 200
    shortcut   how dimensions are matched: "A", "B" or "C" (2015, section 3.3)
    stride_in  which convolution of a bottleneck halves the image: the first "1x1" (the paper), or the "3x3" (common
               since; a sixteenth more multiply-adds in ResNet-50)
    plain      the same layers without shortcuts
    unit, skip and what follows   as in `cifar_resnet`; filters 64 in the papers
    Raises ArgumentError or DtypeError for anything else, saying what is possible.
    """
    op = "imagenet_resnet"
    depth = checks.choice(op, "depth", checks.integer(op, "depth", depth, 1), tuple(UNITS))
    stride_in = checks.choice(op, "stride_in", stride_in, ("1x1", "3x3"))
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    filters = checks.integer(op, "filters", filters, 1)
    deep = depth >= 50
    convs = functools.partial(bottleneck, stride_in=stride_in) if deep else basic
    d = design(op, convs, shortcut, plain, unit, skip, scales=scales, gate_bias=gate_bias, dropout=dropout)
    width = 4 * filters if deep else filters
    return Sequential(
        Conv2d(3, filters, 7, stride=2, padding=3),
        BatchNorm2d(filters),
        ReLU(),
        MaxPool2d(3, stride=2, padding=1),
        *stages(filters, (width, 2 * width, 4 * width, 8 * width), UNITS[depth], d),
        GlobalAvgPool2d(),
        Linear(8 * width, num_classes),
    )


resnet18, resnet34, resnet50, resnet101, resnet152, resnet200 = (functools.partial(imagenet_resnet, n) for n in UNITS)
plain18, plain34 = (functools.partial(imagenet_resnet, depth, plain=True) for depth in (18, 34))
