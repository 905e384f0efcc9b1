"""add_relu, the join of a residual unit."""

import numpy as np
import pytest

import tinyres
from cases import SHAPES
from op_case import DEVICES, Case, away_from_zero, checks_of
from tinyres import ops


def _smaller(*shape):
    """Too small to bring a sum with away_from_zero near ReLU's kink."""
    return lambda rng: rng.uniform(-0.09, 0.09, shape)


CASES = [
    *(Case(reason, ops.add_relu, away_from_zero(*shape), _smaller(*shape)) for reason, shape in SHAPES.items()),
    Case("a tensor and itself", lambda x: ops.add_relu(x, x), away_from_zero(3, 5)),
    Case("identity shortcut", lambda x: ops.add_relu(x * 0.5, x), away_from_zero(3, 5)),
    Case(
        "more elements than one chunk of a thread",
        lambda a, b: ops.add_relu(a, b) * 2,
        away_from_zero(70, 1009),
        _smaller(70, 1009),
    ),
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_fused_equals_plain(dtype, device, rng):
    """One addition and one maximum: the same bits, forward and backward."""
    arrays, dy = rng.standard_normal((2, 3, 4, 5, 17)).astype(dtype), rng.standard_normal((3, 4, 5, 17))
    results = []
    for call in (ops.add_relu, lambda a, b: ops.relu(a + b)):
        a, b = (tinyres.tensor(v, requires_grad=True, device=device) for v in arrays)
        y = call(a, b)
        y.backward(dy)
        results.append([y.numpy().tobytes(), a.grad.tobytes(), b.grad.tobytes()])
    assert results[0] == results[1]


@pytest.mark.parametrize("device", DEVICES)
def test_both_sides_own_their_gradient(device):
    """Both gradients are one array on the way; writing to one must not change the other."""
    a, b = (tinyres.tensor(np.ones(4), requires_grad=True, device=device) for _ in range(2))
    ops.add_relu(a, b).backward(np.arange(4.0))
    a.grad += 100
    assert b.grad.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_nan(device):
    a = tinyres.tensor(np.array([np.nan, 1.0, -np.inf]), device=device)
    b = tinyres.tensor(np.array([1.0, np.nan, np.inf]), device=device)
    with np.errstate(invalid="ignore"):
        assert np.isnan(ops.add_relu(a, b).numpy()).all()
