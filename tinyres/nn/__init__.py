"""Layers and networks."""

from tinyres.nn import init
from tinyres.nn.fuse import fold_batch_norm, fuse
from tinyres.nn.fuse_blocks import FusedSequential
from tinyres.nn.fused import BatchNormAddReLU2d, BatchNormReLU2d, Conv2dAddReLU, Conv2dReLU, FusedResidual
from tinyres.nn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Identity,
    Linear,
    MaxPool2d,
    ReLU,
)
from tinyres.nn.module import Module, Parameter, Sequential
from tinyres.nn.residual import ConstantScale, Gate, Residual, ZeroPadShortcut, shortcut

__all__ = [
    "AvgPool2d", "BatchNorm2d", "BatchNormAddReLU2d", "BatchNormReLU2d", "ConstantScale", "Conv2d", "Conv2dAddReLU",
    "Conv2dReLU", "Dropout", "Flatten", "FusedResidual", "FusedSequential", "Gate", "GlobalAvgPool2d", "Identity",
    "Linear", "MaxPool2d", "Module", "Parameter", "ReLU", "Residual", "Sequential", "ZeroPadShortcut",
    "fold_batch_norm", "fuse", "init", "shortcut",
]  # fmt: skip
