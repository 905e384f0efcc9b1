"""VGG-16 and VGG-19 (Simonyan and Zisserman 2014, Table 1, D and E), which He et al. 2015 compare with."""

from __future__ import annotations

import functools

from tinyres.errors import ArgumentError, expect
from tinyres.nn import Conv2d, Dropout, Flatten, Linear, MaxPool2d, Module, ReLU, Sequential
from tinyres.ops import checks

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # 3x3, of each stage


def vgg(depth: int, num_classes: int = 1000, *, image_size: int = 224, filters: int = 64) -> Sequential:
    """The network of `depth` layers with biases for (N, image_size, image_size, 3) images; logits (N, num_classes).

    depth       16 or 19
    image_size  a multiple of 32
    filters     of the first stage, 64 in the paper; the two hidden layers have 64 times as many units
    Raises ArgumentError or DtypeError for anything else.
    """
    op = "vgg"
    depth = checks.choice(op, "depth", checks.integer(op, "depth", depth, 1), tuple(CONVOLUTIONS))
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    image_size = checks.integer(op, "image_size", image_size, 1)
    expect(image_size % 32 == 0, op, "image_size must be a multiple of 32", ArgumentError, image_size=image_size)
    filters = checks.integer(op, "filters", filters, 1)
    layers: list[Module] = []
    channels = 3
    for stage, count in enumerate(CONVOLUTIONS[depth]):
        width = filters * min(2**stage, 8)
        for _ in range(count):
            layers += [Conv2d(channels, width, 3, padding=1, bias=True), ReLU()]
            channels = width
        layers.append(MaxPool2d(2))
    hidden = 64 * filters
    return Sequential(
        *layers,
        Flatten(),
        Linear(channels * (image_size // 32) ** 2, hidden),
        ReLU(),
        Dropout(),
        Linear(hidden, hidden),
        ReLU(),
        Dropout(),
        Linear(hidden, num_classes),
    )


vgg16, vgg19 = (functools.partial(vgg, depth) for depth in CONVOLUTIONS)
