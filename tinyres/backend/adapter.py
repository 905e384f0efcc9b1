"""The adapter between the kernel table and an extension: one class for `cpu`, `emulated` and `cuda`.

A method makes its inputs dense (the one place where that happens), takes the output from the allocator and calls
the launcher of the same name. Contracts are in spec.py.
"""

import math

import numpy as np

from tinyres.backend import compose
from tinyres.backend import norm as norms
from tinyres.backend.norm import Gradient, Norm
from tinyres.backend.reference import output_size
from tinyres.dtypes import wide
from tinyres.errors import ArgumentError, fail
from tinyres.options import get as options

# what the methods of one kind have in common ---------------------------------------------------------------------


def _binary(op):
    def kernel(self, a, b):
        a, b = self._operand(a), self._operand(b)
        shape = a.shape if a.shape == b.shape else np.broadcast_shapes(a.shape, b.shape)
        y = self.empty(shape, a.dtype)
        self.extension.binary(op, y, a, b)
        return y

    return kernel


def _unary(op):
    def kernel(self, x):
        y = self.empty(x.shape, x.dtype)
        self.extension.unary(op, y, self.contiguous(x))
        return y

    return kernel


def _unary_backward(op):
    def kernel(self, dy, y):
        dx = self._like(y)
        self.extension.unary_backward(op, dx, self.contiguous(dy), self.contiguous(y))
        return dx

    return kernel


def _reduce(kernel):
    def reduce(self, x, axes, keepdims):
        rows = self._rows(x, axes)
        shape = list(x.shape)
        for axis in reversed(axes):
            shape[axis : axis + 1] = (1,) if keepdims else ()
        y = self.empty(tuple(shape), x.dtype)
        getattr(self.extension, kernel)(y, rows)
        return y

    return reduce


def _neighbours(axes, ndim):
    """An order of all axes in which `axes` lie side by side: as they are, or else those first."""
    if not axes or axes[-1] - axes[0] < len(axes):
        return range(ndim)
    return [*axes, *(i for i in range(ndim) if i not in axes)]


class Adapter:
    """The kernels of a device as methods.

    xp         the array module: NumPy or CuPy
    extension  tinyres._cpu, _emulated or _cuda
    empty      (shape, dtype) -> an uninitialised dense array
    overwrites  whether a gradient may be written over the one that it is worked out from
    graphs     how a CUDA device captures launches (cuda.py); None on the others
    """

    graphs = None

    def __init__(self, name, xp, extension, empty, overwrites=False):
        self.name, self.xp, self.extension, self.empty, self.overwrites = name, xp, extension, empty, overwrites
        self.array = xp.ndarray

    def contiguous(self, x):
        if x.flags.c_contiguous:
            return x
        y = self._like(x)
        self.extension.copy(y, x)
        return y

    def _like(self, x):
        return self.empty(x.shape, x.dtype)

    def _operand(self, a):
        """An operand of an elementwise op: a NumPy scalar array () becomes the device's."""
        if isinstance(a, self.array):
            return a
        y = self.empty((), a.dtype)
        self.extension.fill(y, float(a))
        return y

    # elementwise ----------------------------------------------------------------------------------------------------

    add, sub, mul, div = _binary("add"), _binary("sub"), _binary("mul"), _binary("div")
    pow, maximum = _binary("pow"), _binary("maximum")
    neg, exp, log, sqrt = _unary("neg"), _unary("exp"), _unary("log"), _unary("sqrt")
    sigmoid, tanh, relu = _unary("sigmoid"), _unary("tanh"), _unary("relu")
    sqrt_backward, sigmoid_backward = _unary_backward("sqrt"), _unary_backward("sigmoid")
    tanh_backward, relu_backward = _unary_backward("tanh"), _unary_backward("relu")

    def _spread(self, a, shape):
        return self.contiguous(self.xp.broadcast_to(self._operand(a), shape))

    def pow_backward(self, dy, a, b, y):
        da, db = self._like(dy), self._like(dy)
        a, b, y = (self._spread(v, dy.shape) for v in (a, b, y))
        self.extension.pow_backward(da, db, self.contiguous(dy), a, b, y)
        return da, db

    def maximum_backward(self, dy, a, b):
        da, db = self._like(dy), self._like(dy)
        a, b = self._spread(a, dy.shape), self._spread(b, dy.shape)
        self.extension.maximum_backward(da, db, self.contiguous(dy), a, b)
        return da, db

    def accumulate(self, total, x):
        self.extension.binary("add", total, total, x)
        return total

    def add_relu(self, a, b):
        y = self._like(a)
        self.extension.add_relu(y, self.contiguous(a), self.contiguous(b))
        return y

    def dropout(self, x, p, key):
        y = self._like(x)
        self.extension.dropout(y, self.contiguous(x), p, *key)
        return y

    def cast(self, x, dtype):
        if x.dtype == dtype:
            return x
        y = self.empty(x.shape, dtype)
        self.extension.cast(y, self.contiguous(x))
        return y

    # shape ----------------------------------------------------------------------------------------------------------

    def broadcast_to(self, x, shape):
        y = self.empty(shape, x.dtype)
        if isinstance(x, self.array):
            self.extension.copy(y, x)
        else:
            self.extension.fill(y, float(x))
        return y

    def pad(self, x, widths, value):
        y = self.empty(tuple(n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)), x.dtype)
        self.extension.fill(y, value)
        inner = y[tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, widths, strict=True))]
        self.extension.copy(inner, x)
        return y

    def concatenate(self, arrays, axis):
        shape = list(arrays[0].shape)
        shape[axis] = 0
        for x in arrays:
            shape[axis] += x.shape[axis]
        y = self.empty(tuple(shape), arrays[0].dtype)
        begin = 0
        for x in arrays:
            end = begin + x.shape[axis]
            self.extension.copy(y[(slice(None),) * axis + (slice(begin, end),)], x)
            begin = end
        return y

    def scatter(self, dy, shape, index):
        dx = self.empty(shape, dy.dtype)
        self.extension.fill(dx, 0)
        self.extension.copy(dx[index], dy)
        return dx

    # reductions -----------------------------------------------------------------------------------------------------

    def _rows(self, x, axes):
        """x as dense (outer, n, inner) with n over `axes`."""
        first, end = (axes[0], axes[-1] + 1) if axes else (0, 0)
        if end - first != len(axes):
            x, first, end = x.transpose(_neighbours(axes, x.ndim)), 0, len(axes)
        sizes, prod = x.shape, math.prod
        return self.contiguous(x).reshape(prod(sizes[:first]), prod(sizes[first:end]), prod(sizes[end:]))

    sum, max = _reduce("sum"), _reduce("max")

    def max_backward(self, dy, x, y, axes):
        rows = self._rows(x, axes)
        order = _neighbours(axes, x.ndim)
        dx = self.empty(rows.shape, x.dtype)
        outputs = (rows.shape[0], rows.shape[2])
        dy, y = self.contiguous(dy).reshape(outputs), self.contiguous(y).reshape(outputs)
        self.extension.max_backward(dx, dy, rows, y)
        dx = dx.reshape([x.shape[i] for i in order])
        return self.contiguous(dx.transpose([order.index(i) for i in range(x.ndim)]))

    def sum_to(self, x, shape):
        if x.shape == shape:
            return x
        lead = x.ndim - len(shape)
        axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1)
        return self.sum(x, axes, True).reshape(shape) if axes else x

    # linear algebra -------------------------------------------------------------------------------------------------

    def matmul(self, a, b, transpose_a=False, transpose_b=False):
        if transpose_a:
            a = a.swapaxes(-1, -2)
        if transpose_b:
            b = b.swapaxes(-1, -2)
        if a.ndim == b.ndim == 2:
            y = self.empty((a.shape[0], b.shape[1]), a.dtype)
            self.extension.matmul(y, a, b)
            return y
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        y = self.empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
        rows = y.reshape(math.prod(batch), *y.shape[-2:])
        self.extension.matmul(rows, self._batched(a, batch), self._batched(b, batch))
        return y

    def _batched(self, a, batch):
        """`a` as (matrices, rows, columns) with its leading axes broadcast to `batch`: a view where one is possible."""
        if a.ndim == 2:
            return self.xp.broadcast_to(a, (math.prod(batch), *a.shape))
        return self.xp.broadcast_to(a, (*batch, *a.shape[-2:])).reshape(math.prod(batch), *a.shape[-2:])

    # convolution ----------------------------------------------------------------------------------------------------

    def _algorithm(self, dtype):
        known, chosen = self.extension.conv_algorithms, options().conv
        if chosen == "auto" and dtype == np.float32 and options().precision == "tf32" and "mma" in known:
            return "direct"  # on tensor cores, which round float32; in bfloat16 they are the extension's own choice
        if chosen not in known:
            rule = f"on {self.name} the option conv is one of {', '.join(known)}"
            fail("conv2d", rule, ArgumentError, conv=chosen)
        return chosen

    def _conv2d_output(self, x, w, stride, padding):
        return self.empty((x.shape[0], *output_size(x.shape, w.shape[:2], stride, padding), w.shape[3]), x.dtype)

    def conv2d_forward(self, x, w, stride, padding):
        algorithm = self._algorithm(x.dtype)
        y = self._conv2d_output(x, w, stride, padding)
        self.extension.conv2d_forward(y, self.contiguous(x), self.contiguous(w), stride, padding, algorithm)
        return y

    def conv2d_bias_forward(self, x, w, b, residual, relu, stride, padding):
        algorithm = self._algorithm(x.dtype)
        y = self._conv2d_output(x, w, stride, padding)
        x, w, b = self.contiguous(x), self.contiguous(w), self.contiguous(b)
        residual = residual if residual is None else self.contiguous(residual)
        self.extension.conv2d_bias_forward(y, x, w, b, residual, relu, stride, padding, algorithm)
        return y

    def conv2d_backward_input(self, dy, w, x_shape, stride, padding, total=None):
        algorithm, add = self._algorithm(dy.dtype), total is not None
        dx = total if add else self.empty(x_shape, dy.dtype)
        dy, w = self.contiguous(dy), self.contiguous(w)
        self.extension.conv2d_backward_input(dx, dy, w, stride, padding, algorithm, add)
        return dx

    def conv2d_backward_weight(self, dy, x, w_shape, stride, padding):
        algorithm = self._algorithm(dy.dtype)
        dw = self.empty(w_shape, wide(dy.dtype))
        self.extension.conv2d_backward_weight(dw, self.contiguous(dy), self.contiguous(x), stride, padding, algorithm)
        return dw

    conv2d_backward = compose.conv2d_backward  # one kernel for both would save a reading of dy, and next to no time

    # residual blocks: batch norm in the convolutions around it, where conv3x3.cu has them ---------------------------

    def _conv3x3_rows(self, x, w_shape, stride, padding, backward=False):
        """The rows of sums that a fused kernel leaves of its result; 0 where it may not, or cannot, take its place."""
        rounds = x.dtype == np.float32 and options().precision != "tf32"
        if rounds or options().conv != "auto" or not getattr(self.extension, "conv3x3_rows", None):
            return 0
        if w_shape[:2] != (3, 3) or padding != (1, 1) or stride[0] != stride[1]:
            return 0
        return self.extension.conv3x3_rows(x.dtype, x.shape, w_shape[3], stride[0], backward)

    def _packed(self, x):
        """x, dense and where its elements can be moved 16 bytes at once."""
        x = self.contiguous(x)
        address = x.__array_interface__["data"][0] if self.xp is np else x.data.ptr
        if address % 16 == 0:
            return x
        y = self._like(x)
        self.extension.copy(y, x)
        return y

    def _batch_norm(self, norm):
        """A Norm as kernels take it: the first of them works out the statistics from the rows."""
        rows, running_mean, running_var = norm.rows, norm.running_mean, norm.running_var
        if norm.mean is None:
            norm.mean, norm.inv_std = self._like(norm.gamma), self._like(norm.gamma)
        else:
            rows = running_mean = running_var = None
        gamma, beta = self.contiguous(norm.gamma), self.contiguous(norm.beta)
        return gamma, beta, rows, norm.mean, norm.inv_std, running_mean, running_var, norm.momentum, norm.eps

    def _input(self, x):
        """What a convolution loads, and the batch norm that it applies to that, or None."""
        if isinstance(x, Norm) and x.activation is None and x.rows is not None:
            return x.x, self._batch_norm(x)
        return self._packed(norms.activation(self, x)), None

    def _gradient(self, gradient):
        """A gradient likewise: dz and what makes dx of it, or dx and None."""
        if not isinstance(gradient, Gradient) or gradient.dx is not None or gradient.rows is None:
            return self._packed(norms.by_output(self, gradient)), None
        norm, rows = gradient.norm, gradient.rows
        if gradient.dgamma is None:
            gradient.dgamma, gradient.dbeta = self._like(norm.gamma), self._like(norm.gamma)
        else:
            rows = None
        gamma = self.contiguous(norm.gamma)
        return gradient.dz, (norm.x, gamma, norm.mean, norm.inv_std, rows, gradient.dgamma, gradient.dbeta)

    def _whole_packs(self, x, before):
        """Whether option A moves whole packs of 16 bytes."""
        return not (before * x.itemsize % 16 or x.shape[3] * x.itemsize % 16)

    def normed_conv2d_forward(self, x, w, stride, padding):
        source = norms.raw(x)
        count = self._conv3x3_rows(source, w.shape, stride, padding)
        if not count:
            return compose.normed_conv2d_forward(self, x, w, stride, padding)
        y = self._conv2d_output(source, w, stride, padding)
        rows = self.empty((count * (2 * w.shape[3] + 1),), wide(y.dtype))
        x, norm = self._input(x)
        self.extension.conv3x3_forward(y, rows, x, self._packed(w), norm, stride[0])
        return y, rows

    def normed_conv2d_backward_input(self, gradient, w, x, stride, padding, around=None):
        source = norms.raw(x)
        count = self._conv3x3_rows(source, w.shape, stride, padding, True)
        if not count:
            return compose.normed_conv2d_backward_input(self, gradient, w, x, stride, padding, around)
        if around:
            dy, *place = around
            if not self._whole_packs(dy, place[1]):
                dy, place = norms.shortcut_backward(self, dy, *place, source.shape), (1, 0)
            around = self._packed(dy), *place
        dx, (dz, made) = self._like(source), self._gradient(gradient)
        rows = output = mask = None
        if isinstance(x, Norm) and x.rows is not None:
            rows = self.empty((count * 2 * source.shape[3],), wide(dx.dtype))
            output, mask = x.activation, (x.x, self.contiguous(x.gamma), self.contiguous(x.beta), x.mean, x.inv_std)
        arguments = dx, rows, dz, self._packed(w), made, around, output, mask, stride[0]
        self.extension.conv3x3_backward_input(*arguments)
        if rows is not None:
            return Gradient(x, dx, rows)
        return compose.block_output_backward(self, dx, x, overwrite=True) if isinstance(x, Norm) else dx

    def normed_conv2d_backward_weight(self, gradient, x, w_shape, stride, padding, parts=False):
        source = norms.raw(x)
        if not self._conv3x3_rows(source, w_shape, stride, padding, True):
            return compose.normed_conv2d_backward_weight(self, gradient, x, w_shape, stride, padding, parts)
        (dz, made), (x, norm) = self._gradient(gradient), self._input(x)
        shape = w_shape
        if parts:
            shape = self.extension.conv3x3_slabs(dz.dtype, x.shape, w_shape[3], stride[0]), *w_shape
        dw = self.empty(shape, wide(dz.dtype))
        whole, slabs = (None, dw) if parts else (dw, None)
        self.extension.conv3x3_backward_weight(whole, slabs, dz, x, made, norm, stride[0])
        return dw

    def block_output(self, norm, shortcut=None, stride=1, before=0):
        if norm.rows is None:
            return compose.block_output(self, norm, shortcut, stride, before)
        norm.joined, shortcut_norm = shortcut is not None, None
        if isinstance(shortcut, Norm):
            if shortcut.rows is None:
                shortcut = shortcut.normalise(self)
            else:
                shortcut, shortcut_norm = shortcut.x, self._batch_norm(shortcut)
        elif norm.joined and not self._whole_packs(shortcut, before):
            shortcut, stride, before = norms.shortcut(self, shortcut, stride, before, norm.x.shape[3]), 1, 0
        y = self._like(norm.x)
        around = (self._packed(shortcut), stride, before) if norm.joined else None
        self.extension.block_output(y, norm.x, self._batch_norm(norm), around, shortcut_norm)
        norm.activation = y
        return y

    def block_output_backward(self, dy, norm, overwrite=False):
        if norm.rows is None:
            return compose.block_output_backward(self, dy, norm, overwrite)
        dz, x = self._like(norm.x), norm.x
        count = self.extension.block_output_rows(x.dtype, x.size // x.shape[3], x.shape[3])
        rows = self.empty((count * 2 * x.shape[3],), wide(x.dtype))
        self.extension.block_output_backward(dz, rows, self._packed(dy), norm.activation, x, norm.mean)
        return Gradient(norm, dz, rows)

    # batch norm: plain, +ReLU and +add+ReLU are one kernel with two switches ----------------------------------------

    def _batch_norm_forward(self, x, residual, relu, gamma, beta, running_mean, running_var, momentum, eps):
        y, mean, inv_std = self._like(x), self._like(gamma), self._like(gamma)
        residual = residual if residual is None else self.contiguous(residual)
        self.extension.batch_norm_forward(
            y,
            mean,
            inv_std,
            running_mean,
            running_var,
            self.contiguous(x),
            self.contiguous(gamma),
            self.contiguous(beta),
            residual,
            relu,
            momentum,
            eps,
        )
        return y, mean, inv_std

    def batch_norm_forward(self, x, *args):
        return self._batch_norm_forward(x, None, False, *args)

    def batch_norm_relu_forward(self, x, *args):
        return self._batch_norm_forward(x, None, True, *args)

    def batch_norm_add_relu_forward(self, x, residual, *args):
        return self._batch_norm_forward(x, residual, True, *args)

    def _over(self, dy, overwrite):
        """Where the next gradient goes: over dy if that is allowed, for a cache holds it already; else a new array.

        Not with a number of channels that leaves a rest, whose vector overlaps the one before and is computed twice.
        """
        return dy if overwrite and self.overwrites and dy.shape[-1] % 16 == 0 else self._like(dy)

    def _batch_norm_backward(self, dx, dresidual, dy, x, y, gamma, beta, mean, inv_std):
        dgamma, dbeta = self._like(gamma), self._like(gamma)
        x, gamma = self.contiguous(x), self.contiguous(gamma)
        self.extension.batch_norm_backward(dx, dresidual, dgamma, dbeta, dy, x, y, gamma, beta, mean, inv_std)
        return dgamma, dbeta

    def batch_norm_backward(self, dy, x, gamma, mean, inv_std, overwrite=False):
        dy = self.contiguous(dy)
        dx = self._over(dy, overwrite)
        return dx, *self._batch_norm_backward(dx, None, dy, x, None, gamma, None, mean, inv_std)

    def batch_norm_relu_backward(self, dy, x, gamma, beta, mean, inv_std, overwrite=False):
        dy = self.contiguous(dy)
        dx = self._over(dy, overwrite)
        return dx, *self._batch_norm_backward(dx, None, dy, x, None, gamma, self.contiguous(beta), mean, inv_std)

    def batch_norm_add_relu_backward(self, dy, x, y, gamma, mean, inv_std, overwrite=False):
        dy = self.contiguous(dy)
        dx, dresidual = self._like(x), self._over(dy, overwrite)
        return dx, dresidual, *self._batch_norm_backward(dx, dresidual, dy, x, y, gamma, None, mean, inv_std)

    def _batch_norm_inference(self, x, residual, relu, gamma, beta, mean, var, eps):
        y = self._like(x)
        residual = residual if residual is None else self.contiguous(residual)
        gamma, beta, mean, var = (self.contiguous(v) for v in (gamma, beta, mean, var))
        self.extension.batch_norm_inference(y, self.contiguous(x), gamma, beta, mean, var, residual, relu, eps)
        return y

    def batch_norm_inference(self, x, *args):
        return self._batch_norm_inference(x, None, False, *args)

    def batch_norm_relu_inference(self, x, *args):
        return self._batch_norm_inference(x, None, True, *args)

    def batch_norm_add_relu_inference(self, x, residual, *args):
        return self._batch_norm_inference(x, residual, True, *args)

    def batch_norm_inference_backward(self, dy, x, gamma, mean, var, eps):
        dx, dgamma, dbeta = self._like(x), self._like(gamma), self._like(gamma)
        dy, x, gamma, mean, var = (self.contiguous(v) for v in (dy, x, gamma, mean, var))
        self.extension.batch_norm_inference_backward(dx, dgamma, dbeta, dy, x, gamma, mean, var, eps)
        return dx, dgamma, dbeta

    # pooling --------------------------------------------------------------------------------------------------------

    def max_pool2d_forward(self, x, window, stride, padding):
        shape = (x.shape[0], *output_size(x.shape, window, stride, padding), x.shape[3])
        y, argmax = self.empty(shape, x.dtype), self.empty(shape, np.int32)
        self.extension.max_pool2d_forward(y, argmax, self.contiguous(x), window, stride, padding)
        return y, argmax

    def max_pool2d_backward(self, dy, argmax, x_shape, window, stride, padding):
        dx = self.empty(x_shape, dy.dtype)
        self.extension.max_pool2d_backward(dx, self.contiguous(dy), argmax, window, stride, padding)
        return dx

    def avg_pool2d_forward(self, x, window, stride, padding):
        y = self.empty((x.shape[0], *output_size(x.shape, window, stride, padding), x.shape[3]), x.dtype)
        self.extension.avg_pool2d_forward(y, self.contiguous(x), window, stride, padding)
        return y

    def avg_pool2d_backward(self, dy, x_shape, window, stride, padding):
        dx = self.empty(x_shape, dy.dtype)
        self.extension.avg_pool2d_backward(dx, self.contiguous(dy), window, stride, padding)
        return dx

    def global_avg_pool2d_forward(self, x):
        y = self.empty((x.shape[0], x.shape[3]), x.dtype)
        self.extension.global_avg_pool2d_forward(y, self.contiguous(x))
        return y

    def global_avg_pool2d_backward(self, dy, x_shape):
        dx = self.empty(x_shape, dy.dtype)
        self.extension.global_avg_pool2d_backward(dx, self.contiguous(dy))
        return dx

    # loss and training ----------------------------------------------------------------------------------------------

    def cross_entropy(self, logits, labels, smoothing):
        loss, dlogits = self.empty((), wide(logits.dtype)), self._like(logits)
        labels = self.xp.ascontiguousarray(labels)
        self.extension.cross_entropy(loss, dlogits, self.contiguous(logits), labels, smoothing)
        return loss, dlogits

    def _classifier(self, dx, dw, db, x, w, b, labels, smoothing, metrics):
        loss = self.empty((), wide(x.dtype))
        if metrics is None:
            metrics = self.empty((4,), np.float64)
            self.extension.fill(metrics, 0)
        x, w, b = self.contiguous(x), self.contiguous(w), self.contiguous(b)
        labels = self.xp.ascontiguousarray(labels)
        self.extension.classifier(loss, dx, dw, db, metrics, x, w, b, labels, smoothing)
        return loss

    def classifier(self, x, w, b, labels, smoothing, metrics=None, parts=False):
        if not hasattr(self.extension, "classifier"):
            return compose.classifier(self, x, w, b, labels, smoothing, metrics, parts)
        lead = (self.extension.classifier_parts(len(x), *w.shape),) if parts else ()
        dx, (dw, db) = self._like(x), (self.empty((*lead, *a.shape), wide(x.dtype)) for a in (w, b))
        return self._classifier(dx, dw, db, x, w, b, labels, smoothing, metrics), dx, dw, db

    def classifier_inference(self, x, w, b, labels, smoothing, metrics=None):
        if not hasattr(self.extension, "classifier"):
            return compose.classifier_inference(self, x, w, b, labels, smoothing, metrics)
        return self._classifier(None, None, None, x, w, b, labels, smoothing, metrics)

    def sgd(self, weights, velocities, gradients, decays, lr, momentum, nesterov, copies=None):
        self.extension.sgd(weights, velocities, gradients, decays, lr, momentum, nesterov, copies)

    def augment(self, images, index, top, left, flip, mean, scale):
        x = self.empty((len(index), *images.shape[1:]), np.float32)
        self.extension.augment(x, images, index, top, left, flip, mean, scale)
        return x

    def augment_step(
        self, images, labels, order, counter, mean, scale, key, batch_size, steps_per_epoch, n, dtype, padding
    ):
        x, batch_labels = self.empty((n, *images.shape[1:]), dtype), self.empty((n,), np.int64)
        arrays = images, labels, order, counter, mean, scale
        self.extension.augment_step(x, batch_labels, *arrays, key, batch_size, steps_per_epoch, padding)
        return x, batch_labels
