"""Ops that move elements and compute nothing: results must match bit for bit."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, checks_of, normal
from tinyres import ops

INDICES = {
    "a row": 1,
    "last row": -1,
    "an element": (2, 3, 1),
    "a slice": slice(1, 3),
    "every second from the end": (slice(None), slice(None, None, -2)),
    "ellipsis": (..., 0),
    "a new axis": (None, slice(None), None, 2),
    "stride larger than the axis": (slice(None), slice(1, None, 9)),
    "slices clipped to the axis": (slice(-99, 99), slice(1, 99)),
    "shortcut A: every second pixel": (slice(None, None, 2), slice(None, None, 2)),
}

CASES = [
    Case("reshape", lambda x: ops.reshape(x, (5, 6)), normal(2, 3, 5)),
    Case("reshape, one size inferred", lambda x: ops.reshape(x, (3, -1)), normal(2, 3, 5)),
    Case("reshape to a scalar", lambda x: ops.reshape(x, ()), normal(1, 1)),
    Case("reshape after transpose", lambda x: ops.reshape(ops.transpose(x), (10,)), normal(2, 5)),
    Case("transpose", ops.transpose, normal(2, 3, 5)),
    Case("transpose, axes given", lambda x: ops.transpose(x, (0, 2, 1)), normal(2, 3, 17)),
    Case("transpose, negative axes", lambda x: ops.transpose(x, (-1, 0, 1)), normal(2, 3, 5)),
    Case("flatten", ops.flatten, normal(2, 3, 2, 2)),
    Case("flatten from 0", lambda x: ops.flatten(x, 0), normal(2, 3)),
    *(
        Case(f"getitem, {reason}", lambda x, i=index: ops.getitem(x, i), normal(4, 5, 3))
        for reason, index in INDICES.items()
    ),
    Case("pad", lambda x: ops.pad(x, ((1, 2), (0, 3))), normal(3, 5)),
    Case("pad with a value", lambda x: ops.pad(x, ((0, 0), (2, 1)), value=-1.5), normal(2, 3)),
    Case("pad with nothing", lambda x: ops.pad(x, ((0, 0), (0, 0))), normal(2, 3)),
    Case("pad channels, as shortcut A does", lambda x: ops.pad(x, ((0, 0),) * 3 + ((0, 3),)), normal(1, 2, 2, 3)),
    Case("concatenate", lambda *t: ops.concatenate(t), normal(2, 3), normal(1, 3), normal(4, 3)),
    Case("concatenate on the last axis", lambda *t: ops.concatenate(t, axis=-1), normal(2, 3), normal(2, 17)),
    Case("concatenate one", lambda x: ops.concatenate([x], axis=1), normal(2, 3)),
    Case("concatenate the same twice", lambda x: ops.concatenate([x, x], axis=0), normal(2, 3)),
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_values(device, dtype, rng):
    a, b = rng.standard_normal((2, 4, 5, 3)).astype(dtype)
    x, z = tinyres.tensor(a, device=device), tinyres.tensor(b, device=device)
    pairs = {
        "reshape": (ops.reshape(x, (6, 10)), a.reshape(6, 10)),
        "transpose": (ops.transpose(x, (2, 0, 1)), a.transpose(2, 0, 1)),
        "an op on columns side by side": (ops.relu(x.T), np.maximum(a.T, 0)),
        "flatten": (ops.flatten(x), a.reshape(4, 15)),
        "pad": (ops.pad(x, ((1, 0), (0, 2), (3, 1)), 2.0), np.pad(a, ((1, 0), (0, 2), (3, 1)), constant_values=2)),
        "concatenate": (ops.concatenate([x, z], 1), np.concatenate([a, b], 1)),
        **{f"getitem {reason}": (x[index], a[index]) for reason, index in INDICES.items()},
    }
    for name, (got, want) in pairs.items():
        assert got.dtype == dtype, name
        assert np.array_equal(got.numpy(), want), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", (np.array(1), np.int8(1), np.uint64(1)))
def test_the_gradient_through_an_integer_of_numpy(index, device):
    x = tinyres.tensor(np.zeros((3, 2)), requires_grad=True, device=device)
    (x[index] + x[:, index].sum()).sum().backward()
    assert x.grad.tolist() == [[0, 2], [1, 3], [0, 2]]
