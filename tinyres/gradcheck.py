"""Compare the gradients of a function with central differences in float64.

Small inputs are checked entry by entry of the Jacobian, large ones along random directions. Upstream gradients are
random and never ones, which hide whatever sums to zero. Where the function has a kink (ReLU at zero, a tie in a
pooling window) no derivative exists: such a point is recognised from the function's values alone, never from the
gradient under test, and drawn again nearby.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyres.autograd import Tensor, _sweep, no_grad
from tinyres.errors import ArgumentError, DtypeError, GradcheckError, expect


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` did: derivatives compared, points drawn again because of a kink, largest absolute error."""

    checked: int
    redraws: int
    largest_error: float


class _Kink(Exception):
    """The function is not differentiable at the point being checked."""


def gradcheck(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Tensor | Sequence[Tensor],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    seed: int = 0,
    max_full: int = 256,
    projections: int = 8,
    max_redraws: int = 10,
) -> GradcheckReport:
    """Check the gradients of `fn(*inputs)` by every input.

    fn           maps Tensors to a float64 Tensor, or to a tuple of them; the same inputs must give the same outputs
                 (seed any randomness inside). It may also read the inputs by closure, as a module reads its weights.
    inputs       float64 leaf Tensors that require gradients. Their `.data` is put back at the end; no `.grad` changes.
    eps          step of the differences, times max(1, |x|)
    atol, rtol   pass where |analytic - numeric| <= atol + rtol * |numeric|
    seed         of the upstream gradients, directions and redraws
    max_full     inputs and outputs up to this many elements enter the Jacobian one by one, larger ones through
                 `projections` random directions
    max_redraws  points tried before a function is said to have kinks everywhere

    Raises GradcheckError for a wrong gradient: it names input and element, both values, the seed, and the call that
    reproduces it. Raises ArgumentError or DtypeError for a wrong call.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    _validate(
        fn,
        inputs,
        real={"eps": eps, "atol": atol, "rtol": rtol},
        whole={"seed": seed, "max_full": max_full, "projections": projections, "max_redraws": max_redraws},
    )
    check = _Check(fn, tuple(inputs), eps, atol, rtol, seed, max_full, projections)
    kept = [x.data for x in inputs]
    start = [check.host(x) for x in inputs]
    redraws = 0
    try:
        while True:
            try:
                check.run()
                return GradcheckReport(check.checked, redraws, check.largest_error)
            except _Kink as kink:
                redraws += 1
                expect(
                    redraws <= max_redraws,
                    "gradcheck",
                    "fn must be differentiable near its inputs: every point drawn lay on a kink",
                    error=GradcheckError,
                    points=redraws,
                    last=str(kink),
                    seed=seed,
                )
            for x, values in zip(inputs, start, strict=True):
                spread = 1e-3 * np.maximum(1.0, np.abs(values))  # a thousand steps: far from the kink, near the point
                check.assign(x, values + spread * check.rng.uniform(-1.0, 1.0, values.shape))
    finally:
        for x, data in zip(inputs, kept, strict=True):
            x.data = data


def _validate(fn, inputs, real, whole):
    op = "gradcheck"
    expect(callable(fn), op, "fn must be callable", DtypeError, fn=type(fn).__name__)
    expect(isinstance(inputs, (list, tuple)), op, "inputs must be Tensors", DtypeError, inputs=type(inputs).__name__)
    expect(len(inputs) > 0, op, "there must be at least one input", ArgumentError)
    for i, x in enumerate(inputs):
        expect(isinstance(x, Tensor), op, "inputs must be Tensors", DtypeError, input=i, type=type(x).__name__)
        expect(x.dtype == np.float64, op, "inputs must be float64", DtypeError, input=i, dtype=x.dtype)
        leaf = x.requires_grad and x._node is None
        expect(leaf, op, "inputs must be leaves that require gradients", ArgumentError, input=i)
    expect(len({id(x) for x in inputs}) == len(inputs), op, "inputs must be different Tensors", ArgumentError)
    for name, value in real.items():
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        valid = valid and (value > 0 or name != "eps")
        expect(valid, op, f"{name} must be a positive number", ArgumentError, **{name: repr(value)})
    for name, value in whole.items():
        least = 1 if name == "projections" else 0
        valid = isinstance(value, (int, np.integer)) and value >= least
        expect(valid, op, f"{name} must be an integer of at least {least}", ArgumentError, **{name: repr(value)})


class _Check:
    """One gradient check. `weights` (rows, outputs) and a direction in one input pick the derivative that is compared:
    analytically the gradient of `weights[row] . y` along the direction, numerically a difference of y's."""

    def __init__(self, fn, inputs, eps, atol, rtol, seed, max_full, projections):
        self.fn, self.inputs, self.eps, self.atol, self.rtol = fn, inputs, eps, atol, rtol
        self.seed, self.max_full, self.projections = seed, max_full, projections
        self.rng = np.random.default_rng(seed)
        self.checked, self.largest_error = 0, 0.0

    def run(self):
        """Check the point at which the inputs stand now; _Kink if it turns out to lie on one."""
        y = self.values()
        repeated = np.array_equal(y, self.values())
        expect(repeated, "gradcheck", "fn must give the same outputs for the same inputs", error=ArgumentError)
        expect(np.isfinite(y).all(), "gradcheck", "outputs must be finite", error=ArgumentError)
        weights, analytic = self.analytic(y.size)
        for i, x in enumerate(self.inputs):
            full = x.size <= self.max_full
            for j in range(x.size if full else self.projections):
                # No component of a direction is near zero: each element takes part in each projection.
                direction = np.zeros(x.size) if full else self.random(x.size)
                if full:
                    direction[j] = 1.0
                a, n = _along(analytic[i], direction), weights @ self.slope(i, direction, y)
                error = np.abs(a - n)
                wrong = ~(error <= self.atol + self.rtol * np.abs(n))  # a NaN is wrong
                if wrong.any():
                    row = int(np.argmax(wrong))  # the first: one of the Jacobian's, if there are any
                    self.fail(i, direction, weights[row], analytic[i][row])
                self.checked += error.size
                self.largest_error = max(self.largest_error, float(error.max(initial=0.0)))

    def host(self, x):
        return np.array(x.numpy(), dtype=np.float64)

    def assign(self, x, values):
        x.data = x.device.asarray(values)

    def random(self, *shape):
        """Signed numbers of magnitude 0.5 to 1.5."""
        return self.rng.uniform(0.5, 1.5, shape) * self.rng.choice((-1.0, 1.0), shape)

    def call(self):
        outputs = self.fn(*self.inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        for y in outputs:
            expect(
                isinstance(y, Tensor), "gradcheck", "fn must return Tensors", error=DtypeError, type=type(y).__name__
            )
            expect(y.dtype == np.float64, "gradcheck", "outputs must be float64", error=DtypeError, dtype=y.dtype)
        return outputs

    def values(self):
        """All outputs at the present inputs as one vector."""
        with no_grad():
            return np.concatenate([self.host(y).ravel() for y in self.call()])

    def analytic(self, outputs):
        """weights (rows, outputs), and by input the gradients of `weights @ y` (rows, input size)."""
        weights = self.random(1 if outputs <= self.max_full else self.projections, outputs)
        scale = np.ones(len(weights))
        if outputs <= self.max_full:
            # The rows of the Jacobian. Their upstream gradient is a random multiple of a one, divided out again.
            weights = np.concatenate([np.eye(outputs), weights])
            scale = np.concatenate([self.random(outputs), scale])
        gradients = [np.zeros((len(weights), x.size)) for x in self.inputs]
        for row, upstream in enumerate(weights * scale[:, None]):
            for into, dx in zip(gradients, self.backward(upstream), strict=True):
                if dx is not None:  # else nothing reached this input: its gradient is zero
                    into[row] = dx / scale[row]
        return weights, gradients

    def backward(self, upstream):
        """The gradient by each input, flat, or None; no tensor's `grad` changes."""
        ys, dys, end = [], [], 0
        for y in self.call():
            begin, end = end, end + y.size
            if y.requires_grad:
                ys.append(y)
                dys.append(y.device.asarray(upstream[begin:end].reshape(y.shape)))
        wanted = {(id(x), 0): None for x in self.inputs}
        _sweep("gradcheck", ys, dys, False, wanted)
        return [
            None if dx is None else Tensor(dx, device=x.device).numpy().ravel()
            for x, dx in zip(self.inputs, wanted.values(), strict=True)
        ]

    def slope(self, i, direction, y):
        """Central difference of all outputs along a direction of input i; y are the outputs at the point itself."""
        x = self.inputs[i]
        point = self.host(x)
        length = self.eps * max(1.0, np.abs(point.ravel()[direction != 0]).max())
        direction = direction.reshape(x.shape)

        def sides(h):
            self.assign(x, point + h * direction)
            right = (self.values() - y) / h
            self.assign(x, point - h * direction)
            return (y - self.values()) / h, right

        data = x.data
        try:
            left, right = sides(length)
            bend = right - left
            rounding = 64 * np.finfo(np.float64).eps * np.abs(y).max(initial=0.0) / length
            suspect = np.abs(bend) > self.atol + self.rtol * np.maximum(np.abs(left), np.abs(right)) + rounding
            if not np.isfinite(bend).all():
                raise _Kink(f"input {i}, element {self.name(i, direction)}: not finite beside it")
            if suspect.any():
                # Of a smooth function the bend is the curvature times the step: half the step, half the bend. With a
                # kink inside the step it is not; the second halving is for the kink that meets the first by luck.
                for part in (2, 4):
                    nearer_left, nearer_right = sides(length / part)
                    unlike = np.abs(part * (nearer_right - nearer_left) - bend)
                    if (unlike > 0.1 * np.abs(bend) + part * part * rounding)[suspect].any():
                        raise _Kink(f"input {i}, element {self.name(i, direction)}")
        finally:
            x.data = data
        return (left + right) / 2

    def fail(self, i, direction, weights, analytic):
        """Raise, naming the element of the direction that is wrong: found by halving towards the larger error."""
        y = self.values()
        while np.count_nonzero(direction) > 1:
            halves = []
            for half in np.array_split(np.flatnonzero(direction), 2):
                part = np.zeros_like(direction)
                part[half] = direction[half]
                error = abs(_along(analytic, part) - weights @ self.slope(i, part, y))
                halves.append((math.isnan(error), error, part))
            direction = max(halves, key=lambda half: half[:2])[2]
        direction = np.abs(np.sign(direction))
        outputs = np.flatnonzero(weights)
        raise GradcheckError(
            f"[gradcheck] analytic and numeric gradient must agree; got input {i}, element {self.name(i, direction)}, "
            f"analytic {_along(analytic, direction):.9g}, numeric {weights @ self.slope(i, direction, y):.9g}, of "
            f"{f'output element {outputs[0]} (flat)' if outputs.size == 1 else 'the outputs times random numbers'}, "
            f"seed {self.seed}; reproduce with tinyres.gradcheck(fn, inputs, seed={self.seed}), inputs of shapes "
            + ", ".join(str(x.shape) for x in self.inputs)
        )

    def name(self, i, direction):
        """The index of a direction's element; of a projection, how many elements it moves."""
        support = np.flatnonzero(direction)
        if support.size > 1:
            return f"{support.size} at once"
        return tuple(int(k) for k in np.unravel_index(support[0], self.inputs[i].shape))


def _along(gradient, direction):
    """gradient @ direction, where a NaN counts only if the direction goes there."""
    support = np.flatnonzero(direction)
    return gradient[..., support] @ direction[support]
