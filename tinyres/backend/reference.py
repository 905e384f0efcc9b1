"""Every mandatory kernel in plain NumPy: what the others are checked against, and the place to read what a kernel
means. Contracts are in spec.py; the derivations of the gradients stand beside the C++ and CUDA kernels.

N batch, H W input size, C channels, K filters, R S window, P Q output size.
"""

import numpy as np

from tinyres.backend.random import philox, uniform

# elementwise --------------------------------------------------------------------------------------------------


def add(a, b):
    return np.asarray(a + b)


def sub(a, b):
    return np.asarray(a - b)


def mul(a, b):
    return np.asarray(a * b)


def div(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(a / b)


def pow(a, b):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(a**b)


def pow_backward(dy, a, b, y):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        da = np.where(b == 0, 0, dy * b * a ** (b - 1))
        db = np.where(a == 0, 0, dy * y * np.log(a))
    return da.astype(dy.dtype), db.astype(dy.dtype)


def maximum(a, b):
    return np.asarray(np.maximum(a, b))


def maximum_backward(dy, a, b):
    half = np.where(a == b, dy * dy.dtype.type(0.5), np.zeros((), dy.dtype))
    return np.where(a > b, dy, half), np.where(b > a, dy, half)


def accumulate(total, x):
    total += x
    return total


def neg(x):
    return np.asarray(-x)


def exp(x):
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(x))


def log(x):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(x))


def sqrt(x):
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(x))


def sqrt_backward(dy, y):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(dy / (2 * y))


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, e) / (1 + e), dtype=x.dtype)


def sigmoid_backward(dy, y):
    return np.asarray(dy * y * (1 - y))


def tanh(x):
    return np.asarray(np.tanh(x))


def tanh_backward(dy, y):
    return np.asarray(dy * (1 - y * y))


def relu(x):
    return np.asarray(np.maximum(x, 0))


def relu_backward(dy, y):
    return np.where(y > 0, dy, np.zeros((), dy.dtype))


def cast(x, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        return x if x.dtype == dtype else x.astype(dtype, order="C")


def dropout(x, p, key):
    stream, draw = key
    bits = philox(stream, draw, -(-x.size // 4)).reshape(-1)[: x.size]
    kept = ((bits >> np.uint32(8)) * 2.0**-24 >= p).reshape(x.shape)
    return np.where(kept, x * x.dtype.type(1 / (1 - p)), np.zeros((), x.dtype))


# shape --------------------------------------------------------------------------------------------------------


def contiguous(x):
    return np.ascontiguousarray(x).reshape(x.shape)  # ascontiguousarray alone makes a scalar one-dimensional


def broadcast_to(x, shape):
    return np.broadcast_to(x, shape).copy()


def sum_to(x, shape):
    lead = x.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1)
    return sum(x, axes, True).reshape(shape)


def pad(x, widths, value):
    return np.pad(x, widths, constant_values=value)


def concatenate(arrays, axis):
    return np.concatenate(arrays, axis)


def scatter(dy, shape, index):
    dx = np.zeros(shape, dy.dtype)
    dx[index] = dy
    return dx


# reductions ---------------------------------------------------------------------------------------------------


def sum(x, axes, keepdims):
    return np.asarray(np.sum(x, axes, np.float64, keepdims=keepdims), x.dtype)


def max(x, axes, keepdims):
    return np.asarray(np.max(x, axes, keepdims=keepdims))


def max_backward(dy, x, y, axes):
    ties = x == y
    with np.errstate(invalid="ignore"):  # no tie at all where the maximum is NaN
        return np.asarray(dy * ties / np.sum(ties, axes, keepdims=True), x.dtype)


# linear algebra -----------------------------------------------------------------------------------------------


def matmul(a, b, transpose_a=False, transpose_b=False):
    return np.matmul(a.swapaxes(-1, -2) if transpose_a else a, b.swapaxes(-1, -2) if transpose_b else b)


# convolution: one matrix product per tap (r, s) of the window --------------------------------------------------


def _taps(image, window, stride, output):
    """Yield (r, s, view of the padded image that tap (r, s) multiplies: (N, P, Q, C))."""
    (sh, sw), (P, Q) = stride, output
    for r in range(window[0]):
        for s in range(window[1]):
            yield r, s, image[:, r : r + sh * P : sh, s : s + sw * Q : sw][:, :P, :Q]


def _padded(x, padding, value=0):
    (ph, pw) = padding
    return np.pad(x, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=value)


def _inner(padded, shape, padding):
    (_, H, W, _), (ph, pw) = shape, padding
    return np.ascontiguousarray(padded[:, ph : ph + H, pw : pw + W])


def output_size(shape, window, stride, padding):
    _, H, W, _ = shape
    return (H + 2 * padding[0] - window[0]) // stride[0] + 1, (W + 2 * padding[1] - window[1]) // stride[1] + 1


def conv2d_forward(x, w, stride, padding):
    P, Q = output_size(x.shape, w.shape[:2], stride, padding)
    y = np.zeros((x.shape[0], P, Q, w.shape[3]), x.dtype)
    for r, s, view in _taps(_padded(x, padding), w.shape[:2], stride, (P, Q)):
        y += view @ w[r, s]
    return y


def conv2d_backward_input(dy, w, x_shape, stride, padding, total=None):
    N, H, W, C = x_shape
    dx = np.zeros((N, H + 2 * padding[0], W + 2 * padding[1], C), dy.dtype)
    for r, s, view in _taps(dx, w.shape[:2], stride, dy.shape[1:3]):
        view += dy @ w[r, s].T
    dx = _inner(dx, x_shape, padding)
    return dx if total is None else accumulate(total, dx)


def conv2d_backward_weight(dy, x, w_shape, stride, padding):
    dw = np.empty(w_shape, dy.dtype)
    for r, s, view in _taps(_padded(x, padding), w_shape[:2], stride, dy.shape[1:3]):
        dw[r, s] = np.tensordot(view, dy, axes=((0, 1, 2), (0, 1, 2)))
    return dw


# batch norm over the last axis ---------------------------------------------------------------------------------


def batch_norm_forward(x, gamma, beta, running_mean, running_var, momentum, eps):
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    mean, var = rows.mean(0), rows.var(0)
    if running_mean is not None:
        running_mean += momentum * (mean - running_mean)
        running_var += momentum * (var * (len(rows) / (len(rows) - 1)) - running_var)
    mean, inv_std = mean.astype(x.dtype), (1 / np.sqrt(var + eps)).astype(x.dtype)
    return gamma * (x - mean) * inv_std + beta, mean, inv_std


def batch_norm_backward(dy, x, gamma, mean, inv_std, overwrite=False):
    normalised = (x - mean) * inv_std
    dgamma, dbeta = sum_to(dy * normalised, gamma.shape), sum_to(dy, gamma.shape)
    count = x.size // x.shape[-1]
    return gamma * inv_std * (dy - dbeta / count - normalised * (dgamma / count)), dgamma, dbeta


def batch_norm_inference(x, gamma, beta, mean, var, eps):
    return gamma * (x - mean) * (1 / np.sqrt(var.astype(np.float64) + eps)).astype(x.dtype) + beta


def batch_norm_inference_backward(dy, x, gamma, mean, var, eps):
    inv_std = (1 / np.sqrt(var.astype(np.float64) + eps)).astype(x.dtype)
    return dy * gamma * inv_std, sum_to(dy * (x - mean) * inv_std, gamma.shape), sum_to(dy, gamma.shape)


# pooling ------------------------------------------------------------------------------------------------------


def max_pool2d_forward(x, window, stride, padding):
    P, Q = output_size(x.shape, window, stride, padding)
    padded = _padded(x, padding, -np.inf)
    stack = np.stack([view for _, _, view in _taps(padded, window, stride, (P, Q))])
    inside = _padded(np.ones(x.shape, bool), padding, False)
    first = np.stack([view for _, _, view in _taps(inside, window, stride, (P, Q))]).argmax(0)
    argmax = np.where(stack.max(0) == -np.inf, first, stack.argmax(0))  # padding never wins, not even a tie
    return np.take_along_axis(stack, argmax[None], 0)[0], argmax.astype(np.int32)


def max_pool2d_backward(dy, argmax, x_shape, window, stride, padding):
    N, H, W, C = x_shape
    dx = np.zeros((N, H + 2 * padding[0], W + 2 * padding[1], C), dy.dtype)
    for r, s, view in _taps(dx, window, stride, dy.shape[1:3]):
        view += np.where(argmax == r * window[1] + s, dy, np.zeros((), dy.dtype))
    return _inner(dx, x_shape, padding)


def avg_pool2d_forward(x, window, stride, padding):
    P, Q = output_size(x.shape, window, stride, padding)
    y = np.zeros((x.shape[0], P, Q, x.shape[3]), x.dtype)
    for _, _, view in _taps(_padded(x, padding), window, stride, (P, Q)):
        y += view
    return y / (window[0] * window[1])


def avg_pool2d_backward(dy, x_shape, window, stride, padding):
    N, H, W, C = x_shape
    dx = np.zeros((N, H + 2 * padding[0], W + 2 * padding[1], C), dy.dtype)
    for _, _, view in _taps(dx, window, stride, dy.shape[1:3]):
        view += dy / (window[0] * window[1])
    return _inner(dx, x_shape, padding)


def global_avg_pool2d_forward(x):
    return sum(x, (1, 2), False) / x.dtype.type(x.shape[1] * x.shape[2])


def global_avg_pool2d_backward(dy, x_shape):
    return broadcast_to(dy[:, None, None, :] / dy.dtype.type(x_shape[1] * x_shape[2]), x_shape)


# loss ---------------------------------------------------------------------------------------------------------


def cross_entropy(logits, labels, smoothing):
    N, K = logits.shape
    shifted = (logits - logits.max(1, keepdims=True)).astype(np.float64)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.full((N, K), smoothing / K)
    target[np.arange(N), labels] += 1 - smoothing
    loss = -(target * np.where(target == 0, 0, log_softmax)).sum() / N  # 0 times an infinite one is nothing
    return np.asarray(loss, logits.dtype), ((np.exp(log_softmax) - target) / N).astype(logits.dtype)


# training -----------------------------------------------------------------------------------------------------


def sgd(weights, velocities, gradients, decays, lr, momentum, nesterov, copies=None):
    velocities, copies = (arrays or [None] * len(weights) for arrays in (velocities, copies))
    for w, v, dw, decay, copy in zip(weights, velocities, gradients, decays, copies, strict=True):
        step = (dw if dw.shape == w.shape else sum(dw, (0,), False)) + decay * w
        if v is not None:
            v[...] = momentum * v + step
            step = step + momentum * v if nesterov else v
        w -= (float(lr) * step).astype(w.dtype)
        if copy is not None:
            copy[...] = w


def augment(images, index, top, left, flip, mean, scale):
    H, W = images.shape[1:3]
    x = (images[index].astype(np.float32) - mean) * scale
    x = np.where(flip[:, None, None, None].astype(bool), x[:, :, ::-1], x)
    rows, columns = np.arange(H) + top[:, None], np.arange(W) + left[:, None]  # where each output pixel comes from
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    moved = x[np.arange(len(x))[:, None, None], rows.clip(0, H - 1)[:, :, None], columns.clip(0, W - 1)[:, None, :]]
    return np.where(inside[..., None], moved, np.float32(0))


def augment_step(images, labels, order, counter, mean, scale, key, batch_size, steps_per_epoch, n, dtype, padding):
    step = int(counter[0])
    first = step % steps_per_epoch * batch_size
    index, (top, left, flip) = order[first : first + n], np.zeros((3, n), np.int32)
    if padding is not None:
        top, left, flip = uniform(philox(key, step, -(-3 * n // 2)).reshape(-1)[: 6 * n]).reshape(3, n)
        top, left = (np.floor(draw * (2 * padding + 1)).astype(np.int32) - padding for draw in (top, left))
        flip = flip < 0.5
    counter[:1] += 1
    return augment(images, index, top, left, flip, mean, scale).astype(dtype), labels[index]
