"""The kernel of SGD: gradients in parts, a rate that lies on the device, rounded copies. Its formula: test_optim.py."""

import ml_dtypes
import numpy as np
import pytest

from op_case import DEVICES
from tinyres import backend

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(3, 3, 16, 16), (), (1031,), (0, 4), (2, 65)]  # over a chunk, a scalar, ragged, empty


def arrays(device, seed, dtype, lead=(), integers=True):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-3, 4, shape)) if integers else rng.standard_normal
    return [device.asarray(np.asarray(draw((*lead, *shape)), dtype)) for shape in SHAPES]


def step(device, dtype, dw, lr=0.5, integers=True, copies=None, nesterov=True, momentum=0.5):
    """The weights and velocities after a step."""
    w, v = arrays(device, 1, dtype, (), integers), arrays(device, 2, dtype, (), integers)
    decays = [0.25 * (i % 3) for i in range(len(w))]
    device.kernels.sgd(w, v if momentum else None, dw, decays, lr, momentum, nesterov, copies)
    return [device.numpy(a) for a in (*w, *v)]


def assert_equal(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.tobytes() == w.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("parts", (1, 2, 4, 5, 13, 33, 130))
def test_parts_are_added_up(device, dtype, parts):
    """Of small integers, exactly; every parameter by itself."""
    d = backend.get(device)
    dw = arrays(d, 3, dtype, (parts,))
    whole = [d.asarray(d.numpy(g).sum(0)) for g in dw]
    assert_equal(step(d, dtype, dw), step(d, dtype, whole))
    mixed = [g if i % 2 else whole[i] for i, g in enumerate(dw)]
    assert_equal(step(d, dtype, mixed, momentum=0), step(d, dtype, whole, momentum=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", (3, 40))
def test_parts_to_rounding(device, parts):
    d = backend.get(device)
    for dtype, eps in ((np.float32, 2.0**-23), (np.float64, 2.0**-52)):
        dw = arrays(d, 3, dtype, (parts,), integers=False)
        whole = [np.asarray(d.numpy(g).astype(np.float64).sum(0)) for g in dw]
        want = step(backend.get("reference"), np.float64, whole, integers=False)
        for g, w in zip(step(d, dtype, dw, integers=False), want, strict=True):
            # weights and velocities are rounded to dtype before the step, and the sum has some `parts` roundings
            np.testing.assert_allclose(g, w, rtol=0, atol=(8 + parts) * eps * max(1, np.abs(w).max(initial=0)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_a_rate_on_the_device_is_read_by_the_kernel(device, dtype):
    """The same bits as by value, and those of what the array holds at the time of the call."""
    d = backend.get(device)
    dw = arrays(d, 3, dtype, integers=False)
    rate = d.asarray(np.full((), 7.0))
    for value in (0.1, 1e-4, 0.0):
        rate[...] = value
        got = step(d, dtype, dw, rate, integers=False)
        assert_equal(got, step(d, dtype, dw, value, integers=False))
    assert np.array_equal(got[0], d.numpy(arrays(d, 1, dtype, (), False)[0])), "a rate of 0 changes no weight"
    assert d.numpy(rate) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", (None, 2, 9))
def test_copies_are_the_new_weights_rounded(device, parts):
    d = backend.get(device)
    dw = arrays(d, 3, np.float32, () if parts is None else (parts,), integers=False)
    copies = [d.asarray(np.full(shape, 9, BF16)) for shape in SHAPES]
    some = [copy if i != 2 else None for i, copy in enumerate(copies)]
    got = step(d, np.float32, dw, integers=False, copies=some)
    assert_equal(got, step(d, np.float32, dw, integers=False))
    want = [w.astype(BF16) if i != 2 else np.full(w.shape, 9, BF16) for i, w in enumerate(got[: len(SHAPES)])]
    assert_equal([d.numpy(copy) for copy in copies], want)


@pytest.mark.parametrize("device", DEVICES)
def test_more_parameters_than_one_launch_takes(device):
    d = backend.get(device)
    for count in (64, 65, 1300):
        w, dw = ([d.asarray(np.full(1, i + offset, np.float32)) for i in range(count)] for offset in (0, 1))
        d.kernels.sgd(w, None, dw, [0.0] * count, 1.0, 0.0, False)
        assert all(float(d.numpy(a)[0]) == -1 for a in w)
