"""Reverse-mode automatic differentiation: Tensor, Function, and the sweep.

Running an op records a node (a Function) that knows its parents; `backward` walks the nodes from the result to the
leaves, each once, after all of its consumers. First order only: gradients are plain arrays, not Tensors.
Arithmetic on Tensors is bound in ops/__init__.py; this file knows no op.
"""

from __future__ import annotations

import collections
import functools
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinyres import backend
from tinyres.backend import Array, Device
from tinyres.dtypes import FLOATS, bfloat16, is_bfloat16
from tinyres.errors import ArgumentError, DeviceError, DtypeError, GraphError, ShapeError, expect, fail, out_of_memory

Axis = int | tuple[int, ...] | None  # of a reduction; None is all axes
BasicIndex = SupportsIndex | slice | EllipsisType | None
Index = BasicIndex | tuple[BasicIndex, ...]
P = ParamSpec("P")
R = TypeVar("R")

# What holds here: the depth of no_grad blocks, and who observes ops (see `observed`), the innermost last. One variable,
# as to read one takes a hundredth of the time of an op.
_context: ContextVar[tuple[int, tuple[Any, ...]]] = ContextVar("tinyres.autograd", default=(0, ()))
_orders = itertools.count(0, -1)  # of nodes by age


class Scope:
    """A block of code, or a decorated function, within which something else holds; it may be entered again inside."""

    def __enter__(self) -> None:
        raise NotImplementedError

    def __exit__(self, *exc: object) -> None:
        raise NotImplementedError

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return within


class no_grad(Scope):
    """Within this block (or decorated function) nothing is recorded, so nothing is kept for a backward sweep."""

    def __enter__(self) -> None:
        depth, observers = _context.get()
        _context.set((depth + 1, observers))

    def __exit__(self, *exc: object) -> None:
        depth, observers = _context.get()
        _context.set((depth - 1, observers))


class observed(Scope):
    """Within this block (or decorated function) each op and each sweep of this thread calls these methods.

    after_forward(node, inputs, attributes, out)  the op has run; `out` is what its forward returned
    before_backward(node, dys), after_backward(node, dxs)  around its backward
    after_sweep(leaf, gradient)  with each leaf's whole gradient, before any leaf receives its own
    What they raise stops the op or the sweep.
    """

    def __enter__(self) -> None:
        depth, observers = _context.get()
        _context.set((depth, (*observers, self)))

    def __exit__(self, *exc: object) -> None:
        depth, observers = _context.get()
        _context.set((depth, observers[:-1]))

    def after_forward(
        self, node: Function, inputs: tuple[Tensor | None, ...], attributes: dict[str, Any], out: Any
    ) -> None: ...
    def before_backward(self, node: Function, dys: Sequence[Array]) -> None: ...
    def after_backward(self, node: Function, dxs: tuple) -> None: ...
    def after_sweep(self, leaf: Tensor, gradient: Array) -> None: ...


_in_parts = ContextVar("tinyres.autograd.in_parts", default=0)  # the depth of such blocks


class gradients_in_parts(Scope):
    """Within this block the gradient of a leaf may be left as (parts, *shape), to be added by whoever uses it.

    Kernels that sum over pixels and images do so in parts; an optimizer that adds them saves a launch for each. A
    second gradient cannot be added to one in parts.
    """

    def __enter__(self) -> None:
        _in_parts.set(_in_parts.get() + 1)

    def __exit__(self, *exc: object) -> None:
        _in_parts.set(_in_parts.get() - 1)

    @staticmethod
    def hold() -> bool:
        """Whether this is such a block."""
        return _in_parts.get() > 0


class Tensor:
    """An array and its place in the recorded graph.

    data           NumPy array (CuPy on a GPU); may be assigned, also in another shape or dtype
    grad           None, or the array of a leaf's gradient; backward sweeps add to it
    requires_grad  whether backward sweeps reach this tensor
    device         the Device that its kernels run on
    """

    __slots__ = ("_data", "grad", "requires_grad", "device", "_node", "_slot", "_hooks", "__weakref__")
    __array_priority__ = 1000  # so that `array * tensor` reaches Tensor.__rmul__ ...
    __array_ufunc__ = None  # ... instead of NumPy's elementwise loop over objects

    grad: Array | None
    requires_grad: bool
    device: Device
    _node: Function | None
    _hooks: dict[object, Callable[[Array], Array | None]] | None

    def __init__(self, data: Array, requires_grad: bool = False, device: Device | None = None) -> None:
        self._data = data
        self.requires_grad = requires_grad
        self.device = backend.get() if device is None else device
        self._node = self.grad = self._hooks = None
        self._slot = 0

    @property
    def data(self) -> Array:
        return self._data

    @data.setter
    def data(self, array: Array) -> None:
        if not self.device.owns(array):
            expect(not isinstance(array, Tensor), "Tensor.data", "needs an array", DtypeError, data=array)
        array = self.device.asarray(array)
        expect(
            not self.requires_grad or array.dtype in FLOATS,
            "Tensor.data",
            "a tensor with a gradient is float32 or float64",
            DtypeError,
            dtype=array.dtype,
        )
        if array.shape != self._data.shape or array.dtype != self._data.dtype:
            self.grad = None  # the gradient of what is gone
        self._data = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        return self._data.dtype

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def size(self) -> int:
        return self._data.size

    def __len__(self) -> int:
        expect(self.ndim > 0, "len", "a scalar tensor has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        body = np.array2string(self.numpy(), separator=", ", prefix="tensor(")
        extra = "" if self.device.name == "cpu" else f", device={self.device}"
        return f"tensor({body}, dtype={self.dtype}{extra}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype, copy=copy) if copy else np.asarray(self.numpy(), dtype)

    def numpy(self) -> np.ndarray:
        """The data as a NumPy array: the same memory where it lies on the host, else a copy, waited for."""
        return self.device.numpy(self._data)

    def item(self) -> float:
        """The value of a tensor of one element, as a Python number, which waits for a GPU to have computed it.

        Raises ShapeError for any other.
        """
        expect(self.size == 1, "item", "needs a tensor of one element", x=self.shape)
        return self._data.item()

    def detach(self) -> Tensor:
        """The same data outside of the graph."""
        return Tensor(self._data, False, self.device)

    def zero_grad(self) -> None:
        """Forget the gradient: `grad` becomes None."""
        self.grad = None

    def register_hook(self, hook: Callable[[Array], Array | None]) -> Handle:
        """Call `hook(gradient)` with this tensor's whole gradient in each sweep, before it goes further.

        What the hook returns, if not None, takes the gradient's place. Returns a handle whose `remove()` ends it.
        Raises GraphError where the tensor has no gradient.
        """
        expect(self.requires_grad, "register_hook", "the tensor must require a gradient", GraphError)
        expect(callable(hook), "register_hook", "the hook must be callable", ArgumentError, hook=hook)
        if self._hooks is None:
            self._hooks = {}
            if self._node is not None:
                self._node.hooks = {**self._node.hooks, self._slot: self._hooks}
        return Handle(self._hooks, hook)

    def backward(self, gradient: Tensor | ArrayLike | None = None, retain_graph: bool = False) -> None:
        """Sweep from this tensor to the leaves and add to their `grad`.

        gradient      the gradient of the loss by this tensor (array or number of its shape); 1 for a scalar
        retain_graph  keep what ops have saved, so that the graph can be swept again
        Raises GraphError if nothing that requires a gradient leads to the tensor, or its graph was swept already;
        ShapeError or DtypeError for a gradient that does not fit. Then no `grad` has changed.
        """
        _sweep("backward", [self], [gradient], retain_graph, None)

    if TYPE_CHECKING:  # what ops/__init__.py binds

        def __add__(self, other: Operand) -> Tensor: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __add__

        def __matmul__(self, other: Tensor | Array) -> Tensor: ...

        __rmatmul__ = __matmul__

        def __neg__(self) -> Tensor: ...
        def __getitem__(self, index: Index) -> Tensor: ...
        def __iter__(self) -> Iterator[Tensor]: ...
        def exp(self) -> Tensor: ...

        log = sqrt = sigmoid = tanh = relu = exp

        def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...

        mean = max = sum

        def reshape(self, *shape: int | Sequence[int]) -> Tensor: ...
        def transpose(self, *axes: int | Sequence[int]) -> Tensor: ...
        def flatten(self, start: int = 1) -> Tensor: ...
        @property
        def T(self) -> Tensor: ...


Operand = Tensor | Array | float  # of arithmetic


class Handle:
    """Removes what was registered."""

    def __init__(self, table: dict, value: object) -> None:
        self._table, self._key = table, object()
        table[self._key] = value

    def remove(self) -> None:
        self._table.pop(self._key, None)


def tensor(
    array: Tensor | ArrayLike,
    requires_grad: bool = False,
    dtype: DTypeLike | None = None,
    device: str | Device | None = None,
) -> Tensor:
    """A leaf Tensor with a copy-free view of `array` where dtype and device allow it, else a copy.

    array   array (of any device), number or nested list: real numbers. Python floats become float32
    dtype   float32 or float64 (bfloat16, integers and bools too where no gradient is required); None keeps an array's
            own. "bfloat16" is ml_dtypes.bfloat16
    device  name or Device; None is the default (`tinyres.backend.use`)
    Raises DtypeError for data that are not real numbers or need a gradient and are not floating, ShapeError for
    ragged lists, DeviceError for an absent device.
    """
    op = "tensor"
    device = backend.get(device)
    expect(
        isinstance(requires_grad, (bool, np.bool_)),
        op,
        "requires_grad must be True or False",
        DtypeError,
        requires_grad=type(requires_grad).__name__,
    )
    if isinstance(array, Tensor):
        array = array.data
    try:
        given = hasattr(array, "dtype")
        array = _array(device, array)
    except ValueError as error:
        raise ShapeError(f"[{op}] nested lists must have equal lengths ({error})") from None
    if dtype is None:
        dtype = np.float32 if not given and array.dtype.kind == "f" else array.dtype
    try:
        named = isinstance(dtype, str) and dtype == "bfloat16"
        kept: np.dtype = bfloat16() if named else np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise DtypeError(f"[{op}] dtype must name a type; got dtype {dtype!r}") from None
    valid = array.dtype.kind in "fiub" or is_bfloat16(array.dtype)
    valid = valid and (kept in FLOATS or not requires_grad and (kept.kind in "iub" or is_bfloat16(kept)))
    expect(
        valid,
        op,
        "data must be float32 or float64" + ("" if requires_grad else ", bfloat16, integer or bool"),
        DtypeError,
        array=array.dtype,
        dtype=kept,
    )
    expect(array.ndim <= 16, op, "at most 16 axes", shape=array.shape)
    with np.errstate(over="ignore"):  # a number beyond float32 becomes an infinity, as in any float32 arithmetic
        return Tensor(device.asarray(array, kept), bool(requires_grad), device)


def _array(device: Device, data: Any) -> Array:
    """`data` as an array whose shape and dtype can be checked: of `device` already, or of the host."""
    return data if device.owns(data) else np.asarray(backend.host(data))


class Function:
    """An op: `forward` and, directly below it, `backward`, both on raw arrays.

        class Square(Function):
            def forward(self, x):
                self.saved = x
                return self.kernels.mul(x, x)

            def backward(self, dy):
                return self.kernels.mul(dy, 2 * self.saved)

        y = Square.apply(x)

    self.kernels  the kernel table of the inputs' device
    self.needs    for each tensor input, whether its gradient is wanted; None may be returned for the others
    self.saved    whatever backward needs; freed when the sweep has passed
    self.seeded   in backward: the sweep starts here, with a gradient of 1, and nothing is kept for another one. So a
                  gradient that forward has worked out can be returned as it is
    `backward` takes the gradient of each output and returns one for each tensor input, of that input's shape and
    dtype. It must not write into what it is given, but into the gradient where self.owns_gradient says that nobody
    else holds it. Where it returns such or new arrays only, `fresh_gradients = True` spares a copy. Where it can add to
    what other ops have sent to an input, `adds_gradients = True` asks for it: then
    self.totals  for each input, None or the array that sums up its gradient, which backward may add to and return
    """

    device: Device
    kernels: Any
    needs: tuple[bool, ...]
    saved: Any = None
    fresh_gradients = False
    adds_gradients = False
    totals: Sequence[Array | None] = ()
    owns_gradient = False
    seeded = False
    # What _record sets, and the sweep reads:
    order: int  # age; the newest has the smallest
    parents: list[tuple | None]  # by input: ((node or leaf, slot), shape, dtype), None where no gradient is wanted
    outputs: tuple | None = None  # (shape, dtype) of each, where there are several
    hooks: dict[int, dict] = {}  # by slot of the output
    swept = False
    note: Any = None  # an observer's own

    def forward(self, *arrays: Any, **attributes: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, *gradients: Any) -> Any:
        raise GraphError(f"[{type(self).__name__}] has no backward")

    @classmethod
    def apply(cls, *inputs: Tensor | None, **attributes: Any) -> Any:
        """Run forward on the data of `inputs` (Tensors of one device, or None) and record it for the sweep.

        Returns a Tensor; a tuple of them where forward returns a tuple.
        """
        device: Any = None
        arrays: list[Any] = []
        needs: list[bool] = []
        for x in inputs:
            if isinstance(x, Tensor):
                if x.device is not device:
                    if device is not None:
                        fail(cls.__name__, "tensors must be on one device", DeviceError, devices=(device, x.device))
                    device = x.device
                arrays.append(x._data)
                needs.append(x.requires_grad)
            elif x is None:
                arrays.append(None)
                needs.append(False)
            else:
                raise DtypeError(f"[{cls.__name__}] inputs must be Tensors or None; got {type(x).__name__}")
        if device is None:
            fail(cls.__name__, "at least one input must be a Tensor", DtypeError)
        no_grad_depth, observers = _context.get()
        needs_grad = True in needs and no_grad_depth == 0
        node = cls()
        node.device, node.kernels = device, device.kernels
        node.needs = tuple(needs) if needs_grad else (False,) * len(needs)
        try:
            out = node.forward(*arrays, **attributes)
        except MemoryError as error:
            shapes = ", ".join(str(getattr(x, "shape", None)) for x in arrays)
            out_of_memory(cls.__name__, f"in forward of {shapes}", error)
        if observers:
            observers[-1].after_forward(node, inputs, attributes, out)
        if not isinstance(out, tuple):
            result = _result(cls, device, out, needs_grad)
            if needs_grad:
                node._record(inputs)
                result._node = node
            return result
        results = tuple([_result(cls, device, y, needs_grad) for y in out])
        if needs_grad:
            node._record(inputs)
            node.outputs = tuple([(y.shape, y.dtype) for y in out])
            for slot, y in enumerate(results):
                y._node, y._slot = node, slot
        return results

    def _record(self, inputs):
        # A parent is (node, slot) of the op that made an input, or (leaf tensor, 0): holding nodes rather than
        # tensors lets go of activations that no backward needs.
        self.order = next(_orders)
        self.parents = parents = []
        for x, needed in zip(inputs, self.needs, strict=True):
            parents.append(((x._node or x, x._slot), x._data.shape, x._data.dtype) if needed else None)


def _result(function, device, y, requires_grad):
    if not isinstance(y, device.array):
        raise DtypeError(f"[{function.__name__}] forward must return arrays of its device; got {type(y).__name__}")
    return Tensor(y, requires_grad, device)


def grad(
    ys: Tensor | Iterable[Tensor],
    xs: Tensor | Iterable[Tensor],
    gradients: Sequence[Tensor | ArrayLike | None] | None = None,
    retain_graph: bool = False,
) -> list[Array]:
    """The gradients of the sum of `ys` by each of `xs`, as a list of arrays; no tensor's `grad` changes.

    ys         Tensor or list of Tensors
    xs         Tensor or list of Tensors, leaves or results of ops
    gradients  an upstream gradient for each of `ys`; None means 1 for scalars
    retain_graph  as in `Tensor.backward`
    Raises GraphError if an x does not lead to any y, and what `Tensor.backward` raises.
    """
    for t in (ys, xs):
        expect(isinstance(t, (Tensor, Iterable)), "grad", "ys and xs must be Tensors", DtypeError, got=type(t).__name__)
    ys, xs = ([t] if isinstance(t, Tensor) else list(t) for t in (ys, xs))
    for t in (*ys, *xs):
        expect(isinstance(t, Tensor), "grad", "ys and xs must be Tensors", DtypeError, got=type(t).__name__)
    gradients = [None] * len(ys) if gradients is None else gradients
    expect(
        isinstance(gradients, (list, tuple)),
        "grad",
        "gradients must be a list",
        DtypeError,
        gradients=type(gradients).__name__,
    )
    expect(
        len(gradients) == len(ys), "grad", "gradients must be one for each of ys", gradients=len(gradients), ys=len(ys)
    )
    wanted: dict[tuple[int, int], Any] = {(id(x._node or x), x._slot): None for x in xs}
    _sweep("grad", ys, gradients, retain_graph, wanted)
    places = [(id(x._node or x), x._slot) for x in xs]
    found = []
    for i, place in enumerate(places):
        g = wanted[place]
        expect(g is not None, "grad", "every x must lead to a y through recorded ops", GraphError, index=i)
        found.append(g.copy() if place in places[:i] else g)  # an x named twice gets two arrays
    return found


def _sweep(op, ys, gradients, retain_graph, wanted):
    """Walk the graph of `ys` from the newest node to the oldest.

    A node is younger than all of its parents, so this order meets every consumer of a value before its producer,
    and frees what was saved last first. A heap gives it without recursion, whatever the depth.

    wanted  None to add to every leaf's `grad`; else a dict by (id of node or leaf, slot) that receives gradients
    """
    expect(
        isinstance(retain_graph, bool),
        op,
        "retain_graph must be True or False",
        DtypeError,
        retain_graph=type(retain_graph).__name__,
    )
    arrived = {}  # (node or leaf, slot) -> (gradient so far, whether the array is ours to add to)
    heap = []  # (order, slot, node) for every output that a gradient has arrived at
    for y, gradient in zip(ys, gradients, strict=True):
        seed = _seed_gradient(op, y, gradient)
        _deliver(arrived, heap, (y._node or y, y._slot), seed, True, y.device.kernels)
    observers = _context.get()[1]
    observer = observers[-1] if observers else None
    in_parts = gradients_in_parts.hold()
    seeded = None if retain_graph or len(ys) != 1 or gradients[0] is not None else ys[0]._node
    node = None
    while heap:
        before, node = node, heapq.heappop(heap)[2]
        if node is before:
            continue  # another of its outputs
        if node.swept:
            rule = "the graph was swept already (retain_graph=True keeps it for another sweep)"
            fail(op, rule, GraphError, node=type(node).__name__)
        totals = None
        if node.adds_gradients:
            totals = node.totals = [_total(arrived, parent) for parent in node.parents]
        try:
            dys = _output_gradients(node, arrived, wanted)
            node.seeded = node is seeded and not node.hooks
            if observer:
                observer.before_backward(node, dys)
            dxs = node.backward(*dys)
            del dys  # what backward did not return need not outlive it
        except MemoryError as error:
            shapes = ", ".join(str(parent and parent[1]) for parent in node.parents)
            out_of_memory(type(node).__name__, f"in backward to {shapes}", error)
        if not isinstance(dxs, tuple):
            dxs = (dxs,)
        if observer:
            observer.after_backward(node, dxs)
        if len(dxs) != len(node.parents):
            rule = "backward must return a gradient for each input"
            fail(type(node).__name__, rule, GraphError, inputs=len(node.parents), gradients=len(dxs))
        for parent, dx in zip(node.parents, dxs, strict=True):
            if parent is not None and dx is not None:
                if totals is not None and any(dx is total for total in totals):
                    continue  # it was added to in place
                place, shape, dtype = parent
                fits = isinstance(dx, node.device.array) and dx.dtype == dtype
                if not (fits and (dx.shape == shape or in_parts and dx.shape[1:] == shape)):
                    given = getattr(dx, "shape", None), getattr(dx, "dtype", None)
                    rule = "a gradient must be an array of its input's shape and dtype"
                    fail(type(node).__name__, rule, GraphError, gradient=given, input=(shape, dtype))
                _deliver(arrived, heap, place, dx, node.fresh_gradients, node.kernels)
        if totals is not None:
            node.totals = ()
        if not retain_graph:
            node.saved, node.swept = None, True
    leaves = [leaf for leaf, _ in arrived]
    finished = [_leaf_gradient(op, leaf, *held, wanted) for (leaf, _), held in arrived.items()]
    if observer:
        for leaf, gradient in zip(leaves, finished, strict=True):
            observer.after_sweep(leaf, gradient)
    if wanted is None:
        # Not a Python loop, in which Ctrl-C could come when some leaves have their gradient and others not.
        collections.deque(map(setattr, leaves, itertools.repeat("grad"), finished), maxlen=0)
    else:
        places = ((id(leaf), 0) for leaf in leaves)
        wanted.update((place, g) for place, g in zip(places, finished, strict=True) if place in wanted)


def _seed_gradient(op, y, gradient):
    """The upstream gradient of `y` as an array of its shape."""
    expect(y.requires_grad, op, "the tensor must come from recorded ops on tensors that require a gradient", GraphError)
    if gradient is None:
        expect(y.size == 1, op, "a gradient must be given for a tensor of more than one element", tensor=y.shape)
        return y.device.kernels.broadcast_to(y.dtype.type(1), y.shape)
    try:
        gradient = _array(y.device, gradient.data if isinstance(gradient, Tensor) else gradient)
    except ValueError as error:
        raise ShapeError(f"[{op}] the gradient must be an array ({error})") from None
    numbers = gradient.dtype.kind in "fiu" or is_bfloat16(gradient.dtype)
    expect(numbers, op, "the gradient must be real numbers", DtypeError, gradient=gradient.dtype)
    expect(
        gradient.shape in (y.shape, ()),
        op,
        "the gradient must have the tensor's shape",
        gradient=gradient.shape,
        tensor=y.shape,
    )
    return y.device.kernels.broadcast_to(y.device.asarray(gradient, y.dtype), y.shape)


def _total(arrived, parent):
    """The array of ours that sums up the gradient of a parent, if one has arrived there."""
    total, owned = arrived.get(parent[0], (None, False)) if parent is not None else (None, False)
    return total if owned and total.flags.c_contiguous else None


def _deliver(arrived, heap, place, gradient, fresh, kernels):
    """Add `gradient` to what has arrived at `place`, a (node or leaf, slot).

    The first arrival is borrowed unless fresh: another place may hold the same array. A second makes a sum in
    whichever of the two is ours, or in a new array, and later ones are added to that in place.
    """
    held = arrived.get(place)
    if held is None:
        node, slot = place
        if isinstance(node, Function):
            heapq.heappush(heap, (node.order, slot, node))
    else:
        total, owned = held
        if not owned and fresh:
            total, gradient = gradient, total
        gradient, fresh = (kernels.accumulate if owned or fresh else kernels.add)(total, gradient), True
    arrived[place] = gradient, fresh


def _output_gradients(node, arrived, wanted):
    """The gradient of each output of `node`, hooks applied; zeros where none arrived."""
    if node.outputs is None and not node.hooks and wanted is None:
        dy, node.owns_gradient = arrived.pop((node, 0))
        return (dy,)
    node.owns_gradient = False
    dys = []
    for slot in range(len(node.outputs or (None,))):
        if (node, slot) in arrived:
            dy, owned = arrived.pop((node, slot))
            if slot in node.hooks:
                dy, _ = _run_hooks(node.hooks[slot], dy, owned, node.device)
        else:
            shape, dtype = node.outputs[slot]
            dy = node.kernels.broadcast_to(dtype.type(0), shape)
        if wanted is not None and (id(node), slot) in wanted:
            wanted[id(node), slot] = node.kernels.broadcast_to(dy, dy.shape)
        dys.append(dy)
    return dys


def _leaf_gradient(op, leaf, gradient, owned, wanted):
    """The whole gradient of a leaf, what its `grad` holds included, in an array that nothing else holds."""
    kernels = leaf.device.kernels
    if leaf._hooks:
        gradient, owned = _run_hooks(leaf._hooks, gradient, owned, leaf.device)
    if wanted is not None or leaf.grad is None:
        return gradient if owned else kernels.broadcast_to(gradient, gradient.shape)
    held = getattr(leaf.grad, "shape", None), getattr(leaf.grad, "dtype", None)
    fits = held == (gradient.shape, gradient.dtype) and leaf.device.owns(leaf.grad)
    rule = "grad must be an array of the gradient's shape and dtype to be added to"
    expect(fits, op, rule, GraphError, grad=held, gradient=(gradient.shape, gradient.dtype))
    return kernels.add(leaf.grad, gradient)


def _run_hooks(hooks, gradient, owned, device):
    """The gradient after `hooks`, and whether it is still an array of our own."""
    if hooks and not owned:
        # hooks may keep it or write into it
        gradient, owned = device.kernels.broadcast_to(gradient, gradient.shape), True
    for hook in list(hooks.values()) if hooks else ():
        changed = hook(gradient)
        if changed is not None:
            given = getattr(changed, "shape", None), getattr(changed, "dtype", None)
            fits = given == (gradient.shape, gradient.dtype) and device.owns(changed)
            rule = "a hook must return None or an array of the gradient's shape and dtype, on its device"
            expect(fits, "hook", rule, GraphError, got=(*given, type(changed).__name__))
            gradient = changed
        owned = False  # the hook may have kept what it saw
    return gradient, owned
