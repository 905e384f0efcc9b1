"""What a trained network does inside: strengths of responses, of gradients, and of shortcuts beside branches.

Each function runs a model that is not fused (the modules of `tinyres.models` as they are built; a checkpoint of a fused
one fits them) and leaves it as it was: modes, buffers, gradients, hooks and the state of the random numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tinyres import ops
from tinyres.autograd import Function, Handle, grad, no_grad, tensor
from tinyres.backend import Array, random
from tinyres.errors import ArgumentError, DtypeError, expect
from tinyres.nn import (
    BatchNorm2d,
    BatchNormAddReLU2d,
    BatchNormReLU2d,
    Conv2d,
    Conv2dAddReLU,
    Conv2dReLU,
    FusedResidual,
    Identity,
    Linear,
    Module,
    Residual,
    Sequential,
)
from tinyres.nn.module import home_of

FUSED = (BatchNormReLU2d, BatchNormAddReLU2d, Conv2dReLU, Conv2dAddReLU, FusedResidual)


class Share(NamedTuple):
    """How much of a unit's signal its shortcut carries, from 0 (all by the branch) to 1 (see `shortcut_shares`)."""

    forward: float
    backward: float


def layer_responses(model: Module, batches: Iterable[Array]) -> dict[str, float]:
    """The standard deviation of each 3x3 convolution's response, by the convolution's name in network order.

    That is the quantity of He et al. 2015, Fig. 7 and "Analysis of Layer Responses" in section 4.2: the output of the
    convolution after its batch norm and before the nonlinearity or the addition. Where no batch norm follows the
    convolution, as at the end of a branch with unit full_preactivation or bn_after_add, it is the convolution's own
    output: there, too, what is added.

    batches  arrays (N, H, W, C) of images as the model takes them; run in evaluation mode, by running statistics
    The deviation is over all images, positions and channels together, about their common mean.
    Raises ArgumentError for a fused model, or where there is no batch; DtypeError unless given a Module.
    """
    _check("layer_responses", model)
    follower: dict[Module, Module] = {}  # of each module in a Sequential
    for module in model.modules():
        if isinstance(module, Sequential):
            follower.update(itertools.pairwise(module))
    sums: dict[str, Any] = {}  # name -> count, sum, sum of squares

    def measure(name):
        sums[name] = np.zeros(3)

        def hook(module, inputs, output):
            y = output.data.astype(np.float64)
            sums[name] += y.size, float(y.sum()), float((y * y).sum())

        return hook

    with _undisturbed(model) as handles, no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Conv2d) and module.weight.shape[:2] == (3, 3):
                norm = follower.get(module)
                source = norm if isinstance(norm, BatchNorm2d) else module
                handles.append(source.register_forward_hook(measure(name)))
        model.eval()
        some = False
        for x in batches:
            some = True
            model(tensor(x, device=home_of(model)))
    expect(some, "layer_responses", "needs at least one batch", ArgumentError)
    return {name: math.sqrt(max(squares / n - (total / n) ** 2, 0.0)) for name, (n, total, squares) in sums.items()}


def gradient_norms(model: Module, x: Array, labels: Array) -> dict[str, float]:
    """The Euclidean norm of the loss's gradient by each layer's weights, by the layer's name in network order.

    Layers are convolutions and linear layers, those of projections and gates as well. The loss is the mean
    cross-entropy of the batch x (N, H, W, C) with labels (N,), in training mode: batch norm by the batch, dropout
    drawn; that is the gradient which a step of training would follow, before weight decay.
    Raises ArgumentError for a fused model; DtypeError unless given a Module; what ops.cross_entropy raises.
    """
    _check("gradient_norms", model)
    layers = {name: module.weight for name, module in model.named_modules() if isinstance(module, (Conv2d, Linear))}
    with _undisturbed(model):
        model.train()
        loss = ops.cross_entropy(model(tensor(x, device=home_of(model))), labels)
        gradients = grad(loss, list(layers.values()))
    return {name: _norm(gradient) for name, gradient in zip(layers, gradients, strict=True)}


def shortcut_shares(model: Module, x: Array, labels: Array) -> dict[str, Share]:
    """How much of the signal passes each residual unit by its shortcut, by the unit's name in network order.

    A unit adds two terms, y = S + B: by Eqn. (3) of He et al. 2016, y = x + F(x), they are x and F(x); by Eqn. (6),
    lambda x and F(x). In general B is what the branch F contributes to the join and S = join(0, shortcut) is the
    rest: (1 - g) x beside g F with an exclusive gate. With |.| the Euclidean norm over the whole batch,

        forward   |S| / (|S| + |B|)
        backward  |dS| / (|dS| + |dB|), where dS + dB = dE/dx: the gradient that arrives at the fork of the two paths,
                  dB what comes out of F and dS all else, a gate's own gradient included

    The terms of `backward` are the two of Eqn. (5), and with a factor of Eqn. (8), for a single unit (L = l + 1): dS is
    dE/dy for an identity, lambda dE/dy for a scaled one. A share near 1 in every unit is the direct path of Eqn. (4).
    E is the mean cross-entropy of the batch x (N, H, W, C) with labels (N,), in training mode.

    The fork lies behind the activation that both paths share, if any (`Residual.pre`). A share is 0 where both norms
    are. {} for a network without shortcuts. Raises ArgumentError for a fused model; DtypeError unless given a Module;
    what ops.cross_entropy raises.
    """
    _check("shortcut_shares", model)
    units = {name: module for name, module in model.named_modules() if isinstance(module, Residual)}
    forward = {name: {"shortcut": 0.0, "branch": 0.0} for name in units}
    backward = {name: {"shortcut": 0.0, "branch": 0.0} for name in units}
    with _undisturbed(model) as handles, contextlib.ExitStack() as entrances:
        for name, unit in units.items():
            entrances.enter_context(_probed(unit, backward[name]))
            handles.extend(_watch_terms(unit, forward[name]))
        model.train()
        image = tensor(x, requires_grad=True, device=home_of(model))  # a first unit has a gradient at its input too
        loss = ops.cross_entropy(model(image), labels)
        if units:
            grad(loss, image)
    return {name: Share(_share(forward[name]), _share(backward[name])) for name in units}


@contextlib.contextmanager
def _probed(unit: Residual, norms: dict[str, float]) -> Iterator[None]:
    """While in force, both paths of `unit` begin with a probe that notes the norm of the gradient it passes on."""
    branch, shortcut = unit.branch, unit.shortcut
    unit.branch = Sequential(_Probe(norms, "branch"), branch)
    unit.shortcut = Sequential(_Probe(norms, "shortcut"), Identity() if shortcut is None else shortcut)
    try:
        yield
    finally:
        unit.branch, unit.shortcut = branch, shortcut


class _Probe(Module):
    """x itself, as a node of its own: its gradient is that of one path, where that of x is the sum of both."""

    def __init__(self, norms, path):
        super().__init__()
        self.norms, self.path = norms, path

    def forward(self, x):
        y = _Same.apply(x)

        def note(gradient):
            self.norms[self.path] = _norm(gradient)

        y.register_hook(note)
        return y


class _Same(Function):
    """y = x."""

    def forward(self, x):
        return self.kernels.broadcast_to(x, x.shape)

    def backward(self, dy):
        return dy


def _watch_terms(unit: Residual, norms: dict[str, float]) -> list[Handle]:
    """Hooks that note the norms of the unit's two terms, S and B."""

    def of(path: str) -> Callable[..., None]:
        def note(module, inputs, output):
            norms[path] = _norm(output.data)

        return note

    def of_join(module, inputs, output):
        branch, shortcut = inputs
        with no_grad():
            by_shortcut = module.forward(0.0 * branch, shortcut).data
        norms["shortcut"], norms["branch"] = _norm(by_shortcut), _norm(output.data - by_shortcut)

    if unit.join is not None:
        return [unit.join.register_forward_hook(of_join)]
    return [getattr(unit, path).register_forward_hook(of(path)) for path in ("branch", "shortcut")]


@contextlib.contextmanager
def _undisturbed(model: Module) -> Iterator[list[Handle]]:
    """Afterwards modes, buffers and random numbers are what they were, and the hooks in the list are gone."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, array, array.copy()) for m in model.modules() for name, array in m._buffers.items()]
    draws = random.state()
    handles: list[Handle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for module, name, array, before in buffers:
            array[...] = before
            module._buffers[name] = array
        random.set_state(draws)


def _check(op, model):
    expect(isinstance(model, Module), op, "needs a Module", DtypeError, model=type(model).__name__)
    fused = next((module for module in model.modules() if isinstance(module, FUSED)), None)
    rule = "needs the model as it was before tinyres.fuse or fold_batch_norm"
    expect(fused is None, op, rule, ArgumentError, found=type(fused).__name__)


def _norm(array):
    wide = array.astype(np.float64)
    return math.sqrt(float((wide * wide).sum()))


def _share(norms):
    total = norms["shortcut"] + norms["branch"]
    return norms["shortcut"] / total if total else 0.0
