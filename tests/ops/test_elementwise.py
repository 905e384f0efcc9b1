"""Elementwise ops: every op over every shape, broadcasting, special values, operators."""

import warnings

import numpy as np
import pytest

import tinyres
from cases import BROADCASTS, SHAPES
from op_case import DEVICES, Case, away_from_zero, checks_of, normal, positive
from tinyres import ops

UNARY = {
    "neg": (ops.neg, normal),
    "exp": (ops.exp, normal),
    "log": (ops.log, positive),
    "sqrt": (ops.sqrt, positive),
    "sigmoid": (ops.sigmoid, normal),
    "tanh": (ops.tanh, normal),
    "relu": (ops.relu, away_from_zero),
}
BINARY = {
    "add": (ops.add, normal, normal),
    "sub": (ops.sub, normal, normal),
    "mul": (ops.mul, normal, normal),
    "div": (ops.div, normal, positive),
    "pow": (ops.pow, positive, normal),
    "maximum": (ops.maximum, normal, normal),
}

CASES = [
    *(
        Case(f"{name}, {reason}", op, draw(*shape))
        for name, (op, draw) in UNARY.items()
        for reason, shape in SHAPES.items()
    ),
    *(
        Case(f"{name}, {reason}", op, draw_a(*a), draw_b(*b), reduction=20)
        for name, (op, draw_a, draw_b) in BINARY.items()
        for reason, (a, b) in BROADCASTS.items()
    ),
    Case("square of negative numbers", lambda x: x**2, away_from_zero(3, 5)),
    Case("cube of negative numbers", lambda x: x**3, away_from_zero(3, 5)),
    Case("reciprocal", lambda x: 1 / x, away_from_zero(3, 5)),
    Case("both sides the same tensor", lambda x: x * x, normal(5)),
    Case("more elements than one chunk of a thread", lambda x: ops.relu(x) * 2, away_from_zero(70, 1009)),
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_special_values(device, dtype):
    """Infinities, NaN, zeros of both signs and numbers near the ends of the range, without a warning."""
    special = np.array(
        [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 80.0, -80.0, 1000.0, -1000.0, 1e30, 1e-30], dtype
    )
    x = tinyres.tensor(special, device=device)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error")
        want = {
            "neg": -special,
            "exp": np.exp(special),
            "log": np.log(special),
            "sqrt": np.sqrt(special),
            "tanh": np.tanh(special),
            "relu": np.maximum(special, 0),
        }
        got = {name: getattr(ops, name)(x).numpy() for name in want}
        sigmoid = ops.sigmoid(x).numpy()
        a, b = special[:, None], special[None, :]
        pairs = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "maximum": np.maximum(a, b), "pow": a**b}
        binary = {
            name: getattr(ops, name)(tinyres.tensor(a, device=device), tinyres.tensor(b, device=device)).numpy()
            for name in pairs
        }
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    for name in pairs:
        np.testing.assert_allclose(binary[name], pairs[name], rtol=1e-5, err_msg=name)
    assert np.isnan(sigmoid[0])
    np.testing.assert_allclose(
        sigmoid[1:9], [1, 0, 0.5, 0.5, 0.731058578630, 0.26894142137, 1, 0], rtol=1e-6, atol=1e-30
    )


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_at_kinks(device):
    """Where no derivative exists the gradient is a stated choice: 0 for ReLU at 0, half each for a tie."""
    x = tinyres.tensor(np.zeros(3), requires_grad=True, device=device)
    ops.relu(x).backward(np.ones(3))
    assert x.grad.tolist() == [0, 0, 0]
    a, b = (tinyres.tensor(np.ones(3), requires_grad=True, device=device) for _ in range(2))
    ops.maximum(a, b).backward(np.array([1.0, 2.0, 4.0]))
    assert a.grad.tolist() == b.grad.tolist() == [0.5, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_powers_at_zero(device):
    """0 ** b has no logarithm: finite gradients wherever the derivative is."""
    a = tinyres.tensor(np.zeros(4), requires_grad=True, device=device)
    b = tinyres.tensor(np.array([0.0, 1.0, 2.0, 3.0]), requires_grad=True, device=device)
    (a**b).backward(np.ones(4))
    assert a.grad.tolist() == [0, 1, 0, 0]
    assert b.grad.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_operators_take_numbers_and_arrays(device, rng):
    values = rng.uniform(1, 2, (3, 4)).astype(np.float32)
    other = rng.uniform(1, 2, 4).astype(np.float32)
    x = tinyres.tensor(values, device=device)
    array = x.device.asarray(other)
    pairs = [
        (x + 1, values + 1), (1 + x, values + 1), (x - 2.5, values - 2.5), (2.5 - x, 2.5 - values), (x * 3, values * 3),
        (3 * x, values * 3), (x / 2, values / 2), (2 / x, 2 / values), (x**2, values**2), (-x, -values),
        (x @ x.transpose(), values @ values.T), (x + array, values + other), (array * x, other * values),
    ]  # fmt: skip
    for i, (got, want) in enumerate(pairs):
        assert got.dtype == np.float32, f"operator {i} changed the dtype"
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, err_msg=f"operator {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("name", ("add", "sub", "mul", "maximum", "add_relu"))
def test_integers_are_exact(name, dtype, device, rng):
    a, b = rng.integers(-9, 10, (2, 7, 19)).astype(dtype)
    want = {"add": a + b, "sub": a - b, "mul": a * b, "maximum": np.maximum(a, b), "add_relu": np.maximum(a + b, 0)}[
        name
    ]
    got = getattr(ops, name)(tinyres.tensor(a, device=device), tinyres.tensor(b, device=device)).numpy()
    assert np.array_equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_many_elements_of_views(device, rng):
    """More than a thread takes at once, of operands whose axes cannot be merged."""
    a, b = rng.integers(-9, 10, (60, 70, 24)).astype(np.float32), rng.integers(-9, 10, (60, 1, 12)).astype(np.float32)
    x, y = tinyres.tensor(a, device=device), tinyres.tensor(b, device=device)
    assert np.array_equal((x[:, ::-1, ::2] + y).numpy(), a[:, ::-1, ::2] + b)
    assert np.array_equal((y - x[:, :, 12:]).numpy(), b - a[:, :, 12:])
    assert np.array_equal(ops.relu(x.transpose(2, 0, 1)).numpy(), np.maximum(a.transpose(2, 0, 1), 0))


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_gradient_goes_only_to_the_larger(device):
    a, b = (tinyres.tensor(np.array(values), requires_grad=True, device=device) for values in ([1.0, 3], [2.0, 2]))
    ops.maximum(a, b).backward(np.array([np.inf, -np.inf]))
    assert a.grad.tolist() == [0, -np.inf] and b.grad.tolist() == [np.inf, 0]
