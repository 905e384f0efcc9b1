"""Fusion: batch norm with what follows it, and the join of a residual unit, as one pass over memory each; and, for
inference, batch norm into the convolution before it.

`fuse(model)` returns a model in which these patterns are replaced by the layers below; `print` shows them:
    BatchNorm2d, ReLU in a Sequential                        -> BatchNormReLU2d
    a Residual whose branch ends in BatchNorm2d, then ReLU   -> FusedResidual ending in BatchNormAddReLU2d
    any other Residual that adds, then ReLU                  -> FusedResidual joined by AddReLU
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

from tinyres import ops
from tinyres.autograd import Tensor
from tinyres.errors import DtypeError, expect
from tinyres.nn.layers import BatchNorm2d, Conv2d, Identity, ReLU
from tinyres.nn.module import Module, Parameter, Sequential
from tinyres.nn.residual import Residual
from tinyres.ops import checks


class BatchNormReLU2d(BatchNorm2d):
    """relu(batch_norm(x)) in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normalise(ops.batch_norm_relu, x)


class BatchNormAddReLU2d(BatchNorm2d):
    """relu(batch_norm(x) + residual) in one pass; called with (x, residual)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # a second input
        checks.mixed("BatchNormAddReLU2d", x=x, residual=residual)
        if x.shape != residual.shape:  # an addition that broadcasts has no fused kernel
            return ops.relu(self._normalise(ops.batch_norm, x) + residual)
        return self._normalise(ops.batch_norm_add_relu, x, residual)


class Conv2dReLU(Conv2d):
    """relu(conv2d(x)) in one call; always with a bias."""

    bias: Parameter

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d_relu(x, self.weight, self.bias, self.stride, self.padding)


class Conv2dAddReLU(Conv2d):
    """relu(conv2d(x) + residual) in one call, with (x, residual); always with a bias."""

    bias: Parameter

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # a second input
        return ops.conv2d_add_relu(x, residual, self.weight, self.bias, self.stride, self.padding)


class FusedResidual(Residual):
    """A Residual whose join, activation and, where there is one, last batch norm or folded convolution are one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = self.pre(x)
        *branch, last = self.branch
        h = x
        for module in branch:
            h = module(h)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if isinstance(last, (BatchNormAddReLU2d, Conv2dAddReLU)):
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
