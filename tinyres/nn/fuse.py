"""Fusion: batch norm with what follows it, and the join of a residual unit, as one pass over memory each.

`fuse(model)` returns a model in which these patterns are replaced by the layers below; `print` shows them:
    BatchNorm2d, ReLU in a Sequential                        -> BatchNormReLU2d
    a Residual whose branch ends in BatchNorm2d, then ReLU   -> FusedResidual ending in BatchNormAddReLU2d
    any other Residual that adds, then ReLU                  -> FusedResidual joined by AddReLU
A pattern stays as it is where one of its modules has a forward hook: the hook could not see what it asked for. So
hooks are registered before `fuse`, or on the model that it returns.
"""

from __future__ import annotations

import itertools

from tinyres import ops
from tinyres.autograd import Tensor
from tinyres.errors import DtypeError, expect
from tinyres.nn.layers import BatchNorm2d, Identity, ReLU
from tinyres.nn.module import Module, Sequential
from tinyres.nn.residual import Residual


class BatchNormReLU2d(BatchNorm2d):
    """relu(batch_norm(x)) in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(ops.batch_norm_relu, x)


class BatchNormAddReLU2d(BatchNorm2d):
    """relu(batch_norm(x) + residual) in one pass; called with (x, residual)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # a second input
        if x.shape != residual.shape:  # an addition that broadcasts has no fused kernel
            return ops.relu(self._normalise(ops.batch_norm, x) + residual)
        return self._normalise(ops.batch_norm_add_relu, x, residual)


class FusedResidual(Residual):
    """A Residual whose join, activation and, where there is one, last batch norm are one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        *branch, last = self.branch
        h = x
        for module in branch:
            h = module(h)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if isinstance(last, BatchNormAddReLU2d):
            return last(h, shortcut)
        y = last(h)
        return ops.add_relu(y, shortcut) if y.shape == shortcut.shape else ops.relu(y + shortcut)


def fuse(model: Module) -> Module:
    """`model` with the patterns above fused: a new tree of modules over the same parameters and buffers.

    Training either trains both, and `state_dict` has the same names. Raises DtypeError unless given a Module.
    """
    expect(isinstance(model, Module), "fuse", "needs a Module", DtypeError, model=type(model).__name__)
    joins = type(model) is Residual and model.join is None and _plain(model.activation, ReLU)
    joins = joins and _plain(model.branch, Sequential)
    fused = _share(model, FusedResidual if joins else type(model))
    for name, child in model.children():
        fused._modules[name] = fuse(child)
    if joins:
        fused.activation = None
        name, last = list(model.branch.children())[-1]
        if _plain(last, BatchNorm2d):
            fused.branch._modules[name] = _share(last, BatchNormAddReLU2d)
    elif type(model) is Sequential:
        for (name, first), (next_name, second) in itertools.pairwise(model.children()):
            if _plain(first, BatchNorm2d) and _plain(second, ReLU):
                fused._modules[name] = _share(first, BatchNormReLU2d)
                fused._modules[next_name] = Identity()
    return fused


def _share(module, kind):
    """A new module of class `kind` over the parameters and buffers of `module`, with children of its own to replace."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(_modules=dict(module._modules), _forward_hooks=dict(module._forward_hooks))
    return twin


def _plain(module, kind):
    return type(module) is kind and not _hooked(module)


def _hooked(module):
    return bool(module._forward_hooks)
