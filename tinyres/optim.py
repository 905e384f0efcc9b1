"""Stochastic gradient descent, and schedules of its rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinyres import backend
from tinyres.autograd import Tensor
from tinyres.backend import Array
from tinyres.errors import ArgumentError, CheckpointError, DtypeError, TinyresError, expect, out_of_memory
from tinyres.nn import Module
from tinyres.ops import checks


class SGD:
    """Gradient descent with momentum and weight decay, all parameters in one kernel call.

    g = dw + weight_decay w;  v = momentum v + g;  w -= lr (g + momentum v if nesterov else v)

    params  an iterable of Parameters (or leaf Tensors), or of dicts {"params": [...], "weight_decay": d} for groups
            with a decay of their own
    lr      the rate; assign `optimizer.lr` to change it
    Raises ArgumentError for a setting outside its range, DtypeError for what is no parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor | dict[str, Any]],
        lr: float,
        momentum: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        self.lr = _at_least_zero("lr", lr)
        self.momentum = checks.fraction("SGD", "momentum", momentum)
        self.nesterov = checks.flag("SGD", "nesterov", nesterov)
        expect(not nesterov or self.momentum > 0, "SGD", "nesterov needs momentum", ArgumentError, momentum=momentum)
        iterable = isinstance(params, Iterable) and not isinstance(params, (Tensor, np.ndarray, str))
        expect(iterable, "SGD", "params must be an iterable of Parameters", DtypeError, params=type(params).__name__)
        self.params: list[Tensor] = []
        self._decays: list[float] = []
        for group in params:
            group = group if isinstance(group, dict) else {"params": (group,)}
            known = "params" in group and set(group) <= {"params", "weight_decay"}
            expect(
                known, "SGD", "a group holds params, and weight_decay if it has its own", ArgumentError, group=[*group]
            )
            decay = _at_least_zero("weight_decay", group.get("weight_decay", weight_decay))
            for p in group["params"]:
                leaf = isinstance(p, Tensor) and p.requires_grad and p._node is None
                expect(
                    leaf,
                    "SGD",
                    "every parameter must be a leaf Tensor that requires a gradient",
                    DtypeError,
                    parameter=type(p).__name__,
                )
                self.params.append(p)
                self._decays.append(decay)
        expect(len(self.params) > 0, "SGD", "at least one parameter", ArgumentError)
        expect(
            len({id(p) for p in self.params}) == len(self.params), "SGD", "a parameter may be given once", ArgumentError
        )
        self._velocities: list[Array | None] = [None] * len(self.params)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.update(_at_least_zero("lr", self.lr))

    def update(self, lr: float | Array, copies: list[tuple[Array, Array]] | None = None) -> None:
        """`step` at the rate `lr`, a number or an array () of float64 on the parameters' device, read by the kernel.

        A gradient may be in parts, (parts, *shape), which are added. copies: pairs (weight, its rounded copy), of
        weights that are among the parameters' arrays; each copy gets the new weight. Raises ShapeError for a gradient
        of another shape, dtype or device than its parameter's.
        """
        copy_of = {id(weight): copy for weight, copy in copies or ()}
        by_table: dict[tuple[str, np.dtype], list[int]] = {}  # one call for each device and dtype: usually one
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            given = getattr(p.grad, "shape", None), getattr(p.grad, "dtype", None)
            shape = given[0] if given[0] is None or len(given[0]) == p.ndim else given[0][1:]  # (parts, *shape)
            fits = (shape, given[1]) == (p.shape, p.dtype) and p.device.owns(p.grad)
            rule = "a gradient must be an array of its parameter's shape and dtype, on its device"
            expect(fits, "SGD", rule, parameter=(p.shape, p.dtype), gradient=given)
            p.grad = p.device.asarray(p.grad)  # aligned, where it was assigned from outside
            flags = p.data.flags
            if not (flags.c_contiguous and getattr(flags, "writeable", True)):  # CuPy's arrays are all writable
                p.data = p.data.copy()  # assigned from outside: kernels update dense arrays of our own
            if self.momentum:
                self._velocities[i] = _like(self._velocities[i], p)
            by_table.setdefault((p.device.name, p.dtype), []).append(i)
        for indices in by_table.values():
            kernels = self.params[indices[0]].device.kernels
            kernels.sgd(
                [self.params[i].data for i in indices],
                [self._velocities[i] for i in indices] if self.momentum else None,
                [kernels.contiguous(self.params[i].grad) for i in indices],
                [self._decays[i] for i in indices],
                lr,
                self.momentum,
                self.nesterov,
                [copy_of.get(id(self.params[i].data)) for i in indices] if copy_of else None,
            )

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.params:
            p.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """lr, momentum, nesterov, weight_decay (one for each parameter), velocity (position -> copy, a NumPy array)."""
        velocity = {str(i): np.array(backend.host(v)) for i, v in enumerate(self._velocities) if v is not None}
        settings = {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov}
        return {**settings, "weight_decay": list(self._decays), "velocity": velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises CheckpointError, before anything changes, if it does not fit.
        """
        op = "SGD.load_state_dict"
        names = {"lr", "momentum", "nesterov", "weight_decay", "velocity"}
        given = sorted(state) if isinstance(state, dict) else type(state).__name__
        expect(given == sorted(names), op, f"needs {sorted(names)}", CheckpointError, state=given)
        decays, velocity = state["weight_decay"], state["velocity"]
        listed = isinstance(decays, list) and len(decays) == len(self.params) and isinstance(velocity, dict)
        expect(listed, op, "needs one weight_decay for each parameter and a dict of velocities", CheckpointError)
        try:
            settings = SGD(self.params, state["lr"], state["momentum"], nesterov=state["nesterov"])
            decays = [_at_least_zero("weight_decay", decay) for decay in decays]
        except TinyresError as error:
            raise CheckpointError(f"[{op}] a setting is out of range: {error}") from None
        velocities: list[Array | None] = [None] * len(self.params)
        places = {str(i): p for i, p in enumerate(self.params)}
        for key, v in velocity.items():
            shape = getattr(v, "shape", None)
            fits = key in places and shape == places[key].shape and v.dtype.kind == "f"
            rule = "each velocity must be a floating array that fits its parameter"
            parameter = places[key].shape if key in places else None
            expect(fits, op, rule, CheckpointError, velocity=key, shape=shape, parameter=parameter)
            p = places[key]
            velocities[int(key)] = p.device.kernels.broadcast_to(p.device.asarray(v, p.dtype), v.shape)
        self.lr, self.momentum, self.nesterov = settings.lr, settings.momentum, settings.nesterov
        self._decays, self._velocities = decays, velocities


def without_norm_decay(model: Module) -> list[dict[str, Any]]:
    """Groups for SGD in which the weights of convolutions and linear layers are decayed, and nothing else is."""
    rule = "needs a Module"
    expect(isinstance(model, Module), "without_norm_decay", rule, DtypeError, model=type(model).__name__)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def _like(velocity, p):
    """The velocity of `p`: zeros at first and after its data took another shape; it follows it in dtype and device."""
    if velocity is None or velocity.shape != p.shape:
        try:
            return p.device.kernels.broadcast_to(p.device.asarray(0, p.dtype), p.shape)
        except MemoryError as error:
            out_of_memory("SGD", f"making the velocity of a parameter {p.shape}", error)
    fits = velocity.dtype == p.dtype and p.device.owns(velocity)
    return velocity if fits else p.device.asarray(velocity, p.dtype)


def _at_least_zero(name: str, value: Any) -> float:
    value = checks.real("SGD", name, value)
    expect(value >= 0, "SGD", f"{name} must be at least 0", ArgumentError, **{name: value})
    return value


def _step_decay(lr: float, milestones: Sequence[int], factor: float = 0.1) -> Callable[[int], float]:
    """lr, times `factor` from each iteration of `milestones` on (He et al. 2015, section 4.2: 32000, 48000)."""
    op = "step_decay"
    lr, factor = checks.real(op, "lr", lr), checks.fraction(op, "factor", factor, one=True)
    listed = isinstance(milestones, (tuple, list))
    expect(listed, op, "milestones must be a tuple or list", DtypeError, milestones=type(milestones).__name__)
    milestones = [checks.integer(op, "milestones", m, 0) for m in milestones]
    return lambda step: lr * factor ** sum(step >= m for m in milestones)


def _one_cycle(lr: float, steps: int, warmup: float = 0.3) -> Callable[[int], float]:
    """From lr / 25 up to lr over the share `warmup` of `steps`, then down to lr / 10000, both along half a cosine
    (Smith and Topin 2017, "Super-convergence")."""
    lr, steps = checks.real("one_cycle", "lr", lr), checks.integer("one_cycle", "steps", steps, 1)
    warmup = checks.fraction("one_cycle", "warmup", warmup, one=True)
    top = max(1.0, warmup * steps)

    def schedule(step):
        if step < top:
            return lr / 25 + (lr - lr / 25) * (1 - math.cos(math.pi * step / top)) / 2
        done = min(1.0, (step - top) / max(1.0, steps - top))
        return lr / 1e4 + (lr - lr / 1e4) * (1 + math.cos(math.pi * done)) / 2

    return schedule


class schedules:
    """Functions from the iteration number, counted from 0, to the rate."""

    step_decay = staticmethod(_step_decay)
    one_cycle = staticmethod(_one_cycle)
