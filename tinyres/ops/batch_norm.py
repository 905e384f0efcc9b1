"""Batch normalisation over the last axis, plain and fused with what follows it in a residual network.

y = gamma (x - mean) / sqrt(var + eps) + beta. In training, mean and var (biased) are those of the batch, and the
running statistics move towards the batch's mean and unbiased variance by the share `momentum`; otherwise the
running statistics are used (PyTorch's conventions). Ioffe and Szegedy 2015; the gradient is derived beside the
kernel, in csrc/cpu/batch_norm.cpp.
"""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.backend import Array
from tinyres.errors import ArgumentError, DeviceError, DtypeError, expect
from tinyres.ops import checks


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
        return self.kernels.batch_norm_backward(dy, x, gamma, *statistics)


class BatchNormReLU(Function):
    fresh_gradients = True

    def forward(self, x, gamma, beta, running, training, momentum, eps):
        if not training:
            y = self.kernels.batch_norm_relu_inference(x, gamma, beta, *running, eps)
            self.saved = x, y, gamma, running, eps
            return y
        y, mean, inv_std = self.kernels.batch_norm_relu_forward(x, gamma, beta, *running, momentum, eps)
        self.saved = x, y, gamma, (mean, inv_std), None
        return y

    def backward(self, dy):
        x, y, gamma, statistics, eps = self.saved
        if eps is not None:
            dz = self.kernels.relu_backward(dy, y)
            return self.kernels.batch_norm_inference_backward(dz, x, gamma, *statistics, eps)
        return self.kernels.batch_norm_relu_backward(dy, x, y, gamma, *statistics)


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
        return self.kernels.batch_norm_add_relu_backward(dy, x, y, gamma, *statistics)


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
    gamma, beta  (C,)
    running_mean, running_var  arrays (C,) of x's dtype, updated in place in training; both may be None in training
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
    checks.operands(op, x=x, residual=residual)
    expect(x.shape == residual.shape, op, "x and residual must have one shape", x=x.shape, residual=residual.shape)
    settings = _check(op, x, gamma, beta, running_mean, running_var, training, momentum, eps)
    return BatchNormAddReLU.apply(x, residual, gamma, beta, **settings)


def _check(op, x, gamma, beta, running_mean, running_var, training, momentum, eps):
    checks.operands(op, x=x, gamma=gamma, beta=beta)
    training = checks.flag(op, "training", training)
    expect(x.ndim >= 2 and x.size > 0, op, "x must be (..., C) with no empty axis", x=x.shape)
    channels = x.shape[-1:]
    expect(
        gamma.shape == channels and beta.shape == channels,
        op,
        "gamma and beta must have one value per channel",
        x=x.shape,
        gamma=gamma.shape,
        beta=beta.shape,
    )
    expect(
        (running_mean is None) == (running_var is None), op, "give both running statistics or neither", ArgumentError
    )
    if running_mean is not None:
        for name, array in (("running_mean", running_mean), ("running_var", running_var)):
            expect(
                x.device.owns(array),
                op,
                f"{name} must be an array of x's device",
                DeviceError,
                **{name: type(array).__name__},
            )
            expect(
                array.shape == channels, op, f"{name} must have one value per channel", x=x.shape, **{name: array.shape}
            )
            expect(
                array.dtype == x.dtype, op, f"{name} must have x's dtype", DtypeError, x=x.dtype, **{name: array.dtype}
            )
            writable = not training or (array.flags.c_contiguous and getattr(array.flags, "writeable", True))
            expect(writable, op, f"{name} must be dense and writable", ArgumentError)
    expect(training or running_mean is not None, op, "running statistics are needed outside of training", ArgumentError)
    expect(not training or x.size > x.shape[-1], op, "training needs more than one value per channel", x=x.shape)
    momentum, eps = checks.fraction(op, "momentum", momentum, one=True), checks.real(op, "eps", eps)
    expect(eps > 0, op, "eps must be positive", ArgumentError, eps=eps)
    return {"running": (running_mean, running_var), "training": training, "momentum": momentum, "eps": eps}
