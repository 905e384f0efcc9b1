"""sum, mean and max over any axes."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, checks_of, distinct, normal
from tinyres import ops

# (shape, axis), with the reason
AXES = {
    "everything": ((3, 5), None),
    "a scalar": ((), None),
    "one element": ((1,), 0),
    "first axis, a column over a vector": ((17, 3), 0),
    "last axis, a row over a vector": ((3, 17), 1),
    "negative axis": ((2, 3, 4), -2),
    "two axes apart": ((2, 3, 4), (0, 2)),
    "two axes apart of four": ((2, 3, 4, 5), (1, 3)),
    "axes in any order": ((2, 3, 4), (2, -3)),
    "axes of one": ((2, 1, 3), 1),
    "no axis": ((2, 3), ()),
}

CASES = [
    Case(
        f"{name}, {reason}{', kept' if keepdims else ''}",
        lambda x, op=op, axis=axis, keepdims=keepdims: op(x, axis=axis, keepdims=keepdims),
        draw(*shape),
        reduction=20,
    )
    for name, op, draw in (("sum", ops.sum, normal), ("mean", ops.mean, normal), ("max", ops.max, distinct))
    for reason, (shape, axis) in AXES.items()
    for keepdims in (False, True)
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_of_max_share_the_gradient(device):
    x = tinyres.tensor(np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), requires_grad=True, device=device)
    ops.max(x, axis=1).backward(np.array([4.0, 6.0]))
    assert x.grad.tolist() == [[0, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_long_sums_keep_their_digits(device):
    """A float32 running total would stop at 2**24."""
    x = tinyres.tensor(np.ones(2**24 + 8, np.float32), device=device)
    assert ops.sum(x).item() == 2**24 + 8
    assert ops.mean(x).item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape, axis", [((3, 1000), 1), ((1000, 3), 0), ((40, 2500), 0)], ids=("run", "rows", "wide"))
def test_sums_run_in_double(shape, axis, device, rng):
    """Which have room for sums of such integers, with all their digits; only the result is rounded."""
    values = rng.integers(-(2**30), 2**30, shape).astype(np.float32)
    want = values.astype(np.float64).sum(axis).astype(np.float32)
    assert np.array_equal(ops.sum(tinyres.tensor(values, device=device), axis=axis).numpy(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_the_largest(device):
    x = tinyres.tensor(np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]]), device=device)
    assert np.isnan(ops.max(x, axis=1).numpy()).tolist() == [True, False]
