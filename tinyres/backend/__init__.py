"""Devices. A Device is a name, an array module and a kernel table (spec.py); nothing else knows how one works.

`reference` is plain NumPy, the oracle of the tests; `cpu` is the C++ extension.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tinyres.backend import compose, spec
from tinyres.errors import ArgumentError, DeviceError, expect

Array = np.ndarray  # or its CuPy twin, on a GPU

NAMES = ("reference", "cpu", "emulated", "cuda")

_devices: dict[str, Device] = {}
_default = "cpu"


class _Kernels:
    """The kernels of a device as attributes; fused ones that it lacks are composed from its own."""

    def __init__(self, module):
        for name in spec.MANDATORY:
            setattr(self, name, getattr(module, name))
        for name in spec.FUSED:
            own = getattr(module, name, None)
            setattr(self, name, own or getattr(compose, name).__get__(self))


class Device:
    """One place where arrays live and kernels run. There is one Device object per name: compare with `is`.

    name     "reference" or "cpu"
    kernels  the kernel table, as attributes
    xp       the array module, NumPy
    """

    name: str
    kernels: Any  # raw kernels: their contracts are in spec.py
    xp: Any

    def __init__(self, name: str, kernels: Any, xp: Any) -> None:
        self.name, self.kernels, self.xp = name, kernels, xp

    def asarray(self, data: ArrayLike, dtype: DTypeLike | None = None) -> Array:
        """`data` as an array of this device, without a copy where possible."""
        array = self.xp.asarray(data, dtype=dtype)
        return array if array.flags.aligned else array.copy()  # kernels load whole elements

    def owns(self, array: object) -> TypeGuard[Array]:
        """Whether `array` is an array of this device's kind."""
        return isinstance(array, self.xp.ndarray)

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
    known = isinstance(name, str) and name in NAMES
    if not known or name not in _devices:
        expect(known, "backend", f"the device must be one of {', '.join(NAMES)}", ArgumentError, device=name)
        expect(
            name in ("reference", "cpu"),
            "backend",
            f"{name} needs the CUDA kernels, which this version does not have",
            DeviceError,
        )
        _devices[name] = Device(name, _Kernels(importlib.import_module(f"tinyres.backend.{name}")), np)
    return _devices[name]


def use(name: str | Device) -> None:
    """Make `name` the default device of new tensors and modules. Raises as `get` does."""
    global _default
    _default = get(name).name
