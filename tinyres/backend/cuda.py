"""Devices `emulated` and `cuda`: the CUDA kernels, on the CPU over NumPy arrays and on the GPU over CuPy's."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from tinyres.backend import memory
from tinyres.backend.adapter import Adapter
from tinyres.dtypes import is_bfloat16
from tinyres.errors import DeviceError, out_of_memory


def emulated() -> Adapter:
    """The kernels compiled for the CPU: slow and exact, for tests, debuggers and readers without a GPU.

    Raises DeviceError if they were not built.
    """
    try:
        importlib.import_module("tinyres._emulated")
    except ImportError as error:
        raise DeviceError(f"[backend] emulated needs tinyres._emulated ({_first_line(error)})") from None
    kernels = adapter("emulated", np, "_emulated", memory.empty, None)
    kernels.graphs = _Emulated(kernels.extension)
    return kernels


def cuda() -> Adapter:
    """The kernels compiled for the GPU, on CuPy's arrays, memory pool and current stream.

    Raises DeviceError if the kernels were not built, if CuPy is missing, or if there is no driver or GPU.
    """
    try:
        importlib.import_module("tinyres._cuda")
    except ModuleNotFoundError:
        raise DeviceError(
            "[backend] cuda needs tinyres built with nvcc, which was not found when it was installed: put the CUDA "
            "toolkit's nvcc on the PATH and install again with TINYRES_CUDA=ON"
        ) from None
    except ImportError as error:
        raise DeviceError(f"[backend] cuda needs tinyres._cuda ({_first_line(error)})") from None
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        raise DeviceError(
            f"[backend] cuda needs CuPy: pip install 'tinyres[cuda13]', or [cuda12] for CUDA 12 ({_first_line(error)})"
        ) from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(f"[backend] cuda needs an NVIDIA GPU and its driver ({_first_line(error)})") from None
    if not count:
        raise DeviceError("[backend] cuda needs an NVIDIA GPU and its driver, which has found none")
    kernels = adapter("cuda", cupy, "_cuda", _allocator(cupy), lambda: cupy.cuda.get_current_stream().ptr)
    kernels.graphs = _CuPy(cupy)
    return kernels


class _Emulated:
    """What a captured step needs of its device (tinyres/graph.py), in the host's memory."""

    def __init__(self, extension):
        self.extension = extension

    def capture(self, function):
        """Call `function`, whose launches are not run but recorded: a graph, with `launch()` to run them."""
        self.extension.begin_capture()
        try:
            function()
        finally:
            graph = self.extension.end_capture()
        return graph

    def place(self, arena, offset, shape, dtype):
        """An array in `arena`, an array of bytes; and an object that lives as long as it and its views."""
        block = _Block(arena, offset, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.asarray(block).view(dtype).reshape(shape), block


class _Block:
    """A part of an arena that NumPy does not look behind: views of an array over it keep it alive."""

    def __init__(self, arena, offset, size):
        self.arena = arena
        address = arena.ctypes.data + offset
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (address, False)}


class _CuPy:
    """The same on a GPU: a CUDA graph."""

    def __init__(self, cupy):
        self.cupy = cupy

    def capture(self, function):
        stream = self.cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        with stream:
            stream.begin_capture()
            try:
                function()
            finally:
                graph = stream.end_capture()
        return graph

    def place(self, arena, offset, shape, dtype):
        array = self.cupy.ndarray(shape, dtype, memptr=arena.data + offset)
        return array, array


def _allocator(cupy):
    """cupy.empty, which says what is missing where that is memory, or a CuPy that knows bfloat16."""
    knows_bfloat16 = int(cupy.__version__.partition(".")[0]) >= 14

    def empty(shape, dtype):
        if not knows_bfloat16 and is_bfloat16(np.dtype(dtype)):
            raise DeviceError(f"[backend] bfloat16 on cuda needs CuPy 14; this is CuPy {cupy.__version__}")
        try:
            return cupy.empty(shape, dtype)
        except MemoryError as error:  # its pool has given back what waits and tried again, and says how large it is
            out_of_memory("empty", f"for {tuple(shape)} {np.dtype(dtype)}", error)

    return empty


def _first_line(error):
    return str(error).strip().partition("\n")[0]


def adapter(name, xp, extension, empty, stream):
    """The adapter of a CUDA device.

    xp         NumPy or CuPy
    extension  "_emulated" or "_cuda"
    empty      the allocator, (shape, dtype) -> array; kernels take their scratch memory from it too
    stream     () -> the address of the stream to launch on, or None for the default one
    """
    module = importlib.import_module(f"tinyres.{extension}")
    kernels = Adapter(name, xp, module, empty)
    module.connect(lambda size: kernels.empty((size,), np.uint8), stream)
    return kernels
