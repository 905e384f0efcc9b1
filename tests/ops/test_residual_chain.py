"""Residual blocks as one op: shapes that CUDA's fused kernels take, shapes that they leave, and mixtures of both."""

import numpy as np
import pytest

import tinyres
from op_case import CHECKS, DEVICES, Case, matches_differences, normal
from tinyres import nn, ops
from tinyres.backend.norm import Norm
from tinyres.errors import ArgumentError, ShapeError
from tinyres.ops.residual_chain import Block, Unit, fits, residual_chain

# By unit (window, C, K, stride); by block its units and its shortcut: a unit, or (stride, new channels).
IDENTITY = (1, 0)
CHAINS = {
    "odd channels, as others than CUDA run all": (
        (2, 5, 4, 3),
        [([(3, 3, 3, 1), (3, 3, 3, 1)], IDENTITY), ([(3, 3, 6, 2), (3, 6, 6, 1)], (2, 3))],
    ),
    "the network's": (
        (2, 5, 3, 16),
        [([(3, 16, 16, 1), (3, 16, 16, 1)], IDENTITY), ([(3, 16, 32, 2), (3, 32, 32, 1)], (2, 16))],
    ),
    "projections of both kinds": (
        (2, 4, 5, 16),
        [([(3, 16, 32, 2), (3, 32, 32, 1)], (1, 16, 32, 2)), ([(3, 32, 16, 1), (3, 16, 16, 1)], (3, 32, 16, 1))],
    ),
    "one convolution a block": ((3, 3, 4, 16), [([(3, 16, 16, 1)], IDENTITY), ([(3, 16, 16, 1)], IDENTITY)]),
    "a bottleneck": (
        (2, 4, 3, 8),
        [([(1, 8, 16, 1), (3, 16, 16, 1), (1, 16, 8, 1)], IDENTITY), ([(1, 8, 5, 2), (1, 5, 12, 1)], (2, 4))],
    ),
    "channels from few to 16": ((2, 4, 4, 4), [([(3, 4, 16, 1), (3, 16, 16, 1)], (1, 12))]),
}  # fmt: skip


def _units(blocks):
    for units, shortcut in blocks:
        yield from [*units, *([shortcut] if len(shortcut) == 4 else [])]


def _scale(*shape):
    return lambda rng: rng.uniform(0.5, 1.5, shape) * rng.choice((-1.0, 1.0), shape)


def _draws(shape, blocks):
    draws = [normal(*shape)]
    for window, C, K, _ in _units(blocks):
        draws += [normal(window, window, C, K), _scale(K), normal(K)]
    return draws


def _blocks(spec, parameters, **changes):
    """Blocks of the spec with these tensors, and running statistics that start from 0 and 1."""
    parameters = iter(parameters)

    def unit(window, C, K, stride):
        w, gamma, beta = (next(parameters) for _ in range(3))
        running = tuple(w.device.asarray(np.full(K, start), gamma.dtype) for start in (0.0, 1.0))
        settings = {"momentum": 0.3, "eps": 1e-3} | changes
        return Unit(w, gamma, beta, (stride, stride), (window // 2, window // 2), running, **settings)

    blocks = []
    for units, shortcut in spec:
        units = [unit(*u) for u in units]
        blocks.append(Block(units, unit(*shortcut)) if len(shortcut) == 4 else Block(units, None, *shortcut))
    return blocks


def _call(spec):
    return lambda x, *parameters: residual_chain(x, _blocks(spec, parameters))


CASES = {
    name: Case(name, _call(blocks), *_draws(shape, blocks), reduction=4096) for name, (shape, blocks) in CHAINS.items()
}


def follows_differences(case, device, monkeypatch):
    """As matches_differences, along fewer directions: the emulation takes its time for each."""
    report = tinyres.gradcheck(case.seeded, case.tensors(device), max_full=2, projections=2)
    assert report.checked > 0 and report.redraws == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "check", [*(c for c in CHECKS if c is not matches_differences), follows_differences], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, check, device, monkeypatch):
    check(CASES[name], device, monkeypatch)


def _plain(x, blocks):
    """The same with the plain ops."""

    def convolve(x, unit):
        y = ops.conv2d(x, unit.w, None, unit.stride, unit.padding)
        return ops.batch_norm(y, unit.gamma, unit.beta, *unit.running, True, unit.momentum, unit.eps)

    for units, projection, stride, new_channels in blocks:
        h = x
        for unit in units[:-1]:
            h = ops.relu(convolve(h, unit))
        if projection:
            around = convolve(x, projection)
        else:
            around = nn.ZeroPadShortcut(x.shape[3], x.shape[3] + new_channels, stride)(x)
        x = ops.relu(convolve(h, units[-1]) + around)
    return x


def _results(call, device, precision, name):
    """The output, all gradients and all running statistics."""
    case, blocks = CASES[name], CHAINS[name][1]
    tensors = case.tensors(device, case.arrays("float64" if precision == "float64" else "float32"))
    blocks = _blocks(blocks, tensors[1:])
    with tinyres.options(precision="tf32" if precision == "tf32" else "float32"):
        y = call(tinyres.ops.cast(tensors[0], "bfloat16") if precision == "bfloat16" else tensors[0], blocks)
        assert (y.dtype.name == "bfloat16") == (precision == "bfloat16")
        y.backward(np.random.default_rng(1).standard_normal(y.shape))
    units = [unit for block in blocks for unit in (*block.units, block.projection) if unit]
    running = [array for unit in units for array in unit.running]
    return [tinyres.backend.host(a) for a in (y.data, *(t.grad for t in tensors), *running)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ("float64", "float32", "tf32", "bfloat16"))
@pytest.mark.parametrize("name", CHAINS)
def test_equals_plain_ops(name, precision, device):
    """No result is much further from those of float64 than the plain ops' is."""
    exact = _results(_plain, "reference", "float64", name)
    plain = _results(_plain, device, precision, name)
    chain = _results(residual_chain, device, precision, name)
    rounding = {"float64": 1e-13, "float32": 1e-6, "tf32": 1e-3, "bfloat16": 0.1}[precision]  # a mask that turns is 4 %
    for i, (got, near, want) in enumerate(zip(chain, plain, exact, strict=True)):
        assert got.dtype == near.dtype and got.shape == near.shape
        got, near = (np.linalg.norm(a.astype(np.float64) - want) / np.linalg.norm(want) for a in (got, near))
        assert got <= 1.5 * near + rounding, f"result {i}: {got:.3g} from float64, plain ops {near:.3g}"


# kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", (5, 16))
def test_parts_of_a_weight_gradient(channels, device):
    """Their sum is the gradient, whichever the device makes."""
    device = tinyres.backend.get(device)
    rng = np.random.default_rng(0)
    x, dy = (device.asarray(rng.standard_normal((33, 9, 9, channels))) for _ in range(2))
    w = device.asarray(rng.standard_normal((3, 3, channels, channels)))
    y, rows = device.kernels.normed_conv2d_forward(x, w, (1, 1), (1, 1))
    norm = Norm(y, rows, *(device.asarray(rng.standard_normal(channels)) for _ in range(2)), None, None, 0.1, 1e-5)
    device.kernels.block_output(norm)
    gradient = device.kernels.block_output_backward(dy, norm)
    arguments = gradient, x, w.shape, (1, 1), (1, 1)
    whole = device.numpy(device.kernels.normed_conv2d_backward_weight(*arguments))
    parts = device.numpy(device.kernels.normed_conv2d_backward_weight(*arguments, parts=True))
    assert parts.shape[1:] == whole.shape and (len(parts) > 1) == (rows is not None)
    np.testing.assert_allclose(parts.sum(0), whole, rtol=1e-12, atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_that_do_not_lie_on_16_bytes(device):
    """CUDA's fused kernels move 16 bytes at once: they are given copies."""
    name = "the network's"
    case, want = CASES[name], _results(residual_chain, device, "float64", name)
    tensors = case.tensors(device)
    for x in tensors:
        wide = x.device.asarray(np.zeros(x.size + 1))
        wide[1:] = x.data.reshape(-1)
        x.data = wide[1:].reshape(x.shape)
    y = residual_chain(tensors[0], _blocks(CHAINS[name][1], tensors[1:]))
    y.backward(np.random.default_rng(1).standard_normal(y.shape))
    for got, expected in zip([y.data, *(t.grad for t in tensors)], want, strict=False):
        assert tinyres.backend.host(got).tobytes() == expected.tobytes()


# what it takes ------------------------------------------------------------------------------------------------


def _changed(blocks, **changes):
    """The blocks with another first unit."""
    first = blocks[0].units[0]._replace(**changes)
    return [blocks[0]._replace(units=[first, *blocks[0].units[1:]]), *blocks[1:]]


def test_what_fits():
    shape, spec = CHAINS["odd channels, as others than CUDA run all"]
    tensors = Case("", None, *_draws(shape, spec)).tensors("cpu")
    x, *parameters = tensors
    blocks = _blocks(spec, parameters)
    assert fits(x, blocks) and fits(x, blocks[:1]) and not fits(x, [])
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    elsewhere = tinyres.tensor(parameters[0].numpy(), device="reference")
    wrong = {
        "too few channels": (tinyres.tensor(np.zeros((2, 5, 4, 2))), blocks),
        "another rank": (tinyres.tensor(np.zeros((5, 4, 3))), blocks),
        "no images": (tinyres.tensor(np.zeros((0, 5, 4, 3))), blocks),
        "another dtype": (tinyres.tensor(np.zeros(shape, np.float32)), blocks),
        "another device": (tinyres.tensor(np.zeros(shape), device="reference"), blocks),
        "an array": (x.data, blocks),
        "weights elsewhere": (x, _changed(blocks, w=elsewhere)),
        "another stride": (x, _changed(blocks, stride=(2, 2))),
        "a window beyond the image": (x, _changed(blocks, padding=(0, 0))),
        "gamma of another size": (x, _changed(blocks, gamma=parameters[0])),
        "read-only statistics": (x, _changed(blocks, running=(read_only, np.zeros(3)))),
        "statistics of another dtype": (x, _changed(blocks, running=(np.zeros(3, np.float32), np.zeros(3)))),
        "a shortcut that would broadcast": (x, [blocks[0]._replace(new_channels=1)]),
        "one value a channel": (tinyres.tensor(np.zeros((1, 1, 1, 3))), blocks[:1]),
    }
    for reason, arguments in wrong.items():
        assert not fits(*arguments), reason
        with pytest.raises(ShapeError, match=r"\[residual_chain\] blocks must fit"):
            residual_chain(*arguments)
    with pytest.raises(ArgumentError):
        residual_chain(x, _changed(blocks, momentum=2.0))
    with pytest.raises(ArgumentError):
        residual_chain(x, _changed(blocks, eps=0.0))
    single = tinyres.tensor(np.zeros(shape, np.float32))
    lower = [tinyres.tensor(p.numpy().astype(np.float32)) for p in parameters]
    assert fits(single, _blocks(spec, lower))
    with tinyres.options(precision="bfloat16"):
        assert not fits(single, _blocks(spec, lower)), "convolutions would lower it, shortcuts would not"


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_that_are_frozen(device):
    """Others have the gradients that they have otherwise."""
    name = "the network's"
    want = _results(residual_chain, device, "float64", name)
    for frozen in ((0,), (1, 4, 7, 10), (2, 5, 8), (0, 1, 4)):
        tensors = CASES[name].tensors(device)
        for i in frozen:
            tensors[i].requires_grad = False
        y = residual_chain(tensors[0], _blocks(CHAINS[name][1], tensors[1:]))
        y.backward(np.random.default_rng(1).standard_normal(y.shape))
        for i, t in enumerate(tensors):
            if i in frozen:
                assert t.grad is None
            else:
                np.testing.assert_allclose(tinyres.backend.host(t.grad), want[i + 1], rtol=1e-11, atol=1e-11)
