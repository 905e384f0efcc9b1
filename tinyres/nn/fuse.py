"""Fusion: batch norm with what follows it, and the join of a residual unit, as one pass over memory each; and, for
inference, batch norm into the convolution before it.

`fuse(model)` returns a model in which these patterns are replaced by the layers of fused.py; `print` shows them:
    BatchNorm2d, ReLU in a Sequential                        -> BatchNormReLU2d
    a Residual whose branch ends in BatchNorm2d, then ReLU   -> FusedResidual ending in BatchNormAddReLU2d
    any other Residual that adds, then ReLU                  -> FusedResidual joined by AddReLU
and with level="block" these too, in training, in a FusedSequential (fuse_blocks.py):
    FusedResiduals of convolutions and batch norms, in a row -> one op
    a Residual of BN, ReLU, conv, ..., without activation    -> one op
`fold_batch_norm(model)` goes further, for a model that is trained no more. In evaluation batch norm is
    y = s (x - mean) + beta,  s = gamma / sqrt(var + eps), of constants: so conv(x, w) + b in the place of x makes
    y = conv(x, s w) + (s (b - mean) + beta), a convolution with other weights and a bias:
    Conv2d, BatchNorm2d                              -> Conv2d
    Conv2d, BatchNorm2d, ReLU                        -> Conv2dReLU
    Conv2d, BatchNorm2d at the end of a branch, ReLU -> Conv2dAddReLU, in a FusedResidual
A pattern stays as it is where one of its modules has a forward hook: the hook could not see what it asked for. So
hooks are registered before `fuse`, or on the model that it returns.
"""

from __future__ import annotations

import itertools

from tinyres.errors import DtypeError, expect
from tinyres.nn.fuse_blocks import FusedSequential, holds_units
from tinyres.nn.fused import BatchNormAddReLU2d, BatchNormReLU2d, Conv2dAddReLU, Conv2dReLU, FusedResidual
from tinyres.nn.layers import BatchNorm2d, Conv2d, Identity, ReLU
from tinyres.nn.module import Module, Parameter, Sequential
from tinyres.nn.residual import Residual
from tinyres.ops import checks


def fuse(model: Module, level: str = "layer") -> Module:
    """`model` with the patterns above fused: a new tree of modules over the same parameters and buffers.

    level  "layer", or "block": residual units too
    Training either trains both, and `state_dict` has the same names. Raises DtypeError unless given a Module,
    ArgumentError for another level.
    """
    expect(isinstance(model, Module), "fuse", "needs a Module", DtypeError, model=type(model).__name__)
    checks.choice("fuse", "level", level, ("layer", "block"))
    joins = type(model) is Residual and model.join is None and _plain(model.activation, ReLU)
    joins = joins and _plain(model.branch, Sequential)
    unfused = Sequential if type(model) is FusedSequential else type(model)
    fused = _share(model, FusedResidual if joins else unfused)
    for name, child in model.children():
        fused._modules[name] = fuse(child, level)
    if joins:
        fused.activation = None
        name, last = list(model.branch.children())[-1]
        if _plain(last, BatchNorm2d):
            fused.branch._modules[name] = _share(last, BatchNormAddReLU2d)
    elif type(fused) is Sequential:
        for (name, first), (next_name, second) in itertools.pairwise(model.children()):
            if _plain(first, BatchNorm2d) and _plain(second, ReLU):
                fused._modules[name] = _share(first, BatchNormReLU2d)
                fused._modules[next_name] = Identity()
        if level == "block" and holds_units(fused):
            fused = _share(fused, FusedSequential)
    return fused


# What a convolution becomes, by the batch norm that it takes in.
_FOLDED = {BatchNorm2d: Conv2d, BatchNormReLU2d: Conv2dReLU, BatchNormAddReLU2d: Conv2dAddReLU}


def fold_batch_norm(model: Module) -> Module:
    """`model` for inference: fused, in evaluation mode, and with each batch norm in the convolution before it.

    A new tree of modules. The folded convolutions have parameters of their own, made from what `model` has now; other
    layers share theirs with it. Raises DtypeError unless given a Module.
    """
    expect(isinstance(model, Module), "fold_batch_norm", "needs a Module", DtypeError, model=type(model).__name__)
    folded = fuse(model)
    for sequence in [module for module in folded.modules() if type(module) is Sequential]:
        for (name, conv), (next_name, norm) in itertools.pairwise(list(sequence.children())):
            if _plain(conv, Conv2d) and type(norm) in _FOLDED and not _hooked(norm):
                sequence._modules[name] = Identity()
                sequence._modules[next_name] = _fold(conv, norm)
    return folded.eval()


def _fold(conv, norm):
    w, dtype = conv.weight, conv.weight.dtype

    def wide(array):
        return array.astype("float64")

    scale = wide(norm.gamma.data) / (wide(norm.running_var) + norm.eps) ** 0.5
    shift = -wide(norm.running_mean) if conv.bias is None else wide(conv.bias.data) - wide(norm.running_mean)
    bias = wide(norm.beta.data) + shift * scale
    folded = _share(conv, _FOLDED[type(norm)])
    folded.__dict__["_parameters"] = {}
    folded.weight = Parameter((wide(w.data) * scale).astype(dtype), w.device)
    folded.bias = Parameter(bias.astype(dtype), w.device)
    return folded


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
