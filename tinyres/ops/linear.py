"""Matrix products: matmul, and the linear layer. Gradients: Y = A B gives dA = dY B^T, dB = A^T dY."""

from __future__ import annotations

import numpy as np

from tinyres.autograd import Function, Tensor
from tinyres.backend import Array
from tinyres.errors import ShapeError, fail
from tinyres.ops import checks
from tinyres.ops.cast import lowered, promoted, rounded, widened


class MatMul(Function):
    fresh_gradients = True

    def forward(self, a, b):
        self.saved = a, b
        return self.kernels.matmul(a, b)

    def backward(self, dy):
        k, (a, b) = self.kernels, self.saved
        da = k.sum_to(k.matmul(dy, b, transpose_b=True), a.shape) if self.needs[0] else None
        return da, k.sum_to(k.matmul(a, dy, transpose_a=True), b.shape) if self.needs[1] else None


class Linear(Function):
    fresh_gradients = True

    def forward(self, x, w, b):
        w = rounded(self.kernels, w, x.dtype)  # as in conv2d.py
        self.saved = x, w
        y = self.kernels.matmul(x, w)
        return y if b is None else self.kernels.accumulate(y, rounded(self.kernels, b, x.dtype))

    def backward(self, dy):
        k, (x, w) = self.kernels, self.saved
        dx = k.matmul(dy, w, transpose_b=True) if self.needs[0] else None
        dy = widened(k, dy)
        dw = k.matmul(widened(k, x), dy, transpose_a=True) if self.needs[1] else None
        return dx, dw, k.sum(dy, (0,), False) if self.needs[2] else None


def matmul(a: Tensor | Array, b: Tensor | Array) -> Tensor:
    """a @ b for a (..., M, K) and b (..., K, N); leading axes broadcast. Raises ShapeError where they do not fit.

    One of them may be an array of the other's dtype. Under precision="bfloat16" what is float32 is rounded to it.
    """
    a, b = map(lowered, checks.tensors("matmul", a, b))
    a, b = promoted(a, b)
    checks.operands("matmul", a=a, b=b)
    if a.ndim < 2 or b.ndim < 2:
        fail("matmul", "operands must have at least two axes", a=a.shape, b=b.shape)
    if a.shape[-1] != b.shape[-2]:
        fail("matmul", "columns of a and rows of b must agree", a=a.shape, b=b.shape)
    if a.ndim > 2 or b.ndim > 2:
        try:
            np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError:
            raise ShapeError(f"[matmul] leading axes must broadcast; got a {a.shape}, b {b.shape}") from None
    return MatMul.apply(a, b)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w + b for x (N, in), w (in, out), b (out,) or None: (N, out). Raises ShapeError where they do not fit.

    dtypes as in `conv2d`.
    """
    if b is None:
        checks.beside("linear", x=x, w=w)
    else:
        checks.beside("linear", x=x, w=w, b=b)
    checks.rank("linear", "x", x, ("N", "in"))
    checks.rank("linear", "w", w, ("in", "out"))
    if x.shape[1] != w.shape[0]:
        fail("linear", "columns of x and rows of w must agree", x=x.shape, w=w.shape)
    if b is not None and b.shape != w.shape[1:]:
        fail("linear", "b must be (out,)", w=w.shape, b=b.shape)
    return Linear.apply(lowered(x), w, b)
