"""bfloat16 storage in the CUDA kernels: what they store is what float64 gives, rounded once; statistics and weight
gradients are float32. The kernels one by one, at every size, are tested from C++ (tests/cuda)."""

import ml_dtypes
import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import backend

BF16 = np.dtype(ml_dtypes.bfloat16)
EPS = 2.0**-8  # half a step: a result is rounded once

reference = backend.get("reference").kernels


def _draw(*shapes):
    """Arrays that bfloat16 holds exactly, as bfloat16 and as float64."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(BF16) for shape in shapes]
    return arrays, [a.astype(np.float64) for a in arrays]


def _close(got, want, dtype, slack=1.0):
    assert got.dtype == dtype and got.shape == want.shape
    eps = EPS if dtype == BF16 else 1e-5
    error = np.abs(got.astype(np.float64) - want).max()
    assert error <= slack * eps * max(1.0, np.abs(want).max())


if "emulated" in DEVICES:
    kernels = backend.get("emulated").kernels

    @pytest.mark.parametrize("name", ("add", "sub", "mul", "div", "maximum"))
    def test_arithmetic(name):
        arrays, doubles = _draw((3, 5, 8), (5, 8))
        _close(getattr(kernels, name)(*arrays), getattr(reference, name)(*doubles), BF16)

    @pytest.mark.parametrize("algorithm", kernels.extension.conv_algorithms)
    @pytest.mark.parametrize("stride", ((1, 1), (2, 1)))
    @pytest.mark.parametrize("C, K", ((5, 9), (16, 40)))
    def test_convolution(C, K, stride, algorithm):
        with tinyres.options(conv=algorithm):
            convolution(C, K, stride)

    def convolution(C, K, stride):
        (x, w), doubles = _draw((2, 7, 6, C), (3, 3, C, K))
        y = reference.conv2d_forward(*doubles, stride, (1, 1))
        _close(kernels.conv2d_forward(x, w, stride, (1, 1)), y, BF16)
        (dy,), (dy64,) = _draw(y.shape)
        dx = reference.conv2d_backward_input(dy64, doubles[1], x.shape, stride, (1, 1))
        _close(kernels.conv2d_backward_input(dy, w, x.shape, stride, (1, 1)), dx, BF16)
        dw = reference.conv2d_backward_weight(dy64, doubles[0], w.shape, stride, (1, 1))
        _close(kernels.conv2d_backward_weight(dy, x, w.shape, stride, (1, 1)), dw, np.float32)

    def test_batch_norm():
        (x, residual, dy), doubles = _draw(*[(4, 3, 3, 8)] * 3)
        gamma, beta = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
        rest = gamma, beta, None, None, 0.1, 1e-5
        y, mean, inv_std = kernels.batch_norm_add_relu_forward(x, residual, *rest)
        wanted = reference_kernels("batch_norm_add_relu_forward", *doubles[:2], *rest)
        for got, want, dtype in zip((y, mean, inv_std), wanted, (BF16, np.float32, np.float32), strict=True):
            _close(got, want, dtype)
        got = kernels.batch_norm_add_relu_backward(dy, x, y, gamma, mean, inv_std)
        wanted = reference_kernels(
            "batch_norm_add_relu_backward", doubles[2], doubles[0], wanted[0], gamma, *wanted[1:]
        )
        for g, w, dtype in zip(got, wanted, (BF16, BF16, np.float32, np.float32), strict=True):
            _close(g, w, dtype)

    def reference_kernels(name, *args):
        return getattr(reference, name)(*(a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args))

    def test_loss_product_and_sum():
        (logits, a, b), doubles = _draw((6, 10), (6, 10), (10, 4))
        labels = np.arange(6)
        loss, dlogits = kernels.cross_entropy(logits, labels, 0.1)
        want, dwant = reference.cross_entropy(doubles[0], labels, 0.1)
        _close(loss, want, np.float32)
        _close(dlogits, dwant, BF16)
        _close(kernels.matmul(a, b), reference.matmul(*doubles[1:]), BF16)
        _close(kernels.sum(a, (0,), False), reference.sum(doubles[1], (0,), False), BF16)
        _close(kernels.max(a, (1,), False), reference.max(doubles[1], (1,), False), BF16)

    def test_pooling():
        (x,), (x64,) = _draw((2, 6, 6, 8))
        geometry = (2, 2), (2, 2), (0, 0)
        y, argmax = kernels.max_pool2d_forward(x, *geometry)
        want, where = reference.max_pool2d_forward(x64, *geometry)
        _close(y, want, BF16)
        assert np.array_equal(argmax, where)
        _close(kernels.global_avg_pool2d_forward(x), reference.global_avg_pool2d_forward(x64), BF16)
