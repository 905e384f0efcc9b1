"""bfloat16 arrays in the kernels of every device: what they store is what float64 gives, rounded once; statistics,
parameters and weight gradients are float32. The CUDA kernels, at every size, are tested from C++ too (tests/cuda)."""

import ml_dtypes
import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import backend
from tinyres.backend import spec

BF16 = np.dtype(ml_dtypes.bfloat16)
EPS = 2.0**-8  # half a step: a result is rounded once

reference = backend.get("reference").kernels


def _numbers(*shape, seed=0):
    """An array that bfloat16 holds exactly."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(BF16)


def _labels():
    return np.arange(6)


_NORM = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
_X, _DY, _SHORTCUT = (_numbers(4, 3, 3, 8, seed=seed) for seed in range(3))
_IMAGE, _WINDOW = _numbers(2, 7, 6, 5), _numbers(3, 3, 5, 9)
_ROWS, _OTHER = (_numbers(6, 10, seed=seed) for seed in range(2))
_INSIDE = np.full((2, 2, 3, 5), 3, np.int32)
_INDEX = (slice(1, None), slice(None, None, -2))

# Kernel: its arguments. Those that update an argument are below.
CALLS = {
    **{name: (_numbers(3, 5, 8), _numbers(5, 8)) for name in ("add", "sub", "mul", "div", "maximum")},
    "pow": (abs(_ROWS), _OTHER),
    "pow_backward": (_ROWS, abs(_OTHER) + BF16.type(1), _OTHER, _ROWS),
    "maximum_backward": (_ROWS, _OTHER, _ROWS),
    **{name: (_ROWS,) for name in ("neg", "exp", "sigmoid", "tanh", "relu")},
    **{name: (abs(_ROWS) + BF16.type(1),) for name in ("log", "sqrt")},
    **{name: (_ROWS, abs(_OTHER)) for name in ("sigmoid_backward", "tanh_backward", "relu_backward", "sqrt_backward")},
    "dropout": (_ROWS, 0.5, (3, 4)),
    "contiguous": (_ROWS.T,),
    "broadcast_to": (_numbers(5, 1), (3, 5, 4)),
    "sum_to": (_numbers(3, 5, 8), (5, 1)),
    "pad": (_ROWS, ((1, 0), (2, 3)), 0.5),
    "concatenate": ([_ROWS, _OTHER[:, ::2], _ROWS], 1),
    "scatter": (_ROWS[1:, ::-2], (6, 10), _INDEX),
    "sum": (_numbers(40, 30), (0,), False),
    "max": (_ROWS, (1,), True),
    "max_backward": (_numbers(6, 1), _ROWS, _ROWS.astype(np.float64).max(1, keepdims=True).astype(BF16), (1,)),
    "matmul": (_numbers(3, 6, 10), _numbers(10, 4)),
    "conv2d_forward": (_IMAGE, _WINDOW, (2, 1), (1, 1)),
    "conv2d_bias_forward": (_IMAGE, _WINDOW, _numbers(9), _numbers(2, 4, 6, 9), True, (2, 1), (1, 1)),
    "conv2d_backward_input": (_numbers(2, 4, 6, 9), _WINDOW, _IMAGE.shape, (2, 1), (1, 1)),
    "conv2d_backward_weight": (_numbers(2, 4, 6, 9), _IMAGE, _WINDOW.shape, (2, 1), (1, 1)),
    "conv2d_backward": (_numbers(2, 4, 6, 9), _IMAGE, _WINDOW, (2, 1), (1, 1)),
    "add_relu": (_ROWS, _OTHER),
    "batch_norm_forward": (_X, *_NORM, None, None, 0.1, 1e-5),
    "batch_norm_relu_forward": (_X, *_NORM, None, None, 0.1, 1e-5),
    "batch_norm_add_relu_forward": (_X, _SHORTCUT, *_NORM, None, None, 0.1, 1e-5),
    "batch_norm_backward": (_DY, _X, _NORM[0], *_NORM[::-1]),
    "batch_norm_relu_backward": (_DY, _X, *_NORM, *_NORM[::-1]),
    "batch_norm_add_relu_backward": (_DY, _X, _SHORTCUT, _NORM[0], *_NORM[::-1]),
    "batch_norm_inference": (_X, *_NORM, *_NORM[::-1], 1e-5),
    "batch_norm_relu_inference": (_X, *_NORM, *_NORM[::-1], 1e-5),
    "batch_norm_add_relu_inference": (_X, _SHORTCUT, *_NORM, *_NORM[::-1], 1e-5),
    "batch_norm_inference_backward": (_DY, _X, _NORM[0], *_NORM[::-1], 1e-5),
    "max_pool2d_forward": (_IMAGE, (3, 2), (2, 2), (1, 1)),
    "max_pool2d_backward": (_numbers(2, 2, 3, 5), _INSIDE, (2, 5, 6, 5), (2, 2), (2, 2), (0, 0)),
    "avg_pool2d_forward": (_IMAGE, (3, 2), (2, 2), (1, 1)),
    "avg_pool2d_backward": (_numbers(2, 4, 4, 5), _IMAGE.shape, (3, 2), (2, 2), (1, 1)),
    "global_avg_pool2d_forward": (_IMAGE,),
    "global_avg_pool2d_backward": (_numbers(2, 5), _IMAGE.shape),
    "cross_entropy": (_ROWS, _labels(), 0.1),
    "classifier": (_numbers(6, 2, 3, 5), _numbers(5, 10), _ROWS[0], _labels(), 0.1),
    "classifier_inference": (_numbers(6, 2, 3, 5), _numbers(5, 10), _ROWS[0], _labels(), 0.1),
}  # fmt: skip
UPDATING = {"accumulate", "sgd", "augment", "augment_step", "cast"}  # below; or never on bfloat16
NORMED = {*spec.NORMED}  # ops/test_residual_chain.py


def _doubled(value):
    if isinstance(value, list):
        return [_doubled(item) for item in value]
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind != "i" else value


def _close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    if dtype.kind == "i":
        return np.testing.assert_array_equal(got, want)
    eps = EPS if dtype == BF16 else 1e-5
    got = got.astype(np.float64)
    scale = np.abs(want) if dtype == BF16 else np.abs(want).max()  # of each result by itself: it is rounded once
    assert (np.abs(got - want) <= 1.01 * eps * scale + 1e-6 * np.abs(want).max()).all()


def test_every_kernel_is_here():
    assert CALLS.keys() | UPDATING | NORMED == spec.MANDATORY.keys() | spec.FUSED.keys()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", DEVICES)
def test_rounded_once(device, name):
    d = backend.get(device)

    def there(value):
        if isinstance(value, list):
            return [there(item) for item in value]
        return d.asarray(value) if isinstance(value, np.ndarray) else value

    before = [value.tobytes() if isinstance(value, np.ndarray) else None for value in CALLS[name]]
    got = getattr(d.kernels, name)(*map(there, CALLS[name]))
    want = getattr(reference, name)(*map(_doubled, CALLS[name]))
    got, want = (r if isinstance(r, tuple) else (r,) for r in (got, want))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        dtype = w.dtype if w.dtype.kind == "i" else np.dtype(np.float32) if i in spec.WIDE.get(name, ()) else BF16
        _close(d.numpy(g), w, dtype)
    assert [value.tobytes() if isinstance(value, np.ndarray) else None for value in CALLS[name]] == before


@pytest.mark.parametrize("stride", ((1, 1), (2, 1), (2, 2)))
@pytest.mark.parametrize("C, K", ((5, 9), (16, 40), (32, 16)))
@pytest.mark.parametrize("algorithm", ("naive", "tiled", "mma", "direct"))
@pytest.mark.parametrize("device", [name for name in DEVICES if name == "emulated"])
def test_every_convolution_rounds_once(device, algorithm, C, K, stride):
    kernels = backend.get(device).kernels
    x, w = _numbers(2, 7, 6, C), _numbers(3, 3, C, K)
    with tinyres.options(conv=algorithm):
        y = reference.conv2d_forward(_doubled(x), _doubled(w), stride, (1, 1))
        dy = _numbers(*y.shape)
        _close(kernels.conv2d_forward(x, w, stride, (1, 1)), y, BF16)
        dx = reference.conv2d_backward_input(_doubled(dy), _doubled(w), x.shape, stride, (1, 1))
        _close(kernels.conv2d_backward_input(dy, w, x.shape, stride, (1, 1)), dx, BF16)
        dw = reference.conv2d_backward_weight(_doubled(dy), _doubled(x), w.shape, stride, (1, 1))
        _close(kernels.conv2d_backward_weight(dy, x, w.shape, stride, (1, 1)), dw, np.dtype(np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_in_place(device):
    d = backend.get(device)
    total, x = d.asarray(_ROWS.copy()), d.asarray(_OTHER)
    assert d.kernels.accumulate(total, x) is total
    _close(d.numpy(total), reference.add(_doubled(_ROWS), _doubled(_OTHER)), BF16)
    total, rest = d.asarray(_IMAGE.copy()), CALLS["conv2d_backward_input"][1:]
    dy, w = d.asarray(CALLS["conv2d_backward_input"][0]), d.asarray(_WINDOW)
    assert d.kernels.conv2d_backward_input(dy, w, *rest[1:], total) is total
    want = reference.conv2d_backward_input(*map(_doubled, CALLS["conv2d_backward_input"])) + _doubled(_IMAGE)
    got = d.numpy(total).astype(np.float64)
    assert np.abs(got - want).max() <= 2 * EPS * np.abs(want).max()
    mean, var = d.asarray(np.zeros(8, np.float32)), d.asarray(np.ones(8, np.float32))
    d.kernels.batch_norm_forward(d.asarray(_X), *map(d.asarray, _NORM), mean, var, 0.5, 1e-5)
    rows = _doubled(_X).reshape(-1, 8)
    np.testing.assert_allclose(d.numpy(mean), rows.mean(0) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d.numpy(var), 0.5 + rows.var(0, ddof=1) / 2, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_cast(device):
    """To the nearest, ties to even; infinite beyond the range; NaN stays NaN."""
    d = backend.get(device)
    step = 2.0**-7
    half = step / 2
    ties = np.array([1 + half, 1 + 3 * half, -1 - half, 1 + half + 2**-20, 3.4e38, -np.inf, -0.0, 1e-40])
    x = np.concatenate([ties, [np.nan], np.random.default_rng(0).standard_normal(40_000)]).astype(np.float32)
    y = d.kernels.cast(d.asarray(x), BF16)
    got = d.numpy(y)
    assert got.dtype == BF16 and np.isnan(got[8].astype(np.float32))
    assert got[:4].tolist() == [1, 1 + 2 * step, -1, 1 + step] and got[4] == np.inf and np.signbit(got[6])
    finite = np.arange(x.size) != 8
    assert got[finite].tobytes() == x[finite].astype(BF16).tobytes()
    back = d.numpy(d.kernels.cast(y, np.dtype(np.float32)))
    assert back.dtype == np.float32 and back[finite].tobytes() == got[finite].astype(np.float32).tobytes()
    assert d.kernels.cast(y, BF16) is y
    strided = d.kernels.cast(d.asarray(x)[::-3], BF16)
    assert d.numpy(strided)[:-3].tobytes() == got[::-3][:-3].tobytes()


def test_a_view_leaves_what_lies_between():
    """The CPU's kernels work on float32 copies of bfloat16: what is written back is the view's elements alone."""
    y = np.full((4, 6), 0x7FC1, np.uint16).view(BF16)  # a NaN that rounding would change
    x = _numbers(2, 3)
    backend.get("cpu").kernels.extension.copy(y[::-2, ::2], x)
    assert y[::-2, ::2].tobytes() == x.tobytes()
    assert (y.view(np.uint16)[::2] == 0x7FC1).all() and (y.view(np.uint16)[:, 1::2] == 0x7FC1).all()


@pytest.mark.parametrize("device", [name for name in ("cpu", "emulated") if name in DEVICES])
def test_raw_bindings_refuse(device):
    extension = backend.get(device).kernels.extension
    x, y = np.zeros(6, np.float32), np.zeros(6, BF16)
    with pytest.raises(TypeError, match=r"\[cast\] x must be float32; got bfloat16"):
        extension.cast(y, y)
    with pytest.raises(TypeError, match=r"\[cast\] y must be float32; got float64"):
        extension.cast(x.astype(np.float64), y)
    with pytest.raises(TypeError, match=r"\[unary\] x must be float32; got bfloat16"):
        extension.unary("relu", x, y)
    with pytest.raises(ValueError, match=r"\[unary\] x must have shape \(6,\); got \(5,\)"):
        extension.unary("relu", y, y[:5])
    odd = np.zeros(13, np.uint8)[1:].view(BF16)
    with pytest.raises(ValueError, match=r"\[unary\] x must be aligned"):
        extension.unary("relu", y, odd)
