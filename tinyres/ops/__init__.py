"""The operations on Tensors. Each checks its arguments once, then records a Function that calls kernels."""

# mypy: disable-error-code="method-assign, assignment"

from tinyres.autograd import Tensor
from tinyres.ops.batch_norm import batch_norm, batch_norm_add_relu, batch_norm_relu
from tinyres.ops.cast import cast
from tinyres.ops.conv2d import conv2d, conv2d_add_relu, conv2d_relu
from tinyres.ops.elementwise import (
    add,
    div,
    dropout,
    exp,
    log,
    maximum,
    mul,
    neg,
    pow,
    relu,
    sigmoid,
    sqrt,
    sub,
    tanh,
)
from tinyres.ops.head import classifier_loss
from tinyres.ops.linear import linear, matmul
from tinyres.ops.loss import cross_entropy
from tinyres.ops.pool import avg_pool2d, global_avg_pool2d, max_pool2d
from tinyres.ops.reduce import max, mean, sum
from tinyres.ops.residual import add_relu
from tinyres.ops.shape import concatenate, flatten, getitem, pad, reshape, transpose

__all__ = [
    "add", "add_relu", "avg_pool2d", "batch_norm", "batch_norm_add_relu", "batch_norm_relu", "cast", "classifier_loss",
    "concatenate", "conv2d", "conv2d_add_relu", "conv2d_relu", "cross_entropy", "div", "dropout", "exp", "flatten",
    "getitem", "global_avg_pool2d", "linear", "log", "matmul", "max", "max_pool2d", "maximum", "mean", "mul", "neg",
    "pad", "pow", "relu", "reshape", "sigmoid", "sqrt", "sub", "sum", "tanh", "transpose",
]  # fmt: skip


def _one_or_many(sizes):
    """x.reshape(2, 3) and x.reshape((2, 3)) are one."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, range)) else sizes


# Arithmetic and methods of Tensor, bound here because autograd.py knows no op; it declares them for type checkers.
Tensor.__add__ = add
Tensor.__radd__ = lambda self, other: add(other, self)
Tensor.__sub__ = sub
Tensor.__rsub__ = lambda self, other: sub(other, self)
Tensor.__mul__ = mul
Tensor.__rmul__ = lambda self, other: mul(other, self)
Tensor.__truediv__ = div
Tensor.__rtruediv__ = lambda self, other: div(other, self)
Tensor.__pow__ = pow
Tensor.__rpow__ = lambda self, other: pow(other, self)
Tensor.__matmul__ = matmul
Tensor.__rmatmul__ = lambda self, other: matmul(other, self)
Tensor.__neg__ = neg
Tensor.__getitem__ = getitem
Tensor.__iter__ = lambda self: (self[i] for i in range(len(self)))
Tensor.exp, Tensor.log, Tensor.sqrt = exp, log, sqrt
Tensor.sigmoid, Tensor.tanh, Tensor.relu = sigmoid, tanh, relu
Tensor.sum, Tensor.mean, Tensor.max = sum, mean, max
Tensor.reshape = lambda self, *shape: reshape(self, _one_or_many(shape))
Tensor.transpose = lambda self, *axes: transpose(self, _one_or_many(axes) if axes else None)
Tensor.flatten = flatten
Tensor.T = property(transpose)
