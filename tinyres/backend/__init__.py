"""Devices. A Device is a name, an array module and a kernel table (spec.py); nothing else knows how one works.

`reference` is plain NumPy, the oracle of the tests; `cpu` the C++ kernels; `cuda` the CUDA kernels on a GPU, over
CuPy arrays; `emulated` the same CUDA kernels compiled for the CPU.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinyres import _cpu
from tinyres.backend import compose, cuda, memory, reference, rounding, spec
from tinyres.backend.adapter import Adapter
from tinyres.errors import ArgumentError, expect

Array = np.ndarray  # or its CuPy twin, on a GPU

NAMES = ("reference", "cpu", "emulated", "cuda")

_devices: dict[str, Device] = {}
_default = "cpu"


class _Kernels:
    """The kernels of a device as attributes; fused ones that it lacks are composed from its own."""

    def __init__(self, module):
        for name in spec.MANDATORY:
            setattr(self, name, rounding.once(name, getattr(module, name)))
        for name in spec.FUSED:
            own = getattr(module, name, None)
            setattr(self, name, rounding.once(name, own or getattr(compose, name).__get__(self)))


class Device:
    """One place where arrays live and kernels run. There is one Device object per name: compare with `is`.

    name     "reference", "cpu", "emulated" or "cuda"
    kernels  the kernel table, as attributes
    xp       the array module: NumPy, or CuPy for cuda
    array    the type of its arrays
    """

    name: str
    kernels: Any  # raw kernels: their contracts are in spec.py
    xp: Any
    array: type

    def __init__(self, name: str, kernels: Any, xp: Any) -> None:
        self.name, self.kernels, self.xp, self.array = name, kernels, xp, xp.ndarray

    def asarray(self, data: ArrayLike, dtype: DTypeLike | None = None) -> Array:
        """`data`, an array of any device included, as an array of this one, without a copy where possible."""
        array = self.xp.asarray(data if self.owns(data) else host(data), dtype=dtype)
        if self.xp is np and not array.flags.aligned:
            return array.copy()  # kernels load whole elements
        return array

    def numpy(self, array: Array) -> np.ndarray:
        """`array`, of this device, in the host's memory: itself where it lies there, else a copy, waited for."""
        return array if isinstance(array, np.ndarray) else array.get()

    def owns(self, array: object) -> TypeGuard[Array]:
        """Whether `array` is an array of this device's kind."""
        return isinstance(array, self.array)

    def __reduce__(self) -> tuple:
        return get, (self.name,)  # copies and pickles of a model are on this very device

    def __repr__(self) -> str:
        return self.name


def get(name: str | Device | None = None) -> Device:
    """The Device called `name` (a Device is returned as it is; None is the default).

    Raises ArgumentError for an unknown name, DeviceError for a device that this build or machine lacks.
    """
    if isinstance(name, Device):
        return name
    if name is None:
        name = _default
    if not isinstance(name, str) or name not in _devices:
        known = isinstance(name, str) and name in NAMES
        expect(known, "backend", f"the device must be one of {', '.join(NAMES)}", ArgumentError, device=name)
        kernels = _KERNELS[name]()
        # Another thread may have made it meanwhile: then that one is it.
        _devices.setdefault(name, Device(name, kernels, getattr(kernels, "xp", np)))
    return _devices[name]


_KERNELS = {
    "reference": lambda: _Kernels(reference),
    "cpu": lambda: Adapter("cpu", np, _cpu, memory.empty, overwrites=True),
    "emulated": cuda.emulated,
    "cuda": cuda.cuda,
}


def host(data: Any) -> Any:
    """`data` itself, or a copy of it in the host's memory, waited for, if it is an array of a GPU."""
    for device in _devices.values():
        if device.xp is not np and device.owns(data):
            return device.numpy(data)
    return data


def use(name: str | Device) -> None:
    """Make `name` the default device of new tensors and modules. Raises as `get` does."""
    global _default
    _default = get(name).name
