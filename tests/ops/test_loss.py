"""Cross-entropy from logits and integer labels, with label smoothing."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, checks_of, normal
from tinyres import ops

SIZES = {
    "one of one": (1, 1),
    "two classes": (3, 2),
    "ten classes": (5, 10),
    "a batch over a vector": (17, 10),
    "classes over two AVX-512 vectors": (2, 33),
    "a hundred classes": (3, 100),
}


def _labels(N, K):
    return np.random.default_rng(N + K).integers(0, K, N)


CASES = [
    Case(
        f"{reason}, smoothing {smoothing}",
        lambda x, n=N, k=K, smoothing=smoothing: ops.cross_entropy(x, _labels(n, k), label_smoothing=smoothing),
        normal(N, K),
        reduction=N * K,
    )
    for reason, (N, K) in SIZES.items()
    for smoothing in (0.0, 0.1, 1.0)
]

test_cases = checks_of(CASES)


@pytest.mark.parametrize("device", DEVICES)
def test_value(device):
    """By hand: uniform logits cost log K, whatever the smoothing."""
    for smoothing in (0.0, 0.3):
        loss = ops.cross_entropy(tinyres.tensor(np.full((4, 8), 3.0), device=device), np.arange(4), smoothing)
        assert abs(loss.item() - np.log(8)) < 1e-12
    logits = np.log(np.array([[1.0, 2.0, 5.0]]))
    loss = ops.cross_entropy(tinyres.tensor(logits, device=device), np.array([1]))
    assert abs(loss.item() - np.log(8 / 2)) < 1e-12
    smooth = ops.cross_entropy(tinyres.tensor(logits, device=device), np.array([1]), 0.3)
    assert abs(smooth.item() - (0.8 * np.log(8 / 2) + 0.1 * np.log(8 / 1) + 0.1 * np.log(8 / 5))) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_large_logits_stay_finite(device, dtype):
    x = tinyres.tensor(np.array([[1e4, -1e4, 0], [-1e30, 1e30, 0]], dtype), requires_grad=True, device=device)
    loss = ops.cross_entropy(x, np.array([0, 1]))
    loss.backward()
    assert loss.item() == 0
    assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_logits_give_a_nan_loss(device):
    x = tinyres.tensor(np.array([[0.0, np.nan], [0.0, 1.0]]), device=device)
    assert np.isnan(ops.cross_entropy(x, np.array([0, 0])).item())


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_row_sum_to_zero(device, rng):
    x = tinyres.tensor(rng.standard_normal((6, 10)), requires_grad=True, device=device)
    ops.cross_entropy(x, rng.integers(0, 10, 6), 0.1).backward()
    np.testing.assert_allclose(tinyres.backend.host(x.grad).sum(1), 0, atol=1e-15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", (np.int8, np.uint8, np.int32, np.int64))
def test_labels_of_any_integer_type(device, kind, rng):
    x = tinyres.tensor(rng.standard_normal((4, 10)), device=device)
    labels = np.array([9, 0, 3, 3])
    assert ops.cross_entropy(x, labels.astype(kind)).item() == ops.cross_entropy(x, labels).item()


@pytest.mark.parametrize("device", DEVICES)
def test_labels_may_be_views_of_any_integers(device, rng):
    logits = tinyres.tensor(rng.standard_normal((4, 5)), device=device)
    labels = np.array([[1, 9], [0, 9], [4, 9], [2, 9]])
    want = ops.cross_entropy(logits, labels[:, 0].copy()).item()
    for view in (labels[:, 0], labels[::-1, 0][::-1], labels[:, 0].astype(np.uint8), [1, 0, 4, 2]):
        assert ops.cross_entropy(logits, view).item() == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("label", (-1, 5))
def test_labels_just_outside_are_refused(device, label):
    logits = tinyres.tensor(np.zeros((2, 5)), device=device)
    with pytest.raises(tinyres.errors.ArgumentError, match=r"\[cross_entropy\] labels must be in 0 \.\. 4"):
        ops.cross_entropy(logits, [0, label])


@pytest.mark.parametrize("device", DEVICES)
def test_an_impossible_class_costs_nothing(device):
    """A logit of -inf masks a class: the loss is that of the others, as long as nothing is smoothed."""
    masked = tinyres.tensor(np.array([[0.5, -np.inf, 1.0]]), device=device)
    others = tinyres.tensor(np.array([[0.5, 1.0]]), device=device)
    assert ops.cross_entropy(masked, [2]).item() == pytest.approx(ops.cross_entropy(others, [1]).item(), rel=1e-15)


@pytest.mark.parametrize("device", DEVICES)
def test_all_smoothed_an_impossible_class_is_infinite(device):
    x = tinyres.tensor(np.array([[0.5, -np.inf, 1.0]]), device=device)
    assert ops.cross_entropy(x, [1], 1.0).item() == ops.cross_entropy(x, [0], 1.0).item() == np.inf
