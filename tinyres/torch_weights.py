"""Weights in and out of PyTorch: its usual names and layouts for ResNets (torchvision's), as a dict or in a file.

    PyTorch                             tinyres.models.imagenet_resnet
    conv1, bn1                          0, 1                            the stem
    layerS.U.convK, layerS.U.bnK        N.branch.(3K - 3), .(3K - 2)    unit U = 0, 1, ... of stage S = 1 ... 4
    layerS.U.downsample.0, .1           N.shortcut.0, .1                its projection
    fc                                  the last layer

What the arrays of a layer are called, and how they lie, is FIELDS. In PyTorch's bottlenecks of today the 3x3
convolution halves the image: weights from there want a model made with stride_in="3x3". The shapes are the same with
"1x1", so nothing else will tell.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyres import backend
from tinyres.checkpoint import write_atomic
from tinyres.errors import ArgumentError, CheckpointError, expect, fail
from tinyres.nn import (
    BatchNorm2d,
    Conv2d,
    FusedResidual,
    GlobalAvgPool2d,
    Identity,
    Linear,
    MaxPool2d,
    Module,
    Parameter,
    ReLU,
    Residual,
    Sequential,
)

# For each kind of layer: PyTorch's names, ours, and the axes of our arrays in the order of PyTorch's.
FIELDS: dict[type[Module], list[tuple[str, str | None, tuple[int, ...]]]] = {
    Conv2d: [("weight", "weight", (3, 2, 0, 1))],  # RSCK to OIHW
    BatchNorm2d: [
        ("weight", "gamma", (0,)),
        ("bias", "beta", (0,)),
        ("running_mean", "running_mean", (0,)),
        ("running_var", "running_var", (0,)),
        ("num_batches_tracked", None, ()),  # counted by PyTorch only, and used only where momentum is None
    ],
    Linear: [("weight", "weight", (1, 0)), ("bias", "bias", (0,))],  # (in, out) to (out, in)
}


def to_torch(model: Module) -> dict[str, np.ndarray]:
    """Copies of the model's parameters and running statistics under PyTorch's names and in its layouts and order.

    model  from `models.imagenet_resnet` with shortcut "B" and unit and skip as in 2015, of either stride_in, or
           `fuse` of one; on any device
    Arrays are dense and of the model's dtype; num_batches_tracked, which tinyres does not count, is an int64 zero.
    Raises ArgumentError for any other model: it has no names in PyTorch.
    """
    table = _table("to_torch", model)
    state = model.state_dict()
    return {
        name: np.zeros((), np.int64) if own is None else state[own].transpose(axes).copy()
        for name, (own, axes) in table.items()
    }


def from_torch(model: Module, state: Mapping[str, Any]) -> None:
    """Copy `state`, named and laid out as PyTorch does it, into the model, casting to its dtype.

    model  as in `to_torch`; bottlenecks with stride_in="3x3" for weights trained by torchvision
    state  of arrays, or tensors on the CPU, as from `state_dict()`; whether num_batches_tracked is there makes no
           difference
    Raises CheckpointError, before anything is changed, listing every name that is missing, unexpected, no array of
    numbers or of another shape; ArgumentError for a model that has no names in PyTorch.
    """
    op = "from_torch"
    table = _table(op, model)
    mapping = isinstance(state, Mapping)
    expect(mapping, op, "needs a mapping of names to arrays", CheckpointError, state=type(state).__name__)
    own_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    own_shapes.update((name, array.shape) for name, array in model.named_buffers())
    problems = [f"missing {name}" for name, (own, _) in table.items() if own is not None and name not in state]
    problems += [f"unexpected {name}" for name in state if name not in table]
    arrays = {}
    for name, (own, axes) in table.items():
        if own is None or name not in state:
            continue
        array = _as_array(state[name])
        shape = tuple(own_shapes[own][axis] for axis in axes)
        if array is None:
            problems.append(f"{name} is no array of numbers that NumPy can read")
        elif array.shape != shape:
            problems.append(f"{name} has shape {array.shape}, the model's is {shape}")
        else:
            arrays[own] = array.transpose(np.argsort(axes))
    expect(not problems, op, "the state must fit the model: " + "; ".join(problems), CheckpointError)
    model.load_state_dict(arrays)


def export_torch(model: Module, path: str | os.PathLike[str]) -> None:
    """Write `to_torch(model)` to the safetensors file `path`, whole or not at all.

    In PyTorch: `torch_model.load_state_dict(safetensors.torch.load_file(path))`.
    Raises as `to_torch` does; OSError where the folder cannot be written.
    """
    from safetensors.numpy import save as serialize

    write_atomic(path, serialize(to_torch(model), {"format": "pt"}))


def import_torch(model: Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights in the safetensors file `path` into the model, as `from_torch` does.

    PyTorch's own files (.pt, .pth) are pickles, which run code when read, and are refused. Once, in PyTorch:
    `safetensors.torch.save_file(torch.load("model.pth", weights_only=True), "model.safetensors")`.
    Raises as `from_torch` does, and CheckpointError for a file that is missing or no safetensors file;
    OSError for one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    op = "import_torch"
    expect(os.path.isfile(path), op, "there is no file here", CheckpointError, path=path)
    state, name = {}, ""
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                state[name] = file.get_tensor(name)
    except SafetensorError as error:
        with open(path, "rb") as damaged:
            start = damaged.read(4)
        pickled = start == b"PK\x03\x04" or start[:1] == b"\x80"  # torch.save's archive, and what it wrote before 1.6
        rule = (
            "needs a safetensors file, not a pickle; to convert it: "
            'safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors")'
        )
        expect(not pickled, op, rule, CheckpointError, path=path)
        raise CheckpointError(f"[{op}] {path} is no readable safetensors file: {error}") from error
    except OSError:
        raise
    except Exception as error:  # bfloat16 or float8, say, or more axes than NumPy has
        raise CheckpointError(f"[{op}] {path}: {name} is of a type or shape that NumPy lacks: {error}") from error
    try:
        from_torch(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"[{op}] {path}: {error}") from None


def _as_array(value):
    """`value` as an array of numbers; None where it is none."""
    try:
        # NumPy refuses a tensor that is being trained.
        array = np.asarray(backend.host(value.detach() if hasattr(value, "detach") else value))
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.dtype.kind in "fiu" else None


def _table(op, model):
    """The mapping: PyTorch's name -> (the name in our state_dict, the axes of our array in the order of PyTorch's)."""
    layers = _layers(op, model)
    own = {id(module): name for name, module in model.named_modules()}
    return {
        f"{name}.{theirs}": (ours and f"{own[id(layer)]}.{ours}", axes)
        for name, layer in layers.items()
        for kind, fields in FIELDS.items()
        if isinstance(layer, kind)
        for theirs, ours, axes in fields
    }


def _layers(op, model):
    """PyTorch's names of the layers -> the layers, in PyTorch's order."""
    rule = (
        "only a network of imagenet_resnet with shortcut B, unit original and skip identity has names in PyTorch, "
        "fused or not, but not folded"
    )
    match [*model] if isinstance(model, Sequential) else []:
        case [
            Conv2d(bias=None) as conv,
            BatchNorm2d() as norm,
            ReLU() | Identity(),
            MaxPool2d(),
            *units,
            GlobalAvgPool2d(),
            Linear(bias=Parameter()) as linear,
        ]:
            layers = {"conv1": conv, "bn1": norm}
        case _:
            fail(op, rule, ArgumentError, model=type(model).__name__)
    stage = number = 0
    for i, unit in enumerate(units, 4):
        parts = _unit(unit)
        expect(parts, op, rule, ArgumentError, layer=f"{i}, {type(unit).__name__}")
        # A stage begins where the dimensions change; the first of basic units, where they do not.
        stage, number = (stage + 1, 0) if stage == 0 or "downsample.0" in parts else (stage, number + 1)
        layers.update((f"layer{stage}.{number}.{name}", layer) for name, layer in parts.items())
    expect(stage == 4, op, rule, ArgumentError, stages=stage)
    return {**layers, "fc": linear}


def _unit(unit):
    """The layers of an original residual unit by PyTorch's names; none for any other module."""
    match unit:
        case Residual(pre=None, join=None, activation=ReLU()) | FusedResidual(pre=None, join=None):
            shortcut = unit.shortcut
        case _:
            return {}
    branch = [*unit.branch]
    projection = [] if shortcut is None else [*shortcut] if isinstance(shortcut, Sequential) else [shortcut]
    if len(branch) not in (5, 8) or len(projection) not in (0, 2) or not _alternate(branch) & _alternate(projection):
        return {}
    names = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")[: len(branch)]
    return dict(zip((*names, "downsample.0", "downsample.1"), branch + projection, strict=False))


def _alternate(layers):
    """Whether they are convolutions without bias, batch norms and ReLUs in turn."""
    kinds = itertools.cycle((Conv2d, BatchNorm2d, (ReLU, Identity)))
    return all(isinstance(x, kind) and getattr(x, "bias", None) is None for x, kind in zip(layers, kinds, strict=False))
