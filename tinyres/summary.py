"""What a model consists of, a table of its layers with shapes, parameters and multiply-adds; and what memory it takes
to train it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tinyres import _cpu
from tinyres.autograd import Tensor, _context, no_grad
from tinyres.backend import Device, memory, random
from tinyres.backend.adapter import Adapter
from tinyres.errors import ArgumentError, DtypeError, expect
from tinyres.nn import Conv2d, Linear, Module
from tinyres.nn.module import home_of
from tinyres.ops import checks
from tinyres.options import CONV

FEW_PIXELS = 2**15  # of the images in a step that is made only to see what scratch it takes

Row = tuple[str, str, tuple[int, ...], int, int]  # of Summary.rows


class Footprint(NamedTuple):
    """The bytes that training holds, with SGD with momentum and in the model's dtype: `total`, which are

    parameters   and buffers
    gradients    of all parameters: those of the step before live until the forward pass is over
    momentum     of SGD
    activations  the batch, and what the forward pass keeps for backward
    workspace    what the peak holds beside all these: gradients on their way, and the kernels' scratch
    waiting      blocks that the allocator keeps for another part of the step, where the peak is
    """

    parameters: int
    gradients: int
    momentum: int
    activations: int
    workspace: int
    waiting: int

    @property
    def total(self) -> int:
        return sum(self)


class Summary:
    """rows           (name, layer, output shape, parameters, multiply-adds) for each layer
    parameters     of the whole model
    multiply_adds  of its convolutions and linear layers for the given input, the papers' measure of cost
    activation_bytes  of all layers' outputs
    batch          images of the given input
    training       the Footprint of a training step on it, worked out when first asked for: see `summary`
    """

    rows: list[Row]
    parameters: int
    multiply_adds: int
    activation_bytes: int
    batch: int

    def __init__(
        self, rows: list[Row], parameters: int, activation_bytes: int, batch: int, footprint: Callable[[], Footprint]
    ) -> None:
        self.rows, self.parameters, self.activation_bytes, self.batch = rows, parameters, activation_bytes, batch
        self.multiply_adds = sum(row[4] for row in rows)
        self._footprint = footprint

    @functools.cached_property
    def training(self) -> Footprint:
        return self._footprint()

    def __str__(self) -> str:
        table = [("layer", "kind", "output", "parameters", "multiply-adds")]
        table += [(name, kind, str(shape), f"{n:,}", f"{m:,}") for name, kind, shape, n, m in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [
            "  ".join(
                f"{cell:{'<' if i < 3 else '>'}{width}}"
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        total = (
            f"{self.parameters:,} parameters, {self.multiply_adds:,} multiply-adds, "
            f"{self.activation_bytes / 2**20:.1f} MiB of layer outputs"
        )
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.training._asdict().items())
        training = f"training, batch {self.batch}: {self.training.total / 2**20:.1f} MiB ({parts})"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "-" * len(lines[0]), total, training])


def summary(model: Module, input_shape: Sequence[int], show: bool = True) -> Summary:
    """Print the table of `model` for inputs of `input_shape`, such as (1, 32, 32, 3), with the memory that training on
    such batches will take.

    Nothing is computed for it, and that memory is not taken: the model's own code runs with kernels that do nothing, on
    arrays that nobody writes to, and so takes addresses only; code that looks at values finds any. The scratch of the
    CPU's kernels, which grows little with the batch, is that of a step that is really made, on a few images; that of
    other devices is left out. Blocks of the allocator that wait for reuse are given back.

    Returns the Summary; `show=False` prints nothing, and leaves the memory to whoever asks for `Summary.training`. The
    model is left as it was. Raises DtypeError unless given a Module, and whatever the model raises for an input of that
    shape.
    """
    expect(isinstance(model, Module), "summary", "needs a Module", DtypeError, model=type(model).__name__)
    expect(
        isinstance(input_shape, (tuple, list)),
        "summary",
        "input_shape must be a tuple",
        ArgumentError,
        input_shape=input_shape,
    )
    shape = tuple([checks.integer("summary", "input_shape", n, 1) for n in input_shape])
    first: Any = next(model.parameters(), None)
    expect(first is not None, "summary", "the model has no parameters", ArgumentError)
    rows: list[Row] = []
    total_bytes = 0

    def note(name, module):
        def hook(_, inputs, output):
            nonlocal total_bytes
            own = sum(p.size for p in module._parameters.values())
            total_bytes += output.data.nbytes
            rows.append((name, type(module).__name__, output.shape, own, _multiply_adds(module, output)))

        return hook

    with _aside(model, _Extension(lambda *_: None)) as device, no_grad():
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(note(name, module))
        model.eval()
        model(_zeros(device, shape, first.dtype))
    footprint = functools.partial(_footprint, model, shape)
    result = Summary(rows, sum(p.size for p in model.parameters()), total_bytes, shape[0], footprint)
    if show:
        print(result)
    return result


def _multiply_adds(module, output):
    if isinstance(module, Conv2d):
        R, S, C, _ = module.weight.shape
        return math.prod(output.shape) * R * S * C
    if isinstance(module, Linear):
        return math.prod(output.shape) * module.weight.shape[0]
    return 0


# Training ---------------------------------------------------------------------------------------------------------


class _Extension:
    """In the place of a device's extension: `call(kernel, number, args)` instead of the kernel, with the call's number
    among those of that kernel in this step."""

    conv_algorithms: tuple[str, ...]

    def __init__(self, call):
        self.call, self.calls = call, Counter()

    def __getattr__(self, kernel):
        def counted(*args):
            self.calls[kernel] += 1
            self.call(kernel, self.calls[kernel], args)

        return counted


def _footprint(model, shape):
    scratch, peak = {}, 0  # scratch: bytes by (kernel, number of its call in a step)

    def run(kernel, number, args):
        memory.reset_peak()
        before = memory.stats()["bytes_in_use"]
        getattr(_cpu, kernel)(*args)
        scratch[kernel, number] = memory.stats()["peak_bytes_in_use"] - before

    def skip(kernel, number, args):
        nonlocal peak
        if kernel == "matmul":  # packs its second factor: the one scratch in proportion to the batch
            in_kernel = args[2].nbytes
            memory.empty((in_kernel,), np.uint8)  # so that the allocator has the block
        else:
            in_kernel = scratch.get((kernel, number), 0)
        peak = max(peak, memory.stats()["bytes_in_use"] + in_kernel)

    def train(call, shape, steps):
        """Steps as a loop makes them: what the last forward pass keeps, the peak, and what the allocator holds then."""
        nonlocal peak
        memory.release()
        extension = _Extension(call)
        with _aside(model, extension) as device:
            before = memory.stats()
            for _ in range(steps):
                extension.calls.clear()
                peak = 0
                x = _zeros(device, shape, next(model.parameters()).dtype)  # while the batch before is still there
                kept = x.data.nbytes + _training_step(model, x)
            held = memory.stats()["bytes_held"] - before["bytes_held"]
        memory.release()
        return kept, peak - before["bytes_in_use"], held

    scratch_held = 0
    if home_of(model).name == "cpu":
        few = min(shape[0], 32, max(2, FEW_PIXELS // math.prod(shape[1:-1]))), *shape[1:]
        scratch_held = max(train(run, few, 1)[2] - train(skip, few, 1)[2], 0)
    # Two steps, because the first leaves gradients, as every step does to the next.
    activations, at_peak, held = train(skip, shape, 2)
    gradients = sum(p.data.nbytes for p in model.parameters() if p.requires_grad)
    parameters = sum(array.nbytes for array in (*(p.data for p in model.parameters()), *model.buffers()))
    workspace = max(at_peak - gradients - activations, 0)
    waiting = max(held + scratch_held - gradients - activations - workspace, 0)
    return Footprint(parameters, gradients, gradients, activations, workspace, waiting)


def _zeros(device, shape, dtype):
    return Tensor(device.kernels.broadcast_to(np.zeros((), dtype), shape), False, device)


def _training_step(model, x):
    """Forward and backward; returns the bytes that forward has kept."""
    before = memory.stats()["bytes_in_use"]
    y = model(x)
    expect(isinstance(y, Tensor), "summary", "the model must return a Tensor", DtypeError, got=type(y).__name__)
    kept = memory.stats()["bytes_in_use"] - before
    if y.requires_grad:
        model.zero_grad()
        y.backward(np.zeros((), y.dtype))
    return kept


@contextmanager
def _aside(model: Module, extension: _Extension) -> Iterator[Device]:
    """The model in training mode, recording, without hooks and gradients, on a device of its own, of that extension;
    afterwards everything is as it was."""
    home, draws = home_of(model), random.state()
    # What convolutions the device has decides which one is asked for; the reference asks for none.
    own = home.kernels.extension if isinstance(home.kernels, Adapter) else None
    extension.conv_algorithms = own.conv_algorithms if own else CONV
    for name in ("conv3x3_rows", "block_output_rows"):  # which say what is fused, and what it leaves
        setattr(extension, name, getattr(own, name, None))
    kernels = Adapter(home.name, np, extension, memory.empty, getattr(home.kernels, "overwrites", False))
    device = Device(home.name, kernels, np)
    leaves = [(p, p._data, p.device, p.grad, p._hooks) for p in model.parameters()]
    modules = [(m, m.training, m._buffers, m._forward_hooks) for m in model.modules()]

    def on_host(array):
        return array if isinstance(array, np.ndarray) else memory.empty(array.shape, array.dtype)

    recording = _context.set((0, ()))  # recorded and unobserved
    try:
        for p, data, *_ in leaves:
            p._data, p.device, p.grad, p._hooks = on_host(data), device, None, None
        for m, _, buffers, _ in modules:
            m.training, m._forward_hooks = True, {}
            m._buffers = {name: on_host(array).copy() for name, array in buffers.items()}
        yield device
    finally:
        for p, data, where, gradient, hooks in leaves:
            p._data, p.device, p.grad, p._hooks = data, where, gradient, hooks
        for m, training, buffers, forward_hooks in modules:
            m.training, m._buffers, m._forward_hooks = training, buffers, forward_hooks
        random.set_state(draws)
        _context.reset(recording)
