"""The layers that `fuse` and `fold_batch_norm` put in the place of several: each is one pass over memory."""

from __future__ import annotations

from tinyres import ops
from tinyres.autograd import Tensor
from tinyres.nn.layers import BatchNorm2d, Conv2d
from tinyres.nn.module import Parameter
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
