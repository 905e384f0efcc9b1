"""Max, average and global average pooling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinyres
from cases import POOLS, pool_geometries
from op_case import DEVICES, Case, checks_of, distinct, normal
from tinyres import ops


def _case(name, op, draw, g):
    return Case(
        f"{op.__name__}, {name}", lambda x: op(x, (g.R, g.S), g.stride, g.padding), draw(*g.x), reduction=g.R * g.S
    )


CASES = [
    *(_case(reason, ops.max_pool2d, distinct, g) for reason, g in POOLS.items()),
    *(_case(reason, ops.avg_pool2d, normal, g) for reason, g in POOLS.items()),
    Case("max_pool2d, stride is the window unless given", lambda x: ops.max_pool2d(x, 2), distinct(1, 4, 6, 2)),
    Case("avg_pool2d, stride is the window unless given", lambda x: ops.avg_pool2d(x, 2), normal(1, 4, 6, 2)),
    Case("global_avg_pool2d, one pixel", ops.global_avg_pool2d, normal(2, 1, 1, 3)),
    Case("global_avg_pool2d, primes", ops.global_avg_pool2d, normal(2, 5, 7, 3), reduction=35),
    Case("global_avg_pool2d, over an AVX-512 vector", ops.global_avg_pool2d, normal(1, 2, 2, 17), reduction=4),
]

test_cases = checks_of(CASES)


def _windows(g):
    """The pixels of each window, by output position: (p, q, [(r, s, h, w)])."""
    for p, q in np.ndindex(g.y[1:3]):
        corner = p * g.stride[0] - g.padding[0], q * g.stride[1] - g.padding[1]
        pixels = [(r, s, corner[0] + r, corner[1] + s) for r, s in np.ndindex(g.R, g.S)]
        yield p, q, [(r, s, h, w) for r, s, h, w in pixels if 0 <= h < g.H and 0 <= w < g.W]


def _loops(name, x, dy, g):
    """The definition: y and dx. Ties of the maximum go to the first in the window."""
    y, dx = np.zeros(g.y), np.zeros(g.x)
    for p, q, pixels in _windows(g):
        for n, c in np.ndindex(g.N, g.C):
            values = [x[n, h, w, c] for _, _, h, w in pixels]
            if name == "max_pool2d":
                first = int(np.argmax(values))
                y[n, p, q, c] = values[first]
                dx[n, pixels[first][2], pixels[first][3], c] += dy[n, p, q, c]
            else:
                y[n, p, q, c] = sum(values) / (g.R * g.S)
                for _, _, h, w in pixels:
                    dx[n, h, w, c] += dy[n, p, q, c] / (g.R * g.S)
    return y, dx


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ("max_pool2d", "avg_pool2d"))
@given(g=pool_geometries(), dtype=st.sampled_from((np.float32, np.float64)))
def test_any_geometry_on_integers(device, name, g, dtype):
    """Integers give plenty of ties; the maximum is exact, the average to a rounding of its division."""
    rng = np.random.default_rng(g.H)
    values, dy = rng.integers(-3, 4, g.x).astype(dtype), rng.integers(-3, 4, g.y).astype(dtype)
    x = tinyres.tensor(values, requires_grad=True, device=device)
    y = getattr(ops, name)(x, (g.R, g.S), g.stride, g.padding)
    y.backward(dy)
    for got, want in zip((y.numpy(), tinyres.backend.host(x.grad)), _loops(name, values, dy, g), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=0 if name == "max_pool2d" else 8 * np.finfo(dtype).eps * 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", (-5, -np.inf))
def test_padding_never_wins(device, value):
    x = tinyres.tensor(np.full((1, 3, 3, 2), float(value)), requires_grad=True, device=device)
    y = ops.max_pool2d(x, 3, 2, 1)
    assert (y.numpy() == value).all()
    y.backward(np.ones(y.shape))
    assert x.grad.sum() == y.size


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_the_largest(device):
    """A NaN activation must not vanish in a pooling layer."""
    values = np.zeros((1, 2, 4, 1))
    values[0, 1, 0, 0] = np.nan
    y = ops.max_pool2d(tinyres.tensor(values, device=device), 2)
    assert np.isnan(y.numpy()).ravel().tolist() == [True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_infinities_pass(device):
    values = np.full((1, 2, 2, 1), -np.inf)
    assert ops.max_pool2d(tinyres.tensor(values, device=device), 2).item() == -np.inf
