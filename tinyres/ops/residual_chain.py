"""Residual blocks in a row, as one op: what one kernel can do for two of them, it does.

A block (He et al. 2015, Fig. 2 and 5) is conv, BN, ReLU, ..., conv, BN, + shortcut, ReLU. A batch norm between two
convolutions is applied as the second loads what the first has stored, and its sums are taken there; the end of a block
is one pass. Backward, the convolution that comes first in a block masks its gradient by the end of the block before,
and takes the sums for that one's batch norm: only the last block needs a pass of its own. Which of this the kernels of
a device fuse is theirs to say (backend/spec.py); csrc/README.md, "Fused kernels", lists the launches of CUDA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinyres.autograd import Function, Tensor, gradients_in_parts
from tinyres.backend import Array
from tinyres.backend.norm import Gradient, Norm, activation
from tinyres.dtypes import is_floating, wide
from tinyres.errors import expect
from tinyres.ops import checks
from tinyres.ops.cast import rounded
from tinyres.options import get as options


class Unit(NamedTuple):
    """A convolution without a bias, and the batch norm behind it.

    w            (R, S, C, K)
    gamma, beta  (K,); in preactivation.py the batch norm stands before the convolution, or is None: then (C,), or None
    stride, padding  pairs
    running      running_mean and running_var, arrays (K,), moved in place by the share `momentum`
    """

    w: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    running: tuple[Array | None, Array | None]
    momentum: float
    eps: float


class Block(NamedTuple):
    """units       the residual function, in order
    projection  the shortcut; None: every stride-th pixel, with so many new channels of zeros, half of them before its
                own and half behind (option A); 1 and 0 are the identity
    """

    units: Sequence[Unit]
    projection: Unit | None = None
    stride: int = 1
    new_channels: int = 0


class ResidualChain(Function):
    fresh_gradients = True

    def forward(self, x, *parameters, blocks):
        kernels, parameters, self.saved = self.kernels, iter(parameters), []

        def convolve(u, unit):
            """The Norm behind a convolution of u, and what backward needs of both."""
            w, gamma, beta = (next(parameters) for _ in range(3))
            w = rounded(kernels, w, x.dtype)
            y, rows = kernels.normed_conv2d_forward(u, w, unit.stride, unit.padding)
            norm = Norm(y, rows, gamma, beta, *unit.running, unit.momentum, unit.eps)
            return norm, (u, w, unit.stride, unit.padding, norm)

        h = x
        for units, projection, stride, new_channels in blocks:
            u, steps, side = h, [], None
            for unit in units:
                u, step = convolve(u, unit)
                steps.append(step)
            if projection is not None:
                around, side = convolve(h, projection)
                kernels.block_output(u, around)
            else:
                kernels.block_output(u, activation(kernels, h), stride, new_channels // 2)
            h = u
            self.saved.append((steps, side, stride, new_channels // 2))
        return h.activation

    def backward(self, dy):
        kernels, gradients = self.kernels, []  # of the parameters, the last first
        weights = [*self.needs[1::3]]

        def through(step, gradient, needed, around=None):
            """The gradient by what a convolution has read; those of its parameters on the way."""
            u, w, stride, padding, _ = step
            dx = dw = None
            if needed:
                dx = kernels.normed_conv2d_backward_input(gradient, w, u, stride, padding, around)
            if weights.pop():
                parts = gradients_in_parts.hold()
                dw = kernels.normed_conv2d_backward_weight(gradient, u, w.shape, stride, padding, parts)
            if gradient.dgamma is None:  # nobody has read it
                gradient.by_x(kernels)
            gradients.extend((gradient.dbeta, gradient.dgamma, dw))
            return dx

        gradient = kernels.block_output_backward(dy, self.saved[-1][0][-1][-1], overwrite=self.owns_gradient)
        for steps, side, stride, before in reversed(self.saved):
            # Of x nobody may ask for the gradient.
            first = steps is self.saved[0][0]
            needed, around = self.needs[0] or not first, (gradient.dz, stride, before)
            if side is not None:
                u, *convolution, norm = side
                tensor = activation(kernels, u)  # its ReLU comes where the paths have met
                around = through((tensor, *convolution, norm), Gradient(norm, gradient.dz), needed), 1, 0
            for step in reversed(steps[1:]):
                gradient = through(step, gradient, True)
            gradient = through(steps[0], gradient, needed, around)
        return gradient, *reversed(gradients)


def residual_chain(x: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The residual blocks, one after another, in training: batch norms take the statistics of the batch.

    x       (N, H, W, C), float32, float64 or bfloat16; parameters are of its dtype, float32 beside bfloat16
    Returns the last block's output, of x's dtype. Raises ShapeError for what `fits` does not accept, ArgumentError for
    a momentum or an eps out of range.
    """
    op = "residual_chain"
    expect(fits(x, blocks), op, "blocks must fit x and each other", x=getattr(x, "shape", type(x).__name__))
    parameters: list[Tensor | None] = []
    for block in blocks:
        for unit in _units(block):
            checks.fraction(op, "momentum", unit.momentum, one=True)
            checks.epsilon(op, unit.eps)
            parameters += unit[:3]
    return ResidualChain.apply(x, *parameters, blocks=tuple(blocks))


def fits(x: Tensor, blocks: Sequence[Block]) -> bool:
    """Whether `residual_chain` takes them: shapes that go together without broadcasting, one device, x's dtype, which
    the options leave as it is, and running statistics that can be written to."""
    if not is_image(x) or not blocks:
        return False
    shape = x.shape
    for block in blocks:
        N, H, W, C = shape
        around = N, -(-H // block.stride), -(-W // block.stride), C + block.new_channels
        if block.projection is not None:
            around = _through(x, shape, [block.projection])
        shape = _through(x, shape, block.units)
        if shape is None or shape != around:
            return False
    return True


def _units(block):
    return [*block.units, *([] if block.projection is None else [block.projection])]


def _through(x, shape, units):
    """The shape that `units` make of `shape`, or None where one does not fit."""
    for unit in units:
        shape = convolved(x, shape, unit.w, unit.stride, unit.padding)
        if shape is None or not normalises(x, shape, unit):
            return None
    return shape


def is_image(x: Tensor) -> bool:
    """Whether x is (N, H, W, C), and of a dtype that convolutions leave as it is: shortcuts lower nothing."""
    if not (isinstance(x, Tensor) and x.ndim == 4 and 0 not in x.shape and is_floating(x.dtype)):
        return False
    return x.dtype != np.float32 or options().precision != "bfloat16"


def convolved(x, shape, w, stride, padding):
    """The shape of a convolution of `shape` with w, None where they do not go together; x tells device and dtype."""
    if w.dtype != wide(x.dtype) or w.device is not x.device or w.ndim != 4 or 0 in w.shape or w.shape[2] != shape[3]:
        return None
    R, S, _, K = w.shape
    P, Q = ((n + 2 * p - r) // s + 1 for n, p, r, s in zip(shape[1:3], padding, (R, S), stride, strict=True))
    return (shape[0], P, Q, K) if P > 0 and Q > 0 and shape[0] * P * Q * K < checks.LIMIT else None


def normalises(x, shape, unit):
    """Whether the unit's batch norm takes a tensor of that shape."""
    C, dtype = shape[3:], wide(x.dtype)
    if any(p.dtype != dtype or p.device is not x.device or p.shape != C for p in (unit.gamma, unit.beta)):
        return False
    for array in unit.running:
        if not x.device.owns(array) or array.shape != C or array.dtype != dtype:
            return False
        flags = array.flags  # of which CuPy's arrays have not all
        if not (flags.c_contiguous and getattr(flags, "aligned", True) and getattr(flags, "writeable", True)):
            return False
    return shape[0] * shape[1] * shape[2] > 1
