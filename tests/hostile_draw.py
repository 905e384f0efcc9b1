"""How a hostile call of hostile.py is drawn: valid arrays and numbers, and what to put in their place."""

import math
import random
import warnings
from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np

import tinyres
from tinyres import Tensor
from tinyres.dtypes import wide

SEED = 20151210
HUGE = 1 << 24  # elements: arrays of so many are views, and not looked at
POOL = np.random.default_rng(0).standard_normal(1 << 16)
BF16 = np.dtype(ml_dtypes.bfloat16)
SIZES = (1, 1, 2, 2, 3, 4, 5, 8, 16, 17)


class Draw:
    """The choices of one call: the same for the same number, on every device."""

    def __init__(self, number, device):
        self.random = random.Random(SEED * 10**9 + number)
        self.device = tinyres.backend.get(device)
        self.dtype = np.dtype(self.pick((np.float32, np.float64)))
        self.inputs, self.outputs = [], []  # memory that the call must leave as it is, and that it may write to
        self.comparable = True
        self.tf32 = False  # what is float32 may be multiplied with 10 bits of mantissa

    def pick(self, choices):
        return choices[self.random.randrange(len(choices))]

    def chance(self, probability):
        return self.random.random() < probability

    def integer(self, low, high):
        return self.random.randint(low, high)

    def shape(self, rank, empty=False):
        shape = [self.pick(SIZES[:8] if rank > 2 else SIZES) for _ in range(rank)]
        if empty and shape and self.chance(0.05):
            shape[self.random.randrange(rank)] = 0
        return tuple(shape)

    def array(self, *shape, dtype=None, low=None, high=None):
        """An input: normal numbers, or integers of low .. high - 1."""
        n = math.prod(shape)
        start = self.random.randrange(len(POOL) - n)
        values = POOL[start : start + n].reshape(shape)
        if low is not None:
            values = low + np.floor(np.abs(values) * 1000) % (high - low)
        return self.keep(values.astype(dtype or self.dtype))

    def out(self, *shape, dtype=None):
        array = self.array(*shape, dtype=dtype)
        self.inputs = [kept for kept in self.inputs if kept is not array]
        self.outputs.append(array)
        return array

    def keep(self, array, like=None):
        """`array`, as memory of the kind that the array `like` is: written to, or (by default) not."""
        (self.outputs if like is not None and self.writes(like) else self.inputs).append(array)
        return array

    def writes(self, array):
        """Whether the call may write to `array`."""
        return any(array is out or np.may_share_memory(array, out) for out in self.outputs)

    def tensor(self, *shape):
        return Tensor(self.array(*shape), self.chance(0.8), self.device)

    def parameter(self, *shape):
        """A tensor that is float32 beside bfloat16."""
        return Tensor(self.array(*shape, dtype=wide(self.dtype)), self.chance(0.8), self.device)


# Hostile arrays ---------------------------------------------------------------------------------------------------
# Each function makes another array out of one. First those that ops must take as they come:


def _buffer(array, shape, d):
    """Memory for another layout of `array`, full of sevens; written to only where `array` may be."""
    return d.keep(np.full(shape, 7).astype(array.dtype), array)


def strided(array, d):
    view = _buffer(array, [2 * n for n in array.shape[::-1]], d).T[(*[slice(None, None, -2)] * array.ndim, ...)]
    view[...] = array
    return view


def fortran(array, d):
    view = _buffer(array, array.shape[::-1], d).T
    view[...] = array
    return view


def sliced(array, d):
    view = _buffer(array, [n + 2 for n in array.shape], d)[(*[slice(1, -1)] * array.ndim, ...)]
    view[...] = array
    return view


def read_only(array, d):
    view = array.view()
    view.flags.writeable = False
    return view


def overlapping(array, d):
    """Element (i, j, ...) is number i + j + ... of the buffer."""
    buffer = _buffer(array, (sum(array.shape) + 1,), d)
    buffer[...] = np.resize(array.ravel(), buffer.shape)
    d.comparable = d.comparable and not d.writes(buffer)
    return np.lib.stride_tricks.as_strided(buffer, array.shape, [array.itemsize] * array.ndim)


def repeated(array, d):
    """Strides of 0 along a few axes."""
    first = array[tuple(slice(0, 1) if d.chance(0.5) else slice(None) for _ in array.shape) + (...,)]
    return np.broadcast_to(first, array.shape) if array.size else array


def fine_steps(array, d):
    """Aligned, dense but for sizes of 1, whose strides are nonsense that NumPy allows."""
    strides = [40 if n == 1 else step for n, step in zip(array.shape, array.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(array, array.shape, strides)


def plant(*specials):
    def planted(array, d):
        if array.dtype.kind not in "fiu":
            return array
        limits = np.iinfo(array.dtype) if array.dtype.kind != "f" else None
        choices = (limits.max, limits.min, 5, 99) if limits else specials
        copy = _buffer(array, array.shape, d)
        copy[...] = array
        for _ in range(d.integer(1, 3) if copy.size else 0):
            copy.reshape(-1)[d.random.randrange(copy.size)] = d.pick(choices)
        return copy

    return planted


LAYOUTS = (strided, fortran, sliced, read_only, overlapping, repeated, fine_steps)
VALUES = (plant(np.nan), plant(np.inf, -np.inf), plant(0.0, -0.0, 1e-40), plant(np.nan, np.inf), plant(-5.0, 9.0))

# ... then those that do not fit.


def unaligned(array, d):
    if array.dtype.kind == "O":
        return array
    view = d.keep(np.zeros(array.nbytes + 1, np.uint8), array)[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def swapped(array, d):
    return d.keep(array.astype(array.dtype.newbyteorder()), array)


def masked(array, d):
    if array.dtype.names:  # no mask for those: NumPy has no fill value for a bfloat16 among others
        return array
    return np.ma.masked_array(array, array != array)


def record(array, d):
    fields = d.keep(np.zeros(array.shape, [("a", array.dtype), ("b", "u1")]), array)
    fields["a"] = array
    return fields if d.chance(0.5) else fields["a"]


_DTYPES = (
    *("?", "i1", "i4", "i8", "u1", "u4", "u8", "f2", "f4", "f8", "g", "c8", "c16"),
    *("bfloat16", "O", "U", "S", "M8[s]", "m8[s]"),
)


def another_dtype(array, d):
    dtype = d.pick(_DTYPES)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if array.dtype.kind not in "fiub":  # made by another mutation: not every value has another form
            return array
        times = np.nan_to_num(array).astype(np.int64) if dtype[0] in "Mm" else array
        return d.keep(times.astype(dtype), array)


def another_rank(array, d):
    how = d.integer(0, 6)
    if how == 0 or not array.ndim:
        return array[None]
    if how == 1:
        return array[..., None]
    if how == 2 and len(array):
        return array[0]
    if how == 3:
        return d.keep(np.array(0 if array.dtype.kind in "Mm" else 0.5, array.dtype), array)
    if how == 4:
        return array.reshape(-1)
    return array.reshape((1,) * (d.pick((16, 17, 32)) - array.ndim) + array.shape)


def another_size(array, d):
    shape = list(array.shape) or [1]
    axis = d.random.randrange(len(shape))
    shape[axis] = d.pick((0, 0, shape[axis] + 1, shape[axis] - 1, 2 * shape[axis], 33))
    return _buffer(array, [max(n, 0) for n in shape], d)


def empty(array, d):
    return _buffer(array, (0,) * max(array.ndim, 1), d)


def huge(array, d):
    """More elements than there is memory, or than an integer can count the bytes of, in the space of one."""
    first = array.reshape(-1)[:1] if array.size else d.keep(np.ones(1, array.dtype), array)
    rank = max(array.ndim, 2)
    if array.dtype.kind not in "f":
        return array  # images are read a few at a time, and so take as long as there are many
    shape = d.pick(((1,) * (rank - 2) + (2**20,) * 2, (1,) * rank + (2**57,)))
    return np.broadcast_to(first.reshape((1,) * len(shape)), shape)


MISFITS = (unaligned, swapped, masked, record, another_dtype, another_dtype, another_dtype,
           another_rank, another_rank, another_size, another_size, empty, huge)  # fmt: skip


class _Index:
    """An integer by its own account."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __repr__(self):
        return f"_Index({self.value})"


SCALARS = (
    None, "", "2", "cpu", b"x", True, False, 0, 1, 2, 3, 4, 7, -1, -2, -7, 2**31, 2**40, 2**62, 2**63, 2**64,
    2**100, -2**63, -2**31, 0.0, -0.0, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, -1.0, 1e-320, 1e39, 1e308, 10**400, math.nan,
    math.inf, -math.inf, 1j, np.int8(1), np.int64(2), np.uint8(3), np.uint64(2**64 - 1), np.float16(1),
    np.float32(0.5), np.float64(0.25), np.float64(np.nan), np.longdouble(0.5), np.bool_(True), np.bool_(False),
    np.complex64(1j), np.str_("a"), np.bytes_(b"a"), np.datetime64("2020-01-01"), np.timedelta64(1), Decimal("0.5"),
    Decimal("NaN"), Fraction(1, 2), _Index(1), _Index(2**70), (), (1,), (1, 1), (1, 2), (2, 1), (0, 0), (0, 1),
    (-1, 1), (1, 2, 3), (2**62, 2**62), (1.0, 1), (None, 1), ("1", 1), [1, 1], [], [[1]], [1, [2]],
    ((1, 1), (0, 2)), {}, {1: 2}, {1}, range(2), range(0), object(), len, int, ..., slice(None),
    slice(None, None, -2), slice(None, None, 0), slice("a"), slice(2**70), np.float32, np.array(1), np.array(0.5),
    np.array([1, 2]), np.array([0.5, 1.5]), np.array([None, 1]), np.array([]), np.array("a"),
    np.array([True, False]),
)  # fmt: skip


# A valid number as something else, which may be as good.
TYPES = (
    *(np.int8, np.uint64, np.int64, np.float16, np.float32, np.longdouble, np.bool_, np.complex64, np.str_),
    *(np.array, np.array, np.array),
    *(bool, int, float, complex, str, Fraction, Decimal, _Index, lambda n: -n, lambda n: n + 2**64, lambda n: [n]),
    *(lambda n: np.array([n]), lambda n: np.array(n, object), lambda n: slice(n, n), lambda n: n + 1, lambda n: n - 1),
)


def hostile_array(array, d):
    if array.size >= HUGE:
        return array
    kinds = d.random.choices((LAYOUTS, VALUES, MISFITS), (4, 2, 4))[0]
    return d.pick(kinds)(array, d)


def hostile(value, arguments, d):
    """Something in the place of the valid argument `value`."""
    if isinstance(value, Tensor):
        how = d.random.random()
        if how < 0.05:
            return d.pick([v for v in arguments.values() if isinstance(v, Tensor)])  # the same one twice
        if how < 0.10 and value.size < HUGE:
            elsewhere = "cpu" if d.device.name == "reference" else "reference"
            return tinyres.tensor(value.data, requires_grad=True, device=elsewhere)
        if how < 0.15:
            return value.data
        if how < 0.25:
            return d.pick(SCALARS)
        array = hostile_array(value.data, d)
        if how < 0.55 or type(array) is not np.ndarray or not array.flags.aligned:  # Tensor() takes what it is given
            return tinyres.tensor(array, requires_grad=d.chance(0.5), device=d.device)
        return Tensor(array, value.requires_grad and array.dtype.kind == "f", d.device)
    if isinstance(value, np.ndarray) and d.chance(0.85):
        if d.chance(0.1) and d.writes(value):  # the output lies over something else
            d.comparable = False
            d.outputs += d.inputs
            d.inputs = []
            return d.pick([v for v in arguments.values() if isinstance(v, np.ndarray)])
        nested = d.chance(0.05) and value.size < 10_000  # what repeats one element by strides of 0 may be of any size
        return value.tolist() if nested else hostile_array(value, d)
    if isinstance(value, (tuple, list)) and value and d.chance(0.6):
        items, place = list(value), d.random.randrange(len(value))
        how = d.integer(0, 4)
        if how == 0:
            del items[place]
        elif how == 1:
            items.insert(place, d.pick([*items, *SCALARS]))
        else:
            items[place] = hostile(items[place], {str(i): item for i, item in enumerate(items)}, d)
        return type(value)(items)
    if isinstance(value, (int, float)) and d.chance(0.5):
        try:
            with np.errstate(all="ignore"):
                return d.pick(TYPES)(value)
        except (OverflowError, TypeError, ValueError):
            return value  # an int8 is not -200
    choice = d.pick(SCALARS)
    if isinstance(choice, np.ndarray) and isinstance(value, np.ndarray):
        return d.keep(choice.copy(), value)  # the call may write to it, if to that
    return choice
