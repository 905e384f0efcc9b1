"""Convolution: the shape grid, random geometries, every algorithm of every device, exactness on integers."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinyres
from cases import BREAKS, CONVS, Geometry, conv_geometries, invalid_conv_geometries
from op_case import DEVICES, Case, assert_close, checks_of, matches_differences, matches_reference, normal
from tinyres import backend, ops
from tinyres.backend.adapter import Adapter


def _algorithms(device):
    kernels = backend.get(device).kernels
    return kernels.extension.conv_algorithms if isinstance(kernels, Adapter) else ("auto",)


ALGORITHMS = [(device, algorithm) for device in DEVICES for algorithm in _algorithms(device)]
# On tensor cores, which round operands of float32.
ROUNDED = [(device, a) for device, a in ALGORITHMS if a == "mma" or (a == "direct" and "mma" in _algorithms(device))]
FULL_FLOAT32 = [pair for pair in ALGORITHMS if pair not in ROUNDED]
DIRECT = [device for device, algorithm in ROUNDED if algorithm == "direct"]


def _reduction(g):
    return max(g.R * g.S * g.C, g.R * g.S * g.K, g.N * g.y[1] * g.y[2])


def _case(name, g):
    return Case(
        name,
        lambda x, w: ops.conv2d(x, w, None, g.stride, g.padding),
        normal(*g.x),
        normal(*g.w),
        reduction=_reduction(g),
    )


CASES = [
    *(_case(reason, g) for reason, g in CONVS.items()),
    # Its dx is added to what came along the other way ...
    Case(
        "beside a shortcut",
        lambda x, w: ops.conv2d(x, w, padding=1) * x,
        normal(2, 5, 9, 4), normal(3, 3, 4, 4), reduction=36,
    ),
    Case(
        "beside the identity, to which goes the very gradient that it reads",
        lambda x, w: ops.conv2d(x, w, padding=1) + x,
        normal(2, 5, 9, 4), normal(3, 3, 4, 4), reduction=90,
    ),
    Case(
        "beside a strided shortcut",
        lambda x, w: ops.conv2d(x, w, stride=2, padding=1) * x[:, ::2, ::2],
        normal(2, 5, 9, 4), normal(3, 3, 4, 4), reduction=36,
    ),
    # ... and is not taken for that of the weights
    Case("of x with itself", lambda x: ops.conv2d(x, x, padding=1) * x, normal(3, 3, 3, 3),
         reduction=27),
    Case(
        "with a bias",
        lambda x, w, b: ops.conv2d(x, w, b, stride=2, padding=1),
        normal(2, 5, 5, 3), normal(3, 3, 3, 4), normal(4), reduction=36,
    ),
    Case(
        "with ReLU",
        lambda x, w, b: ops.conv2d_relu(x, w, b, stride=(2, 1), padding=1),
        normal(2, 5, 4, 3), normal(3, 3, 3, 17), normal(17), reduction=153,
    ),
    Case(
        "with a residual and ReLU",
        lambda x, r, w, b: ops.conv2d_add_relu(x, r, w, b, padding=(1, 0)),
        normal(2, 4, 5, 3), normal(2, 4, 3, 5), normal(3, 3, 3, 5), normal(5), reduction=45,
    ),
    Case(
        "with a residual that broadcasts",
        lambda x, r, w, b: ops.conv2d_add_relu(x, r, w, b),
        normal(2, 4, 4, 3), normal(2, 1, 1, 4), normal(1, 1, 3, 4), normal(4), reduction=32,
    ),
]  # fmt: skip


test_cases = checks_of(CASES)


@pytest.mark.parametrize("device, algorithm", FULL_FLOAT32)
@pytest.mark.parametrize("check", (matches_reference, matches_differences), ids=lambda check: check.__name__)
@pytest.mark.parametrize("reason", ("primes, sides differ", "3x3 stride 2, odd size", "filters over two vectors"))
def test_each_algorithm(reason, check, device, algorithm, monkeypatch):
    with tinyres.options(conv=algorithm):
        check(_case(reason, CONVS[reason]), device, monkeypatch)


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "reference"])
def test_an_algorithm_of_other_devices_is_refused(device):
    x, w = (tinyres.tensor(np.ones(shape), device=device) for shape in ((1, 4, 4, 2), (3, 3, 2, 2)))
    other = "tiled" if device == "cpu" else "winograd"
    message = rf"^\[conv2d\] on {device} the option conv is one of auto, naive, .*; got conv {other}"
    with tinyres.options(conv=other), pytest.raises(tinyres.errors.ArgumentError, match=message):
        ops.conv2d(x, w)


def _loops(x, w, dy, g):
    """The definition, one product at a time: y, dx, dw."""
    y, dx, dw = np.zeros(g.y), np.zeros(g.x), np.zeros(g.w)
    for n, p, q in np.ndindex(g.y[:3]):
        for r, s in np.ndindex(g.R, g.S):
            h, v = p * g.stride[0] + r - g.padding[0], q * g.stride[1] + s - g.padding[1]
            if 0 <= h < g.H and 0 <= v < g.W:
                y[n, p, q] += x[n, h, v] @ w[r, s]
                dx[n, h, v] += w[r, s] @ dy[n, p, q]
                dw[r, s] += np.outer(x[n, h, v], dy[n, p, q])
    return y, dx, dw


def _integers(g, dtype):
    rng = np.random.default_rng(g.N + 10 * g.H + 100 * g.W)
    return [rng.integers(-3, 4, shape).astype(dtype) for shape in (g.x, g.w, g.y)]


def _all_three(x, w, dy, g, device):
    x, w = (tinyres.tensor(a, requires_grad=True, device=device) for a in (x, w))
    y = ops.conv2d(x, w, stride=g.stride, padding=g.padding)
    y.backward(dy)
    return y.numpy(), *(tensor.device.numpy(tensor.grad) for tensor in (x, w))


@pytest.mark.parametrize("device, algorithm", ALGORITHMS)
@given(g=conv_geometries(), dtype=st.sampled_from((np.float32, np.float64)))
def test_any_geometry_is_exact_on_integers(device, algorithm, g, dtype):
    """Sums of small integers have no rounding: every algorithm must give the definition's bits. Winograd's, in float32,
    does not multiply integers; tests/test_winograd.py has bounds for it."""
    if algorithm == "winograd":
        dtype = np.float64
    arrays = _integers(g, dtype)
    with tinyres.options(conv=algorithm):
        got = _all_three(*arrays, g, device)
    for name, result, want in zip(("y", "dx", "dw"), got, _loops(*arrays, g), strict=True):
        assert result.dtype == dtype
        assert np.array_equal(result, want), name


@pytest.mark.parametrize("device, algorithm", ALGORITHMS)
@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("joined", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("K", (16, 17, 48))
def test_what_follows_is_done_in_the_same_pass(K, joined, relu, device, algorithm):
    """Bias, residual and ReLU in whole and partial tiles and vectors, on integers; weights of 16 and 48 filters are
    read where they lie, those of 17 are packed."""
    g = Geometry(2, 9, 10, 5, K, 3, 3, padding=(1, 1))
    x, w, residual = _integers(g, np.float32)
    b = (np.arange(K) - K // 2).astype(np.float32)
    want = _loops(x, w, residual, g)[0] + b + (residual if joined else 0)
    want = np.maximum(want, 0) if relu else want
    with tinyres.options(conv=algorithm):
        kernels, asarray = backend.get(device).kernels, backend.get(device).asarray
        others = asarray(b), asarray(residual) if joined else None, relu
        y = kernels.conv2d_bias_forward(asarray(x), asarray(w), *others, g.stride, g.padding)
    y = backend.get(device).numpy(y)
    if algorithm == "winograd":  # which does not multiply integers
        assert np.abs(y - want).max() < 1e-3
    else:
        assert np.array_equal(y, want)


@pytest.mark.parametrize("device", DEVICES)
@given(g=conv_geometries())
def test_any_geometry_is_bit_identical_for_any_threads(device, g):
    rng = np.random.default_rng(g.H)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (g.x, g.w, g.y)]
    results = []
    for threads in (1, 2, 3, 4):
        with tinyres.options(threads=threads):
            results.append([a.tobytes() for a in _all_three(*arrays, g, device)])
    assert all(r == results[0] for r in results)


@pytest.mark.parametrize("device", DEVICES)
@given(broken=invalid_conv_geometries())
def test_invalid_geometries_raise(device, broken):
    x, w, stride, padding = broken
    x, w = (tinyres.tensor(np.zeros(shape), requires_grad=True, device=device) for shape in (x, w))
    with pytest.raises(tinyres.errors.TinyresError, match=r"^\[conv2d\] .*; got "):
        ops.conv2d(x, w, None, stride, padding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", BREAKS)
def test_each_way_to_break_a_geometry_raises(device, how):
    g = Geometry(2, 6, 5, 3, 4, 3, 2, (2, 1), (1, 0))
    x, w, stride, padding = BREAKS[how](g.x, g.w, g.stride, g.padding)
    x, w = (tinyres.tensor(np.zeros(shape), device=device) for shape in (x, w))
    with pytest.raises(tinyres.errors.TinyresError, match=r"^\[conv2d\] .*; got "):
        ops.conv2d(x, w, None, stride, padding)


NETWORKS = ((2, 32, 32, 16, 16, 1), (2, 32, 32, 16, 32, 2), (3, 8, 8, 64, 64, 1), (5, 32, 32, 3, 16, 1))


def _layer(N, H, W, C, K, stride):
    return Geometry(N, H, W, C, K, 3, 3, (stride, stride), (1, 1))


@pytest.mark.parametrize("device, algorithm", FULL_FLOAT32)
@pytest.mark.parametrize("shape", NETWORKS)
def test_layers_of_the_networks(shape, algorithm, device, rng):
    """The real sizes, which run through every tile and chunk, against float64."""
    g = _layer(*shape)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in (g.x, g.w, g.y)]
    want = _all_three(*(a.astype(np.float64) for a in arrays), g, "reference")
    with tinyres.options(conv=algorithm):
        got = _all_three(*arrays, g, device)
    for name, result, expected in zip(("y", "dx", "dw"), got, want, strict=True):
        assert_close(result, expected, _reduction(g), name)
    assert all(a.dtype == np.float32 for a in got)


TF32 = 2.0**-11  # half a step: what an operand's rounding may change


@pytest.mark.parametrize("device, algorithm", ROUNDED)
@pytest.mark.parametrize("shape", NETWORKS)
def test_tensor_cores_round_operands_to_tf32_and_nothing_else(shape, device, algorithm, rng):
    """In float32: within what rounding both operands can do to the sum of the products' magnitudes, and no nearer than
    rounding makes it. Operands that tf32 holds give float32's accuracy."""
    g = _layer(*shape)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in (g.x, g.w, g.y)]
    held = [a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in arrays]  # so does tf32 hold what bfloat16 does
    bounds = _all_three(*(np.abs(a.astype(np.float64)) for a in arrays), g, "reference")
    with tinyres.options(conv=algorithm):
        rounded, exact = (_all_three(*operands, g, device) for operands in (arrays, held))
    wanted = (_all_three(*(a.astype(np.float64) for a in operands), g, "reference") for operands in (arrays, held))
    for got, want, bound, name in zip(rounded, next(wanted), bounds, ("y", "dx", "dw"), strict=True):
        error = np.abs(got - want)
        assert (error <= (2 * TF32 + TF32**2 + _reduction(g) * 2.0**-24) * bound).all(), name
        assert error.max() > TF32 / 16 * np.abs(want).max(), name
    for got, want, name in zip(exact, next(wanted), ("y", "dx", "dw"), strict=True):
        assert got.dtype == np.float32
        assert_close(got, want, _reduction(g), name)


@pytest.mark.parametrize("device, algorithm", ROUNDED)
def test_tensor_cores_leave_float64_alone(device, algorithm, rng):
    """Where direct does not take the shape, it is tiled that does."""
    g = CONVS["3x3 stride 2, odd size"]
    arrays = [rng.standard_normal(s) for s in (g.x, g.w, g.y)]
    results = []
    for name in (algorithm, "tiled"):
        with tinyres.options(conv=name):
            results.append([a.tobytes() for a in _all_three(*arrays, g, device)])
    assert results[0] == results[1]


@st.composite
def _direct_geometries(draw):
    """What direct takes on CUDA, images narrower and wider than its tiles."""
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 9) | st.sampled_from((15, 33)))
    C, K, stride = draw(st.sampled_from((16, 32, 64))), draw(st.sampled_from((16, 32, 64))), draw(st.integers(1, 2))
    return _layer(draw(st.integers(1, 3)), H, W, C, K, stride)


@pytest.mark.parametrize("device", DIRECT)
@settings(max_examples=12)
@given(g=_direct_geometries(), dtype=st.sampled_from((np.float32, np.float64, ml_dtypes.bfloat16)))
def test_what_direct_takes_is_exact_on_integers(device, g, dtype):
    """The definition's bits, also as a sum with what dx holds; in bfloat16, where auto is direct, rounded once."""
    x, w, dy = _integers(g, dtype)
    kernels, asarray = backend.get(device).kernels, backend.get(device).asarray
    total = np.random.default_rng(0).integers(-3, 4, g.x).astype(dtype)
    wants = _all_three(*(a.astype(np.float64) for a in (x, w, dy)), g, "reference")
    results = {}
    for algorithm in ("direct", "auto"):
        with tinyres.options(conv=algorithm):
            there = asarray(total.copy())
            kernels.conv2d_backward_input(asarray(dy), asarray(w), g.x, g.stride, g.padding, there)
            y = kernels.conv2d_forward(asarray(x), asarray(w), g.stride, g.padding)
            dw = kernels.conv2d_backward_weight(asarray(dy), asarray(x), g.w, g.stride, g.padding)
        results[algorithm] = [backend.get(device).numpy(a) for a in (y, there, dw)]
    for got, again, want in zip(*results.values(), (wants[0], wants[1] + total, wants[2]), strict=True):
        assert np.array_equal(got, want.astype(got.dtype)) and np.array_equal(got, again)


@pytest.mark.parametrize("device", [name for name in DIRECT if name == "emulated"])  # whose arrays are NumPy's
def test_arrays_off_the_grid_go_another_way(device):
    """A view of an array need not be aligned to the 16 bytes that direct moves at once: mma takes it."""
    g = _layer(1, 5, 6, 16, 16, 1)
    kernels = backend.get(device).kernels
    x, w, dy = _integers(g, np.float32)
    want = _all_three(x, w, dy, g, "reference")
    shifted = [np.concatenate([np.zeros(1, np.float32), a.ravel()])[1:].reshape(a.shape) for a in (x, w, dy)]
    assert all(a.ctypes.data % 16 for a in shifted)
    with tinyres.options(conv="direct"):
        got = (
            kernels.conv2d_forward(shifted[0], shifted[1], g.stride, g.padding),
            kernels.conv2d_backward_input(shifted[2], shifted[1], g.x, g.stride, g.padding),
            kernels.conv2d_backward_weight(shifted[2], shifted[0], g.w, g.stride, g.padding),
        )
    for result, expected in zip(got, want, strict=True):
        assert np.array_equal(result, expected)


LARGE = {
    "weights beyond the cache: images share them": Geometry(5, 7, 7, 176, 176, 3, 3, padding=(1, 1)),
    "few images: tasks share the filters": Geometry(1, 12, 12, 40, 150, 3, 3, padding=(1, 1)),
    "an image in bands": Geometry(1, 40, 60, 70, 20, 3, 3, stride=(2, 2), padding=(1, 1)),
    "a matrix product": Geometry(3, 9, 11, 100, 70, 1, 1),
    "a matrix product of every other pixel": Geometry(3, 13, 12, 100, 40, 1, 1, stride=(2, 2)),
    "few channels, wide window": Geometry(3, 30, 31, 3, 70, 7, 7, stride=(2, 2), padding=(3, 3)),
    "many pixels: a task sums several lots, taken three taps at a time": Geometry(
        10, 32, 32, 4, 6, 3, 3, padding=(1, 1)
    ),
    "many pixels, one tap at a time": Geometry(6, 32, 32, 5, 7, 2, 2),
    "few channels, padded column": Geometry(2, 30, 30, 4, 20, 5, 1, padding=(2, 1)),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_layers_on_the_cpu(name):
    """Sizes at which the work is cut in other ways than in the small ones, and by shape alone: on integers `direct`
    gives the bits of `naive`, and on any numbers its own whatever the number of threads."""
    g = LARGE[name]
    arrays = _integers(g, np.float32)
    with tinyres.options(conv="naive"):
        want = _all_three(*arrays, g, "cpu")
    with tinyres.options(conv="direct"):
        got = _all_three(*arrays, g, "cpu")
    for result, expected in zip(got, want, strict=True):
        assert np.array_equal(result, expected)

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(array.shape).astype(np.float32) for array in arrays]
    results = []
    for threads in (1, 2, 3, 4):
        with tinyres.options(threads=threads, conv="direct"):
            results.append(_all_three(*arrays, g, "cpu"))
    for result in results[1:]:
        assert all(map(np.array_equal, result, results[0]))


@pytest.mark.parametrize("device", DEVICES)
def test_unread_pixels_get_no_gradient(device):
    g = CONVS["stride larger than the window"]
    x, w = tinyres.tensor(np.ones(g.x), requires_grad=True, device=device), tinyres.tensor(np.ones(g.w), device=device)
    y = ops.conv2d(x, w, stride=g.stride, padding=g.padding)
    y.backward(np.ones(y.shape))
    dx = x.device.numpy(x.grad)
    assert (dx[:, 2::3] == 0).all() and (dx[:, :, 2::3] == 0).all()
    assert (dx[:, [0, 1, 3, 4, 6, 7]][:, :, [0, 1, 3, 4, 6, 7]] == g.K).all()


@pytest.mark.parametrize("missing", range(4))
def test_an_input_without_gradient_takes_none_from_the_others(missing, rng):
    arrays = [rng.standard_normal(shape) for shape in ((2, 4, 5, 3), (2, 4, 3, 5), (3, 3, 3, 5), (5,))]
    tensors = [tinyres.tensor(a, requires_grad=True) for a in arrays]
    ops.conv2d_add_relu(*tensors, padding=(1, 0)).sum().backward()
    some = [tinyres.tensor(a, requires_grad=i != missing) for i, a in enumerate(arrays)]
    ops.conv2d_add_relu(*some, padding=(1, 0)).sum().backward()
    for i, (x, want) in enumerate(zip(some, tensors, strict=True)):
        assert x.grad is None if i == missing else np.array_equal(x.grad, want.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_the_fused_ops_are_their_parts(device, rng):
    """Bit for bit where sums are exact; NaN stays visible through ReLU."""
    x, w = rng.integers(-3, 4, (2, 9, 7, 5)), rng.integers(-3, 4, (3, 3, 5, 19))
    b, residual = rng.integers(-9, 10, 19), rng.integers(-99, 100, (2, 9, 7, 19))
    x, w, b, residual = (tinyres.tensor(a.astype(np.float32), device=device) for a in (x, w, b, residual))
    y = ops.conv2d(x, w, None, 1, 1)
    for bias in (b, tinyres.tensor(np.where(np.arange(19) == 3, np.nan, 0).astype(np.float32), device=device)):
        wants = [
            (ops.conv2d(x, w, bias, 1, 1), y + bias),
            (ops.conv2d_relu(x, w, bias, 1, 1), ops.relu(y + bias)),
            (ops.conv2d_add_relu(x, residual, w, bias, 1, 1), ops.relu(y + bias + residual)),
        ]
        for got, want in wants:
            assert np.array_equal(got.numpy(), want.numpy(), equal_nan=True)
    assert np.isnan(got.numpy()[..., 3]).all() and not np.isnan(got.numpy()[..., :3]).any()


TOTALS = {**CONVS, "stride 2, vectors of channels": Geometry(1, 7, 9, 33, 5, 3, 3, stride=(2, 2), padding=(1, 1))}


@pytest.mark.parametrize("device, algorithm", ALGORITHMS)
@pytest.mark.parametrize("g", TOTALS.values(), ids=TOTALS)
def test_input_gradient_added_to_a_total(device, algorithm, g):
    """In place, and nothing but a sum: integers are exact."""
    rng = np.random.default_rng(0)
    device = backend.get(device)
    for dtype in (np.float32, np.float64):
        dy, w, start = (rng.integers(-3, 4, shape).astype(dtype) for shape in (g.y, g.w, g.x))
        dy_there, w_there, total = (device.asarray(a) for a in (dy, w, start.copy()))
        with tinyres.options(conv=algorithm):
            given = device.kernels.conv2d_backward_input(dy_there, w_there, g.x, g.stride, g.padding, total)
            dx = device.kernels.conv2d_backward_input(dy_there, w_there, g.x, g.stride, g.padding)
        assert given is total
        if algorithm in ("winograd", "auto"):  # fractions inside: not exact
            assert_close(device.numpy(total), start + device.numpy(dx), _reduction(g), "total")
        else:
            np.testing.assert_array_equal(device.numpy(total), start + device.numpy(dx))
