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
from typing import NamedTuple

import numpy as np

from tinyres import backend, dtypes
from tinyres.autograd import gradients_in_parts, no_grad, tensor
from tinyres.backend import Array, Device
from tinyres.data import Loader
from tinyres.data.augment import PADDING
from tinyres.errors import ArgumentError, DeviceError, DtypeError, GraphError, expect
from tinyres.nn import Dropout, GlobalAvgPool2d, Linear, Module, Sequential
from tinyres.nn.module import home_of
from tinyres.ops.cast import copies_kept, lowered
from tinyres.ops.head import ClassifierLoss
from tinyres.optim import SGD
from tinyres.options import get as options

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
    drawn in Python. What Python does in it besides is done while it runs or is captured, and in no later call: so
    `detect_anomaly` sees nothing of a replay.

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
    uses  in the order of time, as `plan` takes it; of what is given back between two takings the order is of no
          account, and is that of their numbers
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
            at = len(self.uses)
            while at and -1 - number < self.uses[at - 1] < 0:
                at -= 1
            self.uses.insert(at, -1 - number)


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


class Sums(NamedTuple):
    """Over images: their losses, and how many were wrong."""

    loss: float
    wrong: int
    images: int

    def averages(self) -> tuple[float, float]:
        """Mean loss, and error in percent."""
        return self.loss / max(self.images, 1), 100.0 * self.wrong / max(self.images, 1)


class Training:
    """Steps of SGD on batches of `loader`, each one graph: batch, forward, backward and update.

        training = Training(model, optimizer, loader)
        for number in range(first, last):
            training.step(number, lr)
        training.take()  # what has been summed up since the last time

    model      a Sequential that ends in GlobalAvgPool2d and Linear, as all ResNets do, best after
               `tinyres.fuse(model, level="block")`; without dropout, whose draws are made in Python
    optimizer  an SGD of its parameters
    loader     of the model's device

    A step has the bits of the same step run directly. The options in force when a step is captured are those of all
    its replays. Parameters, buffers and velocities may be assigned anew between steps; then the step is captured anew.
    Weights may be changed in place too, before the first step of an epoch: under precision="bfloat16" their rounded
    copies are made there, and otherwise by SGD as it writes the weights.
    Raises DtypeError, ArgumentError or DeviceError for what does not fit; steps raise as Captured does.
    """

    def __init__(self, model: Module, optimizer: SGD, loader: Loader) -> None:
        op = "graph.Training"
        expect(isinstance(optimizer, SGD), op, "needs an SGD", DtypeError, optimizer=type(optimizer).__name__)
        self.batches = _Batches(op, model, loader)
        own = {id(p) for p in self.batches.parameters}
        fits = all(id(p) in own for p in optimizer.params)
        expect(fits, op, "the optimizer's parameters must be the model's", ArgumentError)
        self.model, self.optimizer = model, optimizer
        device = self.batches.device
        self.rate = device.asarray(np.zeros(()))
        self._lr: float | None = None
        self._copies: list[tuple[Array, Array]] = []

    def step(self, number: int, lr: float) -> None:
        """Step `number` of the training, on `loader.batch(number)`, at the rate `lr`. Waits for nothing."""
        self._renew(number % self.batches.loader.steps_per_epoch == 0)
        if lr != self._lr:
            self._lr = lr
            self.rate[...] = lr
        self.batches.run(number, self._step)

    def take(self) -> Sums:
        """The sums over all images since the last call, waited for."""
        return self.batches.take()

    @property
    def launches(self) -> int | None:
        """Of a whole batch; None before it is captured."""
        return self.batches.launches

    @property
    def arena_bytes(self) -> int | None:
        """Of the graph of a whole batch; None before it is captured."""
        return self.batches.arena_bytes

    def _step(self, x, labels):
        with gradients_in_parts(), copies_kept(self._copies):
            self.batches.loss(x, labels).backward()
            self.optimizer.update(self.rate, self._copies)
            self.optimizer.zero_grad()

    def _renew(self, first):
        """Drop the graphs if what they hold was replaced; make the rounded copies if they may be old."""
        replaced = self.batches.hold([v for v in self.optimizer._velocities if v is not None])
        if options().precision != "bfloat16":
            self._copies = []
        elif replaced:
            rounded = [p for p in self.optimizer.params if p.ndim > 1 or p is self.batches.head.bias]
            weights = [p.data for p in rounded if p.dtype == np.float32]
            self._copies = [(w, self.batches.device.kernels.cast(w, dtypes.bfloat16())) for w in weights]
        elif first:
            for w, copy in self._copies:
                self.batches.device.kernels.extension.cast(copy, w)


class Evaluation:
    """Called, it gives the Sums of a model in evaluation mode over one pass of `loader`, each batch one graph.

    model   as for Training
    loader  of the model's device, without shuffling and augmentation
    Every module is left in the mode in which it was. Raises as Training does.
    """

    def __init__(self, model: Module, loader: Loader) -> None:
        op = "graph.Evaluation"
        self.batches, self.model = _Batches(op, model, loader), model
        plain = not (loader.shuffle or loader.augment)
        expect(plain, op, "the loader must neither shuffle nor augment", ArgumentError)

    def __call__(self) -> Sums:
        modes = [(module, module.training) for module in self.model.modules()]
        self.batches.hold()
        self.model.eval()
        try:
            for number in range(self.batches.loader.steps_per_epoch):
                self.batches.run(number, self._step)
        finally:
            for module, training in modes:
                module.training = training
        return self.batches.take()

    @no_grad()
    def _step(self, x, labels):
        self.batches.loss(x, labels)


class _Batches:
    """What training and evaluation have in common: batches by number, a graph for each size, the sums of a network."""

    def __init__(self, op, model, loader):
        expect(isinstance(loader, Loader), op, "needs a data.Loader", DtypeError, loader=type(loader).__name__)
        ends = isinstance(model, Sequential) and [type(module) for module in model][-2:] == [GlobalAvgPool2d, Linear]
        rule = "needs a Sequential that ends in GlobalAvgPool2d and Linear, with a bias"
        expect(ends and list(model)[-1].bias is not None, op, rule, DtypeError, model=type(model).__name__)
        dropout = [module for module in model.modules() if isinstance(module, Dropout) and module.p > 0]
        rule = "dropout draws its masks in Python: it cannot be captured"
        expect(not dropout, op, rule, ArgumentError, got=dropout[:1])
        hooked = [name for name, module in model.named_modules() if module._forward_hooks]
        hooked += [name for name, p in model.named_parameters() if p._hooks]
        expect(not hooked, op, "hooks run in Python: they cannot be captured", ArgumentError, got=hooked[:3])
        self.device = home_of(model)
        rule = "the loader must make its batches on the model's device"
        expect(loader.device is self.device, op, rule, DeviceError, model=self.device, loader=loader.device)
        self.loader, self.head = loader, list(model)[-1]
        classes, highest = self.head.weight.shape[1], int(loader.labels.max())
        expect(highest < classes, op, f"labels must be in 0 .. {classes - 1}", ArgumentError, highest=highest)
        self.body = _without_head(model)
        self.dtype = dtypes.bfloat16() if options().precision == "bfloat16" else np.dtype(np.float32)
        asarray = self.device.asarray
        self.counter, self.metrics = asarray(np.zeros(2, np.int64)), asarray(np.zeros(4))
        self.order = asarray(np.arange(len(loader.images)))
        self.epoch, self.next = -1, 0
        self.steps: dict[int, Captured] = {}
        self.held: list[Array] = []
        self.parameters = list(model.parameters())
        self.buffers = [(module._buffers, name) for module in model.modules() for name in module._buffers]

    def hold(self, others=()):
        """Drop the graphs unless the model's arrays, and others, are those of the last time, whose addresses they have.

        Returns whether it did.
        """
        arrays = [p.data for p in self.parameters]
        arrays += [table[name] for table, name in self.buffers]
        arrays += others
        same = len(arrays) == len(self.held) and all(a is b for a, b in zip(arrays, self.held, strict=True))
        if not same:
            self.held, self.steps = arrays, {}
        return not same

    @property
    def launches(self):
        step = self.steps.get(self.loader.batch_size)
        return step and step.launches

    @property
    def arena_bytes(self):
        step = self.steps.get(self.loader.batch_size)
        return step and step.size

    def run(self, number, function):
        loader = self.loader
        epoch, position = divmod(number, loader.steps_per_epoch)
        if loader.shuffle and epoch != self.epoch:
            self.order[...] = loader.order(epoch)
            self.epoch = epoch
        if number != self.next:
            self.counter[0], self.counter[1] = number, 0
        self.next = None  # until the step is done: it may be interrupted
        size = min(loader.batch_size, len(loader.images) - position * loader.batch_size)
        if size not in self.steps:
            self.steps[size] = Captured(lambda: function(*self.batch(size)), self.device)
        self.steps[size]()
        self.next = number + 1

    def batch(self, size):
        loader = self.loader
        arrays = loader.images, loader.labels, self.order, self.counter, loader.mean, loader.scale
        settings = loader.augment_key, loader.batch_size, loader.steps_per_epoch, size, self.dtype
        return self.device.kernels.augment_step(*arrays, *settings, PADDING if loader.augment else None)

    def loss(self, x, labels):
        features = lowered(self.body(tensor(x, device=self.device)))
        # Not ops.classifier_loss, which in the host's memory looks at the labels: they were looked at in __init__.
        given = {"labels": labels, "smoothing": 0.0, "metrics": self.metrics}
        return ClassifierLoss.apply(features, self.head.weight, self.head.bias, **given)

    def take(self):
        loss, wrong, images, _ = self.device.numpy(self.metrics)
        self.metrics.fill(0)
        return Sums(float(loss), int(wrong), int(images))


def _without_head(model):
    """`model` up to its last feature maps, over the same modules."""
    body = type(model).__new__(type(model))
    body.__dict__.update(model.__dict__)
    body.__dict__["_modules"] = dict(list(model._modules.items())[:-2])
    return body
