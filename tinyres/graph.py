"""Whole steps as graphs: the launches of a function are captured once, and from then on replayed by one call.

At batch 128 a CIFAR ResNet's kernels take a few microseconds each, less than Python needs to ask for them. A captured
step asks once. What a graph holds are launches with their arguments, addresses above all, so:

  - its buffers must be its own, for as long as it lives. They come from one arena, planned from what the function took
    and gave back when it was run directly: two buffers share memory where one was given back before the other was
    taken (`plan`);
  - what changes from step to step must be read from memory by the kernels: the rate, the number of the step, and by
    that number the batch and its random crops;
  - nothing may look at a result on the way. Metrics are summed up on the device (`Training`).

`device="emulated"` captures as a GPU does, so all of it can be watched and tested without one.
"""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable

import numpy as np

from tinyres import backend
from tinyres.backend import Device
from tinyres.errors import DeviceError, DtypeError, GraphError, expect

ALIGNMENT = 256  # bytes; a GPU's allocator gives as much
TRIES = 5  # direct calls until one takes the same memory as the one before

_lock = threading.RLock()  # one function at a time: an allocator is put in the place of the device's


class Captured:
    """`function`, of no arguments and no result, which after its first calls runs as a graph.

        step = Captured(function, "cuda")
        step()  # Python runs; so it does until two calls have taken the same memory in the same order
        step()
        step()  # the third captures, without running anything, and launches what it captured; later ones only launch

    Every call does the same work, with the same bits. The function may call kernels alone, on arrays that outlive it or
    that it takes itself and gives back: no arithmetic of NumPy's or CuPy's, no reading of values, no random numbers
    drawn in Python. What Python does in it besides is done while it runs or is captured, and in no later call.

    launches  how many the graph holds; None before it is there
    size      bytes of its arena; None before
    Raises DeviceError for a device without graphs, DtypeError for what cannot be called; a call raises GraphError if
    the function's use of memory does not settle, or is another while it is captured: then nothing was run.
    """

    def __init__(self, function: Callable[[], object], device: str | Device | None = None) -> None:
        expect(callable(function), "Captured", "needs a function", DtypeError, function=type(function).__name__)
        self.device = backend.get(device)
        graphs = getattr(self.device.kernels, "graphs", None)
        rule = "needs a device with graphs: cuda or emulated"
        expect(graphs is not None, "Captured", rule, DeviceError, device=self.device.name)
        self.function = function
        self.launches: int | None = None
        self.size: int | None = None
        self._graph = self._arena = self._memory = None
        self._tries = 0

    def __call__(self) -> None:
        if self._graph is None:
            with _lock, _no_garbage_collection():
                if self._memory is None or not self._memory.settled:
                    self._run()
                    return
                self._capture()
        self._graph.launch()

    def _run(self):
        """Directly, watching the memory."""
        rule = f"the function must take the same memory at each call; {TRIES} calls differed"
        expect(self._tries < TRIES, "Captured", rule, GraphError)
        memory = _Memory(self.device.kernels)
        with memory:
            self.function()
        memory.settled = self._memory is not None and memory.uses == self._memory.uses
        self._memory, self._tries = memory, self._tries + 1

    def _capture(self):
        kernels, uses = self.device.kernels, self._memory.uses
        offsets, size = plan(uses)
        arena = kernels.empty((max(size, 1),), np.uint8)
        memory = _Memory(kernels, arena, offsets)
        before = kernels.extension.launches()
        with memory:
            graph = kernels.graphs.capture(self.function)
        rule = "the function must take the same memory when it is captured as before"
        expect(memory.uses == uses, "Captured", rule, GraphError)
        self._graph, self._arena, self._memory = graph, arena, None
        self.launches, self.size = kernels.extension.launches() - before, size


class _no_garbage_collection:
    """A block in which objects die with their last name, and at no other time."""

    def __enter__(self):
        self.before = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *exc):
        if self.before:
            gc.enable()


class _Memory:
    """The allocator of a device for this thread in a `with` block: notes what is taken, and when it is given back.

    With an arena, what is taken number i lies there, at offsets[i].
    uses  list of (bytes taken,) and of (-1 - i) where what was taken number i is given back
    """

    def __init__(self, kernels, arena=None, offsets=()):
        self.kernels, self.arena, self.offsets = kernels, arena, offsets
        self.uses, self.watched, self.thread = [], [], threading.get_ident()
        self.settled = False

    def __enter__(self):
        self.open, self.before = True, self.kernels.empty
        self.kernels.empty = self.empty

    def __exit__(self, *exc):
        self.kernels.empty = self.before
        self.open = False

    def empty(self, shape, dtype):
        if threading.get_ident() != self.thread:
            return self.before(shape, dtype)
        number = len(self.watched)
        self.uses.append(math.prod(shape) * np.dtype(dtype).itemsize)
        if self.arena is None:
            array = owner = self.before(shape, dtype)
        else:
            expect(number < len(self.offsets), "Captured", "the function took more memory than before", GraphError)
            array, owner = self.kernels.graphs.place(self.arena, self.offsets[number], shape, dtype)
        self.watched.append(weakref.ref(owner, lambda _: self._given_back(number)))
        return array

    def _given_back(self, number):
        if self.open:
            self.uses.append(-1 - number)


def plan(uses: list[int]) -> tuple[list[int], int]:
    """Where each buffer lies in one arena, and the arena's bytes.

    uses  in the order of time, n >= 0: a buffer of n bytes is taken; -1 - i: buffer number i is given back
    The largest first, each at the lowest place where it meets no other that is in use while it is.
    """
    sizes, begin, end = [], [], []
    for time, use in enumerate(uses):
        if use >= 0:
            sizes.append(-(-use // ALIGNMENT) * ALIGNMENT)
            begin.append(time)
            end.append(len(uses))
        else:
            end[-1 - use] = time
    size, first, last = (np.array(values, np.int64) for values in (sizes, begin, end))
    offset = np.zeros(len(size), np.int64)
    placed: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        others = np.array(placed, np.int64)
        others = others[(first[others] < last[i]) & (first[i] < last[others])]
        others = others[np.argsort(offset[others], kind="stable")]
        place = 0
        for other in others:
            if place + size[i] <= offset[other]:
                break
            place = max(place, int(offset[other] + size[other]))
        offset[i] = place
        placed.append(i)
    return [int(o) for o in offset], int((offset + size).max(initial=0))
