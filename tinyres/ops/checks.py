"""What ops check of their arguments before anything is computed."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, TypeVar

import numpy as np

from tinyres.autograd import Tensor
from tinyres.dtypes import is_floating, wide
from tinyres.errors import ArgumentError, DeviceError, DtypeError, ShapeError, expect, fail

C = TypeVar("C", int, str)

Pair = int | tuple[int, int]  # one for both, or (height, width)

LIMIT = 2**40  # of sizes: beyond any memory, and far from the end of a 64-bit integer
WINDOW_LIMIT = 2**20  # of windows, strides and padding
MAX_RANK = 16  # of arrays
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def operands(op: str, **tensors: Tensor) -> None:
    """Each is a float32, float64 or bfloat16 Tensor, and all have one dtype and one device."""
    _agree(op, tensors, False)


def beside(op: str, **tensors: Tensor) -> None:
    """The same of an input, the first, and parameters, which are float32 beside bfloat16."""
    _agree(op, tensors, True)


def mixed(op: str, **tensors: Tensor) -> None:
    """As `operands`, but bfloat16 may stand beside float32."""
    dtypes = {x._data.dtype for x in tensors.values() if isinstance(x, Tensor)}
    if {dtype.name for dtype in dtypes if len(dtypes) > 1} != {"bfloat16", "float32"}:
        return operands(op, **tensors)
    for name, x in tensors.items():
        operands(op, **{name: x})


def _agree(op, tensors, parameters):
    dtype: Any = None
    device: Any = None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise DtypeError(f"[{op}] {name} must be a Tensor; got {type(x).__name__}")
        if device is None:
            dtype, device = x._data.dtype, x.device
            if not is_floating(dtype):
                raise DtypeError(f"[{op}] {name} must be float32, float64 or bfloat16; got dtype {dtype}")
            if parameters:
                dtype = wide(dtype)
        elif x._data.dtype != dtype:
            got = ", ".join(f"{n} {t.dtype}" for n, t in tensors.items() if isinstance(t, Tensor))
            but = ", parameters float32 beside bfloat16" if parameters else ""
            raise DtypeError(f"[{op}] operands must have one dtype{but}; got {got}")
        elif x.device is not device:
            got = ", ".join(f"{n} {t.device}" for n, t in tensors.items() if isinstance(t, Tensor))
            raise DeviceError(f"[{op}] operands must be on one device; got {got}")


def tensors(op: str, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """`a` and `b` as Tensors: one of them may be a number, which takes the other's dtype, or an array."""
    if isinstance(a, Tensor):
        return a, b if isinstance(b, Tensor) else _constant(op, b, a)
    if not isinstance(b, Tensor):
        fail(op, "an operand must be a Tensor", DtypeError, a=type(a).__name__, b=type(b).__name__)
    return _constant(op, a, b), b


def _constant(op, value, like):
    if is_number(value):
        if not is_floating(like._data.dtype):
            operands(op, operand=like)  # refuses it: not every type could hold the number
        try:
            with np.errstate(over="ignore"):
                return Tensor(like.device.asarray(float(value), like.dtype), False, like.device)
        except OverflowError:
            raise ArgumentError(f"[{op}] a number must fit into float64; got {str(value)[:20]}...") from None
    owned = like.device.owns(value)
    expect(owned, op, "operands must be Tensors, numbers or arrays", DtypeError, operand=type(value).__name__)
    return Tensor(like.device.asarray(value), False, like.device)


def rank(op: str, name: str, x: Tensor, letters: str | tuple[str, ...]) -> None:
    """`x` has one axis per letter of `letters`, such as "NHWC", and none of them is empty."""
    shape = x._data.shape
    if len(shape) != len(letters) or 0 in shape:
        raise ShapeError(f"[{op}] {name} must be ({', '.join(letters)}) with no empty axis; got {name} {shape}")


def integer(op: str, name: str, value: Any, minimum: int, limit: int = LIMIT) -> int:
    """`value` as an int that is at least `minimum` and below `limit`."""
    if type(value) is int and minimum <= value < limit:  # nearly always
        return value
    try:
        whole = operator.index(value)
    except TypeError:
        raise DtypeError(f"[{op}] {name} must be an integer; got {name} {value!r}") from None
    if not minimum <= whole < limit or isinstance(value, bool):
        fail(op, f"{name} must be at least {minimum} and below {limit}", ArgumentError, **{name: value})
    return whole


def pair(op: str, name: str, value: Any, minimum: int) -> tuple[int, int]:
    """An integer, or one for height and one for width, as a pair of ints of at least `minimum`."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            fail(op, f"{name} must be an integer or a pair", ArgumentError, **{name: value})
        return integer(op, name, value[0], minimum, WINDOW_LIMIT), integer(op, name, value[1], minimum, WINDOW_LIMIT)
    return (integer(op, name, value, minimum, WINDOW_LIMIT),) * 2


def fits(
    op: str, shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, int]:
    """The padded image is at least as large as the window; returns the output size (P, Q)."""
    H, W = shape[1] + 2 * padding[0], shape[2] + 2 * padding[1]
    if window[0] > H or window[1] > W:
        fail(op, "the window must fit into the padded image", x=shape, window=window, padding=padding)
    P, Q = (H - window[0]) // stride[0] + 1, (W - window[1]) // stride[1] + 1
    if shape[0] * P * Q >= LIMIT:
        fail(op, "the result is too large", x=shape, window=window, padding=padding)
    return P, Q


def fraction(op: str, name: str, value: Any, one: bool = False) -> float:
    """`value` as a float in [0, 1), or [0, 1] where `one`."""
    number = real(op, name, value)
    if not (0 <= number < 1 or (one and number == 1)):
        fail(op, f"{name} must be in [0, 1{']' if one else ')'}", ArgumentError, **{name: value})
    return number


def real(op: str, name: str, value: Any) -> float:
    """`value` as a finite float."""
    try:
        number = value if type(value) is float else float(value) if is_number(value) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        fail(op, f"{name} must be a finite number", ArgumentError, **{name: repr(value)})
    return number


def is_number(value: Any) -> bool:
    """Whether `value` is a real number: not a bool, nor a span of time, which NumPy counts among the integers."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_, np.timedelta64))


def epsilon(op: str, value: Any) -> float:
    """The eps of a batch norm: a float that is positive and finite in float32 too, in which a device may add it."""
    number = real(op, "eps", value)
    if not _SMALLEST <= number <= _LARGEST:
        fail(op, "eps must be positive, and so in float32", ArgumentError, eps=value)
    return number


def flag(op: str, name: str, value: Any) -> bool:
    """`value`, True or False, as a bool."""
    if value is not True and value is not False and not isinstance(value, np.bool_):
        fail(op, f"{name} must be True or False", DtypeError, **{name: repr(value)})
    return bool(value)


def choice(op: str, name: str, value: C, choices: tuple[C, ...]) -> C:
    """`value`, which must be one of `choices`."""
    known = type(value) in {type(c) for c in choices} and value in choices
    expect(known, op, f"{name} must be one of {', '.join(map(str, choices))}", ArgumentError, **{name: value})
    return value


def axes(op: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """None, an int or a sequence of ints as a sorted tuple of distinct axes in 0 .. ndim-1."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    chosen = []
    for a in axis if isinstance(axis, (tuple, list)) else (axis,):
        a = integer(op, "axis", a, -ndim)
        if a >= ndim:
            fail(op, "axis must exist", axis=axis, ndim=ndim)
        chosen.append(a % ndim)
    if len(set(chosen)) != len(chosen):
        fail(op, "an axis may be named once", axis=axis)
    return tuple(sorted(chosen))
