"""Batch norm: plain and fused, training and evaluation, running statistics in PyTorch's conventions."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, assert_close, checks_of, normal
from tinyres import ops

SHAPES = {
    "two values, one channel": (2, 1),
    "rows and columns": (7, 3),
    "an image": (2, 3, 4, 5),
    "channels under an AVX-512 vector": (5, 15),
    "channels over an AVX-512 vector": (3, 2, 1, 17),
    "the network's widths": (2, 3, 3, 16),
    "one image": (1, 3, 3, 2),
    "rows over a chunk": (1, 37, 31, 3),
}


def _scale(*shape):
    """gamma of either sign, away from 0, where ReLU of a whole channel would turn over."""
    return lambda rng: rng.uniform(0.5, 1.5, shape) * rng.choice((-1.0, 1.0), shape)


def _statistics(x):
    """Running statistics that are the same whenever they are asked for, in x's dtype."""
    rng = np.random.default_rng(x.shape[-1])
    mean, var = rng.standard_normal(x.shape[-1:]), rng.uniform(0.5, 2, x.shape[-1:])
    return x.device.asarray(mean, x.dtype), x.device.asarray(var, x.dtype)


def _call(op, training, **settings):
    def call(x, *rest):
        running = (None, None) if training else _statistics(x)
        return op(x, *rest, *running, training=training, **settings)

    return call


def _draws(op, shape):
    residual = [normal(*shape)] if op is ops.batch_norm_add_relu else []
    return [normal(*shape), *residual, _scale(shape[-1]), normal(shape[-1])]


OPS = (ops.batch_norm, ops.batch_norm_relu, ops.batch_norm_add_relu)
MODES = {"training": True, "evaluation": False}

CASES = [
    *(
        Case(
            f"{op.__name__}, {mode}, {reason}", _call(op, training), *_draws(op, shape),
            reduction=16 * int(np.prod(shape[:-1])),  # the gradient is a difference of sums over the whole batch
        )
        for op in OPS
        for mode, training in MODES.items()
        for reason, shape in SHAPES.items()
        if reason != "two values, one channel" or op is ops.batch_norm  # there y is +-1 and its ReLU close to a kink
    ),
    *(
        Case(f"{op.__name__}, {mode}, a large eps", _call(op, training, eps=0.5), *_draws(op, (5, 4)), reduction=80)
        for op in OPS
        for mode, training in MODES.items()
    ),
]  # fmt: skip

test_cases = checks_of(CASES)


def _tensors(device, dtype=np.float64, shape=(4, 3, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    arrays = [
        draw(rng).astype(dtype) for draw in (normal(*shape), normal(*shape), _scale(shape[-1]), normal(shape[-1]))
    ]
    return [tinyres.tensor(a, requires_grad=True, device=device) for a in arrays]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_running_statistics(op, device):
    """running += momentum * (batch - running), with the biased mean's variance unbiased; y uses the biased one."""
    x, residual, gamma, beta = _tensors(device)
    inputs = (x, residual, gamma, beta) if op is ops.batch_norm_add_relu else (x, gamma, beta)
    running = [x.device.asarray(np.full(5, value)) for value in (2.0, 3.0)]
    y = op(*inputs, *running, training=True, momentum=0.3, eps=0.01)
    mean, var = map(tinyres.backend.host, running)
    rows = x.numpy().reshape(-1, 5)
    np.testing.assert_allclose(mean, 0.7 * 2 + 0.3 * rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, 0.7 * 3 + 0.3 * rows.var(0, ddof=1), rtol=1e-12)
    want = gamma.numpy() * (x.numpy() - rows.mean(0)) / np.sqrt(rows.var(0) + 0.01) + beta.numpy()
    want = want + residual.numpy() if op is ops.batch_norm_add_relu else want
    want = want if op is ops.batch_norm else np.maximum(want, 0)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_of_many_parts(device):
    """Rows drift, so that the parts which are summed apart differ in their means; the last part is a smaller one."""
    rows = np.linspace(-3, 5, 4001)[:, None] * np.arange(1.0, 18) + np.sin(np.arange(4001.0))[:, None]
    x = tinyres.tensor(rows, device=device)
    gamma, beta = (tinyres.tensor(np.full(17, value), device=device) for value in (1.0, 0.0))
    running = [x.device.asarray(np.zeros(17)) for _ in range(2)]
    ops.batch_norm(x, gamma, beta, *running, training=True, momentum=1)
    mean, var = map(tinyres.backend.host, running)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(var, rows.var(0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_evaluation_uses_and_keeps_the_running_statistics(op, device):
    x, residual, gamma, beta = _tensors(device)
    inputs = (x, residual, gamma, beta) if op is ops.batch_norm_add_relu else (x, gamma, beta)
    running = [x.device.asarray(np.linspace(*ends, 5)) for ends in ((-1, 1), (0.5, 2))]
    y = op(*inputs, *running, training=False, eps=0.01)
    mean, var = map(tinyres.backend.host, running)
    assert np.array_equal(mean, np.linspace(-1, 1, 5)) and np.array_equal(var, np.linspace(0.5, 2, 5))
    want = gamma.numpy() * (x.numpy() - mean) / np.sqrt(var + 0.01) + beta.numpy()
    want = want + residual.numpy() if op is ops.batch_norm_add_relu else want
    want = want if op is ops.batch_norm else np.maximum(want, 0)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("shape", ((1, 5), (1, 1, 1, 5)))
def test_one_value_a_channel_is_an_error_in_training(op, shape, device):
    x, residual, gamma, beta = _tensors(device, shape=shape)
    inputs = (x, residual, gamma, beta) if op is ops.batch_norm_add_relu else (x, gamma, beta)
    with pytest.raises(tinyres.errors.ShapeError, match=rf"\[{op.__name__}\] .*one value per channel; got x"):
        op(*inputs)
    assert op(*inputs, *_statistics(x), training=False).shape == shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("mode", MODES)
def test_fused_equals_plain(mode, dtype, device):
    """Output, gradients and running statistics of the fused ops against the three ops that they replace."""
    fused = {
        "batch_norm_relu": lambda x, r, *rest, **kw: ops.batch_norm_relu(x, *rest, **kw),
        "batch_norm_add_relu": ops.batch_norm_add_relu,
    }
    plain = {
        "batch_norm_relu": lambda x, r, *rest, **kw: ops.relu(ops.batch_norm(x, *rest, **kw)),
        "batch_norm_add_relu": lambda x, r, *rest, **kw: ops.relu(ops.batch_norm(x, *rest, **kw) + r),
    }
    for name in fused:
        results = []
        for call in (fused[name], plain[name]):
            tensors = _tensors(device, dtype)
            running = _statistics(tensors[0])
            y = call(*tensors, *running, training=MODES[mode])
            y.backward(np.random.default_rng(1).standard_normal(y.shape))
            arrays = [*(t.grad for t in tensors if t.grad is not None), *running]
            results.append([y.numpy(), *map(tinyres.backend.host, arrays)])
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            assert_close(got, want, 36, f"{name}, result {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_a_mean_far_from_zero_keeps_its_digits(dtype, device):
    """The variance is not the difference of two large numbers."""
    rng = np.random.default_rng(0)
    offset = 1000.0
    x = (rng.standard_normal((64, 4, 4, 3)) + offset).astype(dtype)
    y = ops.batch_norm(*(tinyres.tensor(a, device=device) for a in (x, np.ones(3, dtype), np.zeros(3, dtype))))
    rows = x.astype(np.float64).reshape(-1, 3)
    want = ((x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)).astype(np.float64)
    assert np.abs(y.numpy() - want).max() < 8 * np.finfo(dtype).eps * offset


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_channel_is_finite(device):
    x = tinyres.tensor(np.full((8, 2), 3.25), requires_grad=True, device=device)
    gamma, beta = tinyres.tensor(np.ones(2), device=device), tinyres.tensor(np.full(2, 0.5), device=device)
    y = ops.batch_norm(x, gamma, beta)
    y.backward(np.arange(16.0).reshape(8, 2))
    assert np.array_equal(y.numpy(), np.full((8, 2), 0.5))
    assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_by_x_sums_to_zero(device):
    """Adding a constant to a channel, or scaling it (eps aside), changes nothing."""
    x, _, gamma, beta = _tensors(device)
    y = ops.batch_norm(x, gamma, beta, eps=1e-30)
    y.backward(np.random.default_rng(3).standard_normal(y.shape))
    dx = tinyres.backend.host(x.grad)
    np.testing.assert_allclose(dx.sum((0, 1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((dx * x.numpy()).sum((0, 1, 2)), 0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 3, 16), (300, 64), (4, 7, 13), (9, 40)])
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_a_gradient_written_over_another(device, shape, dtype):
    """The same bits, wherever they go."""
    device = tinyres.backend.get(device)
    rng, channels = np.random.default_rng(0), shape[-1:]
    x, y, given = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    gamma, beta, mean, inv_std = (rng.uniform(0.5, 1.5, channels).astype(dtype) for _ in range(4))
    for name, before in (
        ("batch_norm_backward", (x, gamma)),
        ("batch_norm_relu_backward", (x, gamma, beta)),
        ("batch_norm_add_relu_backward", (x, y, gamma)),
    ):
        kernel = getattr(device.kernels, name)
        arguments = [device.asarray(a) for a in (*before, mean, inv_std)]
        dy = device.asarray(given.copy())
        want = [device.numpy(a).tobytes() for a in kernel(dy, *arguments)]
        assert device.numpy(dy).tobytes() == given.tobytes()
        assert want == [device.numpy(a).tobytes() for a in kernel(dy, *arguments, overwrite=True)]


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_that_others_hold_is_left_alone(op):
    rng = np.random.default_rng(0)
    x, residual, other = (tinyres.tensor(rng.standard_normal((6, 16)), True, np.float64) for _ in range(3))
    gamma, beta = (tinyres.tensor(rng.uniform(0.5, 1.5, 16), True, np.float64) for _ in range(2))
    inputs = (x, residual) if op is ops.batch_norm_add_relu else (x,)
    dy = rng.standard_normal((6, 16))
    (op(*inputs, gamma, beta) + other).backward(dy.copy())  # the sum gives both sides one array
    np.testing.assert_array_equal(other.grad, dy)
    y = op(*inputs, gamma, beta)
    seen = []
    y.register_hook(seen.append)
    y.backward(dy)
    np.testing.assert_array_equal(seen[0], dy)
    mine = dy.copy()
    op(*inputs, gamma, beta).backward(mine)
    np.testing.assert_array_equal(mine, dy)
