"""The join of a residual unit in one pass: y = relu(a + b) (He et al. 2015, equation 1 and Fig. 2)."""

from __future__ import annotations

from tinyres.autograd import Function, Tensor
from tinyres.errors import expect
from tinyres.ops import checks
from tinyres.ops.cast import promoted


class AddReLU(Function):
    def forward(self, a, b):
        self.saved = self.kernels.add_relu(a, b)
        return self.saved

    def backward(self, dy):
        da = self.kernels.relu_backward(dy, self.saved)
        return da, da


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b) for tensors of one shape (no broadcasting), dtype (as in `add`) and device; else an error."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a._data.dtype != b._data.dtype:
        a, b = promoted(a, b)
    checks.operands("add_relu", a=a, b=b)
    expect(a.shape == b.shape, "add_relu", "a and b must have one shape", a=a.shape, b=b.shape)
    return AddReLU.apply(a, b)
