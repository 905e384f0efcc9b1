"""Training in each of `tinyres.options(precision=...)`, on every device. The kernels one by one: test_bfloat16.py."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import backend, data, models, nn, ops, optim
from tinyres.backend import cuda
from tinyres.backend.adapter import Adapter
from tinyres.errors import ArgumentError, DeviceError, DtypeError
from tinyres.options import PRECISION

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


def network(device, fused, dtype=np.float32):
    """ResNet-8 and a batch, the same on every device."""
    backend.use(device)
    tinyres.manual_seed(0)
    model = models.cifar_resnet(8, shortcut="B").to(dtype=dtype)
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((4, 8, 8, 3)).astype(dtype), rng.integers(0, 10, 4)
    return tinyres.fuse(model) if fused else model, tinyres.tensor(x), labels


def step(device, precision, fused, dtype=np.float32):
    """Loss, gradients and running statistics of one step, in a row each; and the dtypes of all activations."""
    model, x, labels = network(device, fused, dtype)
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with tinyres.options(precision=precision):
        loss = ops.cross_entropy(model(x), labels)
        loss.backward()
    kept = [p.grad for p in model.parameters()], list(model.buffers())
    for arrays in (*kept, [p.data for p in model.parameters()], [loss.data]):
        assert all(array.dtype == dtype for array in arrays)
    rows = [np.concatenate([backend.host(a).ravel() for a in arrays]).astype(np.float64) for arrays in kept]
    return loss.item(), *rows, seen


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module", params=(False, True), ids=("plain", "fused"))
def wanted(request):
    """The step in float64, and in bfloat16 by NumPy."""
    try:
        exact = step("reference", "bfloat16", request.param, np.float64)
        return request.param, exact, step("reference", "bfloat16", request.param)
    finally:
        backend.use("cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_bfloat16(device, wanted):
    fused, exact, by_numpy = wanted
    loss, gradients, statistics, seen = step(device, "bfloat16", fused)
    assert seen == {BF16}  # whatever a layer gives, from the first convolution to the logits
    assert exact[3] == {np.dtype(np.float64)}
    # Sums in float32 and in float64 are seldom rounded to different sides: the devices differ a little ...
    assert abs(loss - by_numpy[0]) < 2e-3 and distance(statistics, by_numpy[2]) < 1e-3
    assert distance(gradients, by_numpy[1]) < 0.03
    # ... beside what bfloat16 makes of a small batch in ten layers.
    assert abs(loss - exact[0]) < 0.02 and distance(statistics, exact[2]) < 0.01
    assert 0.01 < distance(gradients, exact[1]) < 0.2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", (False, True))
def test_float32_and_tf32(device, fused):
    exact = step("reference", "float32", fused, np.float64)
    cores = "mma" in getattr(backend.get(device).kernels, "extension", np).__dict__.get("conv_algorithms", ())
    for precision, bound in (("float32", 1e-4), ("tf32", 0.1 if cores else 1e-4)):
        loss, gradients, statistics, seen = step(device, precision, fused)
        assert seen == {FLOAT32} and abs(loss - exact[0]) < bound
        assert max(distance(gradients, exact[1]), distance(statistics, exact[2])) < bound


def integers(*shape, high=3):
    return np.random.default_rng(shape).integers(-high + 1, high, shape).astype(np.float32)


@pytest.mark.parametrize("device", [name for name in DEVICES if name != "reference"])
def test_small_integers_are_exact(device):
    """Products and sums that bfloat16 holds: the same bits on every device, forward and backward."""

    def run(name):
        leaves = [tinyres.tensor(a, True, device=name) for a in (integers(2, 5, 5, 4), integers(3, 3, 4, 4, high=2))]
        x, w = leaves
        b, head, bias = (tinyres.tensor(integers(*s, high=2), True, device=name) for s in ((4,), (4, 3), (3,)))
        with tinyres.options(precision="bfloat16"):
            h = ops.conv2d_relu(ops.cast(x, "bfloat16"), w, b, padding=1)
            h = ops.max_pool2d(ops.add_relu(ops.conv2d(x, w, b, padding=1), h), 5) - 2 * h[:, 2:3, 2:3]
            y = ops.linear(ops.flatten(h) * 0.125, head, bias)
        assert y.dtype == BF16
        y.backward(integers(*y.shape, high=5))
        return [y.numpy(), *(backend.host(t.grad) for t in (x, w, b, head, bias))]

    got, want = run(device), run("reference")
    assert [a.dtype for a in got] == [BF16, *[FLOAT32] * 5]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))
    assert all(np.count_nonzero(np.asarray(a, np.float32)) for a in got)


@pytest.mark.parametrize("device", DEVICES)
def test_master_weights(device):
    """Steps too small for bfloat16 add up in float32, and in the end move what the forward pass sees."""
    backend.use(device)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data = layer.weight.device.asarray(np.ones((1, 1), np.float32))
    optimizer = optim.SGD(layer.parameters(), lr=2.0**-12)
    x, seen = tinyres.tensor(np.ones((1, 1), np.float32)), []
    with tinyres.options(precision="bfloat16"):
        for _ in range(17):
            y = layer(x)
            seen.append(float(y))
            optimizer.zero_grad()
            y.backward()
            optimizer.step()
    assert layer.weight.dtype == np.float32 and layer.weight.item() == 1 - 17 * 2.0**-12
    assert seen == [1.0] * 9 + [1 - 2.0**-8] * 8  # 1 - 2**-9 lies half-way, and goes to the even one


def test_weight_gradients_are_not_rounded():
    """They are sums over the batch, which float32 keeps."""
    rng = np.random.default_rng(0)
    x, head = rng.standard_normal((40, 8)).astype(np.float32), tinyres.tensor(np.ones((8, 4), np.float32), True)
    image, w = rng.standard_normal((4, 6, 6, 3)).astype(np.float32), tinyres.tensor(np.ones((3, 3, 3, 8), "f4"), True)
    b, bias = (tinyres.tensor(np.zeros(n, np.float32), True) for n in (4, 8))
    with tinyres.options(precision="bfloat16"):
        ops.linear(tinyres.tensor(x), head, b).backward(rng.standard_normal((40, 4)))
        ops.conv2d(tinyres.tensor(image), w, bias).backward(rng.standard_normal((4, 4, 4, 8)))
    for gradient in (head.grad, b.grad, w.grad, bias.grad):
        assert gradient.dtype == np.float32 and (gradient != gradient.astype(BF16).astype(np.float32)).any()


def losses(precision, images, labels, steps):
    """A network that learns a few images by heart, on the CPU."""
    loader = data.Loader(images, labels, 32, seed=1, mean=128.0, scale=1 / 64, augment=False, shuffle=True)
    tinyres.manual_seed(1)
    model = tinyres.fuse(models.cifar_resnet(8))
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    found = []
    with tinyres.options(precision=precision):
        for i in range(steps):
            x, wanted = loader.batch(i)
            loss = ops.cross_entropy(model(tinyres.tensor(x)), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return np.array(found)


def test_the_loss_falls_as_in_float32():
    images, labels, *_ = data.shapes10(96, 10)
    falls = {precision: losses(precision, images[:, ::2, ::2], labels, 80) for precision in ("float32", "bfloat16")}
    starts, ends = ([found[part].mean() for found in falls.values()] for part in (slice(5), slice(-12, None)))
    assert min(starts) > 2 and max(ends) < 0.1
    assert abs(ends[0] - ends[1]) < 0.1 * ends[0] and (falls["float32"] != falls["bfloat16"]).any()


def test_threads_do_not_change_the_bits():
    want = None
    for threads in (1, 2, 3):
        with tinyres.options(threads=threads, precision="bfloat16"):
            tinyres.manual_seed(0)
            model = tinyres.fuse(models.cifar_resnet(8))
            x = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32)
            loss = ops.cross_entropy(model(tinyres.tensor(x)), np.arange(8))
            loss.backward()
        got = [loss.data.tobytes(), *(p.grad.tobytes() for p in model.parameters())]
        want = want or got
        assert got == want


def test_the_steady_state_asks_the_system_for_nothing():
    """The float32 copies that the CPU's kernels work on come from the pool too."""
    model, x, labels = network("cpu", True)
    counts = []
    with tinyres.options(precision="bfloat16"):
        for _ in range(4):
            ops.cross_entropy(model(x), labels).backward()
            model.zero_grad()
            counts.append(backend.memory.stats()["system_allocations"])
    assert counts[-1] == counts[1]


# Who decides on the dtype ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_what_meets_float32_becomes_float32(device):
    """As where a shortcut passes the first convolution by. Fused ops do what the plain ones do."""
    backend.use(device)
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return tinyres.tensor(rng.standard_normal(shape).astype(np.float32), requires_grad=True)

    x, w, b, gamma, beta = leaf(2, 5, 5, 3), leaf(3, 3, 3, 3), leaf(3), leaf(3), leaf(3)
    with tinyres.options(precision="bfloat16"):
        h = ops.conv2d(x, w, b, padding=1)
        pairs = [
            (ops.add_relu(h, x), ops.relu(h + x)),
            (ops.conv2d_add_relu(x, x, w, b, padding=1), ops.relu(h + x)),
            (ops.batch_norm_add_relu(h, x, gamma, beta), ops.relu(ops.batch_norm(h, gamma, beta) + x)),
        ]
        assert h.dtype == BF16 and (h * gamma).dtype == FLOAT32 and (h * 0.5).dtype == BF16
        assert (x.reshape(-1, 3) @ w[0, 0]).dtype == (h.reshape(-1, 3) @ gamma.reshape(3, 1)).dtype == BF16
    for got, want in pairs:
        assert got.dtype == FLOAT32 and got.numpy().tobytes() == want.numpy().tobytes()
    (x + h).backward(np.ones(x.shape))
    assert x.grad.dtype == w.grad.dtype == FLOAT32


@pytest.mark.parametrize("device", DEVICES)
def test_cast_and_back(device):
    """Forward and gradient are rounded once each; a gradient that is bfloat16 already passes as it is."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((5, 7)).astype(np.float32) for _ in range(2))
    leaf = tinyres.tensor(x, True, device=device)
    y = ops.cast(leaf, "bfloat16")
    back = ops.cast(y, "float32")
    assert ops.cast(y, "bfloat16") is y and back.dtype == FLOAT32
    assert y.numpy().tobytes() == x.astype(BF16).tobytes() and np.array_equal(back.numpy(), y.numpy())
    back.backward(dy)
    assert leaf.grad.dtype == FLOAT32 and np.array_equal(backend.host(leaf.grad), dy.astype(BF16).astype(np.float32))


def test_inputs_keep_their_dtype():
    x = tinyres.tensor(np.ones((2, 4, 4, 3), np.float32), requires_grad=True)
    w64, x64 = (tinyres.tensor(np.ones(s), requires_grad=True) for s in ((3, 3, 3, 2), (2, 4, 4, 3)))
    w, low = tinyres.tensor(np.ones((3, 3, 3, 2), np.float32)), ops.cast(x, "bfloat16")
    assert ops.conv2d(low, w).dtype == BF16  # whatever the precision, which is of float32 inputs
    with tinyres.options(precision="bfloat16"):
        assert ops.conv2d(x64, w64).dtype == np.float64
        ops.conv2d(x, w).backward(np.ones((2, 2, 2, 2)))
    assert x.grad.dtype == FLOAT32
    assert ops.mean(low * 0 + 3).dtype == BF16 and ops.mean(low[:, :3, :3] * 0 + 3).item() == 3
    many = tinyres.tensor(np.full(385, 255 / 128), dtype="bfloat16")  # which has neither their sum nor their number
    assert ops.mean(many).item() == 255 / 128


MISFITS = {
    r"\[conv2d\] operands must have one dtype, parameters float32 beside bfloat16; got x bfloat16, w bfloat16": (
        lambda f, h: ops.conv2d(h, h)),
    r"\[linear\] operands must have one dtype, .*; got x bfloat16, w float64": (
        lambda f, h: ops.linear(h[0, 0], tinyres.tensor(np.ones((3, 2))))),
    r"\[batch_norm\] operands must have one dtype, .*; got x bfloat16, gamma bfloat16": (
        lambda f, h: ops.batch_norm(h, h[0, 0, 0], h[0, 0, 0])),
    r"\[batch_norm\] running_mean must have gamma's dtype": (
        lambda f, h: ops.batch_norm(h, f[0, 0, 0], f[0, 0, 0], h[0, 0, 0].numpy(), h[0, 0, 0].numpy())),
    r"\[add\] operands must have one dtype; got a bfloat16, b float64": (
        lambda f, h: h + tinyres.tensor(np.ones(3))),
    r"\[batch_norm_add_relu\] operands must have one dtype; got x bfloat16, residual float64": (
        lambda f, h: ops.batch_norm_add_relu(h, tinyres.tensor(np.ones(h.shape)), f[0, 0, 0], f[0, 0, 0])),
    r"\[concatenate\] operands must have one dtype": lambda f, h: ops.concatenate([f, h]),
    r"\[cast\] x must be float32 or bfloat16; got x float64": (
        lambda f, h: ops.cast(tinyres.tensor(np.ones(3)), "bfloat16")),
    r"\[tensor\] data must be float32 or float64; got array bfloat16": (
        lambda f, h: nn.Parameter(h.numpy())),
    r"\[tensor\] data must be float32 or float64; got array float32, dtype bfloat16": (
        lambda f, h: tinyres.tensor(f.numpy(), True, "bfloat16")),
    r"\[to\] dtype must be float32 or float64; got dtype bfloat16": lambda f, h: nn.Linear(2, 2).to(dtype=BF16),
    r"\[gradcheck\] inputs must be float64; got input 0, dtype bfloat16": lambda f, h: tinyres.gradcheck(ops.relu, h),
    r"\[gradcheck\] outputs must be float64; got dtype bfloat16": (
        lambda f, h: tinyres.gradcheck(lambda x: h, tinyres.tensor(np.ones(3), True))),
}  # fmt: skip


@pytest.mark.parametrize("message", MISFITS)
def test_misfits_are_refused(message):
    f = tinyres.tensor(np.ones((2, 4, 4, 3), np.float32))
    with pytest.raises(DtypeError, match=message):
        MISFITS[message](f, ops.cast(f, "bfloat16"))


def test_gradient_checks_stay_sharp():
    x, w = (tinyres.tensor(np.random.default_rng(0).standard_normal(s), True) for s in ((1, 4, 4, 2), (3, 3, 2, 2)))
    with tinyres.options(precision="bfloat16"):
        assert tinyres.gradcheck(ops.conv2d, [x, w]).largest_error < 1e-6


def test_tensors_and_files(tmp_path):
    x = tinyres.tensor([1.0, 2.5], dtype="bfloat16")
    assert x.dtype == BF16 and x[1].item() == 2.5 and "bfloat16" in repr(x)
    assert np.shares_memory(tinyres.tensor(x.numpy()).data, x.data)
    assert tinyres.tensor(x, dtype=np.float32).dtype == FLOAT32
    tinyres.save(tmp_path / "x", x=x)
    loaded = tinyres.load(tmp_path / "x")["x"]
    assert loaded.dtype == BF16 and loaded.tobytes() == x.data.tobytes()


# The option -----------------------------------------------------------------------------------------------------------


def test_the_option():
    assert tinyres.options.current()["precision"] == "float32"
    for wrong in ("float64", "bf16", None, 16):
        with pytest.raises(ArgumentError, match=r"\[options\] precision must be one of float32, tf32, bfloat16"):
            tinyres.options(precision=wrong)
    assert tinyres.options.current()["precision"] == "float32"


def test_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(DtypeError, match=r"\[dtype\] bfloat16 needs ml_dtypes: pip install 'tinyres\[bfloat16\]'"):
        tinyres.options(precision="bfloat16")
    assert tinyres.options.current()["precision"] == "float32"
    with tinyres.options(precision="tf32"):
        pass


def test_an_old_cupy():
    old = types.SimpleNamespace(__version__="13.6.0", empty=np.empty)
    assert cuda._allocator(old)((2,), np.float32).dtype == FLOAT32
    with pytest.raises(DeviceError, match=r"\[backend\] bfloat16 on cuda needs CuPy 14; this is CuPy 13.6.0"):
        cuda._allocator(old)((2,), BF16)
    new = types.SimpleNamespace(__version__="14.0.1", empty=np.empty)
    assert cuda._allocator(new)((2,), BF16).dtype == BF16


def test_who_multiplies_in_tf32():
    """The tensor cores, where there are some, and only what is float32 and left to the device."""
    extension = types.SimpleNamespace(conv_algorithms=("auto", "naive", "mma", "direct"))
    chosen = Adapter("cuda", np, extension, np.empty)._algorithm
    for precision in PRECISION:
        with tinyres.options(precision=precision):
            assert chosen(FLOAT32) == ("direct" if precision == "tf32" else "auto")
            assert chosen(np.dtype(np.float64)) == chosen(BF16) == "auto"
            with tinyres.options(conv="naive"):
                assert chosen(FLOAT32) == "naive"
            extension.conv_algorithms = ("auto", "naive", "direct")  # a CPU's
            assert chosen(FLOAT32) == "auto"
            extension.conv_algorithms = ("auto", "naive", "mma", "direct")
