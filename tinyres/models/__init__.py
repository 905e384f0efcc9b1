"""The papers' networks."""

from tinyres.models.blocks import SKIPS, UNITS
from tinyres.models.catalogue import Entry, catalogue
from tinyres.models.cifar import BLOCKS, cifar_resnet
from tinyres.models.imagenet import (
    imagenet_resnet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnet200,
)
from tinyres.models.vgg import vgg, vgg16, vgg19

__all__ = [
    "BLOCKS", "Entry", "SKIPS", "UNITS", "catalogue", "cifar_resnet", "imagenet_resnet", "plain18", "plain34",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200", "vgg", "vgg16", "vgg19",
]  # fmt: skip
