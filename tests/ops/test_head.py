"""The end of a classifier as one op, held to the ops that it is made of; its metrics; parts of its gradients."""

import ml_dtypes
import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, checks_of, normal
from tinyres import backend, ops
from tinyres.errors import ArgumentError, DeviceError, DtypeError, ShapeError

BF16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {  # N, H, W, C, K
    "one of everything": (1, 1, 1, 1, 1),
    "of a CIFAR network": (3, 2, 2, 64, 10),
    "primes": (5, 3, 1, 7, 3),
    "classes over a warp": (2, 1, 2, 5, 37),
    "channels over a block": (2, 2, 1, 260, 2),
    "more images than blocks": (36, 1, 1, 3, 2),
}


def labels_of(N, K):
    return np.random.default_rng(N + K).integers(0, K, N)


def small(*shape):
    return lambda rng: rng.standard_normal(shape) / 4


CASES = [
    Case(
        f"{reason}, smoothing {smoothing}",
        lambda x, w, b, n=N, k=K, s=smoothing: ops.classifier_loss(x, w, b, labels_of(n, k), s),
        normal(N, H, W, C),
        small(C, K),
        normal(K),
        reduction=N * H * W * C * K,
    )
    for reason, (N, H, W, C, K) in SIZES.items()
    for smoothing in (0.0, 0.1)
]

test_cases = checks_of(CASES)


def tensors(device, dtype=np.float32, N=5, H=2, W=3, C=16, K=10):
    """x, w, b, labels."""
    d, rng = backend.get(device), np.random.default_rng(0)
    wide = np.float32 if dtype == BF16 else dtype
    arrays = [
        (rng.standard_normal((N, H, W, C)), dtype),
        (rng.standard_normal((C, K)), wide),
        (rng.standard_normal(K), wide),
    ]
    return [tinyres.Tensor(d.asarray(a.astype(t)), True, d) for a, t in arrays], rng.integers(0, K, N)


def composed(x, w, b, labels, smoothing=0.0):
    return ops.cross_entropy(ops.linear(ops.global_avg_pool2d(x), w, b), labels, smoothing)


def gradients(loss, ts, **kwargs):
    device = ts[0].device
    return [device.numpy(g).astype(np.float64) for g in tinyres.autograd.grad(loss, ts, **kwargs)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64, BF16), ids=str)
def test_is_what_it_is_made_of(device, dtype):
    ts, labels = tensors(device, dtype)
    eps = 2.0**-7 if dtype == BF16 else np.finfo(dtype).eps
    loss, want = ops.classifier_loss(*ts, labels, 0.1), composed(*ts, labels, 0.1)
    assert loss.dtype == want.dtype and abs(loss.item() - want.item()) <= 8 * eps * want.item()
    got, expected = gradients(loss, ts), gradients(want, ts)
    for g, w in zip(got, expected, strict=True):
        assert np.abs(g - w).max() <= 16 * eps * np.abs(w).max()


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_rounds_once(device):
    """Weights are rounded as linear rounds them; all else is computed in float32."""
    ts, labels = tensors(device, BF16)
    loss = ops.classifier_loss(*ts, labels)
    exact = [tinyres.tensor(t.numpy().astype(BF16).astype(np.float64), True, device="reference") for t in ts]
    want = composed(*exact, labels)
    assert loss.dtype == np.float32 and abs(loss.item() - want.item()) <= 1e-6 * want.item()
    for i, (g, w) in enumerate(zip(gradients(loss, ts), gradients(want, exact), strict=True)):
        bound = 2.0**-8 * np.abs(w) if i == 0 else 0
        assert (np.abs(g - w) <= 1.01 * bound + 2e-6 * np.abs(w).max()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sweep_that_starts_at_the_loss_launches_nothing_for_it(device, monkeypatch):
    """Its gradient is 1, and what forward worked out is handed on; any other gradient multiplies it."""
    ts, labels = tensors(device)
    want = gradients(ops.classifier_loss(*ts, labels), ts, gradients=[2.0])
    plain = gradients(ops.classifier_loss(*ts, labels), ts, gradients=[1.0])
    kernels, products = backend.get(device).kernels, []
    mul = kernels.mul
    monkeypatch.setattr(kernels, "mul", lambda a, b: products.append(1) or mul(a, b))
    loss = ops.classifier_loss(*ts, labels)
    loss.backward()
    assert not products
    for t, p, w in zip(ts, plain, want, strict=True):
        grad = loss.device.numpy(t.grad)
        assert np.array_equal(grad, p) and np.array_equal(2 * grad, w)


@pytest.mark.parametrize("device", DEVICES)
def test_sweeps_that_must_multiply(device):
    """A kept graph, a hook, a loss that is part of another, a loss named twice."""
    ts, labels = tensors(device)
    once = gradients(ops.classifier_loss(*ts, labels), ts)

    def assert_times(factor, got):
        for g, w in zip(got, once, strict=True):
            np.testing.assert_allclose(g, factor * w, rtol=1e-6, atol=1e-9)

    loss = ops.classifier_loss(*ts, labels)
    assert_times(1, gradients(loss, ts, retain_graph=True))
    assert_times(3, gradients(loss * 3.0, ts, retain_graph=True))
    for kept in (True, False):
        loss.backward(retain_graph=kept)
    assert_times(2, [loss.device.numpy(t.grad) for t in ts])
    loss = ops.classifier_loss(*ts, labels)
    loss.register_hook(lambda g: loss.device.asarray(g * 5))
    assert_times(5, gradients(loss, ts))
    loss = ops.classifier_loss(*ts, labels)
    assert_times(2, gradients([loss, loss], ts))
    assert_times(2, gradients(ops.classifier_loss(*ts, labels) * 2.0, ts))


@pytest.mark.parametrize("device", DEVICES)
def test_a_kept_graph_keeps_its_gradients(device):
    """Whoever comes next in a sweep may write over a gradient that is handed on: a batch norm does."""
    (x, w, b), labels = tensors(device)
    gamma, beta = (tinyres.tensor(np.ones(16, np.float32), True, device=device) for _ in range(2))
    ts = [x, gamma, beta, w, b]
    loss = ops.classifier_loss(ops.batch_norm(x, gamma, beta), w, b, labels)
    swept = []
    for kept in (True, True, False):
        loss.backward(retain_graph=kept)
        swept.append([loss.device.numpy(t.grad).copy() for t in ts])
        for t in ts:
            t.zero_grad()
    for g, h, k in zip(*swept, strict=True):
        assert np.array_equal(g, h) and np.array_equal(g, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64, BF16), ids=str)
def test_metrics_are_added_up(device, dtype):
    """With gradients and without, over batches of two sizes."""
    d = backend.get(device)
    metrics, want = d.asarray(np.zeros(4)), np.zeros(4)
    for N, grad in ((5, True), (3, False), (40, True)):
        ts, labels = tensors(device, dtype, N=N)
        if grad:
            loss = ops.classifier_loss(*ts, labels, 0.1, metrics)
        else:
            with tinyres.no_grad():
                loss = ops.classifier_loss(*ts, labels, 0.1, metrics)
            assert not loss.requires_grad
        x, w, b = (t.numpy().astype(dtype).astype(np.float64) for t in ts)
        logits = x.mean((1, 2)) @ w + b
        want += [loss.item() * N, (logits.argmax(1) != labels).sum(), N, 0]
        np.testing.assert_allclose(d.numpy(metrics), want, rtol=1e-6)
        assert d.numpy(metrics)[1:].tolist() == want[1:].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits, best", [([0, 2, 1, 2], 1), ([0, np.nan, 9, np.nan], 1), ([-np.inf] * 4, 0)])
def test_wrong_is_what_argmax_says(device, logits, best):
    d = backend.get(device)
    x, w = (tinyres.tensor(np.zeros(shape, np.float32), device=device) for shape in ((4, 1, 1, 2), (2, 4)))
    metrics = d.asarray(np.zeros(4))
    with np.errstate(all="ignore"):
        ops.classifier_loss(x, w, tinyres.tensor(np.float32(logits), device=device), np.arange(4), 0.0, metrics)
    assert np.argmax(logits) == best and d.numpy(metrics)[1:].tolist() == [3, 4, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_parts(device):
    """Of small integers and powers of two the parts add up to the gradients exactly enough for any order."""
    d = backend.get(device)
    ts, labels = tensors(device, N=40)
    arguments = *(t.data for t in ts), d.asarray(labels), 0.1
    loss, dx, dw, db = d.kernels.classifier(*arguments)
    again, dx_again, dw_parts, db_parts = d.kernels.classifier(*arguments, parts=True)
    assert dw_parts.shape[1:] == dw.shape and db_parts.shape == (len(dw_parts), *db.shape)
    assert float(loss) == float(again) == float(d.kernels.classifier_inference(*arguments))
    assert np.array_equal(d.numpy(dx), d.numpy(dx_again))
    for whole, parts in ((dw, dw_parts), (db, db_parts)):
        whole, parts = d.numpy(whole), d.numpy(parts)
        np.testing.assert_allclose(parts.astype(np.float64).sum(0), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("device", DEVICES)
def test_refused(device):
    (x, w, b), labels = tensors(device)
    d = backend.get(device)
    column = tinyres.tensor(np.ones((16, 1), np.float32), device=device)
    wrong = [
        (ShapeError, "x must be", (ops.global_avg_pool2d(x), w, b, labels)),
        (ShapeError, "channels of x", (x, tinyres.tensor(np.ones((15, 10), np.float32), device=device), b, labels)),
        (ShapeError, "channels of x", (x, w, column, labels)),
        (ShapeError, "labels must be one", (x, w, b, labels[1:])),
        (ArgumentError, "labels must be in 0 .. 9", (x, w, b, labels + 6)),
        (ArgumentError, "label_smoothing", (x, w, b, labels, 1.5)),
        (DtypeError, "operands must have one dtype", (x, tinyres.tensor(np.ones((16, 10)), device=device), b, labels)),
        (DtypeError, "metrics must be float64", (x, w, b, labels, 0.0, d.asarray(np.zeros(4, np.float32)))),
        (ShapeError, r"metrics must be \(4,\)", (x, w, b, labels, 0.0, d.asarray(np.zeros(3)))),
        (ShapeError, "metrics must be", (x, w, b, labels, 0.0, d.asarray(np.zeros(8))[::2])),
        (DtypeError, "metrics must be float64", (x, w, b, labels, 0.0, d.asarray(np.zeros(4, np.int64)))),
        (DeviceError, "metrics must be an array", (x, w, b, labels, 0.0, [0.0] * 4)),
    ]
    for error, text, arguments in wrong:
        with pytest.raises(error, match=rf"\[classifier_loss\] {text}"):
            ops.classifier_loss(*arguments)
    wide = tinyres.tensor(np.ones((1, 1, 1, 11000), np.float32), device=device)
    tall = tinyres.tensor(np.ones((11000, 1), np.float32), device=device)
    one = tinyres.tensor(np.ones(1, np.float32), device=device)
    with pytest.raises(ShapeError, match=r"C \+ 2 K must be at most 11000"):
        ops.classifier_loss(wide, tall, one, [0])
