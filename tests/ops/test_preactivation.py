"""Pre-activation units as one op: shapes that CUDA's fused kernels take, shapes that they leave, and both in one."""

import numpy as np
import pytest

import tinyres
from op_case import CHECKS, DEVICES, Case, matches_differences, normal
from tinyres import nn, ops
from tinyres.errors import ArgumentError, ShapeError
from tinyres.ops.preactivation import PreActivated, fits, preactivation
from tinyres.ops.residual_chain import Unit

# Shape of x; by unit (whether it has a batch norm, window, C, K, stride); shortcut: (window, C, K, stride) or (stride,
# new channels); whether it starts behind the first activation.
UNITS = {
    "odd channels": ((2, 4, 3, 3), [(True, 3, 3, 5, 2), (True, 3, 5, 5, 1)], (2, 2), False),
    "the network's": ((2, 4, 3, 16), [(True, 3, 16, 16, 1), (True, 3, 16, 16, 1)], (1, 0), False),
    "new channels": ((2, 5, 3, 16), [(True, 3, 16, 32, 2), (True, 3, 32, 32, 1)], (2, 16), False),
    "the first unit": ((2, 4, 3, 16), [(False, 3, 16, 16, 1), (True, 3, 16, 16, 1)], (1, 0), False),
    "a projection behind ReLU": ((2, 4, 3, 16), [(True, 3, 16, 8, 2), (True, 3, 8, 8, 1)], (1, 16, 8, 2), True),
    "a projection of x": ((2, 4, 3, 16), [(True, 3, 16, 16, 1)], (1, 16, 16, 1), False),
    "one convolution, fused, that meets x": ((2, 4, 3, 16), [(False, 3, 16, 16, 1)], (1, 0), False),
    "a bottleneck": ((2, 3, 3, 8), [(True, 1, 8, 16, 1), (True, 3, 16, 16, 1), (True, 1, 16, 8, 1)], (1, 0), False),
    "an activation that both paths read": ((2, 4, 3, 16), [(True, 3, 16, 16, 1), (True, 1, 16, 20, 1)], (1, 4), True),
}  # fmt: skip


def _scale(*shape):
    return lambda rng: rng.uniform(0.5, 1.5, shape) * rng.choice((-1.0, 1.0), shape)


def _draws(name):
    shape, units, shortcut, _ = UNITS[name]
    draws = [normal(*shape)]
    for normed, window, C, K, _ in units:
        draws += [normal(window, window, C, K), *([_scale(C), normal(C)] if normed else [])]
    return draws + ([normal(shortcut[0], *shortcut[0:3])] if len(shortcut) == 4 else [])


def _unit(name, parameters):
    """The unit with these tensors, and running statistics that start from 0 and 1."""
    _, units, shortcut, shared = UNITS[name]
    parameters = iter(parameters)

    def part(normed, window, C, K, stride):
        w = next(parameters)
        gamma, beta, running = None, None, (None, None)
        if normed:
            gamma, beta = next(parameters), next(parameters)
            running = tuple(w.device.asarray(np.full(C, start), w.dtype) for start in (0.0, 1.0))
        return Unit(w, gamma, beta, (stride, stride), (window // 2,) * 2, running, 0.3, 1e-3)

    parts = [part(*unit) for unit in units]
    if len(shortcut) == 2:
        return PreActivated(parts, None, shared, *shortcut)
    return PreActivated(parts, (next(parameters), (shortcut[3],) * 2, (shortcut[0] // 2,) * 2), shared)


CASES = {
    name: Case(name, lambda x, *rest, name=name: preactivation(x, _unit(name, rest)), *_draws(name), reduction=4096)
    for name in UNITS
}


def follows_differences(case, device, monkeypatch):
    """As matches_differences, along fewer directions: the emulation takes its time for each."""
    report = tinyres.gradcheck(case.seeded, case.tensors(device), max_full=2, projections=2)
    assert report.checked > 0 and report.redraws == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "check", [*(c for c in CHECKS if c is not matches_differences), follows_differences], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, check, device, monkeypatch):
    check(CASES[name], device, monkeypatch)


def _plain(x, unit):
    """The same with the plain ops."""
    h = start = x
    for i, part in enumerate(unit.units):
        if part.gamma is not None:
            h = ops.relu(ops.batch_norm(h, part.gamma, part.beta, *part.running, True, part.momentum, part.eps))
        start = h if i == 0 and unit.shared else start
        h = ops.conv2d(h, part.w, None, part.stride, part.padding)
    if unit.projection:
        w, *geometry = unit.projection
        return h + ops.conv2d(start, w, None, *geometry)
    return h + nn.ZeroPadShortcut(start.shape[3], start.shape[3] + unit.new_channels, unit.stride)(start)


def _results(call, device, name, frozen=()):
    """The output, all gradients and all running statistics."""
    tensors = CASES[name].tensors(device)
    for i in frozen:
        tensors[i].requires_grad = False
    unit = _unit(name, tensors[1:])
    y = call(tensors[0], unit)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    kept = dy.copy()
    y.backward(y.device.asarray(dy))
    np.testing.assert_array_equal(dy, kept)
    running = [array for part in unit.units if part.gamma is not None for array in part.running]
    return [a if a is None else tinyres.backend.host(a) for a in (y.data, *(t.grad for t in tensors), *running)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_ops(name, device):
    for got, want in zip(_results(preactivation, device, name), _results(_plain, device, name), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ("the network's", "the first unit", "a projection of x"))
def test_parameters_that_are_frozen(name, device):
    """Others have the gradients that they have otherwise."""
    want, count = _results(preactivation, device, name), len(_draws(name))
    for frozen in ((0,), (1,), (0, 1), (*range(1, count, 2),), (count - 1,)):
        got = _results(preactivation, device, name, frozen)
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            if i - 1 in frozen:
                assert g is None
            else:
                np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10)


def test_what_fits():
    name = "odd channels"
    x, *parameters = CASES[name].tensors("cpu")
    unit = _unit(name, parameters)
    assert fits(x, unit)
    first, second = unit.units
    wrong = {
        "another dtype": (tinyres.tensor(x.numpy().astype(np.float32)), unit),
        "no unit": (x, unit._replace(units=[])),
        "too few channels": (x, unit._replace(units=[second])),
        "gamma of another size": (x, unit._replace(units=[first._replace(gamma=second.gamma), second])),
        "a shortcut that would broadcast": (x, unit._replace(new_channels=0)),
        "a shortcut of another size": (x, unit._replace(stride=1)),
        "a projection of other channels": (x, unit._replace(projection=(second.w, (2, 2), (1, 1)))),
        "one value a channel": (tinyres.tensor(np.zeros((1, 1, 1, 3))), unit),
    }
    for reason, arguments in wrong.items():
        assert not fits(*arguments), reason
        with pytest.raises(ShapeError, match=r"\[preactivation\] the unit must fit x"):
            preactivation(*arguments)
    with pytest.raises(ArgumentError):
        preactivation(x, unit._replace(units=[first._replace(momentum=2.0), second]))
