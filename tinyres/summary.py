"""What a model consists of: a table of its layers with shapes, parameters and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyres.autograd import Tensor, no_grad
from tinyres.errors import ArgumentError, DtypeError, expect
from tinyres.nn import Conv2d, Linear, Module
from tinyres.ops import checks

Row = tuple[str, str, tuple[int, ...], int, int]  # of Summary.rows


class Summary:
    """rows           (name, layer, output shape, parameters, multiply-adds) for each layer
    parameters     of the whole model
    multiply_adds  of its convolutions and linear layers for the given input, the papers' measure of cost
    activation_bytes  of all layers' outputs
    """

    rows: list[Row]
    parameters: int
    multiply_adds: int
    activation_bytes: int

    def __init__(self, rows: list[Row], parameters: int, activation_bytes: int) -> None:
        self.rows, self.parameters, self.activation_bytes = rows, parameters, activation_bytes
        self.multiply_adds = sum(row[4] for row in rows)

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
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "-" * len(lines[0]), total])


def summary(model: Module, input_shape: Sequence[int], show: bool = True) -> Summary:
    """Run `model` once in evaluation mode on zeros of `input_shape`, such as (1, 32, 32, 3), and print its table.

    Returns the Summary; `show=False` prints nothing. The model is left as it was. Raises DtypeError unless given a
    Module, and whatever the model raises for an input of that shape.
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
    x = Tensor(first.device.asarray(np.zeros(shape, first.dtype)), False, first.device)

    rows: list[Row] = []
    handles, total_bytes = [], 0
    modes = [(module, module.training) for module in model.modules()]

    def note(name, module):
        def hook(_, inputs, output):
            nonlocal total_bytes
            own = sum(p.size for p in module._parameters.values())
            total_bytes += output.data.nbytes
            rows.append((name, type(module).__name__, output.shape, own, _multiply_adds(module, output)))

        return hook

    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(note(name, module)))
    try:
        with no_grad():
            model.eval()
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    result = Summary(rows, sum(p.size for p in model.parameters()), total_bytes)
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
