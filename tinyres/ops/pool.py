"""Pooling over windows of NHWC images."""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.errors import ArgumentError, expect
from tinyres.ops import checks
from tinyres.ops.checks import Pair


class MaxPool2d(Function):
    fresh_gradients = True

    def forward(self, x, window, stride, padding):
        y, argmax = self.kernels.max_pool2d_forward(x, window, stride, padding)
        self.saved = argmax, x.shape, window, stride, padding
        return y

    def backward(self, dy):
        return self.kernels.max_pool2d_backward(dy, *self.saved)


class AvgPool2d(Function):
    fresh_gradients = True

    def forward(self, x, window, stride, padding):
        self.saved = x.shape, window, stride, padding
        return self.kernels.avg_pool2d_forward(x, window, stride, padding)

    def backward(self, dy):
        return self.kernels.avg_pool2d_backward(dy, *self.saved)


class GlobalAvgPool2d(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = x.shape
        return self.kernels.global_avg_pool2d_forward(x)

    def backward(self, dy):
        return self.kernels.global_avg_pool2d_backward(dy, self.saved)


def max_pool2d(x: Tensor, window: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The largest value in each window; the first of equals takes the gradient, and padding never wins.

    x        (N, H, W, C)
    window, stride, padding  an integer or a pair (height, width); stride None is the window; padding is at most half
             the window
    Returns (N, (H + 2 padding - window) // stride + 1, ..., C). Raises ShapeError or ArgumentError otherwise.
    """
    return MaxPool2d.apply(x, **_check("max_pool2d", x, window, stride, padding))


def avg_pool2d(x: Tensor, window: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The mean of each window, padding counted as zeros. Arguments, result and errors as `max_pool2d`."""
    return AvgPool2d.apply(x, **_check("avg_pool2d", x, window, stride, padding))


def global_avg_pool2d(x: Tensor) -> Tensor:
    """The mean over the whole image: (N, H, W, C) becomes (N, C). Raises ShapeError for another rank."""
    checks.operands("global_avg_pool2d", x=x)
    checks.rank("global_avg_pool2d", "x", x, "NHWC")
    return GlobalAvgPool2d.apply(x)


def _check(op, x, window, stride, padding):
    checks.operands(op, x=x)
    checks.rank(op, "x", x, "NHWC")
    window = checks.pair(op, "window", window, 1)
    stride = window if stride is None else checks.pair(op, "stride", stride, 1)
    padding = checks.pair(op, "padding", padding, 0)
    expect(
        all(2 * p <= n for p, n in zip(padding, window, strict=True)),
        op,
        "padding must be at most half the window",
        ArgumentError,
        padding=padding,
        window=window,
    )
    expect(window[0] * window[1] <= 2**24, op, "the window must have at most 2**24 elements", window=window)
    checks.fits(op, x.shape, window, stride, padding)
    return {"window": window, "stride": stride, "padding": padding}
