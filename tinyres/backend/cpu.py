"""Device `cpu`: the kernel table over the C++ extension.

An adapter function makes its inputs dense (the one place where that happens), takes the output from the allocator
and calls the launcher of the same name. Maxima over axes are NumPy's. Contracts are in spec.py.
"""

import math

import numpy as np

from tinyres import _cpu
from tinyres.backend import reference
from tinyres.backend.memory import empty
from tinyres.backend.reference import output_size
from tinyres.options import get as options

_broadcast_to = np.broadcast_to


def contiguous(x):
    if x.flags.c_contiguous:
        return x
    y = empty(x.shape, x.dtype)
    _cpu.copy(y, x)
    return y


# elementwise --------------------------------------------------------------------------------------------------


def _binary(op):
    def kernel(a, b):
        if a.shape != b.shape:
            shape = np.broadcast_shapes(a.shape, b.shape)
            a, b = _broadcast_to(a, shape), _broadcast_to(b, shape)
        y = empty(a.shape, a.dtype)
        _cpu.binary(op, y, a, b)
        return y

    return kernel


def _unary(op):
    def kernel(x):
        y = empty(x.shape, x.dtype)
        _cpu.unary(op, y, contiguous(x))
        return y

    return kernel


def _unary_backward(op):
    def kernel(dy, y):
        dx = empty(y.shape, y.dtype)
        _cpu.unary_backward(op, dx, contiguous(dy), contiguous(y))
        return dx

    return kernel


add, sub, mul, div = _binary("add"), _binary("sub"), _binary("mul"), _binary("div")
pow, maximum = _binary("pow"), _binary("maximum")
neg, exp, log, sqrt = _unary("neg"), _unary("exp"), _unary("log"), _unary("sqrt")
sigmoid, tanh, relu = _unary("sigmoid"), _unary("tanh"), _unary("relu")
sqrt_backward, sigmoid_backward = _unary_backward("sqrt"), _unary_backward("sigmoid")
tanh_backward, relu_backward = _unary_backward("tanh"), _unary_backward("relu")


def pow_backward(dy, a, b, y):
    da, db = empty(dy.shape, dy.dtype), empty(dy.shape, dy.dtype)
    a, b, y = (contiguous(_broadcast_to(v, dy.shape)) for v in (a, b, y))
    _cpu.pow_backward(da, db, contiguous(dy), a, b, y)
    return da, db


def maximum_backward(dy, a, b):
    da, db = empty(dy.shape, dy.dtype), empty(dy.shape, dy.dtype)
    a, b = (contiguous(_broadcast_to(v, dy.shape)) for v in (a, b))
    _cpu.maximum_backward(da, db, contiguous(dy), a, b)
    return da, db


def accumulate(total, x):
    _cpu.binary("add", total, total, x)
    return total


def add_relu(a, b):
    y = empty(a.shape, a.dtype)
    _cpu.add_relu(y, contiguous(a), contiguous(b))
    return y


def dropout(x, p, key):
    y = empty(x.shape, x.dtype)
    _cpu.dropout(y, contiguous(x), p, *key)
    return y


# shape --------------------------------------------------------------------------------------------------------


def broadcast_to(x, shape):
    y = empty(shape, x.dtype)
    _cpu.copy(y, _broadcast_to(x, shape))
    return y


def pad(x, widths, value):
    y = empty(tuple(n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)), x.dtype)
    _cpu.fill(y, value)
    inner = y[tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, widths, strict=True))]
    _cpu.copy(inner, x)
    return y


def concatenate(arrays, axis):
    shape = list(arrays[0].shape)
    shape[axis] = 0
    for x in arrays:
        shape[axis] += x.shape[axis]
    y = empty(tuple(shape), arrays[0].dtype)
    begin = 0
    for x in arrays:
        end = begin + x.shape[axis]
        _cpu.copy(y[(slice(None),) * axis + (slice(begin, end),)], x)
        begin = end
    return y


def scatter(dy, shape, index):
    dx = empty(shape, dy.dtype)
    _cpu.fill(dx, 0)
    _cpu.copy(dx[index], dy)
    return dx


# reductions ---------------------------------------------------------------------------------------------------


def sum(x, axes, keepdims):
    shape = x.shape
    first, end = (axes[0], axes[-1] + 1) if axes else (0, 0)
    kept = [n for i, n in enumerate(x.shape) if i not in axes]
    if end - first != len(axes):  # not neighbours: bring them to the front
        x, first, end = x.transpose(*axes, *(i for i in range(x.ndim) if i not in axes)), 0, len(axes)
    inner = math.prod(x.shape[end:])
    rows = contiguous(x).reshape(math.prod(x.shape[:first]), math.prod(x.shape[first:end]), inner)
    y = empty(tuple(kept), x.dtype)
    _cpu.sum(y.reshape(len(rows), inner), rows)
    return y.reshape([1 if i in axes else n for i, n in enumerate(shape)]) if keepdims else y


max, max_backward = reference.max, reference.max_backward  # off the path of a network's training: NumPy's will do


def sum_to(x, shape):
    lead = x.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1)
    return sum(x, axes, True).reshape(shape) if axes else x


# linear algebra -----------------------------------------------------------------------------------------------


def matmul(a, b, transpose_a=False, transpose_b=False):
    if transpose_a:
        a = a.swapaxes(-1, -2)
    if transpose_b:
        b = b.swapaxes(-1, -2)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
    _cpu.matmul(y.reshape(math.prod(batch), *y.shape[-2:]), _batched(a, batch), _batched(b, batch))
    return y


def _batched(a, batch):
    """`a` as (matrices, rows, columns) with its leading axes broadcast to `batch`: a view where one is possible."""
    if a.ndim == 2:
        return _broadcast_to(a, (math.prod(batch), *a.shape))
    return _broadcast_to(a, (*batch, *a.shape[-2:])).reshape(math.prod(batch), *a.shape[-2:])


# convolution --------------------------------------------------------------------------------------------------


def conv2d_forward(x, w, stride, padding):
    y = empty((x.shape[0], *output_size(x.shape, w.shape[:2], stride, padding), w.shape[3]), x.dtype)
    _cpu.conv2d_forward(y, contiguous(x), contiguous(w), stride, padding, options().conv)
    return y


def conv2d_backward_input(dy, w, x_shape, stride, padding):
    dx = empty(x_shape, dy.dtype)
    _cpu.conv2d_backward_input(dx, contiguous(dy), contiguous(w), stride, padding, options().conv)
    return dx


def conv2d_backward_weight(dy, x, w_shape, stride, padding):
    dw = empty(w_shape, dy.dtype)
    _cpu.conv2d_backward_weight(dw, contiguous(dy), contiguous(x), stride, padding, options().conv)
    return dw


# batch norm: plain, +ReLU and +add+ReLU are one kernel with two switches ---------------------------------------


def _batch_norm_forward(x, residual, relu, gamma, beta, running_mean, running_var, momentum, eps):
    y, mean, inv_std = empty(x.shape, x.dtype), empty(gamma.shape, x.dtype), empty(gamma.shape, x.dtype)
    residual = residual if residual is None else contiguous(residual)
    _cpu.batch_norm_forward(
        y,
        mean,
        inv_std,
        running_mean,
        running_var,
        contiguous(x),
        contiguous(gamma),
        contiguous(beta),
        residual,
        relu,
        momentum,
        eps,
    )
    return y, mean, inv_std


def batch_norm_forward(x, *args):
    return _batch_norm_forward(x, None, False, *args)


def batch_norm_relu_forward(x, *args):
    return _batch_norm_forward(x, None, True, *args)


def batch_norm_add_relu_forward(x, residual, *args):
    return _batch_norm_forward(x, residual, True, *args)


def _batch_norm_backward(dy, x, y, dresidual, gamma, mean, inv_std):
    dx, dgamma, dbeta = empty(x.shape, x.dtype), empty(gamma.shape, x.dtype), empty(gamma.shape, x.dtype)
    dy, x, gamma = contiguous(dy), contiguous(x), contiguous(gamma)
    _cpu.batch_norm_backward(dx, dresidual, dgamma, dbeta, dy, x, y, gamma, mean, inv_std)
    return dx, dgamma, dbeta


def batch_norm_backward(dy, x, gamma, mean, inv_std):
    return _batch_norm_backward(dy, x, None, None, gamma, mean, inv_std)


def batch_norm_relu_backward(dy, x, y, gamma, mean, inv_std):
    return _batch_norm_backward(dy, x, y, None, gamma, mean, inv_std)


def batch_norm_add_relu_backward(dy, x, y, gamma, mean, inv_std):
    dresidual = empty(x.shape, x.dtype)
    dx, dgamma, dbeta = _batch_norm_backward(dy, x, y, dresidual, gamma, mean, inv_std)
    return dx, dresidual, dgamma, dbeta


def _batch_norm_inference(x, residual, relu, gamma, beta, mean, var, eps):
    y = empty(x.shape, x.dtype)
    residual = residual if residual is None else contiguous(residual)
    gamma, beta, mean, var = contiguous(gamma), contiguous(beta), contiguous(mean), contiguous(var)
    _cpu.batch_norm_inference(y, contiguous(x), gamma, beta, mean, var, residual, relu, eps)
    return y


def batch_norm_inference(x, *args):
    return _batch_norm_inference(x, None, False, *args)


def batch_norm_relu_inference(x, *args):
    return _batch_norm_inference(x, None, True, *args)


def batch_norm_add_relu_inference(x, residual, *args):
    return _batch_norm_inference(x, residual, True, *args)


def batch_norm_inference_backward(dy, x, gamma, mean, var, eps):
    dx, dgamma, dbeta = empty(x.shape, x.dtype), empty(gamma.shape, x.dtype), empty(gamma.shape, x.dtype)
    dy, x, gamma, mean, var = (contiguous(v) for v in (dy, x, gamma, mean, var))
    _cpu.batch_norm_inference_backward(dx, dgamma, dbeta, dy, x, gamma, mean, var, eps)
    return dx, dgamma, dbeta


# pooling ------------------------------------------------------------------------------------------------------


def max_pool2d_forward(x, window, stride, padding):
    shape = (x.shape[0], *output_size(x.shape, window, stride, padding), x.shape[3])
    y, argmax = empty(shape, x.dtype), empty(shape, np.int32)
    _cpu.max_pool2d_forward(y, argmax, contiguous(x), window, stride, padding)
    return y, argmax


def max_pool2d_backward(dy, argmax, x_shape, window, stride, padding):
    dx = empty(x_shape, dy.dtype)
    _cpu.max_pool2d_backward(dx, contiguous(dy), argmax, window, stride, padding)
    return dx


def avg_pool2d_forward(x, window, stride, padding):
    y = empty((x.shape[0], *output_size(x.shape, window, stride, padding), x.shape[3]), x.dtype)
    _cpu.avg_pool2d_forward(y, contiguous(x), window, stride, padding)
    return y


def avg_pool2d_backward(dy, x_shape, window, stride, padding):
    dx = empty(x_shape, dy.dtype)
    _cpu.avg_pool2d_backward(dx, contiguous(dy), window, stride, padding)
    return dx


def global_avg_pool2d_forward(x):
    y = empty((x.shape[0], x.shape[3]), x.dtype)
    _cpu.global_avg_pool2d_forward(y, contiguous(x))
    return y


def global_avg_pool2d_backward(dy, x_shape):
    dx = empty(x_shape, dy.dtype)
    _cpu.global_avg_pool2d_backward(dx, contiguous(dy))
    return dx


# loss and training --------------------------------------------------------------------------------------------


def cross_entropy(logits, labels, smoothing):
    loss, dlogits = empty((), logits.dtype), empty(logits.shape, logits.dtype)
    _cpu.cross_entropy(loss, dlogits, contiguous(logits), np.ascontiguousarray(labels), smoothing)
    return loss, dlogits


sgd = _cpu.sgd


def augment(images, index, top, left, flip, mean, scale):
    x = empty((len(index), *images.shape[1:]), np.float32)
    _cpu.augment(x, images, index, top, left, flip, mean, scale)
    return x
