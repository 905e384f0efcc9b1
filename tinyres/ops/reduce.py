"""Reductions over axes: None is all of them, an int one, a tuple several."""

from __future__ import annotations

import math

import numpy as np

from tinyres.autograd import Axis, Function, Tensor
from tinyres.dtypes import is_bfloat16
from tinyres.errors import expect
from tinyres.ops import checks
from tinyres.ops.cast import cast


def _kept(shape, axes):
    """`shape` with the reduced axes kept as 1."""
    return tuple([1 if i in axes else n for i, n in enumerate(shape)])


class Sum(Function):
    fresh_gradients = True

    def forward(self, x, axes, keepdims):
        self.saved = x.shape, axes, keepdims
        return self.kernels.sum(x, axes, keepdims)

    def backward(self, dy):
        shape, axes, keepdims = self.saved
        return self.kernels.broadcast_to(dy if keepdims else dy.reshape(_kept(shape, axes)), shape)


class Mean(Function):
    fresh_gradients = True

    def forward(self, x, axes, keepdims):
        count = np.asarray(math.prod([x.shape[i] for i in axes]), x.dtype)
        self.saved = x.shape, axes, count
        return self.kernels.div(self.kernels.sum(x, axes, keepdims), count)

    def backward(self, dy):
        shape, axes, count = self.saved
        return self.kernels.broadcast_to(self.kernels.div(dy, count).reshape(_kept(shape, axes)), shape)


class Max(Function):
    fresh_gradients = True

    def forward(self, x, axes, keepdims):
        y = self.kernels.max(x, axes, True)
        self.saved = x, y, axes
        return y if keepdims else y.reshape(tuple([n for i, n in enumerate(x.shape) if i not in axes]))

    def backward(self, dy):
        x, y, axes = self.saved
        return self.kernels.max_backward(dy.reshape(y.shape), x, y, axes)


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over `axis`, accumulated in float64. Raises ShapeError for an axis that is not there."""
    checks.operands("sum", x=x)
    return Sum.apply(x, axes=checks.axes("sum", axis, x.ndim), keepdims=checks.flag("sum", "keepdims", keepdims))


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`. Raises ShapeError for an axis that is not there or is empty."""
    checks.operands("mean", x=x)
    axes = checks.axes("mean", axis, x.ndim)
    expect(all(x.shape[i] for i in axes), "mean", "the reduced axes must not be empty", x=x.shape, axes=axes)
    keepdims = checks.flag("mean", "keepdims", keepdims)
    if is_bfloat16(x.dtype):  # which cannot tell 257 elements from 256
        return cast(Mean.apply(cast(x, "float32"), axes=axes, keepdims=keepdims), "bfloat16")
    return Mean.apply(x, axes=axes, keepdims=keepdims)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The largest element over `axis`; ties share the gradient equally. Raises as `mean`."""
    checks.operands("max", x=x)
    axes = checks.axes("max", axis, x.ndim)
    expect(all(x.shape[i] for i in axes), "max", "the reduced axes must not be empty", x=x.shape, axes=axes)
    return Max.apply(x, axes=axes, keepdims=checks.flag("max", "keepdims", keepdims))
