"""The papers' networks."""

from tinyres.models.cifar import cifar_resnet

__all__ = ["cifar_resnet"]
