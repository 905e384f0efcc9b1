"""The papers' networks."""

from tinyres.models.cifar import cifar_resnet
from tinyres.models.imagenet import imagenet_resnet, resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = ["cifar_resnet", "imagenet_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
