"""Captured steps: the same bits as the function run directly, from memory that was planned."""

import threading
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinyres
from op_case import DEVICES
from tinyres import backend, data, nn, ops, train
from tinyres.backend import cuda
from tinyres.errors import ArgumentError, DeviceError, DtypeError, GraphError
from tinyres.graph import ALIGNMENT, TRIES, Captured, Evaluation, Training, plan

needs_graphs = pytest.mark.skipif("emulated" not in DEVICES, reason="the emulation was not built")

# The plan -------------------------------------------------------------------------------------------------------------


@st.composite
def memory_uses(draw):
    """A run in the form that `plan` takes: buffers taken, some of them given back."""
    uses, held, taken = [], [], 0
    for give_back in draw(st.lists(st.booleans(), max_size=40)):
        if give_back and held:
            uses.append(-1 - held.pop(draw(st.integers(0, len(held) - 1))))
        else:
            uses.append(draw(st.sampled_from([0, 1, 255, 256, 257, 1000, 5000])))
            held.append(taken)
            taken += 1
    return uses


@given(memory_uses())
def test_no_two_buffers_in_use_overlap(uses):
    offsets, size = plan(uses)
    sizes = [use for use in uses if use >= 0]
    assert len(offsets) == len(sizes) and all(offset % ALIGNMENT == 0 for offset in offsets)
    held, taken, most = [], 0, 0
    for use in uses:
        if use < 0:
            held.remove(-1 - use)
            continue
        for other in held:
            apart = offsets[taken] >= offsets[other] + sizes[other] or offsets[other] >= offsets[taken] + use
            assert apart or 0 in (use, sizes[other])
        held.append(taken)
        taken += 1
        most = max(most, sum(sizes[i] for i in held))
    assert most <= size <= sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes)


def test_a_chain_needs_two_buffers():
    """Each made from the one before, which is then given back."""
    uses = [1000]
    for i in range(9):
        uses += [1000, -1 - i]
    assert plan(uses)[1] == 2 * 1024
    assert plan([]) == ([], 0)


# Captured -------------------------------------------------------------------------------------------------------------


def network(device):
    tinyres.manual_seed(0)
    backend.use(device)
    unit = nn.Residual(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), unit, nn.GlobalAvgPool2d(), nn.Linear(8, 10)
    model = tinyres.fuse(nn.Sequential(*layers))
    return model, tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)


def training_step(device, model, optimizer):
    rng = np.random.default_rng(1)
    x = tinyres.tensor(rng.standard_normal((4, 6, 6, 3)).astype(np.float32), device=device)
    labels = backend.get(device).asarray(np.arange(4))

    def step():
        optimizer.zero_grad()
        ops.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bits(model, optimizer):
    arrays = [*model.state_dict().values(), *optimizer.state_dict()["velocity"].values()]
    return [np.asarray(backend.host(array)).tobytes() for array in arrays]


@needs_graphs
def test_replays_have_the_bits_of_direct_calls():
    want_model, want_optimizer = network("emulated")
    direct = training_step("emulated", want_model, want_optimizer)
    model, optimizer = network("emulated")
    step = Captured(training_step("emulated", model, optimizer))
    held = backend.memory.stats()
    for i in range(8):
        direct()
        step()
        assert bits(model, optimizer) == bits(want_model, want_optimizer)
        assert (step.launches is None) == (step.size is None)
        if i == 5:
            held = backend.memory.stats()["bytes_in_use"]
    assert step.launches > 10
    assert backend.memory.stats()["bytes_in_use"] == held  # a replay takes no memory


@needs_graphs
def test_python_runs_until_memory_has_settled_and_once_more():
    device = backend.get("emulated")
    total, calls = device.asarray(np.zeros(3)), []

    def step():
        calls.append(len(calls))
        if len(calls) == 1:
            first.append(device.kernels.empty((100,), np.float64))
        device.kernels.accumulate(total, device.kernels.broadcast_to(np.float64(1), (3,)))

    first = []
    captured = Captured(step, "emulated")
    for i in range(1, 10):
        captured()
        assert total.tolist() == [i] * 3
        assert len(calls) == min(i, 4)  # two that differ, one like the second, one to capture
    assert captured.launches == 2


@needs_graphs
def test_a_step_that_never_settles():
    sizes = []

    def step():
        sizes.append(backend.get("emulated").kernels.empty((len(sizes) + 1,), np.float32))

    captured = Captured(step, "emulated")
    for _ in range(TRIES):
        captured()
    with pytest.raises(GraphError, match="same memory at each call"):
        captured()


@needs_graphs
@pytest.mark.parametrize("more", [True, False])
def test_a_step_that_is_another_when_captured(more):
    """Nothing of it is run, and the allocator is the device's again."""
    kernels = backend.get("emulated").kernels
    empty, total, calls = kernels.empty, np.zeros(3), []

    def step():
        calls.append(1)
        for _ in range(2 if len(calls) < 3 else 3 if more else 1):
            kernels.accumulate(total, kernels.broadcast_to(np.float64(1), (3,)))

    captured = Captured(step, "emulated")
    captured()
    captured()
    with pytest.raises(GraphError, match="more memory|same memory"):
        captured()
    assert total.tolist() == [4] * 3 and kernels.empty == empty
    kernels.accumulate(total, np.ones(3))
    assert total.tolist() == [5] * 3  # this thread does not capture any more


@needs_graphs
def test_other_threads_keep_their_allocator():
    device = backend.get("emulated")
    source, total = np.ones(5), np.zeros(5)
    theirs = []

    def elsewhere():
        theirs.append(device.kernels.add(source, source))

    def step():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        device.kernels.accumulate(total, device.kernels.add(source, source))

    captured = Captured(step, "emulated")
    for _ in range(5):
        captured()
    assert len(theirs) == 3 and all(array.tolist() == [2] * 5 for array in theirs)
    assert total.tolist() == [10] * 5
    assert captured.size == ALIGNMENT  # their array has no part in it


def test_what_cannot_be_captured():
    with pytest.raises(DtypeError, match="needs a function"):
        Captured(3)
    with pytest.raises(DeviceError, match="cuda or emulated"):
        Captured(lambda: None, "cpu")
    with pytest.raises(DeviceError, match="cuda or emulated"):
        Captured(lambda: None, "reference")


@needs_graphs
def test_the_gpus_graphs_over_a_stand_in_for_cupy():
    """What is asked of CuPy: a stream of its own, a capture that ends whatever happens, arrays inside of others."""
    extension = backend.get("emulated").kernels.extension
    log = []

    class Stream:
        def __init__(self, non_blocking=False):
            assert non_blocking  # the default stream cannot be captured

        def __enter__(self):
            log.append("enter")

        def __exit__(self, *exc):
            log.append("exit")

        def begin_capture(self):
            extension.begin_capture()

        def end_capture(self):
            log.append("end")
            return extension.end_capture()

    graphs = cuda._CuPy(types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=Stream), ndarray="ndarray"))
    y = np.zeros(2)
    graph = graphs.capture(lambda: extension.fill(y, 7))
    assert y.tolist() == [0, 0] and log == ["enter", "end", "exit"]
    graph.launch()
    assert y.tolist() == [7, 7]
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 / 0)
    assert log == ["enter", "end", "exit"] * 2
    graphs.cupy.ndarray = lambda shape, dtype, memptr: (shape, dtype, memptr)
    array, owner = graphs.place(types.SimpleNamespace(data=1000), 24, (3,), np.float32)
    assert array is owner and array == ((3,), np.float32, 1024)


# Training and evaluation ----------------------------------------------------------------------------------------------


IMAGES = np.random.default_rng(5).integers(0, 256, (22, 8, 8, 3), np.uint8)
LABELS = np.random.default_rng(6).integers(0, 10, 22)


def blocks(device="emulated"):
    """A stem and two residual blocks whose shapes the fused kernels take, and a head."""
    tinyres.manual_seed(0)
    backend.use(device)

    def unit():
        return nn.Residual(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
            nn.BatchNorm2d(16),
        )  # fmt: skip

    stem = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    model = nn.Sequential(*stem, unit(), unit(), nn.GlobalAvgPool2d(), nn.Linear(16, 10))
    model = tinyres.fuse(model, level="block")
    return model, tinyres.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def loader(batch_size=5, training=True, device="emulated"):
    settings = {"mean": 120.0, "scale": 1 / 60, "seed": 3, "device": device}
    return data.Loader(IMAGES, LABELS, batch_size, augment=training, shuffle=training, **settings)


def rate(number):
    return 0.05 if number < 5 else 0.01


@needs_graphs
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_training_has_the_bits_of_its_steps_run_directly(precision, monkeypatch):
    with tinyres.options(precision=precision):
        model, optimizer = blocks()
        training = Training(model, optimizer, loader())
        sums = []
        for number in range(11):  # epochs of four steps
            training.step(number, rate(number))
            if number % 4 == 2:
                sums.append(training.take())
        assert training.launches and training.arena_bytes
        with monkeypatch.context() as patched:
            patched.setattr(Captured, "__call__", lambda self: self.function())
            direct_model, direct_optimizer = blocks()
            direct, direct_sums = Training(direct_model, direct_optimizer, loader()), []
            for number in range(11):
                direct.step(number, rate(number))
                if number % 4 == 2:
                    direct_sums.append(direct.take())
        assert direct.launches is None
    assert bits(model, optimizer) == bits(direct_model, direct_optimizer)
    assert sums == direct_sums and [s.images for s in sums] == [15, 20, 20]


@needs_graphs
@pytest.mark.parametrize("precision, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_training_is_the_loop_that_one_writes(precision, tolerance):
    with tinyres.options(precision=precision):
        model, optimizer = blocks()
        training = Training(model, optimizer, loader())
        plain, plain_optimizer = blocks()
        batches, loss_sum, wrong = loader(), 0.0, 0
        for number in range(6):
            training.step(number, rate(number))
            x, labels = batches.batch(number)
            logits = plain(tinyres.tensor(x, device="emulated"))
            loss = ops.cross_entropy(logits, labels)
            plain_optimizer.lr = rate(number)
            plain_optimizer.zero_grad()
            loss.backward()
            plain_optimizer.step()
            loss_sum += loss.item() * len(labels)
            wrong += int((logits.numpy().astype(np.float32).argmax(axis=1) != labels).sum())
    sums = training.take()
    assert sums.images == 30 and sums.loss == pytest.approx(loss_sum, rel=tolerance)
    assert abs(sums.wrong - wrong) <= (0 if precision == "float32" else 2)
    want = plain.state_dict()
    for name, array in model.state_dict().items():
        np.testing.assert_allclose(array, want[name], atol=5 * tolerance, rtol=tolerance, err_msg=name)


@needs_graphs
def test_a_training_goes_on_at_any_step():
    model, optimizer = blocks()
    training = Training(model, optimizer, loader())
    for number in range(9):
        training.step(number, 0.05)
    again, again_optimizer = blocks()
    first = Training(again, again_optimizer, loader())
    for number in range(6):
        first.step(number, 0.05)
    second = Training(again, again_optimizer, loader())
    for number in range(6, 9):
        second.step(number, 0.05)
    assert bits(model, optimizer) == bits(again, again_optimizer)


@needs_graphs
def test_a_step_that_is_interrupted(monkeypatch):
    """After the batch is made, before anything is updated: the step is done anew, on the same batch."""
    model, optimizer = blocks()
    training = Training(model, optimizer, loader())
    other, other_optimizer = blocks()
    without = Training(other, other_optimizer, loader())
    for number in range(3):
        if number == 1:
            with monkeypatch.context() as patched:
                patched.setattr(training.batches, "loss", lambda x, labels: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    training.step(number, 0.05)
        training.step(number, 0.05)
        without.step(number, 0.05)
    assert bits(model, optimizer) == bits(other, other_optimizer)


@needs_graphs
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_arrays_that_are_replaced(precision):
    """A graph holds addresses: it is made anew, of the arrays that are the parameters now."""
    with tinyres.options(precision=precision):
        model, optimizer = blocks()
        training = Training(model, optimizer, loader())
        other, other_optimizer = blocks()
        without = Training(other, other_optimizer, loader())
        for number in range(10):
            if number == 6:
                assert training.launches
                for p in model.parameters():
                    p.data = p.data.copy()
                optimizer.load_state_dict(optimizer.state_dict())
            training.step(number, 0.05)
            without.step(number, 0.05)
    assert bits(model, optimizer) == bits(other, other_optimizer)


@needs_graphs
def test_evaluation():
    """Over a last batch that is smaller, too; a second pass, in graphs, gives the same; training goes on between."""
    model, optimizer = blocks()
    training, testing = Training(model, optimizer, loader()), Evaluation(model, loader(5, training=False))
    for number in range(8):
        training.step(number, 0.05)
        sums = testing()
        loss, error = train.evaluate(model, loader(5, training=False))
        assert sums.images == 22 and model.training
        assert sums.averages() == (pytest.approx(loss, rel=1e-5), pytest.approx(error))
    assert testing() == sums
    captured = {size: step.launches for size, step in testing.batches.steps.items()}
    assert sorted(captured) == [2, 5] and all(captured.values())


def test_what_a_training_does_not_take():
    backend.use("cpu")
    model, optimizer = network("cpu")
    with pytest.raises(DtypeError, match="needs an SGD"):
        Training(model, None, loader(device="cpu"))
    with pytest.raises(ArgumentError, match="the optimizer's parameters must be the model's"):
        Training(network("cpu")[0], optimizer, loader(device="cpu"))
    with pytest.raises(DtypeError, match="ends in GlobalAvgPool2d and Linear"):
        Training(nn.Sequential(nn.Linear(3, 2)), optimizer, loader(device="cpu"))
    with pytest.raises(DtypeError, match="Loader"):
        Training(model, optimizer, None)
    with pytest.raises(DeviceError, match="cuda or emulated"):
        Training(model, optimizer, loader(device="cpu")).step(0, 0.1)
    with pytest.raises(ArgumentError, match="neither shuffle nor augment"):
        Evaluation(model, loader(device="cpu"))
    with pytest.raises(ArgumentError, match="labels must be in 0 .. 8"):
        fewer = nn.Sequential(nn.GlobalAvgPool2d(), nn.Linear(3, 9))
        Training(fewer, tinyres.optim.SGD(fewer.parameters(), 0.1), loader(device="cpu"))
    dropping = nn.Sequential(nn.Dropout(0.5), nn.GlobalAvgPool2d(), nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="dropout"):
        Training(dropping, tinyres.optim.SGD(dropping.parameters(), 0.1), loader(device="cpu"))
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match="hooks run in Python"):
        Training(model, optimizer, loader(device="cpu"))
    handle.remove()
    handle = model[0].weight.register_hook(lambda gradient: None)
    with pytest.raises(ArgumentError, match="hooks run in Python"):
        Training(model, optimizer, loader(device="cpu"))
    handle.remove()
    if "emulated" in DEVICES:
        with pytest.raises(DeviceError, match="on the model's device"):
            Training(model, optimizer, loader(device="emulated"))
