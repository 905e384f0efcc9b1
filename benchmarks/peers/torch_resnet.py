"""The networks of the 2015 paper in plain PyTorch, for CIFAR (section 4.2) and ImageNet (Table 1), and the copy of
tinyres weights into them.

They are written as PyTorch users write them: modules, in-place ReLU and addition, no tricks. Call
`.to(memory_format=torch.channels_last)` on one for the layout in which PyTorch is fastest.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and, unless `plain`, the shortcut around them.

    shortcut: A copies and fills new channels with zeros, B projects where the shape changes, C projects always.
    """

    def __init__(self, channels, filters, stride, shortcut, plain=False):
        super().__init__()
        self.make_residual(channels, filters, stride)
        self.plain, self.stride, self.new_channels = plain, stride, filters - channels
        changes = stride != 1 or channels != filters
        self.projection = None
        if not plain and (shortcut == "C" or (shortcut == "B" and changes)):
            self.projection = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def make_residual(self, channels, filters, stride):
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)

    def residual(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(y))

    def forward(self, x):
        y = self.residual(x)
        if self.plain:
            return F.relu(y, inplace=True)
        if self.projection is not None:
            x = self.projection(x)
        elif self.stride != 1 or self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        y += x
        return F.relu(y, inplace=True)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, the first two with a quarter of the filters; the first one takes the stride."""

    def make_residual(self, channels, filters, stride):
        inner = filters // 4
        self.conv1 = nn.Conv2d(channels, inner, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, filters, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(filters)

    def residual(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return self.bn3(self.conv3(y))


class ResNet(nn.Module):
    """A stem, blocks, pooling, a linear layer; every stage but the first begins with stride 2."""

    def __init__(self, stem, channels, block, stages, shortcut, plain, num_classes):
        super().__init__()
        self.stem = stem
        blocks = []
        for stage, (filters, count) in enumerate(stages):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, filters, stride, shortcut, plain))
                channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.linear(x.mean((2, 3)))


class CifarResNet(ResNet):
    """depth = 6n + 2: a 3x3 stem, three stages of n blocks with 16, 32, 64 filters."""

    def __init__(self, depth, shortcut="A", plain=False, num_classes=10):
        n, rest = divmod(depth - 2, 6)
        if n < 1 or rest:
            raise ValueError(f"depth must be 6n + 2, got {depth}")
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        super().__init__(stem, 16, Block, [(16, n), (32, n), (64, n)], shortcut, plain, num_classes)


COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ImageNetResNet(ResNet):
    """depth 18 or 34 with blocks of 64 to 512 filters, 50, 101 or 152 with bottlenecks of 256 to 2048."""

    def __init__(self, depth, shortcut="B", num_classes=1000):
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        first, block = (64, Block) if depth < 50 else (256, Bottleneck)
        stages = [(first << stage, count) for stage, count in enumerate(COUNTS[depth])]
        super().__init__(stem, 64, block, stages, shortcut, False, num_classes)


def load_tinyres(model, state):
    """Copy a tinyres `state_dict()` (name -> array) into the PyTorch model of the same shape.

    Layers are matched by their order, which both networks list from the input to the output, and their kind. Weights
    turn from RSCK to OIHW and from (in, out) to (out, in). Raises ValueError where the two do not fit.
    """
    layers = {}
    for name, array in state.items():
        layer, _, field = name.rpartition(".")
        layers.setdefault(layer, {})[field] = np.asarray(array)
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    if len(layers) != len(modules):
        raise ValueError(f"the state has {len(layers)} layers, the model {len(modules)}")
    with torch.no_grad():
        for (name, fields), module in zip(layers.items(), modules, strict=True):
            for target, array in _as_torch(module, fields).items():
                tensor = getattr(module, target)
                if tuple(tensor.shape) != array.shape:
                    raise ValueError(f"{name} {target}: {array.shape} does not fit {tuple(tensor.shape)}")
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
    return model


def _as_torch(module, fields):
    """The arrays of one layer under PyTorch's names and in its axis order."""
    if isinstance(module, nn.BatchNorm2d):
        return {
            "weight": fields["gamma"],
            "bias": fields["beta"],
            "running_mean": fields["running_mean"],
            "running_var": fields["running_var"],
        }
    axes = (3, 2, 0, 1) if isinstance(module, nn.Conv2d) else (1, 0)
    arrays = {"weight": fields["weight"].transpose(axes)}
    if module.bias is not None:
        arrays["bias"] = fields["bias"]
    return arrays


def gradients_as_tinyres(model):
    """The gradients of the model's parameters in tinyres's axis order, as a list from input to output layer.

    The order is that of tinyres's `parameters()`: weight then bias, gamma then beta.
    """
    arrays = []
    for parameter in model.parameters():
        gradient = parameter.grad.numpy()
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[gradient.ndim]
        arrays.append(gradient.transpose(axes))
    return arrays
