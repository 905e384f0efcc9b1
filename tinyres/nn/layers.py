"""The layers: each holds its parameters and calls one op. Parameters are float32 on the default device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyres import backend, ops
from tinyres.autograd import Tensor
from tinyres.backend import Array
from tinyres.nn import init
from tinyres.nn.module import Module, Parameter
from tinyres.ops import checks
from tinyres.ops.checks import Pair


class Conv2d(Module):
    """2-D convolution of (N, H, W, in) with `out` windows (`ops.conv2d`); He initialisation, no bias unless asked.

    weight  (R, S, in, out)
    bias    (out,), zeros, where `bias`
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        in_channels = checks.integer("Conv2d", "in_channels", in_channels, 1)
        out_channels = checks.integer("Conv2d", "out_channels", out_channels, 1)
        self.window = checks.pair("Conv2d", "window", window, 1)
        self.stride, self.padding = (
            checks.pair("Conv2d", "stride", stride, 1),
            checks.pair("Conv2d", "padding", padding, 0),
        )
        shape = (*self.window, in_channels, out_channels)
        self.weight = Parameter(init.he_normal(shape, fan_in=shape[0] * shape[1] * shape[2]))
        self.bias = Parameter(np.zeros(out_channels, np.float32)) if checks.flag("Conv2d", "bias", bias) else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        R, S, C, K = self.weight.shape
        bias = "" if self.bias is None else ", bias=True"
        return f"{C}, {K}, window={R}x{S}, stride={self.stride}, padding={self.padding}{bias}"


class Linear(Module):
    """x @ weight + bias on (N, in); He initialisation.

    weight  (in, out)
    bias    (out,), zeros, unless `bias` is False
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        shape = (
            checks.integer("Linear", "in_features", in_features, 1),
            checks.integer("Linear", "out_features", out_features, 1),
        )
        self.weight = Parameter(init.he_normal(shape, fan_in=shape[0]))
        self.bias = Parameter(np.zeros(shape[1], np.float32)) if checks.flag("Linear", "bias", bias) else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}{'' if self.bias is not None else ', bias=False'}"


class BatchNorm2d(Module):
    """Batch normalisation of each channel of (N, H, W, C) (`ops.batch_norm`).

    gamma, beta                (C,), ones and zeros
    running_mean, running_var  buffers (C,): zeros and ones, updated in training, used in evaluation
    group                      None, or in training so many images at a time are normalised by themselves, as where
                               each of several GPUs gets so many of a batch
    """

    gamma: Parameter
    beta: Parameter
    running_mean: Array
    running_var: Array
    group: int | None

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5, group: int | None = None) -> None:
        super().__init__()
        self.group = group if group is None else checks.integer("BatchNorm2d", "group", group, 1)
        channels = checks.integer("BatchNorm2d", "channels", channels, 1)
        self.momentum = checks.fraction("BatchNorm2d", "momentum", momentum, one=True)
        self.eps = checks.epsilon("BatchNorm2d", eps)
        self.gamma = Parameter(np.ones(channels, np.float32))
        self.beta = Parameter(np.zeros(channels, np.float32))
        device = backend.get()
        self.register_buffer("running_mean", device.asarray(np.zeros(channels, np.float32)))
        self.register_buffer("running_var", device.asarray(np.ones(channels, np.float32)))

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(ops.batch_norm, x)

    def _normalise(self, op: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if self.running_mean.dtype != self.gamma.dtype:  # the parameters were assigned in another dtype
            self.running_mean = self.running_mean.astype(self.gamma.dtype)
            self.running_var = self.running_var.astype(self.gamma.dtype)
        statistics = self.running_mean, self.running_var
        parameters = self.gamma, self.beta, *statistics, self.training, self.momentum, self.eps
        group = self.group
        if group is None or not self.training:
            return op(*inputs, *parameters)
        checks.operands("BatchNorm2d", x=inputs[0])
        images = len(inputs[0])
        if images <= group:
            return op(*inputs, *parameters)
        parts = [slice(begin, begin + group) for begin in range(0, images, group)]
        return ops.concatenate([op(*[x[part] for x in inputs], *parameters) for part in parts])

    def extra_repr(self) -> str:
        return f"{self.gamma.shape[0]}, momentum={self.momentum}, eps={self.eps}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu(x)


class Identity(Module):
    """x itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MaxPool2d(Module):
    """The largest value in each window (`ops.max_pool2d`)."""

    op = staticmethod(ops.max_pool2d)

    def __init__(self, window: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        super().__init__()
        name = type(self).__name__
        self.window = checks.pair(name, "window", window, 1)
        self.stride = self.window if stride is None else checks.pair(name, "stride", stride, 1)
        self.padding = checks.pair(name, "padding", padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.window, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"window={self.window}, stride={self.stride}, padding={self.padding}"


class AvgPool2d(MaxPool2d):
    """The mean of each window (`ops.avg_pool2d`)."""

    op = staticmethod(ops.avg_pool2d)


class GlobalAvgPool2d(Module):
    """The mean over the image: (N, H, W, C) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.global_avg_pool2d(x)


class Flatten(Module):
    """(N, ...) to (N, product of the rest)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.flatten(x)


class Dropout(Module):
    """In training, zeroes elements with probability p and scales the rest (`ops.dropout`)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = checks.fraction("Dropout", "p", p)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
