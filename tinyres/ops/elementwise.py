"""Elementwise ops. Two operands broadcast as in NumPy; either may be a number, or an array of the other's dtype.

bfloat16 and float32 give float32.
"""

from __future__ import annotations

import numpy as np

from tinyres.autograd import Function, Operand, Tensor
from tinyres.backend import random
from tinyres.errors import ShapeError
from tinyres.ops import checks
from tinyres.ops.cast import promoted


def _operands(op, a, b):
    """`a` and `b` as Tensors that broadcast together: a number takes the other's dtype and device."""
    a, b = checks.tensors(op, a, b)
    if a._data.dtype != b._data.dtype:
        a, b = promoted(a, b)
    checks.operands(op, a=a, b=b)
    if a._data.shape != b._data.shape:
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ShapeError(f"[{op}] shapes must broadcast; got a {a.shape}, b {b.shape}") from None
    return a, b


class Add(Function):
    def forward(self, a, b):
        self.saved = a.shape, b.shape
        return self.kernels.add(a, b)

    def backward(self, dy):
        a_shape, b_shape = self.saved
        da = self.kernels.sum_to(dy, a_shape) if self.needs[0] else None
        return da, self.kernels.sum_to(dy, b_shape) if self.needs[1] else None


class Sub(Function):
    def forward(self, a, b):
        self.saved = a.shape, b.shape
        return self.kernels.sub(a, b)

    def backward(self, dy):
        a_shape, b_shape = self.saved
        da = self.kernels.sum_to(dy, a_shape) if self.needs[0] else None
        return da, self.kernels.neg(self.kernels.sum_to(dy, b_shape)) if self.needs[1] else None


class Mul(Function):
    fresh_gradients = True

    def forward(self, a, b):
        self.saved = a, b
        return self.kernels.mul(a, b)

    def backward(self, dy):
        k, (a, b) = self.kernels, self.saved
        da = k.sum_to(k.mul(dy, b), a.shape) if self.needs[0] else None
        return da, k.sum_to(k.mul(dy, a), b.shape) if self.needs[1] else None


class Div(Function):
    fresh_gradients = True

    def forward(self, a, b):
        self.saved = a, b
        return self.kernels.div(a, b)

    def backward(self, dy):
        k, (a, b) = self.kernels, self.saved
        da = k.div(dy, b)
        db = k.sum_to(k.neg(k.mul(da, k.div(a, b))), b.shape) if self.needs[1] else None
        return k.sum_to(da, a.shape) if self.needs[0] else None, db


class Pow(Function):
    fresh_gradients = True

    def forward(self, a, b):
        y = self.kernels.pow(a, b)
        self.saved = a, b, y
        return y

    def backward(self, dy):
        a, b, y = self.saved
        da, db = self.kernels.pow_backward(dy, a, b, y)
        da = self.kernels.sum_to(da, a.shape) if self.needs[0] else None
        return da, self.kernels.sum_to(db, b.shape) if self.needs[1] else None


class Maximum(Function):
    fresh_gradients = True

    def forward(self, a, b):
        self.saved = a, b
        return self.kernels.maximum(a, b)

    def backward(self, dy):
        a, b = self.saved
        da, db = self.kernels.maximum_backward(dy, a, b)
        return self.kernels.sum_to(da, a.shape), self.kernels.sum_to(db, b.shape)


class Neg(Function):
    fresh_gradients = True

    def forward(self, x):
        return self.kernels.neg(x)

    def backward(self, dy):
        return self.kernels.neg(dy)


class Exp(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = self.kernels.exp(x)
        return self.saved

    def backward(self, dy):
        return self.kernels.mul(dy, self.saved)


class Log(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = x
        return self.kernels.log(x)

    def backward(self, dy):
        return self.kernels.div(dy, self.saved)


class Sqrt(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = self.kernels.sqrt(x)
        return self.saved

    def backward(self, dy):
        return self.kernels.sqrt_backward(dy, self.saved)


class Sigmoid(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = self.kernels.sigmoid(x)
        return self.saved

    def backward(self, dy):
        return self.kernels.sigmoid_backward(dy, self.saved)


class Tanh(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = self.kernels.tanh(x)
        return self.saved

    def backward(self, dy):
        return self.kernels.tanh_backward(dy, self.saved)


class ReLU(Function):
    fresh_gradients = True

    def forward(self, x):
        self.saved = self.kernels.relu(x)
        return self.saved

    def backward(self, dy):
        return self.kernels.relu_backward(dy, self.saved)


class Dropout(Function):
    fresh_gradients = True

    def forward(self, x, p, key):
        self.saved = p, key
        return self.kernels.dropout(x, p, key)

    def backward(self, dy):
        return self.kernels.dropout(dy, *self.saved)  # the mask is drawn again, not stored


def add(a: Operand, b: Operand) -> Tensor:
    """a + b, broadcast. Raises DtypeError, DeviceError or ShapeError where the operands do not fit together."""
    return Add.apply(*_operands("add", a, b))


def sub(a: Operand, b: Operand) -> Tensor:
    """a - b, broadcast. Raises as `add`."""
    return Sub.apply(*_operands("sub", a, b))


def mul(a: Operand, b: Operand) -> Tensor:
    """a * b, broadcast. Raises as `add`."""
    return Mul.apply(*_operands("mul", a, b))


def div(a: Operand, b: Operand) -> Tensor:
    """a / b, broadcast. Raises as `add`."""
    return Div.apply(*_operands("div", a, b))


def pow(a: Operand, b: Operand) -> Tensor:
    """a ** b, broadcast; NaN for a negative a and a fractional b. Raises as `add`.

    The gradient by b is 0 where a is 0.
    """
    return Pow.apply(*_operands("pow", a, b))


def maximum(a: Operand, b: Operand) -> Tensor:
    """The larger of a and b, broadcast; a tie shares the gradient equally. Raises as `add`."""
    return Maximum.apply(*_operands("maximum", a, b))


def neg(x: Tensor) -> Tensor:
    """-x. Raises DtypeError unless x is a Tensor of floats, as do the ops below."""
    checks.operands("neg", x=x)
    return Neg.apply(x)


def exp(x: Tensor) -> Tensor:
    """e ** x."""
    checks.operands("exp", x=x)
    return Exp.apply(x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm; NaN below 0."""
    checks.operands("log", x=x)
    return Log.apply(x)


def sqrt(x: Tensor) -> Tensor:
    """The square root; NaN below 0, and an infinite gradient at 0."""
    checks.operands("sqrt", x=x)
    return Sqrt.apply(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e ** -x)."""
    checks.operands("sigmoid", x=x)
    return Sigmoid.apply(x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    checks.operands("tanh", x=x)
    return Tanh.apply(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0); the gradient at 0 is 0."""
    checks.operands("relu", x=x)
    return ReLU.apply(x)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p); x itself unless training.

    The mask is the next draw of the random stream "dropout" (`tinyres.manual_seed`).
    Raises ArgumentError unless p is in [0, 1).
    """
    checks.operands("dropout", x=x)
    p = checks.fraction("dropout", "p", p)
    if not checks.flag("dropout", "training", training) or p == 0:
        return x
    stream, draw = random.next_draw("dropout")
    return Dropout.apply(x, p=p, key=(stream.key, draw))
