"""2-D convolution (cross-correlation), NHWC activations and RSCK weights; plain and fused with what follows it.

y[n, p, q, k] = sum over r, s, c of x[n, p sh + r - ph, q sw + s - pw, c] w[r, s, c, k]  (+ b[k])

The gradients are derived beside the kernels, in csrc/cpu/conv2d.cpp. Beside a bfloat16 x the parameters are float32:
the Functions round them, and pass their gradients on as the kernels have summed them, in float32.
"""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.errors import fail
from tinyres.ops import checks
from tinyres.ops.cast import lowered, rounded, widened
from tinyres.ops.checks import Pair
from tinyres.ops.elementwise import add, relu


class Conv2d(Function):
    fresh_gradients = True
    adds_gradients = True  # dx, to the gradient that came along a shortcut

    def forward(self, x, w, b, stride, padding):
        w = rounded(self.kernels, w, x.dtype)
        self.saved = x, w, stride, padding
        if b is None:
            return self.kernels.conv2d_forward(x, w, stride, padding)
        return self._with_bias(x, w, b, None, False, stride, padding)

    def _with_bias(self, x, w, b, residual, relu, stride, padding):
        b = rounded(self.kernels, b, x.dtype)
        return self.kernels.conv2d_bias_forward(x, w, b, residual, relu, stride, padding)

    def backward(self, dy):
        return self._gradients(dy, self.needs, *self.saved)

    def _gradients(self, dy, needs, x, w, stride, padding):
        dx = dw = db = None
        if needs[0] and needs[1]:
            dx, dw = self.kernels.conv2d_backward(dy, x, w, stride, padding, self.totals[0])
        elif needs[0]:
            dx = self.kernels.conv2d_backward_input(dy, w, x.shape, stride, padding, self.totals[0])
        elif needs[1]:
            dw = self.kernels.conv2d_backward_weight(dy, x, w.shape, stride, padding)
        if needs[2]:
            db = self.kernels.sum(widened(self.kernels, dy), (0, 1, 2), False)
        return dx, dw, db


class Conv2dReLU(Conv2d):
    def forward(self, x, w, b, stride, padding):
        w = rounded(self.kernels, w, x.dtype)
        y = self._with_bias(x, w, b, None, True, stride, padding)
        self.saved = y, x, w, stride, padding
        return y

    def backward(self, dy):
        y, *saved = self.saved
        return self._gradients(self.kernels.relu_backward(dy, y), self.needs, *saved)


class Conv2dAddReLU(Conv2d):
    def forward(self, x, residual, w, b, stride, padding):
        w = rounded(self.kernels, w, x.dtype)
        y = self._with_bias(x, w, b, residual, True, stride, padding)
        self.saved = y, x, w, stride, padding
        return y

    def backward(self, dy):
        y, *saved = self.saved
        dresidual = self.kernels.relu_backward(dy, y)
        dx, dw, db = self._gradients(dresidual, (self.needs[0], *self.needs[2:]), *saved)
        return dx, dresidual, dw, db


def conv2d(x: Tensor, w: Tensor, b: Tensor | None = None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Slide `w` over the zero-padded `x`.

    x        (N, H, W, C), float32 or float64; or bfloat16, which float32 becomes under precision="bfloat16"
    w        (R, S, C, K), of x's dtype, float32 beside bfloat16; so is b
    b        (K,) or None
    stride, padding  an integer, or one for height and one for width
    Returns (N, (H + 2 padding - R) // stride + 1, (W + 2 padding - S) // stride + 1, K).
    Raises ShapeError, DtypeError, DeviceError or ArgumentError for what does not fit.
    """
    stride, padding, _ = _check("conv2d", x, w, b, stride, padding)
    return Conv2d.apply(lowered(x), w, b, stride=stride, padding=padding)


def conv2d_relu(x: Tensor, w: Tensor, b: Tensor, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """relu(conv2d(x, w, b)), with one pass over what the convolution gives; arguments and errors of `conv2d`."""
    stride, padding, _ = _check("conv2d_relu", x, w, b, stride, padding)
    return Conv2dReLU.apply(lowered(x), w, b, stride=stride, padding=padding)


def conv2d_add_relu(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """relu(conv2d(x, w, b) + residual), with one pass over what the convolution gives.

    `residual` is added as by `+`; in the same pass where it has the shape of the result. Otherwise as `conv2d_relu`.
    """
    op = "conv2d_add_relu"
    stride, padding, shape = _check(op, x, w, b, stride, padding)
    x = lowered(x)
    checks.mixed(op, x=x, residual=residual)
    if residual.shape != shape or residual.dtype != x.dtype:
        return relu(add(Conv2d.apply(x, w, b, stride=stride, padding=padding), residual))
    return Conv2dAddReLU.apply(x, residual, w, b, stride=stride, padding=padding)


def _check(op, x, w, b, stride, padding):
    """Stride and padding as pairs, and the shape of the result."""
    if b is None and op == "conv2d":
        checks.beside(op, x=x, w=w)
    else:
        checks.beside(op, x=x, w=w, b=b)
    checks.rank(op, "x", x, "NHWC")
    checks.rank(op, "w", w, "RSCK")
    x_shape, w_shape = x.shape, w.shape
    if x_shape[3] != w_shape[2]:
        fail(op, "input channels of x and w must agree", x=x_shape, w=w_shape)
    if b is not None and b.shape != w_shape[3:]:
        fail(op, "b must have one value per filter", w=w_shape, b=b.shape)
    stride, padding = checks.pair(op, "stride", stride, 1), checks.pair(op, "padding", padding, 0)
    P, Q = checks.fits(op, x_shape, w_shape[:2], stride, padding)
    shape = x_shape[0], P, Q, w_shape[3]
    if shape[0] * P * Q * shape[3] >= checks.LIMIT:
        fail(op, "the result is too large", x=x_shape, w=w_shape)
    return stride, padding, shape
