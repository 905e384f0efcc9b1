"""Hostile calls of everything public: drawn from a seed, run on a device and compared with the reference.

    python tests/hostile.py DEVICE FIRST COUNT    run calls FIRST .. FIRST + COUNT - 1; a report as JSON
    python tests/hostile.py DEVICE NUMBER         run one call; its arguments and its outcome

A call is a function of its number and nothing else. It starts from valid arguments, of which some are made hostile:
wrong ranks, dtypes, layouts, values, types. Then it either works, with the results of the device `reference`, or is
refused with the project's own error (a raw binding's ValueError or TypeError; a MemoryError where nothing else is
wrong than the size), and has changed no input. `tests/test_hostile.py` runs this as a process of its own, because
what it looks for includes crashes.
"""

import importlib
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np

import tinyres
from op_case import ULPS
from tinyres import Tensor, data, nn, ops, optim
from tinyres.backend import reference
from tinyres.backend.random import philox
from tinyres.errors import TinyresError
from tinyres.nn.module import Module

SEED = 20151210
SECONDS = 20  # for one call, before it counts as a hang
MEMORY = 4 << 30  # of addresses: what is absurdly large fails at once instead of filling the machine
HUGE = 1 << 24  # elements: such results are views, and not looked at
POOL = np.random.default_rng(0).standard_normal(1 << 16)
SIZES = (1, 1, 2, 2, 3, 4, 5, 8, 16, 17)


class Draw:
    """The choices of one call: the same for the same number, on every device."""

    def __init__(self, number, device):
        self.random = random.Random(SEED * 10**9 + number)
        self.device = tinyres.backend.get(device)
        self.dtype = np.dtype(self.pick((np.float32, np.float64)))
        self.inputs, self.outputs = [], []  # memory that the call must leave as it is, and that it may write to
        self.comparable = True

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


def _plant(*specials):
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
VALUES = (_plant(np.nan), _plant(np.inf, -np.inf), _plant(0.0, -0.0, 1e-40), _plant(np.nan, np.inf), _plant(-5.0, 9.0))

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
    return np.ma.masked_array(array, array != array)


def record(array, d):
    fields = d.keep(np.zeros(array.shape, [("a", array.dtype), ("b", "u1")]), array)
    fields["a"] = array
    return fields if d.chance(0.5) else fields["a"]


_DTYPES = ("?", "i1", "i4", "i8", "u1", "u4", "u8", "f2", "f4", "f8", "g", "c8", "c16", "O", "U", "S", "M8[s]", "m8[s]")


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
        return d.keep(np.array(0.5, array.dtype), array)
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
        return value.tolist() if d.chance(0.05) else hostile_array(value, d)
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
    return d.pick(SCALARS)


# What is called ---------------------------------------------------------------------------------------------------
# By name: the valid arguments of a call, and how it is made: (arguments, draw) -> arrays to be compared.


def _upstream(y, d):
    """A gradient for y, in one layout or another."""
    if y.size > 1 << 16:
        return np.broadcast_to(y.dtype.type(0.5), y.shape)
    dy = d.array(*y.shape, dtype=y.dtype)
    return d.pick((strided, repeated, overlapping, _plant(np.nan, np.inf)))(dy, d) if d.chance(0.3) else dy


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def results(y, arguments, d, *more):
    """y, and the gradients of all Tensors among the arguments and more."""
    if not isinstance(y, Tensor):
        return []  # of an Identity
    arrays = [y.data]
    leaves = [x for x in {id(x): x for x in (*_tensors([*arguments.values()]), *more)}.values() if x.requires_grad]
    if y.requires_grad and y._node is not None:
        y.backward(_upstream(y, d))
        arrays += [x.grad for x in leaves if x.grad is not None]
    return arrays


def _op(name):
    def run(arguments, d):
        y = getattr(ops, name)(**arguments)
        running = [arguments.get("running_mean"), arguments.get("running_var")]
        return results(y, arguments, d) + [a for a in running if isinstance(a, np.ndarray)]

    return run


def _same(*names):
    def arguments(d):
        shape = d.shape(d.integer(0, 4), empty=True)
        return {name: d.tensor(*shape) for name in names}

    return arguments


def _broadcast(d):
    shape = d.shape(d.integer(0, 4), empty=True)
    less = [tuple(1 if d.chance(0.2) else n for n in shape) for _ in range(2)]
    a, b = (s[d.integer(0, len(s)) if d.chance(0.2) else 0 :] for s in less)
    return {"a": d.tensor(*a), "b": d.tensor(*b)}


def _reduction(d):
    x = d.tensor(*d.shape(d.integer(0, 4), empty=True))
    axes = d.random.sample(range(x.ndim), d.integer(0, x.ndim))
    return {"x": x, "axis": d.pick((None, tuple(axes), *axes)), "keepdims": d.chance(0.5)}


def _reshape(d):
    x = d.tensor(*d.shape(d.integer(0, 4), empty=True))
    return {"x": x, "shape": d.pick((x.shape[::-1], (x.size,), (1, *x.shape), (-1,) if x.size else (0,)))}


def _getitem(d):
    x = d.tensor(*d.shape(d.integer(1, 4)))
    if d.chance(0.5):
        return {"x": x, "index": d.pick((0, -1))}
    choices = (0, -1, slice(None), slice(None, None, -1), slice(1, None, 2), slice(5, 2), slice(-2, None))
    index = [d.pick(choices) for _ in range(d.integer(0, x.ndim))]
    index.insert(d.integer(0, len(index)), d.pick((None, ..., slice(None, 1) if len(index) < x.ndim else None)))
    return {"x": x, "index": tuple(index)}


def _concatenate(d):
    shape = list(d.shape(d.integer(1, 4)))
    axis, tensors = d.random.randrange(len(shape)), []
    for _ in range(d.integer(1, 3)):
        shape[axis] = d.pick((0, *SIZES))
        tensors.append(d.tensor(*shape))
    return {"tensors": tensors, "axis": axis}


def _matmul(d):
    M, K, N = d.pick(SIZES), d.pick((0, *SIZES)), d.pick(SIZES)
    lead = d.pick(((), (), (2,), (2, 3)))
    a, b = d.pick(((lead, ()), ((), lead), (lead, lead)))
    return {"a": d.tensor(*a, M, K), "b": d.tensor(*b, K, N)}


def _side(d, pool):
    """(size, window, stride, padding) of one side of an image."""
    window, stride = d.pick((1, 1, 2, 3, 3, 3, 4)), d.pick((1, 1, 2, 3))
    padding = d.integer(0, window // 2 if pool else 2)
    return max(1, window - 2 * padding) + d.integer(0, 6), window, stride, padding


def _window(d, pool):
    """N, H, W, C, then window, stride and padding as pairs (or as one number)."""
    (H, *h), (W, *w) = _side(d, pool), _side(d, pool)
    pairs = [a if a == b and d.chance(0.5) else (a, b) for a, b in zip(h, w, strict=True)]
    return (d.integer(1, 3), H, W, d.pick((1, 2, 3, 16, 17))), *pairs


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def _output(shape, window, stride, padding):
    return reference.output_size(shape, _pair(window), _pair(stride), _pair(padding))


def _conv2d(residual=False, bias=False):
    def arguments(d):
        shape, window, stride, padding = _window(d, pool=False)
        K = d.pick((1, 2, 4, 16, 17))
        b = {"b": d.tensor(K)} if bias or d.chance(0.5) else {}
        y = {"residual": d.tensor(shape[0], *_output(shape, window, stride, padding), K)} if residual else {}
        w = d.tensor(*_pair(window), shape[3], K)
        return {"x": d.tensor(*shape), **y, "w": w, **b, "stride": stride, "padding": padding}

    return arguments


def _pool(d):
    shape, window, stride, padding = _window(d, pool=True)
    return {"x": d.tensor(*shape), "window": window, "stride": stride, "padding": padding}


def _batch_norm(residual=False):
    def arguments(d):
        shape = (*d.shape(d.integer(1, 3)), d.pick((1, 3, 16, 17)))
        shape = (max(2, shape[0]), *shape[1:])
        C = shape[-1:]
        training = d.chance(0.6)
        running = {"running_mean": d.out(*C), "running_var": d.out(*C)}
        np.abs(running["running_var"], out=running["running_var"])
        if training and d.chance(0.3):
            running = dict.fromkeys(running)
        y = {"residual": d.tensor(*shape)} if residual else {}
        settings = {"training": training, "momentum": d.pick((0.1, 0, 1)), "eps": d.pick((1e-5, 0.1))}
        return {"x": d.tensor(*shape), **y, "gamma": d.tensor(*C), "beta": d.tensor(*C), **running, **settings}

    return arguments


def _cross_entropy(d):
    N, K = d.pick(SIZES), d.pick(SIZES)
    labels = d.array(N, dtype=d.pick((np.int64, np.int64, np.int32, np.uint8)), low=0, high=K)
    return {"logits": d.tensor(N, K), "labels": labels, "label_smoothing": d.pick((0.0, 0.1, 1.0))}


OPS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "maximum"), _broadcast),
    **dict.fromkeys(("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu"), _same("x")),
    **dict.fromkeys(("sum", "mean", "max"), _reduction),
    "add_relu": _same("a", "b"),
    "dropout": lambda d: {**_same("x")(d), "p": d.pick((0, 0.1, 0.5)), "training": d.chance(0.8)},
    "reshape": _reshape,
    "flatten": lambda d: {"x": d.tensor(*d.shape(4, empty=True)), "start": d.integer(0, 3)},
    "transpose": lambda d: {"x": d.tensor(*d.shape(3, empty=True)), "axes": d.pick((None, (2, 0, 1), [-1, 1, 0]))},
    "getitem": _getitem,
    "pad": lambda d: {"x": d.tensor(*d.shape(2)), "widths": ((d.integer(0, 2), 1), [0, d.integer(0, 3)]), "value": 0.5},
    "concatenate": _concatenate,
    "matmul": _matmul,
    "linear": lambda d: {"x": d.tensor(2, 3), "w": d.tensor(3, 5), **({"b": d.tensor(5)} if d.chance(0.5) else {})},
    "conv2d": _conv2d(),
    "conv2d_relu": _conv2d(bias=True),
    "conv2d_add_relu": _conv2d(residual=True, bias=True),
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "global_avg_pool2d": lambda d: {"x": d.tensor(*d.shape(4))},
    "batch_norm": _batch_norm(),
    "batch_norm_relu": _batch_norm(),
    "batch_norm_add_relu": _batch_norm(residual=True),
    "cross_entropy": _cross_entropy,
}  # fmt: skip


def _layer(name, arguments, inputs=("x",)):
    """The constructor's arguments and the inputs, in one; `parts` are positional."""

    def run(arguments, d):
        settings = {key: value for key, value in arguments.items() if key not in inputs}
        parts = settings.pop("parts", ())
        module = getattr(nn, name)(*(parts if isinstance(parts, (tuple, list)) else [parts]), **settings)
        y = module.train(d.chance(0.5))(*[arguments[key] for key in inputs])
        return results(y, arguments, d, *module.parameters()) + [*module.buffers()]

    return arguments, run


def _function(name, arguments):
    """A function that makes a module, called on x."""

    def run(arguments, d):
        made = getattr(nn, name)(**{key: value for key, value in arguments.items() if key != "x"})
        y = arguments["x"] if made is None else made(arguments["x"])
        return results(y, arguments, d, *(made.parameters() if made is not None else ()))

    return arguments, run


def _image(d, C=None):
    """Activations in float32, as the parameters of layers are."""
    d.dtype = np.dtype(np.float32)
    return d.tensor(d.integer(2, 4), d.integer(3, 6), d.integer(3, 6), C or d.pick((1, 3, 16)))


def _norm(d, *inputs):
    x = _image(d)
    settings = {"channels": x.shape[3], "momentum": 0.1, "eps": 1e-5, "group": d.pick((None, None, 1, 2))}
    return {**settings, "x": x, **{name: d.tensor(*x.shape) for name in inputs}}


def _conv(d, bias=None, residual=False):
    x, K = _image(d), d.pick((1, 4, 16))
    settings = {"in_channels": x.shape[3], "out_channels": K, "window": 3, "stride": 1, "padding": 1}
    settings["bias"] = d.chance(0.5) if bias is None else bias
    return {**settings, "x": x, **({"residual": d.tensor(*x.shape[:3], K)} if residual else {})}


def _parts(d):
    return [nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]


def _residual(d):
    pre, shortcut = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.shortcut("C", 3, 3, 1)
    paths = {"shortcut": d.pick((None, shortcut)), "activation": d.pick((None, nn.ReLU())), "pre": d.pick((None, pre))}
    return {"parts": _parts(d), **paths, "join": d.pick((None, nn.ConstantScale(0.5, 0.5))), "x": _image(d, 3)}


def _gate(d):
    branch = _image(d, 3)
    return {"channels": 3, "bias": -6.0, "exclusive": True, "branch": branch, "shortcut": d.tensor(*branch.shape)}


def _scale(d):
    branch = _image(d)
    scales = {"shortcut_scale": 0.5, "branch_scale": 2}
    return {**scales, "branch": branch, "shortcut": d.tensor(*branch.shape)}


def _pooling(d):
    return {"window": 2, "stride": d.pick((None, 1, (2, 1))), "padding": d.pick((0, (1, 0))), "x": _image(d)}


def _model(d):
    return {"model": nn.Sequential(nn.Residual(*_parts(d)), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU()),
            "x": _image(d, 3)}  # fmt: skip


def _parameter(d):
    return {"array": d.array(*d.shape(2)), "device": d.device.name}


LAYERS = {
    "Conv2d": _layer("Conv2d", _conv),
    "Conv2dReLU": _layer("Conv2dReLU", lambda d: _conv(d, bias=True)),
    "Conv2dAddReLU": _layer("Conv2dAddReLU", lambda d: _conv(d, True, residual=True), ("x", "residual")),
    "BatchNorm2d": _layer("BatchNorm2d", _norm),
    "BatchNormReLU2d": _layer("BatchNormReLU2d", _norm),
    "BatchNormAddReLU2d": _layer("BatchNormAddReLU2d", lambda d: _norm(d, "residual"), ("x", "residual")),
    "Linear": _layer("Linear", lambda d: {"in_features": 3, "out_features": 5, "bias": d.chance(0.5),
                                          "x": _image(d, 3).reshape(-1, 3).detach()}),
    "MaxPool2d": _layer("MaxPool2d", _pooling),
    "AvgPool2d": _layer("AvgPool2d", _pooling),
    **{name: _layer(name, lambda d: {"x": _image(d)}) for name in ("GlobalAvgPool2d", "Flatten", "ReLU", "Identity")},
    "Dropout": _layer("Dropout", lambda d: {"p": 0.5, "x": _image(d)}),
    "Sequential": _layer("Sequential", lambda d: {"parts": _parts(d), "x": _image(d, 3)}),
    "Residual": _layer("Residual", _residual),
    "FusedResidual": _layer("FusedResidual", lambda d: {**_residual(d), "activation": None, "join": None}),
    "Gate": _layer("Gate", _gate, ("branch", "shortcut")),
    "ConstantScale": _layer("ConstantScale", _scale, ("branch", "shortcut")),
    "ZeroPadShortcut": _layer("ZeroPadShortcut", lambda d: {"in_channels": 3, "out_channels": 5, "stride": 2,
                                                            "x": _image(d, 3)}),
    "shortcut": _function("shortcut", lambda d: {"option": d.pick("ABC"), "in_channels": 3, "out_channels": 4,
                                                 "stride": 2, "norm": d.chance(0.5), "x": _image(d, 3)}),
    "fuse": _function("fuse", _model),
    "fold_batch_norm": _function("fold_batch_norm", _model),
    "Parameter": (_parameter, lambda arguments, d: [nn.Parameter(**arguments).data]),
}  # fmt: skip


def _sgd(d):
    shapes = [d.shape(d.integer(0, 3)) for _ in range(d.integer(1, 3))]
    params = [Tensor(d.out(*shape), True, d.device) for shape in shapes]
    settings = {"lr": 0.1, "momentum": d.pick((0, 0.9)), "weight_decay": d.pick((0, 0.01)), "nesterov": False}
    return {"params": params, "gradients": [d.array(*shape) for shape in shapes], **settings}


def _run_sgd(arguments, d):
    settings = dict(arguments)
    gradients = settings.pop("gradients")
    optimizer = optim.SGD(**settings)
    for i, p in enumerate(optimizer.params):
        p.grad = gradients[i] if isinstance(gradients, (list, tuple)) and i < len(gradients) else gradients
    optimizer.step()
    optimizer.step()
    return [p.data for p in optimizer.params]


def _schedule(name):
    def run(arguments, d):
        schedule = getattr(optim.schedules, name)(**arguments)
        return [np.array([schedule(step) for step in range(9)])]

    return run


OPTIM = {
    "SGD": (_sgd, _run_sgd),
    "without_norm_decay": (lambda d: {"model": nn.Sequential(*_parts(d))},
                           lambda arguments, d: [p.data for group in optim.without_norm_decay(**arguments)
                                                 for p in group["params"]]),
    "schedules.step_decay": (lambda d: {"lr": 0.1, "milestones": [2, 4], "factor": 0.1},
                             _schedule("step_decay")),
    "schedules.one_cycle": (lambda d: {"lr": 0.1, "steps": 7, "warmup": 0.3},
                            _schedule("one_cycle")),
}  # fmt: skip


def _loader(d):
    L, H, W, C = shape = d.integer(3, 9), d.integer(1, 9), d.integer(1, 9), d.pick((1, 3))
    images, labels = d.array(*shape, dtype=np.uint8, low=0, high=256), d.array(L, dtype=np.int64, low=0, high=10)
    mean, scale = d.pick((0.0, d.array(C), d.array(H, W, C))), d.pick((1 / 64, d.array(C)))
    flags = {"augment": d.chance(0.5), "shuffle": d.chance(0.5)}
    return {"images": images, "labels": labels, "batch_size": d.integer(1, 3), "seed": d.integer(0, 9), "mean": mean,
            "scale": scale, **flags, "device": d.device.name, "step": d.integer(0, 20)}  # fmt: skip


def _run_loader(arguments, d):
    settings = dict(arguments)
    step = settings.pop("step")
    loader = data.Loader(**settings)
    return [*loader.batch(step), *itertools.chain(*loader.epoch())]


def _run_held_out(arguments, d):
    images, labels = np.zeros((9, 2, 2, 1), np.uint8), np.arange(9)
    dataset = data.Dataset("shapes10", images, labels, images, labels, [], "")
    return [*data.held_out(dataset, **arguments)[1:5]]


DATA = {
    "Loader": (_loader, _run_loader),
    "statistics": (lambda d: {"images": d.array(*d.shape(4), dtype=np.uint8, low=0, high=256)},
                   lambda arguments, d: [*data.statistics(**arguments)]),
    "held_out": (lambda d: {"count": d.integer(1, 8)}, _run_held_out),
}  # fmt: skip


def _tensor(d):
    array = d.array(*d.shape(2, empty=True), dtype=d.pick(("f4", "f8", "i8", "?")))
    gradient = array.dtype.kind == "f" and d.chance(0.5)
    return {"array": array, "requires_grad": gradient, "dtype": d.pick((None, np.float32)), "device": d.device.name}


# Raw bindings -----------------------------------------------------------------------------------------------------
# By name: the arguments; which of them are written; and what the reference has in their place.

R = tinyres.backend.get("reference").kernels


def _raw(outputs, arguments, want):
    return outputs.split(), arguments, want


def _raw_window(d, pool=False):
    shape, *pairs = _window(d, pool)
    window, stride, padding = map(_pair, pairs)
    K = shape[3] if pool else d.pick((1, 4, 17))
    y = shape[0], *_output(shape, window, stride, padding), K
    return shape, (*window, shape[3], K), y, {"stride": stride, "padding": padding}


def _raw_conv(d):
    x, w, y, geometry = _raw_window(d)
    return {"y": d.out(*y), "x": d.array(*x), "w": d.array(*w), **geometry, "algorithm": d.pick(_ALGORITHMS)}


def _raw_conv_bias(d):
    x, w, y, geometry = _raw_window(d)
    residual = d.array(*y) if d.chance(0.5) else None
    arrays = {"y": d.out(*y), "x": d.array(*x), "w": d.array(*w), "b": d.array(w[3]), "residual": residual}
    return {**arrays, "relu": d.chance(0.5), **geometry, "algorithm": d.pick(_ALGORITHMS)}


def _raw_conv_input(d):
    x, w, y, geometry = _raw_window(d)
    arrays = {"dx": d.out(*x), "dy": d.array(*y), "w": d.array(*w)}
    return {**arrays, **geometry, "algorithm": d.pick(_ALGORITHMS), "add": d.chance(0.5)}


def _raw_conv_weight(d):
    x, w, y, geometry = _raw_window(d)
    arrays = {"dw": d.out(*w), "dy": d.array(*y), "x": d.array(*x)}
    return {**arrays, **geometry, "algorithm": d.pick(_ALGORITHMS)}


_ALGORITHMS = ("auto", "naive", "direct", "tiled", "winograd")


def _pools(forward, argmax):
    def arguments(d):
        x, w, y, geometry = _raw_window(d, pool=True)
        window = {"window": w[:2], **geometry}
        if forward:
            places = {"argmax": d.out(*y, dtype=np.int32)} if argmax else {}
            return {"y": d.out(*y), **places, "x": d.array(*x), **window}
        chosen = R.max_pool2d_forward(d.array(*x), *window.values())[1]
        return {"dx": d.out(*x), "dy": d.array(*y), **({"argmax": d.keep(chosen)} if argmax else {}), **window}

    return arguments


def _normed(d):
    return (*d.shape(d.integer(1, 2)), d.pick((1, 3, 16, 17)))


def _positive(d, *shape):
    array = d.array(*shape)
    return np.abs(array, out=array)


def _raw_norm(d):
    x = _normed(d)
    x = (max(2, x[0]), *x[1:])
    C = x[-1]
    running = [d.out(C), d.out(C)] if d.chance(0.7) else [None, None]
    return {
        "y": d.out(*x), "mean": d.out(C), "inv_std": d.out(C), "running_mean": running[0], "running_var": running[1],
        "x": d.array(*x), "gamma": d.array(C), "beta": d.array(C), "residual": d.pick((None, d.array(*x))),
        "relu": d.chance(0.5), "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip


def _joined(y, residual, relu):
    y = y if residual is None else R.add(y, residual)
    return R.relu(y) if relu else y


def _want_norm(y, mean, inv_std, running_mean, running_var, x, gamma, beta, residual, relu, momentum, eps):
    y, *statistics = R.batch_norm_forward(x, gamma, beta, running_mean, running_var, float(momentum), float(eps))
    return [_joined(y, residual, relu), *statistics, running_mean, running_var]


def _raw_norm_backward(d):
    x = _normed(d)
    C, mask = x[-1], d.pick(("none", "y", "beta"))
    return {
        "dx": d.out(*x), "dresidual": d.out(*x) if mask == "y" else None, "dgamma": d.out(C), "dbeta": d.out(C),
        "dy": d.array(*x), "x": d.array(*x), "y": d.array(*x) if mask == "y" else None, "gamma": d.array(C),
        "beta": d.array(C) if mask == "beta" else None, "mean": d.array(C), "inv_std": _positive(d, C),
    }  # fmt: skip


def _want_norm_backward(dx, dresidual, dgamma, dbeta, dy, x, y, gamma, beta, mean, inv_std):
    if beta is not None:
        dx, dgamma, dbeta = R.batch_norm_relu_backward(dy, x, gamma, beta, mean, inv_std)
        return [dx, None, dgamma, dbeta]
    dz = dy if y is None else R.relu_backward(dy, y)
    dx, dgamma, dbeta = R.batch_norm_backward(dz, x, gamma, mean, inv_std)
    return [dx, None if dresidual is None else dz, dgamma, dbeta]


def _raw_inference(d):
    x = _normed(d)
    parameters = {name: d.array(x[-1]) for name in ("gamma", "beta", "mean")}
    residual = d.array(*x) if d.chance(0.5) else None
    return {"y": d.out(*x), "x": d.array(*x), **parameters, "var": _positive(d, x[-1]), "residual": residual,
            "relu": d.chance(0.5), "eps": 1e-5}  # fmt: skip


def _raw_inference_backward(d):
    x = _normed(d)
    outputs = {"dx": d.out(*x), "dgamma": d.out(x[-1]), "dbeta": d.out(x[-1])}
    arrays = {"dy": d.array(*x), "x": d.array(*x), "gamma": d.array(x[-1]), "mean": d.array(x[-1])}
    return {**outputs, **arrays, "var": _positive(d, x[-1]), "eps": 1e-5}


def _raw_matmul(d):
    M, K, N = d.pick(SIZES), d.pick((0, *SIZES)), d.pick(SIZES)
    lead = d.pick(((), (3,)))
    return {"y": d.out(*lead, M, N), "a": d.array(*lead, M, K), "b": d.array(*lead, K, N)}


def _raw_loss(d):
    N, K = d.pick(SIZES), d.pick(SIZES)
    arrays = {"loss": d.out(), "dlogits": d.out(N, K), "logits": d.array(N, K)}
    return {**arrays, "labels": d.array(N, dtype=np.int64, low=0, high=K), "smoothing": d.pick((0.0, 0.1, 1))}


def _raw_sgd(d):
    shapes = [d.shape(d.integer(0, 2), empty=True) for _ in range(d.integer(1, 3))]
    momentum = d.pick((0, 0.9))
    velocities = [d.out(*shape) for shape in shapes] if momentum else None
    weights, gradients = [d.out(*shape) for shape in shapes], [d.array(*shape) for shape in shapes]
    return {"weights": weights, "velocities": velocities, "gradients": gradients,
            "decays": [0.01] * len(shapes), "lr": 0.1, "momentum": momentum, "nesterov": d.chance(0.5)}  # fmt: skip


def _want_sgd(weights, velocities, gradients, decays, lr, momentum, nesterov):
    R.sgd(weights, velocities, gradients, [float(decay) for decay in decays], float(lr), float(momentum), nesterov)
    return [weights, velocities]


def _raw_augment(d):
    N, L, H, W, C = (d.integer(1, 4) for _ in range(5))
    d.dtype = np.dtype(np.float32)
    moves = {name: d.array(N, dtype=np.int32, low=-4, high=5) for name in ("top", "left")}
    return {
        "x": d.out(N, H, W, C), "images": d.array(L, H, W, C, dtype=np.uint8, low=0, high=256),
        "index": d.array(N, dtype=np.int64, low=0, high=L), **moves, "flip": d.array(N, dtype=np.uint8, low=0, high=2),
        "mean": d.array(H, W, C), "scale": d.array(C),
    }  # fmt: skip


def _named(names, *arrays):
    """y, and arrays of its shape, after the name of an operation."""

    def arguments(d):
        shape = d.shape(d.integer(0, 3), empty=True)
        first = {"name": d.pick(names)} if names else {}
        outputs = {name: d.out(*shape) for name in arrays[0].split()}
        return {**first, **outputs, **{name: d.array(*shape) for name in arrays[1].split()}}

    return arguments


def _rows(*order):
    """A reduction of the middle axis: each argument is a whole array "x", or what is left of one."""

    def arguments(d):
        x = d.shape(3)
        shapes = {"y": (x[0], x[2]), "x": x, "dx": x, "dy": (x[0], x[2])}
        return {name: (d.out if i == 0 else d.array)(*shapes[name]) for i, name in enumerate(order)}

    return arguments


_BINARY = ("add", "sub", "mul", "div", "pow", "maximum")
_UNARY = ("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu")
_MASK = ("sqrt", "sigmoid", "tanh", "relu")


def _pixels(d, *names):
    x = d.shape(4)
    shapes = {"x": x, "y": (x[0], x[3]), "dx": x, "dy": (x[0], x[3])}
    return {name: (d.out if i == 0 else d.array)(*shapes[name]) for i, name in enumerate(names)}


def _ints(pair):
    return tuple(int(n) for n in pair)


RAW = {
    "binary": _raw(
        "y", _named(_BINARY, "y", "a b"), lambda name, y, a, b: [R.broadcast_to(getattr(R, name)(a, b), y.shape)]
    ),
    "unary": _raw("y", _named(_UNARY, "y", "x"), lambda name, y, x: [getattr(R, name)(x)]),
    "unary_backward": _raw(
        "dx", _named(_MASK, "dx", "dy y"), lambda name, dx, dy, y: [getattr(R, f"{name}_backward")(dy, y)]
    ),
    "add_relu": _raw("y", _named((), "y", "a b"), lambda y, a, b: [R.add_relu(a, b)]),
    "maximum_backward": _raw(
        "da db", _named((), "da db", "dy a b"), lambda da, db, dy, a, b: [*R.maximum_backward(dy, a, b)]
    ),
    "pow_backward": _raw(
        "da db", _named((), "da db", "dy a b y"), lambda da, db, dy, a, b, y: [*R.pow_backward(dy, a, b, y)]
    ),
    "dropout": _raw(
        "y",
        lambda d: {**_named((), "y", "x")(d), "p": d.pick((0, 0.5)), "key": d.pick((0, 2**64 - 1)), "draw": 3},
        lambda y, x, p, key, draw: [R.dropout(x, float(p), (int(key), int(draw)))],
    ),
    "copy": _raw("y", _named((), "y", "a"), lambda y, a: [R.broadcast_to(a, y.shape)]),
    "fill": _raw(
        "y",
        lambda d: {**_named((), "y", "")(d), "value": 0.5},
        lambda y, value: [np.full(y.shape, float(value), y.dtype)],
    ),
    "sum": _raw("y", _rows("y", "x"), lambda y, x: [R.sum(x, (1,), False)]),
    "max": _raw("y", _rows("y", "x"), lambda y, x: [R.max(x, (1,), False)]),
    "max_backward": _raw(
        "dx",
        _rows("dx", "dy", "x", "y"),
        lambda dx, dy, x, y: [R.max_backward(dy[:, None], x, y[:, None], (1,))],
    ),
    "matmul": _raw("y", _raw_matmul, lambda y, a, b: [R.matmul(a, b)]),
    "conv2d_forward": _raw(
        "y", _raw_conv, lambda y, x, w, s, p, algorithm: [R.conv2d_forward(x, w, _ints(s), _ints(p))]
    ),
    "conv2d_bias_forward": _raw(
        "y",
        _raw_conv_bias,
        lambda y, x, w, b, residual, relu, s, p, algorithm: [
            R.conv2d_bias_forward(x, w, b, residual, bool(relu), _ints(s), _ints(p))
        ],
    ),
    "conv2d_backward_input": _raw(
        "dx",
        _raw_conv_input,
        lambda dx, dy, w, s, p, algorithm, add: [
            R.conv2d_backward_input(dy, w, dx.shape, _ints(s), _ints(p), dx if add else None)
        ],
    ),
    "conv2d_backward_weight": _raw(
        "dw",
        _raw_conv_weight,
        lambda dw, dy, x, s, p, algorithm: [R.conv2d_backward_weight(dy, x, dw.shape, _ints(s), _ints(p))],
    ),
    "batch_norm_forward": _raw("y mean inv_std running_mean running_var", _raw_norm, _want_norm),
    "batch_norm_backward": _raw("dx dresidual dgamma dbeta", _raw_norm_backward, _want_norm_backward),
    "batch_norm_inference": _raw(
        "y",
        _raw_inference,
        lambda y, x, gamma, beta, mean, var, residual, relu, eps: [
            _joined(R.batch_norm_inference(x, gamma, beta, mean, var, float(eps)), residual, relu)
        ],
    ),
    "batch_norm_inference_backward": _raw(
        "dx dgamma dbeta",
        _raw_inference_backward,
        lambda dx, dgamma, dbeta, dy, x, gamma, mean, var, eps: [
            *R.batch_norm_inference_backward(dy, x, gamma, mean, var, float(eps))
        ],
    ),
    "max_pool2d_forward": _raw(
        "y argmax",
        _pools(forward=True, argmax=True),
        lambda y, argmax, x, *window: [*R.max_pool2d_forward(x, *map(_ints, window))],
    ),
    "max_pool2d_backward": _raw(
        "dx",
        _pools(forward=False, argmax=True),
        lambda dx, dy, argmax, *window: [R.max_pool2d_backward(dy, argmax, dx.shape, *map(_ints, window))],
    ),
    "avg_pool2d_forward": _raw(
        "y",
        _pools(forward=True, argmax=False),
        lambda y, x, *window: [R.avg_pool2d_forward(x, *map(_ints, window))],
    ),
    "avg_pool2d_backward": _raw(
        "dx",
        _pools(forward=False, argmax=False),
        lambda dx, dy, *window: [R.avg_pool2d_backward(dy, dx.shape, *map(_ints, window))],
    ),
    "global_avg_pool2d_forward": _raw(
        "y", lambda d: _pixels(d, "y", "x"), lambda y, x: [R.global_avg_pool2d_forward(x)]
    ),
    "global_avg_pool2d_backward": _raw(
        "dx", lambda d: _pixels(d, "dx", "dy"), lambda dx, dy: [R.global_avg_pool2d_backward(dy, dx.shape)]
    ),
    "cross_entropy": _raw(
        "loss dlogits",
        _raw_loss,
        lambda loss, dlogits, logits, labels, smoothing: [*R.cross_entropy(logits, labels, float(smoothing))],
    ),
    "sgd": _raw("weights velocities", _raw_sgd, _want_sgd),
    "augment": _raw("x", _raw_augment, lambda x, *arguments: [R.augment(*arguments).astype(x.dtype)]),
    # of the CPU alone
    "philox": _raw(
        "out",
        lambda d: {"out": d.out(d.integer(0, 9), dtype=np.uint32), "key": 2**64 - 1, "draw": 7},
        lambda out, key, draw: [np.resize(philox(int(key), int(draw), -(-out.size // 4)), out.shape)],
    ),
    "empty": _raw("", lambda d: {"shape": d.shape(d.integer(0, 3), empty=True), "dtype": "f4"}, lambda *_: []),
    "set_threads": _raw("", lambda d: {"count": d.integer(0, 4)}, lambda *_: []),
    **dict.fromkeys(
        ("isa", "isas", "threads", "default_threads", "memory_stats", "memory_reset_peak", "memory_release"),
        _raw("", lambda d: {}, lambda: []),
    ),
}


def _binding(extension, name):
    outputs, arguments, want = RAW[name]

    def run(arguments, d):
        if d.device.name == "reference":
            plain = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments.values()]
            return _flat(want(*plain))
        getattr(extension, name)(*arguments.values())
        return _flat(arguments[key] for key in outputs)

    return arguments, run


def _flat(arrays):
    """The arrays among values that may be lists or None."""
    for value in arrays:
        if isinstance(value, np.ndarray):
            yield value
        elif value is not None:
            yield from _flat(value)


# Running ----------------------------------------------------------------------------------------------------------


def public(device):
    """The names of everything that must have hostile calls, as the namespaces list them."""
    extension = importlib.import_module("tinyres._emulated" if device == "emulated" else "tinyres._cpu")
    names = [f"ops.{name}" for name in ops.__all__]
    names += [f"nn.{name}" for name in nn.__all__ if name not in ("Module", "init")]  # no op of its own; no arguments
    for name, value in vars(optim).items():
        if getattr(value, "__module__", None) == optim.__name__ and not name.startswith("_"):
            members = [f".{member}" for member in vars(value) if member[0] != "_"] if name == "schedules" else [""]
            names += [f"optim.{name}{member}" for member in members]
    # Those that read files, or draw too many images, have tests of their own.
    names += [f"data.{name}" for name in data.__all__ if name not in ("NAMES", "Dataset", "load", "shapes10")]
    # `connect` is how the adapter introduces itself, not a kernel.
    raw = {name for name, value in vars(extension).items() if name[0] != "_" and callable(value)} - {"connect"}
    return names + ["tensor"] + [f"raw.{name}" for name in sorted(raw)]


def targets(device):
    """By name, (arguments, run, errors) of everything that has hostile calls."""
    extension = importlib.import_module("tinyres._emulated" if device == "emulated" else "tinyres._cpu")
    own = {f"ops.{name}": (arguments, _op(name)) for name, arguments in OPS.items()}
    own |= {f"nn.{name}": layer for name, layer in LAYERS.items()}
    own |= {f"optim.{name}": target for name, target in OPTIM.items()}
    own |= {f"data.{name}": target for name, target in DATA.items()}
    own["tensor"] = _tensor, lambda arguments, d: [tinyres.tensor(**arguments).data]
    raw = {f"raw.{name}": _binding(extension, name) for name in RAW if hasattr(extension, name)}
    return {name: (*target, TinyresError) for name, target in own.items()} | {
        name: (*target, (ValueError, TypeError)) for name, target in raw.items()
    }


def drawn(number, device, target, arguments=None):
    """The Draw, and the arguments of call `number`, a few of them hostile; into `arguments` as far as one came."""
    d = Draw(number, device)
    arguments = {} if arguments is None else arguments
    arguments.update(target[0](d))
    for _ in range(d.random.choices((0, 1, 2), (2, 6, 2))[0]):
        name = d.pick([*arguments, "extra"] if not arguments else [*arguments])
        arguments[name] = hostile(arguments.get(name), arguments, d)
    return d, arguments


def attempt(number, device, target):
    """(results, None) or (None, the error) of a call, and what the call has broken, if anything."""
    tinyres.manual_seed(3)
    tinyres.backend.use(device)
    d, arguments = Draw(0, device), {}
    try:
        d, arguments = drawn(number, device, target)
        before = [[a.tobytes() for a in kept] for kept in (d.inputs, d.outputs)]
        kept = d.inputs[:], d.outputs[:]
        try:
            outcome, error = [np.asarray(a) for a in target[1](arguments, d)], None
        except (MemoryError, *np.atleast_1d(target[2])) as refusal:
            outcome, error = None, refusal
        kinds = range(1 if error is None else 2)  # the inputs; where it was refused the outputs too
        if any([a.tobytes() for a in kept[kind]] != before[kind] for kind in kinds):
            return d, outcome, error, "memory was written to that had to stay as it was"
    except (TinyresError, MemoryError) as refusal:  # of a hostile array, by tinyres.tensor or by NumPy
        return d, None, refusal, None
    return d, outcome, error, None


def compared(name, got, want, size):
    """What differs, or None: the suite's tolerance after `size` summands, and the same NaN and infinities.

    Batch norm may order its factors so that an infinity becomes a NaN. And a convolution may multiply by the zeros of
    its padding or leave them out, and Winograd's spreads a NaN over a tile (docs/winograd.md): what is finite counts.
    """
    if len(got) != len(want):
        return f"{len(got)} results, the reference has {len(want)}"
    convolves = any(part in name for part in ("onv", "Sequential", "Residual", "Gate", "shortcut", "fuse", "fold"))
    # Of all results, since a gradient that cancels is as exact as those that it comes from; and what a batch norm of
    # equal numbers passes on is 1 / sqrt(eps) as large.
    floats = [w[np.isfinite(w)] for w in want if w.dtype.kind == "f" and w.size < HUGE]
    scale = max((np.abs(w).max(initial=1) for w in floats), default=1)
    scale *= 320 if name.startswith("nn.") and convolves else 1
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.size != w.size or g.dtype != w.dtype:
            return f"result {i} is {g.dtype} {g.shape}, the reference's {w.dtype} {w.shape}"
        if g.size >= HUGE:
            continue  # a view of something huge
        g, w = g.ravel(), w.ravel()
        if g.dtype.kind != "f":
            if not np.array_equal(g, w, equal_nan=g.dtype.kind == "c"):
                return f"result {i} differs"
            continue
        g, w = g.astype(np.float64), w.astype(np.float64)
        finite = np.isfinite(g) & np.isfinite(w)
        both = finite | (~np.isfinite(g) & ~np.isfinite(w) if "orm" in name else (g == w) | (g != g) & (w != w))
        if not convolves and not both.all():
            at = np.argmin(both)
            return f"result {i}, element {at} of {g.size}: {g[at]}, the reference has {w[at]}"
        precision = np.finfo(
            np.float32 if name == "raw.augment" else got[i].dtype
        ).eps  # in float64 the oracle has none
        error = np.abs(g[finite] - w[finite]).max(initial=0.0)
        if error > ULPS * precision * math.sqrt(size) * scale:
            return f"result {i} differs by {error:.3g} of {scale:.3g}"
    return None


def check(number, device, table):
    """(name, whether the call worked, what is wrong or None)."""
    name = [*table][number % len(table)]
    target = table[name]
    try:
        d, got, error, broken = attempt(number, device, target)
    except Exception as unexpected:
        return name, False, f"{type(unexpected).__name__}: {unexpected}"
    if broken or isinstance(error, MemoryError) or (error is not None and name.startswith("raw.")):
        return name, error is None, broken
    with np.errstate(all="ignore"):
        try:
            _, want, refusal, broken = attempt(number, "reference", target)
        except Exception as unexpected:
            return name, error is None, f"the reference: {type(unexpected).__name__}: {unexpected}"
    if type(error) is not type(refusal):
        return name, error is None, f"{error or 'works'!r}, on the reference {refusal or 'works'!r}"
    if error is None and d.comparable:
        size = max((a.size for a in (*d.inputs, *d.outputs)), default=1)
        broken = broken or compared(name, got, want, max(1, size))
    return name, error is None, broken


def text(value):
    """An argument in a line."""
    if isinstance(value, Tensor):
        return f"Tensor({text(value.data)}, {value.requires_grad}, {value.device})"
    if isinstance(value, np.ndarray):
        few = f": {value.tolist()}" if value.size <= 6 else ""
        writeable = "" if value.flags.writeable else ", read-only"
        return f"{type(value).__name__} {value.dtype} {value.shape}, strides {value.strides}{writeable}{few}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return type(value).__name__ if isinstance(value, Module) else repr(value)


def described(number, device):
    """One call in words: its name, its arguments, the command that repeats it."""
    table = targets(device)
    name = [*table][number % len(table)]
    arguments = {}
    tinyres.manual_seed(3)
    tinyres.backend.use(device)
    try:
        drawn(number, device, table[name], arguments)
    except TinyresError:
        pass
    finally:
        tinyres.backend.use("cpu")
    listed = "".join(f"\n    {key} = {text(value)}" for key, value in arguments.items())
    return f"{name} on {device}: python tests/hostile.py {device} {number}{listed}"


def main(device, first, count=None, progress=None):
    """Run calls. Where each begins, its number goes into the file `progress`, for those who outlive this process."""
    if device == "emulated":
        tinyres.backend.get("emulated")
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's own, of names that it is given
    warnings.filterwarnings("ignore", module="tinyres.backend.reference")  # which is what a tensor elsewhere is on
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which needs addresses for what it does
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    table = targets(device)
    if count is None:
        print(described(first, device))
        print(check(first, device, table))
        return
    file = os.open(progress or os.devnull, os.O_WRONLY)
    counts, problems = {name: [0, 0] for name in table}, []
    for number in range(first, first + count):
        os.pwrite(file, number.to_bytes(8, "little"), 0)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles it: it ends the process, whatever that does
        name, worked, problem = check(number, device, table)
        counts[name][not worked] += 1
        if problem:
            problems.append([number, problem])
    signal.setitimer(signal.ITIMER_REAL, 0)
    json.dump({"counts": counts, "problems": problems}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
