"""Ops that move elements without changing them. Results are views of the input where its layout allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinyres.autograd import Function, Index, Tensor
from tinyres.errors import ArgumentError, DtypeError, ShapeError, expect, fail
from tinyres.ops import checks


class Reshape(Function):
    def forward(self, x, shape):
        self.saved = x.shape
        return x.reshape(shape)

    def backward(self, dy):
        return dy.reshape(self.saved)


class Transpose(Function):
    def forward(self, x, axes):
        self.saved = axes
        return x.transpose(axes)

    def backward(self, dy):
        axes = self.saved
        return dy.transpose(sorted(range(len(axes)), key=axes.__getitem__))


class GetItem(Function):
    fresh_gradients = True

    def forward(self, x, index):
        self.saved = x.shape, index
        return x[index]

    def backward(self, dy):
        return self.kernels.scatter(dy, *self.saved)


class Pad(Function):
    def forward(self, x, widths, value):
        self.saved = tuple([slice(before, before + n) for n, (before, _) in zip(x.shape, widths, strict=True)])
        return self.kernels.pad(x, widths, value)

    def backward(self, dy):
        return dy[self.saved]


class Concatenate(Function):
    def forward(self, *arrays, axis):
        self.saved = [x.shape[axis] for x in arrays], axis
        return self.kernels.concatenate(arrays, axis)

    def backward(self, dy):
        sizes, axis = self.saved
        dxs, begin = [], 0
        for size in sizes:
            dxs.append(dy[(slice(None),) * axis + (slice(begin, begin + size),)])
            begin += size
        return tuple(dxs)


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x` in another shape of as many elements; one size may be -1. Raises ShapeError where that cannot be."""
    checks.operands("reshape", x=x)
    shape = tuple([checks.integer("reshape", "shape", n, -1) for n in _sequence("reshape", "shape", shape)])
    if len(shape) > checks.MAX_RANK:
        fail("reshape", f"at most {checks.MAX_RANK} axes", shape=shape)
    if -1 not in shape and 0 not in shape and math.prod(shape) == x.size:
        return Reshape.apply(x, shape=shape)
    known = math.prod([n for n in shape if n != -1])
    missing = shape.count(-1)
    fits = known == x.size if missing == 0 else missing == 1 and known > 0 and x.size % known == 0
    fits = fits and math.prod([max(n, 1) for n in shape]) < checks.LIMIT  # NumPy multiplies them before it sees a 0
    if not fits:
        fail("reshape", "the new shape must have as many elements", x=x.shape, shape=shape)
    return Reshape.apply(x, shape=shape)


def flatten(x: Tensor, start: int = 1) -> Tensor:
    """`x` with the axes from `start` on made one: (N, H, W, C) becomes (N, H W C)."""
    checks.operands("flatten", x=x)
    start = checks.integer("flatten", "start", start, 0)
    expect(start < x.ndim, "flatten", "x must have the axis to start from", x=x.shape, start=start)
    return Reshape.apply(x, shape=(*x.shape[:start], math.prod(x.shape[start:])))


def transpose(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """`x` with its axes in the order `axes`; reversed where None. Raises ShapeError unless it is a permutation."""
    checks.operands("transpose", x=x)
    if axes is None:
        axes = range(x.ndim)[::-1]
    axes = [checks.integer("transpose", "axes", a, -x.ndim) for a in _sequence("transpose", "axes", axes)]
    valid = len(axes) == x.ndim and {a % x.ndim for a in axes} == set(range(x.ndim)) and all(a < x.ndim for a in axes)
    expect(valid, "transpose", "axes must be a permutation of x's axes", x=x.shape, axes=axes)
    return Transpose.apply(x, axes=tuple([a % x.ndim for a in axes]))


_BASIC = (slice, type(None), type(...))


def getitem(x: Tensor, index: Index) -> Tensor:
    """`x[index]` for basic indices: integers, slices (with steps), Ellipsis and None.

    Raises DtypeError for any other index, ShapeError for one that does not fit.
    """
    checks.operands("getitem", x=x)
    index = index if isinstance(index, tuple) else (index,)
    # An array () would be an integer too, but for NumPy it makes a copy, into which backward would write in vain.
    index = tuple([i if isinstance(i, _BASIC) else checks.integer("getitem", "index", i, -checks.LIMIT) for i in index])
    expect(sum(i is Ellipsis for i in index) <= 1, "getitem", "one Ellipsis at most", index=index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)  # so that the result is an array even where every axis gets an integer
    rank = x.ndim + sum(i is None for i in index)
    expect(rank <= checks.MAX_RANK, "getitem", f"at most {checks.MAX_RANK} axes", x=x.shape, index=index)
    try:
        x.data[index]
    except (IndexError, ValueError, TypeError) as error:
        raise ShapeError(f"[getitem] the index must fit; got x {x.shape}, index {index} ({error})") from None
    return GetItem.apply(x, index=index)


def pad(x: Tensor, widths: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    """`x` within a border of `value`; widths is (before, after) for each axis. Raises ShapeError for other widths."""
    checks.operands("pad", x=x)
    widths = _sequence("pad", "widths", widths)
    paired = len(widths) == x.ndim and all(isinstance(w, (tuple, list)) and len(w) == 2 for w in widths)
    expect(paired, "pad", "widths must be (before, after) for each axis", x=x.shape, widths=widths)
    widths = tuple([tuple([checks.integer("pad", "widths", n, 0) for n in w]) for w in widths])
    result = math.prod([n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)])
    expect(result < checks.LIMIT, "pad", "the result is too large", x=x.shape, widths=widths)
    return Pad.apply(x, widths=widths, value=checks.real("pad", "value", value))


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors along `axis`; their other sizes must agree, else ShapeError."""
    tensors = _sequence("concatenate", "tensors", tensors)
    expect(len(tensors) > 0, "concatenate", "at least one tensor", ArgumentError)
    checks.operands("concatenate", **{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    (axis,) = checks.axes("concatenate", checks.integer("concatenate", "axis", axis, -tensors[0].ndim), tensors[0].ndim)
    others = {(x.ndim, x.shape[:axis], x.shape[axis + 1 :]) for x in tensors}
    expect(
        len(others) == 1,
        "concatenate",
        "shapes must agree except along the axis",
        shapes=[x.shape for x in tensors],
        axis=axis,
    )
    return Concatenate.apply(*tensors, axis=axis)


def _sequence(op, name, value):
    if not isinstance(value, (tuple, list, range)):  # spelt out: a repr made for `expect` would wait for the GPU
        raise DtypeError(f"[{op}] {name} must be a tuple or list; got {name} {value!r}")
    return value
