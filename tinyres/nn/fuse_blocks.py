"""Residual blocks as one op: what `fuse(model, level="block")` makes of a Sequential."""

from __future__ import annotations

from tinyres.autograd import Tensor
from tinyres.nn.fused import BatchNormAddReLU2d, BatchNormReLU2d, FusedResidual
from tinyres.nn.layers import BatchNorm2d, Conv2d, Identity
from tinyres.nn.module import Module, Sequential
from tinyres.nn.residual import Residual, ZeroPadShortcut
from tinyres.ops import preactivation, residual_chain
from tinyres.ops.preactivation import PreActivated
from tinyres.ops.residual_chain import Block, Unit


class FusedSequential(Sequential):
    """A Sequential that in training runs as one op
    neighbouring units of conv, BN, ReLU, ..., conv, BN, + shortcut, ReLU (ops/residual_chain.py), and
    each unit of BN, ReLU, conv, ..., BN, ReLU, conv, + shortcut (ops/preactivation.py), also without the first BN, ReLU
    where convolutions have no bias, batch norms no groups, and the shortcut is the identity, a ZeroPadShortcut, or a
    convolution, with its batch norm in the first kind. All else runs by its own forward: other modules, evaluation,
    units with a forward hook, and inputs that do not fit.
    """

    def forward(self, x: Tensor) -> Tensor:
        run: list[Module] = []
        blocks: list[Block] = []
        for module in self:
            unit = _unit_of(module)
            if isinstance(unit, Block):
                run.append(module)
                blocks.append(unit)
                continue
            x = _through(x, run, blocks)
            run, blocks = [], []
            one = unit is not None and preactivation.fits(x, unit)
            x = preactivation.preactivation(x, unit) if one else module(x)
        return _through(x, run, blocks)


def _through(x, run, blocks):
    if residual_chain.fits(x, blocks):
        return residual_chain.residual_chain(x, blocks)
    for module in run:
        x = module(x)
    return x


def holds_units(model: Module) -> bool:
    """Whether a FusedSequential would find a unit in the place of `model`."""
    return any(_parts(module) is not None for module in model._modules.values())


def _unit_of(module):
    """What one of the ops takes of a module that it can stand for now, else None."""
    parts = _parts(module)
    if parts is None or any(part._forward_hooks for part in module.modules()):
        return None
    units, projection = parts
    shortcut, pre_activated = module.shortcut, type(module) is Residual
    if not all(norm.training for _, norm in (*units, projection or (None, None)) if norm is not None):
        return None
    units = [_unit(*unit) for unit in units]
    padding = (shortcut.stride, shortcut.new_channels) if type(shortcut) is ZeroPadShortcut else (1, 0)
    if not pre_activated:
        return Block(units, _unit(*projection) if projection else None, *padding)
    conv = (shortcut.weight, shortcut.stride, shortcut.padding) if projection else None
    return PreActivated(units, conv, module.pre is not None, *padding)


def _parts(module):
    """The pairs (convolution, batch norm) of a unit, and that of its projection or None; None of any other module.

    In a FusedResidual batch norms stand behind their convolutions, in a Residual before them; the first of these, and
    that of the projection, is None where there is none.
    """
    if type(module) not in (FusedResidual, Residual) or type(module.branch) is not Sequential:
        return None
    layers, shortcut, projection = _layers(module.branch), module.shortcut, None
    if type(module) is FusedResidual:
        if module.pre is not None:
            return None
        convs, norms = layers[::2], layers[1::2]
        kinds = [*[BatchNormReLU2d] * (len(norms) - 1), BatchNormAddReLU2d]
        if type(shortcut) is Sequential and [type(layer) for layer in shortcut] == [Conv2d, BatchNorm2d]:
            projection = (*shortcut,)
    else:
        if module.activation is not None or module.join is not None or type(module.pre) not in (type(None), Sequential):
            return None
        layers = [*_layers(module.pre or ()), *layers]
        if layers and type(layers[0]) is Conv2d:
            layers = [None, *layers]
        norms, convs = layers[::2], layers[1::2]
        kinds = [BatchNormReLU2d] * len(norms)
        if type(shortcut) is Conv2d:
            projection = shortcut, None
    if projection is None and not (shortcut is None or type(shortcut) is ZeroPadShortcut):
        return None
    found = [type(norm) for norm in norms if norm is not None]
    if not found or len(convs) != len(norms) or found != kinds[len(kinds) - len(found) :]:
        return None
    pairs = list(zip(convs, norms, strict=True))
    plain = all(
        type(conv) is Conv2d and conv.bias is None and (norm is None or norm.group is None)
        for conv, norm in (*pairs, *([projection] if projection else []))
    )
    return (pairs, projection) if plain else None


def _layers(sequential):
    return [layer for layer in sequential if type(layer) is not Identity]


def _unit(conv, norm):
    if norm is None:
        return Unit(conv.weight, None, None, conv.stride, conv.padding, (None, None), 0.0, 1.0)
    running = norm.running_mean, norm.running_var
    return Unit(conv.weight, norm.gamma, norm.beta, conv.stride, conv.padding, running, norm.momentum, norm.eps)
