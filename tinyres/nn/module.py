"""Module: a tree of layers with named parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinyres import backend
from tinyres.autograd import Handle, Tensor, tensor
from tinyres.backend import Array, Device
from tinyres.dtypes import FLOATS
from tinyres.errors import ArgumentError, CheckpointError, DtypeError, expect

if TYPE_CHECKING:
    from typing_extensions import Self


class Parameter(Tensor):
    """A leaf Tensor that a Module trains: a float32 or float64 copy of `array` on the default or given device."""

    __slots__ = ()

    def __init__(self, array: Tensor | ArrayLike, device: str | Device | None = None) -> None:
        device = backend.get(device)
        if isinstance(array, Tensor):
            array = array.data
        data = tensor(array, requires_grad=True, device=device).data
        super().__init__(device.kernels.broadcast_to(data, data.shape), True, device)

    def __repr__(self) -> str:
        return f"Parameter({super().__repr__()})"


class Module:
    """A layer or a network: subclass it, set Parameters and Modules as attributes, define `forward`.

    Attributes are registered in the order of assignment, which is the order of `parameters()`. A subclass calls
    `super().__init__()` first.
    """

    training: bool
    _parameters: dict[str, Parameter]
    _buffers: dict[str, Array]
    _modules: dict[str, Module]
    _forward_hooks: dict[object, Callable[..., object]]

    def __init__(self) -> None:
        # Past __setattr__, which would look for these.
        self.__dict__.update(_parameters={}, _buffers={}, _modules={}, _forward_hooks={}, training=True)

    def forward(self, *inputs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *inputs: Any) -> Any:
        output = self.forward(*inputs)
        if self._forward_hooks:
            for hook in list(self._forward_hooks.values()):
                hook(self, inputs, output)
        return output

    def __setattr__(self, name: str, value: Any) -> None:
        tables: Any = self.__dict__.get("_parameters"), self.__dict__.get("_buffers"), self.__dict__.get("_modules")
        expect(
            tables[0] is not None,
            type(self).__name__,
            "call super().__init__() before setting attributes",
            ArgumentError,
            attribute=name,
        )
        held = isinstance(value, (list, tuple)) and any(isinstance(v, (Module, Parameter)) for v in value)
        expect(
            not held,
            type(self).__name__,
            "modules in a list would not be trained: use Sequential",
            ArgumentError,
            attribute=name,
        )
        table = tables[0] if isinstance(value, Parameter) else tables[2] if isinstance(value, Module) else None
        if table is None and name in tables[1]:
            table = tables[1]
        for other in tables:
            if other is not table:
                other.pop(name, None)
        if table is None:
            self.__dict__[name] = value
        else:
            self.__dict__.pop(name, None)
            table[name] = value

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for table in ("_parameters", "_modules", "_buffers"):
            if table in own and name in own[table]:
                return own[table][name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def register_buffer(self, name: str, array: Array) -> None:
        """Keep `array`, an array of the default device, as state that is saved but not trained."""
        self._buffers[name] = array

    def register_forward_hook(self, hook: Callable[[Any, tuple[Any, ...], Any], object]) -> Handle:
        """Call `hook(module, inputs, output)` after each forward. Returns a handle whose `remove()` ends it."""
        return Handle(self._forward_hooks, hook)

    def children(self) -> ItemsView[str, Module]:
        """The modules directly below, as (name, module)."""
        return self._modules.items()

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(dotted name, module) for this module (its name is the prefix) and all below, parents first."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        """This module and all below, parents first."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, Parameter), each parameter once, in the order of assignment."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{prefix}.{name}" if prefix else name), parameter

    def parameters(self) -> Iterator[Parameter]:
        """The Parameters, each once, in the order of assignment."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """(dotted name, array) of the state that is saved but not trained."""
        for prefix, module in self.named_modules():
            for name, array in module._buffers.items():
                yield (f"{prefix}.{name}" if prefix else name), array

    def buffers(self) -> Iterator[Array]:
        """The arrays that are saved but not trained."""
        for _, array in self.named_buffers():
            yield array

    def train(self, mode: bool = True) -> Self:
        """Set training mode (batch statistics, dropout) here and below; returns the module."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Set evaluation mode here and below; returns the module."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients: each parameter's `grad` becomes None."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def to(self, device: str | Device | None = None, dtype: DTypeLike | None = None) -> Self:
        """Move parameters and buffers to a device and/or dtype (float32 or float64), in place; returns the module.

        Gradients are forgotten. Raises DtypeError or DeviceError before anything is moved.
        """
        device = None if device is None else backend.get(device)
        if dtype is not None:
            try:
                dtype = np.dtype(dtype)
            except TypeError:
                dtype = repr(dtype)
            expect(dtype in FLOATS, "to", "dtype must be float32 or float64", DtypeError, dtype=dtype)
        home = device or home_of(self)
        for parameter in self.parameters():
            parameter.device = device or parameter.device
            parameter.zero_grad()
            parameter.data = parameter.device.asarray(parameter.data, dtype)
        for module in self.modules():
            for name, array in module._buffers.items():
                module._buffers[name] = home.asarray(array, dtype)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers as a flat dict: dotted name -> NumPy array."""
        state = {name: parameter.numpy().copy() for name, parameter in self.named_parameters()}
        state.update((name, np.array(backend.host(array))) for name, array in self.named_buffers())
        return state

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy the arrays of `state` (as from `state_dict`) into the parameters and buffers, casting to their dtypes.

        Raises CheckpointError, before anything is changed, listing every name that is missing, unexpected or of
        another shape.
        """
        expect(
            hasattr(state, "items"),
            "load_state_dict",
            "needs a dict of arrays",
            CheckpointError,
            state=type(state).__name__,
        )
        own = {name: parameter.data for name, parameter in self.named_parameters()} | dict(self.named_buffers())
        problems = [f"missing {name}" for name in own if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in own]
        problems += [f"{name} is no array of numbers" for name in own if name in state and not _is_numeric(state[name])]
        problems += [
            f"{name} has shape {state[name].shape}, the model's is {array.shape}"
            for name, array in own.items()
            if name in state and _is_numeric(state[name]) and state[name].shape != array.shape
        ]
        expect(not problems, "load_state_dict", "the state must fit the model: " + "; ".join(problems), CheckpointError)
        for name, parameter in self.named_parameters():
            # Into an array of our own: what stands in `data` may have been assigned, and be somebody else's.
            loaded = parameter.device.asarray(state[name], parameter.dtype)
            parameter.data = parameter.device.kernels.broadcast_to(loaded, loaded.shape)
        home = home_of(self)
        for name, array in self.named_buffers():
            array[...] = home.asarray(state[name], array.dtype)

    def extra_repr(self) -> str:
        """What `print` shows between the parentheses of a layer."""
        return ""

    def __repr__(self) -> str:
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children()]
        head = f"{type(self).__name__}({self.extra_repr()}"
        return head + ("\n" + "\n".join(lines) + "\n)" if lines else ")")


def home_of(model: Module) -> Device:
    """The device of the model's first parameter; the default one for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), backend.get())


def _is_numeric(array):
    """Whether `array` is an array, of NumPy or CuPy, of real numbers."""
    return not isinstance(array, Tensor) and hasattr(array, "shape") and array.dtype.kind in "fiub"


class Sequential(Module):
    """Modules applied one after another. Indexing gives a module, slicing a Sequential of the same modules."""

    def __init__(self, *modules: Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            expect(
                isinstance(module, Module),
                "Sequential",
                "every part must be a Module",
                DtypeError,
                part=type(module).__name__,
            )
            setattr(self, str(i), module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = module(x)
        return x

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Module:
        modules = list(self._modules.values())
        if isinstance(index, slice):
            return Sequential(*modules[index])
        expect(-len(modules) <= index < len(modules), "Sequential", "the index must exist", ArgumentError, index=index)
        return modules[index]
