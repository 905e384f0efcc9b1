"""Device `cuda` on machines without a GPU: everything above the kernels, over arrays that are as strict as CuPy's.

The kernels under it are the CUDA kernels compiled for the CPU, where they are built, and those of `cpu`.
"""

import contextlib
import copy
import importlib
import json
import pickle
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fake_cupy
import tinyres
from op_case import DEVICES
from tinyres import _cpu, backend, data, graph, models, nn, ops, optim, train
from tinyres.backend import cuda
from tinyres.backend.adapter import Adapter
from tinyres.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GraphError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
)
from tinyres.options import PRECISION

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar_resnet.py"


class OnFakes:
    """The extension `_cpu`, called with fake arrays."""

    def __getattr__(self, name):
        value = getattr(_cpu, name)
        return (lambda *args: value(*map(self._host, args))) if callable(value) else value

    def _host(self, x):
        return [self._host(y) for y in x] if isinstance(x, list) else getattr(x, "_host", x)


@pytest.fixture(params=["cpu", *(name for name in DEVICES if name == "emulated")])
def gpu(request, monkeypatch):
    """Device `cuda` over fake arrays: the only thing about it that is not CuPy."""
    if request.param == "cpu":
        kernels = Adapter("cuda", fake_cupy, OnFakes(), fake_cupy.empty)
    else:
        kernels = cuda.adapter("cuda", fake_cupy, "_emulated", fake_cupy.empty, None)
    device = backend.Device("cuda", kernels, fake_cupy)
    monkeypatch.setitem(backend._devices, "cuda", device)
    fake_cupy.reset()
    yield device
    if request.param == "emulated":
        cuda.emulated()  # takes its scratch memory from the host's pool again


def host(array):
    """What a fake array holds, without counting as a wait."""
    return array._host


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


# Tensors --------------------------------------------------------------------------------------------------------------


def test_the_fakes_are_strict():
    """They refuse what CuPy refuses, and a little more; otherwise the tests below would prove nothing."""
    x = fake_cupy.asarray([1.0, 2.0])
    for mistake in (
        lambda: np.asarray(x),
        lambda: x + np.ones(2),
        lambda: np.ones(2) * x,
        lambda: x == np.ones(2),
        lambda: x.__iadd__(np.ones(2)),
        lambda: np.concatenate([x, x]),
        lambda: np.array([x, x]),
        lambda: x.astype(np.float32) * np.float64(2),
        lambda: fake_cupy.broadcast_to(np.ones(2), (2, 2)),
    ):
        with pytest.raises(TypeError):
            mistake()
    with pytest.raises(ValueError, match="non-scalar"):
        x[...] = np.ones(2)
    with pytest.raises(AttributeError):
        x.flags.writeable  # noqa: B018
    fake_cupy.reset()
    for wait in (lambda: x[0].item(), lambda: float(x[0]), lambda: bool(x[0] > 0), x.get, lambda: repr(x)):
        before = fake_cupy.waits
        wait()
        assert fake_cupy.waits == before + 1
    assert isinstance(2 * x - np.float64(1), fake_cupy.ndarray) and fake_cupy.uploads == 0


@pytest.mark.parametrize(
    "make", [np.array, np.ndarray.tolist, fake_cupy.asarray, tinyres.tensor, lambda a: a.T.copy().T]
)
def test_tensors_from_anything(gpu, make):
    values = np.array([[1.5, -2.0, 0.25], [3.0, 4.0, 5.0]], np.float32)
    x = tinyres.tensor(make(values), device="cuda")
    assert gpu.owns(x.data) and x.dtype == np.float32
    for got in (x.numpy(), np.asarray(x), np.array(x)):
        assert type(got) is np.ndarray and got.tobytes() == values.tobytes()
    assert repr(x) == repr(tinyres.tensor(values)).replace(")", ", device=cuda)")
    back = tinyres.tensor(x, device="cpu")
    assert type(back.data) is np.ndarray and back.numpy().tobytes() == values.tobytes()
    x.data = values[:1]
    assert gpu.owns(x.data) and (x * 2)[0, 0].item() == 3.0 and float(x[0, 1]) == -2.0 and bool(x[0, 2])
    back.data = x.data
    assert type(back.data) is np.ndarray and back.shape == (1, 3)


def test_parameters_and_copies(gpu):
    for given in (numbers(2, 3), fake_cupy.asarray(numbers(2, 3)), tinyres.tensor(numbers(2, 3), device="cuda")):
        p = nn.Parameter(given, "cuda")
        assert gpu.owns(p.data) and p.data is not given and np.array_equal(p.numpy(), numbers(2, 3))
        assert type(nn.Parameter(given, "cpu").data) is np.ndarray
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert twin.device is gpu and np.array_equal(twin.numpy(), p.numpy()) and twin.data is not p.data


def test_gradients_from_anything(gpu):
    dy = numbers(2, 3, dtype=np.float64)
    for gradient in (dy, dy.tolist(), fake_cupy.asarray(dy), tinyres.tensor(dy), tinyres.tensor(dy, device="cuda")):
        x = tinyres.tensor(numbers(2, 3), requires_grad=True, device="cuda")
        (x * x).backward(gradient)
        assert gpu.owns(x.grad)
        np.testing.assert_array_equal(host(x.grad), 2 * dy.astype(np.float32) * numbers(2, 3))
        (dx,) = tinyres.grad((x * x).sum(), x)
        assert gpu.owns(dx)
        np.testing.assert_array_equal(host(dx), 2 * numbers(2, 3))
    for wrong, error in ((np.ones((3, 2)), ShapeError), ([[1], [2, 3]], ShapeError), ("one", DtypeError)):
        with pytest.raises(error):
            (x * x).backward(wrong)


def test_hooks(gpu):
    seen = []
    x = tinyres.tensor(numbers(4), requires_grad=True, device="cuda")
    x.register_hook(seen.append)
    y = x * 3
    y.register_hook(lambda dy: dy * 2)
    (y + y).sum().backward()
    assert gpu.owns(seen[0]) and np.array_equal(host(x.grad), np.full(4, 12, np.float32))
    y = x * 3
    y.register_hook(lambda dy: np.ones(4, np.float32))
    with pytest.raises(GraphError, match="on its device; got"):
        y.sum().backward()


def test_gradients_and_arrays_of_the_host_are_refused(gpu):
    x = nn.Parameter(numbers(3), "cuda")
    with pytest.raises(DtypeError, match="operands must be Tensors, numbers or arrays"):
        x + numbers(3)
    with pytest.raises(DeviceError):
        x + tinyres.tensor(numbers(3), device="cpu")
    x.grad = numbers(3)
    with pytest.raises(ShapeError, match="on its device"):
        optim.SGD([x], 0.1).step()
    with pytest.raises(GraphError, match="grad must be an array"):
        x.sum().backward()


def test_every_op_goes_without_a_wait(gpu):
    """Forward and backward of a graph of many ops; only what the caller reads is waited for."""
    x, y = (tinyres.tensor(numbers(2, 3) + 3, requires_grad=True, device="cuda") for _ in range(2))
    fake_cupy.reset()
    z = ops.maximum(x**2 / y, 1.5).exp().log().sqrt() + ops.dropout(x.sigmoid() @ y.T.tanh(), 0.2).sum()
    rows = z[::-1].max(1, keepdims=True).reshape(1, 2) @ (2 - x) + ops.mean(-y) + np.float64(3) * ops.flatten(x, 0)[:3]
    ops.concatenate([ops.pad(z, ((1, 0), (0, 1))).relu()[:, :3], rows]).sum().backward()
    assert fake_cupy.waits == 0 and fake_cupy.uploads == 0
    assert np.isfinite(host(x.grad)).all() and np.isfinite(host(y.grad)).all()


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "cuda"])
def test_labels(gpu, place):
    """Those of the host are checked and sent; those that lie on the device are trusted and not looked at."""
    logits = tinyres.tensor(numbers(4, 5), device="cuda")
    want = ops.cross_entropy(tinyres.tensor(numbers(4, 5), device="reference"), [1, 0, 4, 2]).item()
    for labels in ([1, 0, 4, 2], np.array([1, 0, 4, 2]), np.array([[1, 0, 4, 2]], np.uint8).T[:, 0]):
        given = labels if place == "host" else fake_cupy.asarray(labels)
        fake_cupy.reset()
        for loss in (ops.cross_entropy(logits, given), ops.cross_entropy(logits, tinyres.tensor(given, device="cuda"))):
            assert fake_cupy.waits == 0 and host(loss.data) == pytest.approx(want, rel=1e-6)
    for wrong, error in (([0.5] * 4, DtypeError), ([1, 2], ShapeError)):
        with pytest.raises(error, match="labels"):
            ops.cross_entropy(logits, wrong if place == "host" else fake_cupy.asarray(wrong))
    if place == "host":
        with pytest.raises(ArgumentError, match=r"labels must be in 0 \.\. 4; got smallest -1, largest 5"):
            ops.cross_entropy(logits, [0, -1, 5, 2])
        with pytest.raises(DeviceError, match="labels must be"):
            ops.cross_entropy(tinyres.tensor(numbers(4, 5)), fake_cupy.asarray([0, 1, 2, 3]))


# State ----------------------------------------------------------------------------------------------------------------


def trained(device, steps=2):
    """A small network after a few steps, and its optimizer."""
    backend.use(device)
    tinyres.manual_seed(3)
    model = tinyres.fuse(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    )
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model, optimizer, steps):
    for step in steps:
        x = np.random.default_rng(step).standard_normal((4, 5, 5, 3)).astype(np.float32)
        loss = ops.cross_entropy(model(tinyres.tensor(x)), [0, 1, 2, 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def same_state(a, b):
    """Two (model, optimizer) with the same bits."""
    for x, y in zip(a, b, strict=True):
        x, y = ({**s.state_dict(), **s.state_dict().get("velocity", {})} for s in (x, y))
        assert x.keys() == y.keys()
        for name in x:
            if isinstance(x[name], np.ndarray):
                assert x[name].tobytes() == y[name].tobytes(), name


def test_state_dicts_are_of_the_host(gpu):
    model, optimizer = trained("cuda")
    arrays = [*model.state_dict().values(), *optimizer.state_dict()["velocity"].values()]
    assert len(arrays) == 7 + 5 and all(type(array) is np.ndarray for array in arrays)
    assert all(gpu.owns(array) for array in [*model.buffers(), *(p.data for p in model.parameters())])


def test_saved_on_a_gpu_loaded_on_a_cpu_and_back(gpu, tmp_path):
    here = trained("cuda")
    for device in ("cpu", "cuda"):
        tinyres.save(tmp_path / "c", model=here[0], optimizer=here[1], raw=fake_cupy.asarray([1, 2]), t=here[0][4].bias)
        there = trained(device, steps=1)
        tree = tinyres.load(tmp_path / "c")
        assert tree["raw"].tolist() == [1, 2] and type(tree["t"]) is np.ndarray
        for part, name in zip(there, ("model", "optimizer"), strict=True):
            part.load_state_dict(tree[name])
        same_state(here, there)
        assert all(backend.get(device).owns(array) for array in there[0].buffers())
        go_on(*there, [7])
        here = there


def test_moved_to_a_gpu_and_back(gpu):
    """Model and optimizer in mid-training: the velocities follow their parameters."""
    moving, staying = trained("cuda"), trained("cuda")
    for device in ("cpu", "cuda"):
        moving[0].to(device)
        owned = [*moving[0].buffers(), *(p.data for p in moving[0].parameters())]
        assert all(backend.get(device).owns(array) for array in owned)
        same_state(moving, staying)
        backend.use(device)
        go_on(*moving, [5])
        backend.use("cuda")
        go_on(*staying, [5])
        for x, y in zip(moving[0].state_dict().values(), staying[0].state_dict().values(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        for part, other in zip(moving, staying, strict=True):
            other.load_state_dict(part.state_dict())  # the kernels of the two devices differ in the last bits


def test_gradcheck_and_summary(gpu):
    x, w = (tinyres.tensor(numbers(*s, dtype=np.float64), True, device="cuda") for s in ((1, 3, 3, 2), (2, 2, 2, 1)))
    assert tinyres.gradcheck(lambda x, w: ops.conv2d(x, w).sigmoid(), [x, w]).checked > 0
    assert gpu.owns(x.data)
    backend.use("cuda")
    model = models.cifar_resnet(8)
    assert tinyres.summary(model, (1, 32, 32, 3), show=False).parameters == sum(p.size for p in model.parameters())


# Training -------------------------------------------------------------------------------------------------------------


def pictures(count):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8), rng.integers(0, 10, count)


@pytest.mark.parametrize("augment", (False, True))
@pytest.mark.parametrize("shuffle", (False, True))
def test_batches_are_those_of_the_cpu(gpu, augment, shuffle):
    settings = {"seed": 2, "mean": 100.0, "scale": 1 / 64, "augment": augment, "shuffle": shuffle}
    here = data.Loader(*pictures(10), 4, device="cuda", **settings)
    there = data.Loader(*pictures(10), 4, device="cpu", **settings)
    here.batch(0)
    fake_cupy.reset()
    pairs = [(here.batch(step), there.batch(step)) for step in (1, 0)]
    assert fake_cupy.waits == 0 and fake_cupy.uploads <= 6  # three rows of choices a batch
    pairs += [(here.batch(step), there.batch(step)) for step in (5, 2)]
    pairs += zip(here.epoch(), there.epoch(), strict=True)
    for got, want in pairs:
        for g, w in zip(got, want, strict=True):
            assert gpu.owns(g) and g.dtype == w.dtype and host(g).tobytes() == w.tobytes()


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("fused", (None, "layer", "block"))
def test_an_epoch_does_not_wait(gpu, fused, precision):
    """Batch, forward, loss, backward, update and metrics: nothing is read until the figures are wanted."""
    backend.use("cuda")
    tinyres.options(precision=precision)
    loader = data.Loader(*pictures(12), 2, augment=True, shuffle=True, device="cuda")
    model = models.cifar_resnet(8, shortcut="B")
    model = tinyres.fuse(model, fused) if fused else model
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    running = train.Running()
    fake_cupy.reset()
    for step in range(6):
        x, labels = loader.batch(step)
        logits = model(tinyres.tensor(x))
        loss = ops.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.add(loss, logits, labels, 0.1)
    assert fake_cupy.waits == 0
    assert fake_cupy.uploads == 6 * 3 + 1  # the choices of each batch, the order of the epoch
    assert np.isfinite(running.loss) and 0 <= running.error <= 100 and fake_cupy.waits == 2


def test_running_sums_are_those_of_the_cpu(gpu):
    sums = {device: train.Running() for device in ("cpu", "cuda")}
    for device, running in sums.items():
        for i in range(5):
            logits = tinyres.tensor(numbers(6, 10) * i, device=device)
            labels = np.random.default_rng(i).integers(0, 10, 6)
            loss = tinyres.tensor(np.float32(0.1 * i), device=device)
            wrong = running.add(loss, logits, logits.device.asarray(labels) if i % 2 else labels, 0.5)
            assert int(wrong) == sum((numbers(6, 10) * i).argmax(1) != labels)
            if i == 2:  # saved and gone on from
                state = json.loads(json.dumps(running.state_dict()))
                running.reset()
                running.load_state_dict(state)
    assert sums["cuda"].state_dict() == sums["cpu"].state_dict()
    exact = sum(float(np.float32(0.1 * i)) * 6 for i in range(5))
    assert sums["cpu"].loss_sum == exact and sums["cpu"].images == 30 and sums["cpu"].images_per_second == 12


def test_evaluate_and_check_finite(gpu):
    backend.use("cuda")
    model = models.cifar_resnet(8)
    loader = data.Loader(*pictures(5), 2, device="cuda")
    assert np.isfinite(train.evaluate(model, loader)).all()
    before = model.state_dict()
    *_, (name, last) = model.children()
    last.weight.data[0, 3] = np.nan
    backend.use("cpu")  # the device is the model's
    with pytest.raises(NonFiniteError, match=rf"at step 4: .* is {name} \(Linear\); its weight was not finite before"):
        train.evaluate(model, loader, 4)
    x, _ = loader.batch(0)
    with pytest.raises(NonFiniteError, match=rf"the loss must be finite; got nan at step 9: .* is {name} \(Linear\)"):
        train.check_finite(float("nan"), model, x, 9)
    after = model.state_dict()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before if key != f"{name}.weight")


class CountingLoader(data.Loader):
    """Notes at each training batch how often the program had waited by then."""

    waited: list[int] = []

    def batch(self, step):
        self.waited.append(fake_cupy.waits)
        return super().batch(step)


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Run examples/cifar_resnet.py in this process on a few drawn pictures; returns its exit status."""

    def shapes10():
        train_images, train_labels, test_images, test_labels, classes = data.shapes10(48, 10)
        return data.Dataset("shapes10", train_images, train_labels, test_images, test_labels, classes, "drawn")

    monkeypatch.setattr(data, "load", lambda *_: shapes10())
    monkeypatch.setattr(data, "Loader", CountingLoader)
    monkeypatch.setattr(CountingLoader, "waited", [])

    def run(device, *arguments):
        command = ["--device", device, "--depth", "8", "--batch-size", "8", "--recipe", "quick", "--graph", "off"]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *command, "--out", str(tmp_path / device), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return end.value.code

    return run


def test_the_example_trains_without_waiting(gpu, example, tmp_path):
    """The whole program, which waits at the end of an epoch only."""
    assert example("cuda", "--iterations", "12", "--lr", "0.01") == 0
    steps = np.diff(CountingLoader.waited)
    assert not steps[:5].any() and steps[5] > 1 and not steps[6:11].any()
    same = isinstance(gpu.kernels.extension, OnFakes)  # the very same kernels; else one whose rounding is as small
    with tinyres.options(conv="auto" if same else "direct"):
        assert example("cpu", "--iterations", "12", "--lr", "0.01") == 0
    lines = {}
    for device in ("cpu", "cuda"):
        text = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        lines[device] = [(line["train_loss"], line["test_loss"]) for line in map(json.loads, text)]
    if same:
        assert lines["cuda"] == lines["cpu"]
    np.testing.assert_allclose(lines["cuda"], lines["cpu"], rtol=1e-3)


def test_the_example_resumes(gpu, example, tmp_path):
    """Stopped in mid-epoch: gone on from there, the checkpoint is that of the run that was never stopped."""
    trees = []
    for lengths in ("8",), ("3", "8"):
        for length in lengths:
            more = ["--recipe", "paper2015", "--iterations", length, *["--resume"] * (length != lengths[0])]
            assert example("cuda", *more) == 0
        trees.append(tinyres.load(tmp_path / "cuda" / "checkpoint.safetensors"))
    for tree in trees:
        for part in (tree, tree["running"]):
            part.pop("seconds")
        tree["model"], tree["velocity"] = (
            {name: array.tobytes() for name, array in arrays.items()}
            for arrays in (tree["model"], tree["optimizer"].pop("velocity"))
        )
    assert trees[0] == trees[1] and trees[0]["running"]["images"] == 16


def test_the_example_stops_on_nan(gpu, example):
    """Found where the loss is next read: at the end of the epoch."""
    message = example("cuda", "--iterations", "12", "--lr", "1e30")
    assert message.startswith("error: [train] the") and "must be finite" in message
    assert len(CountingLoader.waited) == 7  # the last batch is made again, to find the layer


def test_the_example_detects_anomalies(gpu, example):
    """Told to, it stops at the first op whose result is not finite, in the first step after the update."""
    message = example("cuda", "--iterations", "12", "--lr", "1e30", "--detect-anomaly")
    assert message.startswith("error: [") and f'from File "{EXAMPLE}", line ' in message
    assert message.endswith(": logits = model(tinyres.tensor(x))") and len(CountingLoader.waited) == 2


# The same kernels over NumPy arrays -----------------------------------------------------------------------------------


def losses(device, conv):
    backend.use(device)
    tinyres.manual_seed(0)
    model = tinyres.fuse(models.cifar_resnet(8)).to(dtype=np.float64)
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    result = []
    with tinyres.options(conv=conv):
        for _ in range(10):
            loss = ops.cross_entropy(model(tinyres.tensor(rng.standard_normal((4, 8, 8, 3)))), rng.integers(0, 10, 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
    return result


@pytest.mark.parametrize("conv", ("auto", "naive"))
@pytest.mark.parametrize("device", DEVICES)
def test_ten_steps_agree_with_the_reference(device, conv):
    np.testing.assert_allclose(losses(device, conv), losses("reference", "auto"), rtol=1e-10)


@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
@pytest.mark.parametrize("device", [name for name in DEVICES if name != "reference"])
def test_the_example_runs(device, precision, example, capsys, tmp_path):
    assert example(device, "--iterations", "5", "--precision", precision) == 0
    assert f"5 steps on {device}" in (printed := capsys.readouterr().out) and "test      error" in printed
    config = json.loads((tmp_path / device / "config.json").read_text())
    assert config["precision"] == config["options"]["precision"] == precision


# What is missing ------------------------------------------------------------------------------------------------------


def cupy_with(count):
    class CUDARuntimeError(Exception):
        pass

    def device_count():
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    runtime = types.SimpleNamespace(getDeviceCount=device_count, CUDARuntimeError=CUDARuntimeError)
    return types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime), __version__="14.0.1")


@pytest.mark.parametrize(
    "modules, message",
    [
        ({"tinyres._cuda": None}, r"needs tinyres built with nvcc, .*TINYRES_CUDA=ON"),
        ({"tinyres._cuda": object(), "cupy": None}, r"needs CuPy: pip install 'tinyres\[cuda13\]'"),
        (
            {"tinyres._cuda": object(), "cupy": cupy_with("NoDevice")},
            r"needs an NVIDIA GPU and its driver \(NoDevice\)",
        ),
        (
            {"tinyres._cuda": object(), "cupy": cupy_with(0)},
            r"needs an NVIDIA GPU and its driver, which has found none",
        ),
    ],
    ids=("nvcc", "cupy", "driver", "gpu"),
)
def test_what_is_missing_is_named(monkeypatch, modules, message):
    """One sentence that says which of the kernels, CuPy and the driver it was, and what to do."""
    monkeypatch.delitem(backend._devices, "cuda", raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for _ in range(2):  # a refusal is not remembered as a device
        with pytest.raises(DeviceError, match=rf"^\[backend\] cuda {message}") as error:
            backend.get("cuda")
        assert "\n" not in str(error.value)
    assert "cuda" not in backend._devices


if "emulated" in DEVICES:

    def test_whole_steps_do_not_wait(monkeypatch):
        """Run directly, captured and replayed: nothing is read or sent but the order of an epoch and a rate."""
        extension = importlib.import_module("tinyres._emulated")

        class Stream(contextlib.nullcontext):
            def __init__(self, non_blocking):
                super().__init__()
                self.begin_capture, self.end_capture = extension.begin_capture, extension.end_capture

        cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=Stream), ndarray=fake_cupy.placed)
        kernels = cuda.adapter("cuda", fake_cupy, "_emulated", fake_cupy.empty, None)
        kernels.graphs = cuda._CuPy(cupy)
        monkeypatch.setitem(backend._devices, "cuda", backend.Device("cuda", kernels, fake_cupy))
        backend.use("cuda")
        try:
            model = tinyres.fuse(models.cifar_resnet(8), "block")
            optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
            loader = data.Loader(*pictures(12), 2, augment=True, shuffle=True, device="cuda")
            with tinyres.options(precision="bfloat16"):
                training = graph.Training(model, optimizer, loader)
                fake_cupy.reset()
                for step in range(6):
                    training.step(step, 0.1)
            assert training.launches and fake_cupy.waits == 0
            assert fake_cupy.uploads <= 1  # the order of the epoch
            sums = training.take()
            assert sums.images == 12 and np.isfinite(sums.loss) and fake_cupy.waits == 1
        finally:
            cuda.emulated()  # takes its scratch memory from the host's pool again

    def test_a_full_gpu_is_told_as_any_other(monkeypatch):
        def full(shape, dtype):
            raise MemoryError("Out of memory allocating 512 bytes (allocated so far: 1,024 bytes).")

        cupy = cupy_with(1)
        cupy.empty, cupy.ndarray = full, fake_cupy.ndarray
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "tinyres._cuda", importlib.import_module("tinyres._emulated"))
        try:
            with pytest.raises(
                OutOfMemoryError, match=r"^\[empty\] out of memory for \(2, 3\) float32: Out of memory al"
            ):
                cuda.cuda().empty((2, 3), np.float32)
        finally:
            cuda.emulated()  # takes its scratch memory from the host's pool again


def test_emulated_without_its_kernels(monkeypatch):
    monkeypatch.delitem(backend._devices, "emulated", raising=False)
    monkeypatch.setitem(sys.modules, "tinyres._emulated", None)
    with pytest.raises(DeviceError, match=r"^\[backend\] emulated needs tinyres\._emulated \("):
        backend.get("emulated")


def test_emulated_opens_late():
    """Its extension must find room for its thread-local variables in a process that has long been running kernels."""
    program = "import numpy as np, tinyres as t; t.ops.relu(t.tensor(np.ones((512, 512)))); t.backend.get('emulated')"
    subprocess.run([sys.executable, "-c", program], check=True)
