"""Captured steps: the same bits as the function run directly, from memory that was planned."""

import threading
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinyres
from op_case import DEVICES
from tinyres import backend, nn, ops
from tinyres.backend import cuda
from tinyres.errors import DeviceError, DtypeError, GraphError
from tinyres.graph import ALIGNMENT, TRIES, Captured, plan

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
