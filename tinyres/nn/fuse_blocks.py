"""Residual blocks in a row as one op: what `fuse(model, level="block")` makes of a Sequential."""

from __future__ import annotations

from tinyres.autograd import Tensor
from tinyres.nn.fused import BatchNormAddReLU2d, BatchNormReLU2d, FusedResidual
from tinyres.nn.layers import BatchNorm2d, Conv2d, Identity
from tinyres.nn.module import Module, Sequential
from tinyres.nn.residual import ZeroPadShortcut
from tinyres.ops.residual_chain import Block, Unit, fits, residual_chain


class FusedSequential(Sequential):
    """A Sequential that runs neighbouring residual blocks as one op (`ops.residual_chain`) in training.

    That is what `fuse` makes of conv, BN, ReLU, ..., conv, BN, + shortcut, ReLU, where convolutions have no bias, batch
    norms no groups, and the shortcut is the identity, a ZeroPadShortcut, or a convolution and its batch norm. All else
    runs by its own forward: other modules, evaluation, blocks with a forward hook, and inputs that do not fit.
    """

    def forward(self, x: Tensor) -> Tensor:
        run: list[Module] = []
        blocks: list[Block] = []
        for module in self:
            block = _block(module)
            if block is None:
                x, run, blocks = module(_through(x, run, blocks)), [], []
            else:
                run.append(module)
                blocks.append(block)
        return _through(x, run, blocks)


def _through(x, run, blocks):
    if fits(x, blocks):
        return residual_chain(x, blocks)
    for module in run:
        x = module(x)
    return x


def holds_blocks(model: Module) -> bool:
    """Whether a FusedSequential would find a block in the place of `model`, in training."""
    return any(_parts(module) is not None for module in model._modules.values())


def _block(module):
    """What residual_chain takes of a module that it can stand for now, else None."""
    parts = _parts(module)
    if parts is None or any(part._forward_hooks for part in module.modules()):
        return None
    units, projection = parts
    if not all(norm.training for _, norm in [*units, *([projection] if projection else [])]):
        return None
    units = [_unit(*unit) for unit in units]
    shortcut = module.shortcut
    if projection:
        return Block(units, _unit(*projection))
    return Block(units) if shortcut is None else Block(units, None, shortcut.stride, shortcut.new_channels)


def _parts(module):
    """The pairs (convolution, batch norm) of a block, and its projection or None; None of any other module."""
    if type(module) is not FusedResidual or module.pre is not None or type(module.branch) is not Sequential:
        return None
    branch = [part for part in module.branch if type(part) is not Identity]
    units = list(zip(branch[::2], branch[1::2], strict=False))
    norms = [BatchNormReLU2d] * (len(units) - 1) + [BatchNormAddReLU2d]
    if len(branch) % 2 or not all(_are_unit(*unit, kind) for unit, kind in zip(units, norms, strict=True)):
        return None
    shortcut = module.shortcut
    if shortcut is None or type(shortcut) is ZeroPadShortcut:
        return units, None
    if type(shortcut) is Sequential and len(shortcut) == 2 and _are_unit(*shortcut, BatchNorm2d):
        return units, (*shortcut,)
    return None


def _are_unit(conv, norm, kind):
    return type(conv) is Conv2d and conv.bias is None and type(norm) is kind and norm.group is None


def _unit(conv, norm):
    running = norm.running_mean, norm.running_var
    return Unit(conv.weight, norm.gamma, norm.beta, conv.stride, conv.padding, running, norm.momentum, norm.eps)
