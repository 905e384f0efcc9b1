"""2-D convolution (cross-correlation), NHWC activations and RSCK weights.

y[n, p, q, k] = sum over r, s, c of x[n, p sh + r - ph, q sw + s - pw, c] w[r, s, c, k]  (+ b[k])

The gradients are derived beside the kernels, in csrc/cpu/conv2d.cpp.
"""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.errors import expect
from tinyres.ops import checks
from tinyres.ops.checks import Pair


class Conv2d(Function):
    fresh_gradients = True

    def forward(self, x, w, b, stride, padding):
        self.saved = x, w, stride, padding
        y = self.kernels.conv2d_forward(x, w, stride, padding)
        return y if b is None else self.kernels.add(y, b)

    def backward(self, dy):
        x, w, stride, padding = self.saved
        dx = dw = db = None
        if self.needs[0]:
            dx = self.kernels.conv2d_backward_input(dy, w, x.shape, stride, padding)
        if self.needs[1]:
            dw = self.kernels.conv2d_backward_weight(dy, x, w.shape, stride, padding)
        if self.needs[2]:
            db = self.kernels.sum(dy, (0, 1, 2), False)
        return dx, dw, db


def conv2d(x: Tensor, w: Tensor, b: Tensor | None = None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Slide `w` over the zero-padded `x`.

    x        (N, H, W, C), float32 or float64
    w        (R, S, C, K)
    b        (K,) or None
    stride, padding  an integer, or one for height and one for width
    Returns (N, (H + 2 padding - R) // stride + 1, (W + 2 padding - S) // stride + 1, K).
    Raises ShapeError, DtypeError, DeviceError or ArgumentError for what does not fit.
    """
    checks.operands("conv2d", x=x, w=w, **({} if b is None else {"b": b}))
    checks.rank("conv2d", "x", x, "NHWC")
    checks.rank("conv2d", "w", w, "RSCK")
    expect(x.shape[3] == w.shape[2], "conv2d", "input channels of x and w must agree", x=x.shape, w=w.shape)
    if b is not None:
        expect(b.shape == w.shape[3:], "conv2d", "b must have one value per filter", w=w.shape, b=b.shape)
    stride, padding = checks.pair("conv2d", "stride", stride, 1), checks.pair("conv2d", "padding", padding, 0)
    P, Q = checks.fits("conv2d", x.shape, w.shape[:2], stride, padding)
    expect(x.shape[0] * P * Q * w.shape[3] < checks.LIMIT, "conv2d", "the result is too large", x=x.shape, w=w.shape)
    return Conv2d.apply(x, w, b, stride=stride, padding=padding)
