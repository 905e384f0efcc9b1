"""Between float32 and bfloat16. Who casts: convolutions, linear layers and matrix products their float32 inputs, where
`tinyres.options(precision="bfloat16")` asks for it; sums and other ops of two, what they meet beside float32.
"""

from __future__ import annotations

from contextvars import ContextVar

import numpy as np

from tinyres import dtypes
from tinyres.autograd import Function, Scope, Tensor
from tinyres.backend import Array
from tinyres.errors import DtypeError, expect
from tinyres.ops import checks
from tinyres.options import get as options

FLOAT32 = np.dtype(np.float32)


class Cast(Function):
    fresh_gradients = True

    def forward(self, x, dtype):
        self.saved = x.dtype
        return self.kernels.cast(x, dtype)

    def backward(self, dy):
        return self.kernels.cast(dy, self.saved)


def cast(x: Tensor, dtype: str) -> Tensor:
    """`x` rounded to `dtype`, "float32" or "bfloat16", to the nearest, ties to even; x itself where it has that dtype.

    Its gradient comes back in x's dtype. Raises DtypeError for a float64 x, ArgumentError for another dtype.
    """
    checks.operands("cast", x=x)
    checks.choice("cast", "dtype", dtype, ("float32", "bfloat16"))
    if x.dtype.name == dtype:
        return x
    expect(x.dtype != np.float64, "cast", "x must be float32 or bfloat16", DtypeError, x=x.dtype)
    return Cast.apply(x, dtype=FLOAT32 if dtype == "float32" else dtypes.bfloat16())


def lowered(x: Tensor) -> Tensor:
    """`x`, an input of a convolution or matrix product, in the precision of the options."""
    if x._data.dtype == FLOAT32 and options().precision == "bfloat16":
        return Cast.apply(x, dtype=dtypes.bfloat16())
    return x


def promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b`, both float32 where one is bfloat16 and the other float32."""
    if {a._data.dtype.name, b._data.dtype.name} == {"bfloat16", "float32"}:
        return cast(a, "float32"), cast(b, "float32")
    return a, b


def widened(kernels, x: Array) -> Array:
    """`x` in the dtype of parameters: what is summed up to a gradient of one is summed and kept in float32."""
    return kernels.cast(x, dtypes.wide(x.dtype))


# Of each block that holds: its copies by the weight's id; the innermost last.
_kept: ContextVar[tuple[dict[int, tuple[Array, Array]], ...]] = ContextVar("tinyres.ops.cast", default=())


class copies_kept(Scope):
    """Within this block the copies of weights are up to date, so that nothing needs to round those again.

    copies  list of (weight, its copy in another dtype), arrays
    """

    def __init__(self, copies: list[tuple[Array, Array]]) -> None:
        self.copies = {id(weight): (weight, copy) for weight, copy in copies}

    def __enter__(self) -> None:
        _kept.set((*_kept.get(), self.copies))

    def __exit__(self, *exc: object) -> None:
        _kept.set(_kept.get()[:-1])


def rounded(kernels, w: Array, dtype: np.dtype) -> Array:
    """The weight `w` in the dtype of activations: the copy that is kept of it, or a new one."""
    blocks = _kept.get()
    kept = blocks[-1].get(id(w)) if blocks else None
    return kept[1] if kept is not None and kept[1].dtype == dtype else kernels.cast(w, dtype)
