"""Batch normalisation over the last axis, plain and fused with what follows it in a residual network.

y = gamma (x - mean) / sqrt(var + eps) + beta. In training, mean and var (biased) are those of the batch, and the
running statistics move towards the batch's mean and unbiased variance by the share `momentum`; otherwise the
running statistics are used (PyTorch's conventions). Ioffe and Szegedy 2015; the gradient is derived beside the
kernel, in csrc/cpu/batch_norm.cpp.
"""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.backend import Array
from tinyres.dtypes import wide
from tinyres.errors import ArgumentError, DeviceError, DtypeError, expect, fail
from tinyres.ops import checks
from tinyres.ops.elementwise import add, relu


class BatchNorm(Function):
    fresh_gradients = True

    def forward(self, x, gamma, beta, running, training, momentum, eps):
        if not training:
            self.saved = x, gamma, running, eps
            return self.kernels.batch_norm_inference(x, gamma, beta, *running, eps)
        y, mean, inv_std = self.kernels.batch_norm_forward(x, gamma, beta, *running, momentum, eps)
        self.saved = x, gamma, (mean, inv_std), None
        return y

    def backward(self, dy):
        x, gamma, statistics, eps = self.saved
        if eps is not None:
            return self.kernels.batch_norm_inference_backward(dy, x, gamma, *statistics, eps)
        return self.kernels.batch_norm_backward(dy, x, gamma, *statistics, overwrite=self.owns_gradient)


class BatchNormReLU(Function):
    fresh_gradients = True

    def forward(self, x, gamma, beta, running, training, momentum, eps):
        if not training:
            y = self.kernels.batch_norm_relu_inference(x, gamma, beta, *running, eps)
            self.saved = x, gamma, y, running, eps
            return y
        y, mean, inv_std = self.kernels.batch_norm_relu_forward(x, gamma, beta, *running, momentum, eps)
        self.saved = x, gamma, beta, (mean, inv_std), None
        return y

    def backward(self, dy):
        if self.saved[-1] is not None:
            x, gamma, y, statistics, eps = self.saved
            dz = self.kernels.relu_backward(dy, y)
            return self.kernels.batch_norm_inference_backward(dz, x, gamma, *statistics, eps)
        x, gamma, beta, statistics, _ = self.saved
        return self.kernels.batch_norm_relu_backward(dy, x, gamma, beta, *statistics, overwrite=self.owns_gradient)


class BatchNormAddReLU(Function):
    fresh_gradients = True

    def forward(self, x, residual, gamma, beta, running, training, momentum, eps):
        if not training:
            y = self.kernels.batch_norm_add_relu_inference(x, residual, gamma, beta, *running, eps)
            self.saved = x, y, gamma, running, eps
            return y
        y, mean, inv_std = self.kernels.batch_norm_add_relu_forward(x, residual, gamma, beta, *running, momentum, eps)
        self.saved = x, y, gamma, (mean, inv_std), None
        return y

    def backward(self, dy):
        x, y, gamma, statistics, eps = self.saved
        if eps is not None:
            dresidual = self.kernels.relu_backward(dy, y)
            dx, dgamma, dbeta = self.kernels.batch_norm_inference_backward(dresidual, x, gamma, *statistics, eps)
            return dx, dresidual, dgamma, dbeta
        return self.kernels.batch_norm_add_relu_backward(dy, x, y, gamma, *statistics, overwrite=self.owns_gradient)


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of `x`.

    x            (..., C), at least two values a channel in training
    gamma, beta  (C,), of x's dtype, float32 beside bfloat16
    running_mean, running_var  arrays (C,) of gamma's dtype, updated in place in training; both may be None in training
    momentum     the share of the batch's statistics in the new running ones, in [0, 1]
    Returns the shape of x. Raises ShapeError, DtypeError, DeviceError or ArgumentError for what does not fit.
    """
    settings = _check("batch_norm", x, gamma, beta, running_mean, running_var, training, momentum, eps)
    return BatchNorm.apply(x, gamma, beta, **settings)


def batch_norm_relu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x)) in one pass; arguments and errors of `batch_norm`."""
    settings = _check("batch_norm_relu", x, gamma, beta, running_mean, running_var, training, momentum, eps)
    return BatchNormReLU.apply(x, gamma, beta, **settings)


def batch_norm_add_relu(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x) + residual) in one pass: how a unit of He et al. 2015 (Fig. 2) ends.

    `residual` has the shape of x; other arguments and errors as `batch_norm`.
    """
    op = "batch_norm_add_relu"
    settings = _check(op, x, gamma, beta, running_mean, running_var, training, momentum, eps)
    checks.mixed(op, x=x, residual=residual)
    expect(x.shape == residual.shape, op, "x and residual must have one shape", x=x.shape, residual=residual.shape)
    if x.dtype != residual.dtype:
        return relu(add(BatchNorm.apply(x, gamma, beta, **settings), residual))
    return BatchNormAddReLU.apply(x, residual, gamma, beta, **settings)


def _check(op, x, gamma, beta, running_mean, running_var, training, momentum, eps):
    checks.beside(op, x=x, gamma=gamma, beta=beta)
    training = checks.flag(op, "training", training)
    shape = x.shape
    if len(shape) < 2 or x.size == 0:
        fail(op, "x must be (..., C) with no empty axis", x=shape)
    channels = shape[-1:]
    if gamma.shape != channels or beta.shape != channels:
        fail(op, "gamma and beta must have one value per channel", x=shape, gamma=gamma.shape, beta=beta.shape)
    if (running_mean is None) != (running_var is None):
        fail(op, "give both running statistics or neither", ArgumentError)
    if running_mean is not None:
        _check_statistic(op, "running_mean", running_mean, x, training)
        _check_statistic(op, "running_var", running_var, x, training)
    elif not training:
        fail(op, "running statistics are needed outside of training", ArgumentError)
    if training and x.size == shape[-1]:
        fail(op, "training needs more than one value per channel", x=shape)
    momentum, eps = checks.fraction(op, "momentum", momentum, one=True), checks.epsilon(op, eps)
    return {"running": (running_mean, running_var), "training": training, "momentum": momentum, "eps": eps}


def _check_statistic(op, name, array, x, training):
    if not x.device.owns(array):
        fail(op, f"{name} must be an array of x's device", DeviceError, **{name: type(array).__name__})
    if array.shape != x.shape[-1:]:
        fail(op, f"{name} must have one value per channel", x=x.shape, **{name: array.shape})
    if array.dtype != wide(x.dtype):
        fail(op, f"{name} must have gamma's dtype", DtypeError, x=x.dtype, **{name: array.dtype})
    flags = array.flags
    if not getattr(flags, "aligned", True):  # CuPy's arrays have no such flags
        fail(op, f"{name} must be aligned", ArgumentError)
    if training and not (flags.c_contiguous and getattr(flags, "writeable", True)):
        fail(op, f"{name} must be dense and writable", ArgumentError)
