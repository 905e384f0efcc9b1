"""A pre-activation unit (He et al. 2016, Fig. 1b) as one op: BN, ReLU, conv, ..., BN, ReLU, conv, + shortcut.

A batch norm between two convolutions is applied as the second loads what the first has stored, and its sums are taken
there, as in residual_chain.py. The first is of a sum, which no convolution has stored: it is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tinyres.autograd import Function, Tensor, gradients_in_parts
from tinyres.backend.norm import Gradient, Norm, activation, by_output, shortcut, shortcut_backward
from tinyres.errors import expect
from tinyres.ops import checks
from tinyres.ops.cast import rounded
from tinyres.ops.residual_chain import Unit, convolved, is_image, normalises


class PreActivated(NamedTuple):
    """units       batch norms, each with ReLU, and the convolutions behind them; the first may have no batch norm, then
                gamma is None
    projection  the shortcut: (w, stride, padding) of a convolution; None: as in residual_chain.Block
    shared      whether the shortcut starts behind the first ReLU instead of at x
    """

    units: Sequence[Unit]
    projection: tuple[Tensor, tuple[int, int], tuple[int, int]] | None = None
    shared: bool = False
    stride: int = 1
    new_channels: int = 0


class PreActivation(Function):
    fresh_gradients = True

    def forward(self, x, *parameters, unit):
        kernels, y, rows = self.kernels, x, None
        *parameters, projection = parameters
        steps = []
        for (w, gamma, beta), part in zip(zip(*[iter(parameters)] * 3, strict=True), unit.units, strict=True):
            u = y
            if gamma is not None:
                u = Norm(y, rows, gamma, beta, *part.running, part.momentum, part.eps)
            w = rounded(kernels, w, x.dtype)
            y, rows = kernels.normed_conv2d_forward(u, w, part.stride, part.padding)
            steps.append((u, w, part.stride, part.padding))
        start = activation(kernels, steps[0][0]) if unit.shared else x
        before = unit.new_channels // 2
        if projection is None:
            around, place = shortcut(kernels, start, unit.stride, before, y.shape[3]), (unit.stride, before)
        else:
            place = rounded(kernels, projection, x.dtype), *unit.projection[1:]
            around = kernels.conv2d_forward(start, *place)
        self.saved = steps, start, unit.shared, projection is None, place
        return kernels.accumulate(y, around)

    def backward(self, dy):
        kernels, (steps, start, shared, padded, place) = self.kernels, self.saved
        needs_x, weights = self.needs[0], [*self.needs[1:-1:3], self.needs[-1]]
        d_projection = None
        # Where the shortcut starts at what the first convolution reads, its gradient is added as that one's is made.
        meets = shared or not isinstance(steps[0][0], Norm)
        if not padded:
            w, *geometry = place
            around = kernels.conv2d_backward_input(dy, w, start.shape, *geometry), 1, 0
            if weights[-1]:
                d_projection = kernels.conv2d_backward_weight(dy, start, w.shape, *geometry)
        else:
            around = kernels.broadcast_to(dy, dy.shape) if meets else dy, *place  # a copy may be added to
        gradient, found = dy, []  # found: by unit, the last first, dw and the gradient by what the convolution reads
        for i, (u, w, stride, padding) in reversed([*enumerate(steps)]):
            dx = dw = None
            if i > 0 or needs_x or isinstance(u, Norm):
                joined = around if i == 0 and meets else None
                dx = kernels.normed_conv2d_backward_input(gradient, w, u, stride, padding, joined)
            if weights[i]:
                parts = gradients_in_parts.hold()
                dw = kernels.normed_conv2d_backward_weight(gradient, u, w.shape, stride, padding, parts)
            found.append((dw, dx))
            gradient = dx
        dx = None if gradient is None else by_output(kernels, gradient)
        if needs_x and not meets:
            dx = kernels.accumulate(dx, shortcut_backward(kernels, *around, dx.shape))
        parameters = []
        for dw, before in reversed(found):
            dgamma = dbeta = None
            if isinstance(before, Gradient):
                if before.dgamma is None:  # nobody has read it
                    before.by_x(kernels)
                dgamma, dbeta = before.dgamma, before.dbeta
            parameters += dw, dgamma, dbeta
        return dx, *parameters, d_projection


def preactivation(x: Tensor, unit: PreActivated) -> Tensor:
    """The unit's result, in training: batch norms take the statistics of the batch.

    x       (N, H, W, C), float32, float64 or bfloat16; parameters are of its dtype, float32 beside bfloat16
    Raises ShapeError for what `fits` does not accept, ArgumentError for a momentum or an eps out of range.
    """
    op = "preactivation"
    expect(fits(x, unit), op, "the unit must fit x", x=getattr(x, "shape", type(x).__name__))
    parameters: list[Tensor | None] = []
    for part in unit.units:
        checks.fraction(op, "momentum", part.momentum, one=True)
        checks.epsilon(op, part.eps)
        parameters += part[:3]
    projection = None if unit.projection is None else unit.projection[0]
    return PreActivation.apply(x, *parameters, projection, unit=unit)


def fits(x: Tensor, unit: PreActivated) -> bool:
    """Whether `preactivation` takes them, as residual_chain.fits says."""
    if not is_image(x) or not unit.units:
        return False
    shape = x.shape
    for part in unit.units:
        if part.gamma is not None and not normalises(x, shape, part):
            return False
        shape = convolved(x, shape, part.w, part.stride, part.padding)
        if shape is None:
            return False
    N, H, W, C = x.shape
    around = N, -(-H // unit.stride), -(-W // unit.stride), C + unit.new_channels
    return shape == (around if unit.projection is None else convolved(x, x.shape, *unit.projection))
