"""Batch norms that are not applied yet: what the kernels of spec.FUSED that fuse them hand on instead of tensors.

Between two convolutions stand batch norm and ReLU, u = relu(gamma (x - mean) inv_std + beta). A kernel can apply them
to x as it loads it, so that u is never written; what it needs for that is a Norm. Backward, likewise, it can make the
gradient by x as it loads the gradient by the batch norm's result: a Gradient. On other devices, and for other shapes,
the same records hold u and the gradient by x as tensors.
"""

from __future__ import annotations

from typing import Any

Array = Any


class Norm:
    """Batch norm of x (N, H, W, C), then ReLU, as the next convolution reads it.

    x            the output of a convolution
    rows         partial sums of x, left by the kernel that wrote it; None: there are none
    gamma, beta  (C,)
    running_mean, running_var  (C,) or None; moved by whoever works out the statistics
    mean, inv_std  (C,), worked out by the first kernel that reads x; None until then
    activation   the result as a tensor, where one was made: at the end of a block, and where nothing is fused
    joined       whether a shortcut was added before the ReLU
    """

    def __init__(
        self,
        x: Array,
        rows: Array | None,
        gamma: Array,
        beta: Array,
        running_mean: Array | None,
        running_var: Array | None,
        momentum: float,
        eps: float,
    ) -> None:
        self.x, self.rows, self.gamma, self.beta = x, rows, gamma, beta
        self.running_mean, self.running_var, self.momentum, self.eps = running_mean, running_var, momentum, eps
        self.mean = self.inv_std = self.activation = None
        self.joined = False

    def parameters(self) -> tuple:
        """What follows x among the arguments of batch_norm_forward."""
        return self.gamma, self.beta, self.running_mean, self.running_var, self.momentum, self.eps

    def kept(self) -> dict[str, Array]:
        """What backward reads, by name."""
        return {name: getattr(self, name) for name in ("x", "gamma", "beta", "mean", "inv_std", "activation")}

    def normalise(self, kernels: Any) -> Array:
        """The batch norm's result, without ReLU, as a tensor."""
        z, self.mean, self.inv_std = kernels.batch_norm_forward(self.x, *self.parameters())
        return z


class Gradient:
    """The gradient of the loss by `norm`: by its result, ReLU's mask applied, and by its x, in one form or both.

    norm   the Norm
    dz     the gradient by gamma (x - mean) inv_std + beta, which is also the shortcut's; None: nobody asks for it
    rows   partial sums of dz for dgamma and dbeta, left by the kernel that wrote it; None: there are none
    dx     the gradient by x; None: it is made from dz by whoever reads that
    dgamma, dbeta  (C,), worked out by the first kernel that reads dz; None until then
    """

    def __init__(
        self,
        norm: Norm,
        dz: Array | None,
        rows: Array | None = None,
        dx: Array | None = None,
        dgamma: Array | None = None,
        dbeta: Array | None = None,
    ) -> None:
        self.norm, self.dz, self.rows, self.dx, self.dgamma, self.dbeta = norm, dz, rows, dx, dgamma, dbeta

    def by_x(self, kernels: Any) -> Array:
        """The gradient by x as a tensor."""
        if self.dx is None:
            norm = self.norm
            whole = kernels.batch_norm_backward(self.dz, norm.x, norm.gamma, norm.mean, norm.inv_std)
            self.dx, self.dgamma, self.dbeta = whole
        return self.dx


def by_output(kernels: Any, gradient: Gradient | Array) -> Array:
    """The gradient by a convolution's output, whose batch norm the Gradient is of, as a tensor."""
    return gradient.by_x(kernels) if isinstance(gradient, Gradient) else gradient


def activation(kernels: Any, x: Norm | Array) -> Array:
    """What a convolution of `x` reads, as a tensor."""
    if not isinstance(x, Norm):
        return x
    return kernels.block_output(x) if x.activation is None else x.activation


def raw(x: Norm | Array) -> Array:
    """The tensor behind `x`, which has the shape and type of its activation."""
    return x.x if isinstance(x, Norm) else x


def shortcut(kernels: Any, x: Array, stride: int, before: int, channels: int) -> Array:
    """x (N, H, W, C) as option A of He et al. 2015 takes it round a block: every stride-th pixel, with `before`
    channels of zeros before its own, and more behind them up to `channels`."""
    x = x[:, ::stride, ::stride]
    after = channels - before - x.shape[3]
    return kernels.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)), 0) if before or after else kernels.contiguous(x)


def shortcut_backward(kernels: Any, dy: Array, stride: int, before: int, shape: tuple[int, ...]) -> Array:
    """The gradient by x, of that shape."""
    if stride == 1 and dy.shape == shape:
        return dy
    index = slice(None), slice(None, None, stride), slice(None, None, stride)
    return kernels.scatter(dy[..., before : before + shape[3]], shape, index)
