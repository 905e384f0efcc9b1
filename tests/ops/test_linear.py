"""matmul and linear."""

import numpy as np
import pytest

import tinyres
from cases import MATMUL_BATCHES, MATMULS
from op_case import DEVICES, Case, checks_of, normal
from tinyres import ops

CASES = [
    *(
        Case(f"matmul, {reason}", ops.matmul, normal(M, K), normal(K, N), reduction=max(M, K, N))
        for reason, (M, K, N) in MATMULS.items()
    ),
    *(
        Case(f"matmul, {reason}", ops.matmul, normal(*a), normal(*b), reduction=20)
        for reason, (a, b) in MATMUL_BATCHES.items()
    ),
    *(
        Case(f"linear, {reason}", ops.linear, normal(M, K), normal(K, N), normal(N), reduction=max(M, K, N))
        for reason, (M, K, N) in MATMULS.items()
    ),
    Case("linear without a bias", ops.linear, normal(3, 7), normal(7, 10), reduction=10),
    Case("matmul of a transpose", lambda a, b: a.transpose() @ b, normal(5, 3), normal(5, 9), reduction=9),
    Case("matmul by itself", lambda a: a @ a, normal(5, 5), reduction=5),
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("reason", MATMULS)
def test_integers_are_exact(reason, dtype, device, rng):
    M, K, N = MATMULS[reason]
    a, w, b, dy = (rng.integers(-4, 5, shape).astype(dtype) for shape in ((M, K), (K, N), (N,), (M, N)))
    x, weight, bias = (tinyres.tensor(v, requires_grad=True, device=device) for v in (a, w, b))
    y = ops.linear(x, weight, bias)
    y.backward(dy)
    gradients = [tinyres.backend.host(t.grad) for t in (x, weight, bias)]
    got = y.numpy(), *gradients, ops.matmul(x, weight).numpy()
    for g, want in zip(got, (a @ w + b, dy @ w.T, a.T @ dy, dy.sum(0), a @ w), strict=True):
        assert np.array_equal(g, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M, K, N", ((131, 521, 67), (128, 512, 64), (3, 2050, 5)))
def test_sizes_over_a_cache_block(M, K, N, device, rng):
    """Larger than any tile, on all three axes, with rests and without."""
    a, b = rng.integers(-4, 5, (M, K)).astype(np.float32), rng.integers(-4, 5, (K, N)).astype(np.float32)
    y = ops.matmul(tinyres.tensor(a, device=device), tinyres.tensor(b, device=device))
    assert np.array_equal(y.numpy(), a @ b)
