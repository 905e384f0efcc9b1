"""The part of CuPy that tinyres uses, over the host's memory, and as strict as CuPy: for tests without a GPU.

Its arrays are no NumPy arrays and never turn into one unasked; to mix the two raises as it does in CuPy. What makes
a program wait for the GPU is counted in `waits`, what sends an array to it in `uploads`. Where versions of CuPy
differ (the dtype of an array and a NumPy scalar), it refuses both.

Behaviour after cupy/_core/core.pyx and _routines_indexing.pyx of CuPy 9 to 13.
"""

import ctypes
import operator

import numpy

waits = 0  # get(), item(), int(), bool(), printing ...: everything that copies to the host
uploads = 0  # asarray() of host data with at least one axis; a number is passed to a kernel as an argument instead


def reset():
    global waits, uploads
    waits = uploads = 0


class _Memory:
    """cupy.cuda.MemoryPointer."""

    def __init__(self, host):
        self.ptr = host.ctypes.data

    def __add__(self, offset):
        return self.ptr + offset


class _Flags:
    """cupy's Flags: nothing but these three, so that `flags.writeable` is an AttributeError."""

    def __init__(self, host):
        self.c_contiguous, self.f_contiguous = host.flags.c_contiguous, host.flags.f_contiguous
        self.owndata = host.base is None


def _plain(x):
    """An operand as NumPy takes it; a NumPy array is refused as CuPy refuses it."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, (bool, int, float, complex, numpy.generic)):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


def _apply(ufunc, *inputs):
    result = ufunc(*map(_plain, inputs))
    weak = [x.item() if isinstance(x, numpy.generic) else _plain(x) for x in inputs]
    if ufunc(*weak).dtype != result.dtype:
        raise TypeError("an array and a NumPy scalar: the dtype of the result depends on the version of CuPy")
    return ndarray(numpy.asarray(result))


def _binary(name):
    ufunc = getattr(numpy, name)

    def forward(self, other):
        return NotImplemented if getattr(other, "__array_ufunc__", 0) is None else _apply(ufunc, self, other)

    def reflected(self, other):
        return _apply(ufunc, other, self)

    def in_place(self, other):
        ufunc(self._host, _plain(other), out=self._host, casting="same_kind")
        return self

    return forward, reflected, in_place


def _reduction(name):
    def reduce(self, axis=None, **settings):
        return ndarray(numpy.asarray(getattr(self._host, name)(axis=axis, **settings)))

    return reduce


class ndarray:
    """cupy.ndarray over the NumPy array `host`, which nothing outside of this file gets to see."""

    __array_priority__ = 100
    __hash__ = None

    def __init__(self, host):
        assert type(host) is numpy.ndarray
        self._host = host

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    data = property(lambda self: _Memory(self._host))
    flags = property(lambda self: _Flags(self._host))
    T = property(lambda self: self.transpose())

    # to the host, explicitly

    def get(self):
        global waits
        waits += 1
        return self._host.copy(order="C")

    def item(self):
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def __bool__(self):
        if self.size != 1:
            raise ValueError("The truth value of an array with more than one element is ambiguous")
        return bool(self.get())

    def __reduce__(self):
        return asarray, (self.get(),)

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __index__(self):
        return operator.index(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    # and never implicitly

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    def __array_ufunc__(self, ufunc, method, *inputs, **settings):
        return _apply(ufunc, *inputs) if method == "__call__" and not settings else NotImplemented

    def __array_function__(self, function, types, args, settings):
        return NotImplemented

    # views and copies

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, (ndarray, numpy.ndarray, list)) for i in index):
            (index,) = index  # one array of integers, wrapped around where they are out of range
            if isinstance(index, (numpy.ndarray, list)):
                index = asarray(index)
            assert index.dtype.kind in "iu", "a mask would wait for its count"
            return ndarray(numpy.asarray(self._host.take(index._host, axis=0, mode="wrap")))
        return ndarray(self._host[(*index, ...) if Ellipsis not in index else index])

    def __setitem__(self, index, value):
        if isinstance(value, ndarray):
            self._host[index] = value._host
        else:
            self[index].fill(value)

    def fill(self, value):
        if isinstance(value, numpy.ndarray):
            if value.shape != ():
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            value = value.item()
        self._host.fill(_plain(value))

    def reshape(self, *shape):
        return ndarray(self._host.reshape(*shape))

    def ravel(self):
        return ndarray(self._host.ravel())

    def transpose(self, *axes):
        return ndarray(self._host.transpose(*axes))

    def swapaxes(self, a, b):
        return ndarray(self._host.swapaxes(a, b))

    def copy(self, order="C"):
        return ndarray(self._host.copy(order))

    __copy__ = copy

    def __deepcopy__(self, memo):
        return self.copy()

    def astype(self, dtype, order="K", copy=True):
        return self if not copy and self.dtype == dtype else ndarray(self._host.astype(dtype, order))

    # arithmetic

    sum, max, min, argmax = _reduction("sum"), _reduction("max"), _reduction("min"), _reduction("argmax")
    all, any = _reduction("all"), _reduction("any")

    __add__, __radd__, __iadd__ = _binary("add")
    __sub__, __rsub__, __isub__ = _binary("subtract")
    __mul__, __rmul__, __imul__ = _binary("multiply")
    __truediv__, __rtruediv__, __itruediv__ = _binary("true_divide")
    __eq__, __ne__ = _binary("equal")[0], _binary("not_equal")[0]
    __lt__, __le__ = _binary("less")[0], _binary("less_equal")[0]
    __gt__, __ge__ = _binary("greater")[0], _binary("greater_equal")[0]

    def __neg__(self):
        return _apply(numpy.negative, self)


def empty(shape, dtype=float):
    """Uninitialised, so full of what gives mistakes away."""
    host = numpy.empty(shape, dtype)
    host.fill(numpy.nan if host.dtype.kind == "f" else 113)
    return ndarray(host)


def asarray(a, dtype=None):
    global uploads
    if isinstance(a, ndarray):
        return a.astype(a.dtype if dtype is None else dtype, copy=False)
    column_order = isinstance(a, numpy.ndarray) and a.flags.f_contiguous  # is kept, as by order="K"
    host = numpy.array(a, dtype, order="F" if column_order else "C")
    host = host.astype(host.dtype.newbyteorder("="), copy=False)
    if host.dtype.char not in "?bhilqBHILQefdFD":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    uploads += host.ndim > 0
    return ndarray(host)


def ascontiguousarray(a):
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected ndarray, got {type(a).__name__})")
    return a.reshape(1) if a.ndim == 0 else a if a.flags.c_contiguous else a.copy()


def broadcast_to(array, shape):
    if not isinstance(array, ndarray):
        raise TypeError(f"Argument 'array' has incorrect type (expected ndarray, got {type(array).__name__})")
    host = numpy.broadcast_to(array._host, shape)
    return ndarray(numpy.lib.stride_tricks.as_strided(array._host, host.shape, host.strides))


def placed(shape, dtype, memptr):
    """cupy.ndarray(shape, dtype, memptr): an array at that address, which somebody else keeps."""
    size = numpy.dtype(dtype).itemsize * int(numpy.prod(shape))
    memory = (ctypes.c_char * size).from_address(memptr)
    return ndarray(numpy.frombuffer(memory, numpy.uint8).view(dtype).reshape(shape))
