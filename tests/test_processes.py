"""Processes and threads: fork, spawn, several Python threads, PyTorch beside them, Ctrl-C, the end of the interpreter.

What could hang or crash runs in a process of its own, with a time-out.
"""

import ctypes
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from small_training import make, train, trained
from tinyres import _cpu, backend, ops
from tinyres.autograd import observed
from tinyres.backend import random

TESTS = Path(__file__).parent


@functools.cache
def digests():
    """What `trained(seed)` gives in this process, for the three seeds that the children check."""
    return [trained(seed) for seed in range(3)]


def run(program, *arguments, **environment):
    """The standard output of `python -c program`, which must end well and in time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "MKL_"))}
    kept |= {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Processes ------------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, threading, warnings
import numpy as np
import tinyres
from small_training import make, train, trained
warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads, from Python 3.12 on

def in_a_child(call):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            call()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
    return child

def wait(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def check(seed):
    got = trained(seed)
    assert got == sys.argv[1 + seed], got
"""


def test_after_a_fork():
    """A process that has used the pool forks: child and parent train at once, on threads of their own, and the child's
    own child too."""
    program = """
check(0)
def child():
    assert len(os.listdir("/proc/self/task")) == 1
    check(1)
    assert len(os.listdir("/proc/self/task")) == 3
    grandchild = in_a_child(lambda: check(2))
    check(0)
    wait(grandchild)
children = [in_a_child(child) for _ in range(2)]
check(1)
for child in children:
    wait(child)
check(2)
"""
    run(CHILD + program, *digests())


@pytest.mark.parametrize("device", [name for name in DEVICES if name in ("cpu", "emulated")])
def test_a_fork_while_other_threads_are_in_kernels(device):
    """Whatever lock, list or job they are in the middle of, the child must not wait for them."""
    program = """
models = [make(seed, sys.argv[4]) for seed in range(2)]
ready, stop = threading.Semaphore(0), threading.Event()
def work(model, seed):
    tinyres.options(threads=2)
    while not stop.is_set():
        train(model, seed, 1)
        ready.release()
threads = [threading.Thread(target=work, args=(model, seed)) for seed, model in enumerate(models)]
for thread in threads:
    thread.start()
for thread in threads:
    ready.acquire()
for i in range(8):
    wait(in_a_child(lambda: check(i % 3)))
    elsewhere = threading.Thread(target=lambda: wait(in_a_child(lambda: check(i % 3))))  # not from the main thread
    elsewhere.start()
    elsewhere.join()
stop.set()
for thread in threads:
    thread.join()
check(0)
"""
    run(CHILD + program, *digests(), device)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method):
    program = """
import multiprocessing
check(0)
with multiprocessing.get_context(sys.argv[4]).Pool(2) as pool:
    got = pool.map_async(trained, range(3), chunksize=1).get(60)
    assert got == sys.argv[1:4], got
check(1)
"""
    run(CHILD + program, *digests(), method)


# Threads --------------------------------------------------------------------------------------------------------------


def in_threads(calls):
    """The results of calls made at the same time, each in a thread of its own."""
    together, results = threading.Barrier(len(calls)), {}

    def work(i, call):
        together.wait(60)
        results[i] = call()

    threads = [threading.Thread(target=work, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[i] for i in range(len(calls))]


def test_several_threads_train():
    """Each to the bits that it reaches alone, whatever its options, its device, and what the others do."""
    settings = [{"threads": 1}, {"threads": 3}, {"threads": 4, "conv": "direct"}, {"conv": "naive"}]
    devices = ["cpu", "cpu", "cpu", "cpu" if "emulated" not in DEVICES else "emulated"]

    def work(model, seed, options):
        with tinyres.options(**options):
            return train(model, seed, 4)

    rounds = []
    for at_once in (False, True):
        models = [make(seed, device) for seed, device in enumerate(devices)]
        calls = [functools.partial(work, *job) for job in zip(models, range(4), settings, strict=True)]
        rounds.append(in_threads(calls) if at_once else [call() for call in calls])
    assert rounds[0] == rounds[1]


def test_settings_belong_to_their_thread():
    """Options, no_grad and detect_anomaly of one thread are not seen by another; default device and seed are shared."""
    inside, leave = threading.Event(), threading.Event()

    def change():
        with tinyres.options(conv="naive", precision="tf32", threads=2), tinyres.no_grad(), tinyres.detect_anomaly():
            backend.use("reference")
            tinyres.manual_seed(9)
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=change)
    thread.start()
    assert inside.wait(60)
    try:
        assert tinyres.options.current() == {"conv": "auto", "precision": "float32", "threads": None}
        assert _cpu.threads() == _cpu.default_threads()
        x = tinyres.tensor([0.0], requires_grad=True, device="cpu")
        assert x.log().requires_grad and np.isinf(x.log().item())
        assert backend.get().name == "reference" and random.seed() == 9
    finally:
        leave.set()
        thread.join()


def test_threads_meet_one_device(monkeypatch):
    """Tensors of two Device objects could not be added."""

    def slowly():
        time.sleep(0.05)
        return make_kernels()

    make_kernels = backend._KERNELS["cpu"]
    monkeypatch.setattr(backend, "_devices", {})
    monkeypatch.setitem(backend._KERNELS, "cpu", slowly)
    devices = in_threads([lambda: tinyres.tensor([1.0]).device] * 4)
    assert len(set(devices)) == 1


def test_threads_get_different_draws():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        draws = in_threads([lambda: [random.next_draw("dropout")[1] for _ in range(10_000)]] * 4)
    finally:
        sys.setswitchinterval(before)
    assert sorted(sum(draws, [])) == list(range(40_000))


def test_the_gil_is_released():
    """Another Python thread counts on while a kernel runs; as long as it takes to see that, kernels get longer."""
    ticks, stop = [0], threading.Event()

    def count():
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        seen, n = 0, 256
        while seen < 20 and n <= 4096:
            a, y = np.ones((1, n, n), np.float32), np.empty((1, n, n), np.float32)
            before = ticks[0]
            with tinyres.options(threads=1):
                _cpu.matmul(y, a, a)
            seen, n = ticks[0] - before, 2 * n
    finally:
        stop.set()
        thread.join()
    assert seen >= 20


def test_every_binding_releases_the_gil():
    checked = 0
    for path in [TESTS.parent / "csrc" / name for name in ("bindings.h", "bindings_cpu.cpp")]:
        for function in re.split(r"^}", path.read_text(), flags=re.MULTILINE):
            # Not those that only say how much memory another one needs.
            kernel = r"kernels<\w+>\(\)\.(?!\w+_(?:rows|slabs|parts)\()\w+\(|philox::philox_fill\("
            for call in re.finditer(kernel, function):
                assert "const NoGil released;" in function[: call.start()], function
                checked += 1
    assert checked > 25


@pytest.mark.parametrize("threads", [1, 3, 5])
def test_as_many_threads_as_asked_for(threads):
    """Counted by the system; of what the environment, the affinity and the options say."""
    program = """
import os, sys
import numpy as np
from tinyres import _cpu, options
def count():
    a = np.ones(3_000_000, np.float32)
    _cpu.binary("add", np.empty_like(a), a, a)
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
if "OMP_NUM_THREADS" not in os.environ:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
started = count() - before + 1
options(threads=6)
print(started, count() - before + 1)
"""
    asked = {} if threads == 1 else {"OMP_NUM_THREADS": str(threads)}
    assert run(program, **asked).split() == [str(threads), "6"]


@pytest.mark.parametrize("device", [name for name in DEVICES if name in ("cpu", "emulated")])
def test_the_rounding_of_others(device):
    """Kernels round to nearest, and their threads too, whatever this thread is told; and leave it as it was."""
    libm, upward = ctypes.CDLL(None), 0x800 if os.uname().machine == "x86_64" else 0x400000
    if not hasattr(libm, "fesetround"):
        libm = ctypes.CDLL("libm.so.6")
    rng = np.random.default_rng(0)
    n = 600_000 if device == "cpu" else 3_000
    a, b = (tinyres.tensor(rng.standard_normal(n).astype(np.float32), device=device) for _ in range(2))
    with tinyres.options(threads=4):
        want = (a * b).numpy().tobytes()
        try:
            assert libm.fesetround(upward) == 0
            for _ in range(5):
                with tinyres.options(threads=7):  # more, made by a thread that rounds upwards
                    assert (a * b).numpy().tobytes() == want
                assert (a * b).numpy().tobytes() == want
            assert libm.fegetround() == upward
        finally:
            libm.fesetround(0)


HAVE_TORCH = importlib.util.find_spec("torch") is not None


def test_torch_is_here_when_required():
    assert HAVE_TORCH or os.environ.get("TINYRES_REQUIRE_TORCH", "0") != "1", "TINYRES_REQUIRE_TORCH=1, but no torch"


if HAVE_TORCH:

    @pytest.mark.parametrize("first, second", [("torch", "tinyres"), ("tinyres", "torch")])
    def test_beside_torch(first, second):
        """Its OpenMP threads at work, before, after and at the same time: the bits of a process without it."""
        program = """
torch.set_num_threads(3)
def theirs():
    w, image = torch.randn(256, 256, requires_grad=True), torch.ones(4, 8, 32, 32)
    (torch.relu(w @ w).sum() + torch.nn.functional.conv2d(image, torch.ones(8, 8, 3, 3)).sum()).backward()
theirs()
check(0)
torch.set_flush_denormal(True)
stop = threading.Event()
def work():
    while not stop.is_set():
        theirs()
thread = threading.Thread(target=work)
thread.start()
check(1)
stop.set()
thread.join()
theirs()
check(2)
"""
        run(f"import {first}\nimport {second}, torch\n" + CHILD + program, *digests())


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also in a test run in the background, where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_kernel():
    """It takes effect when the kernel is done: its result is whole, and so is the next one's."""
    program = """
signal.signal(signal.SIGINT, signal.default_int_handler)
rng = np.random.default_rng(0)
n, inside = 256, False
while not inside:  # a kernel that is long enough for this machine
    a, y = rng.standard_normal((1, n, n)), np.full((1, n, n), np.nan)
    entered, left = threading.Event(), threading.Event()
    def interrupt():
        global inside
        entered.wait()
        inside = not left.wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    want = a @ a
    try:
        try:
            entered.set()
            tinyres._cpu.matmul(y, a, a)
            left.set()
            thread.join()
        finally:
            left.set()
            thread.join()
        raise SystemExit("no KeyboardInterrupt")
    except KeyboardInterrupt:
        inside = inside and not np.isnan(y).all()  # or it came too early
    assert not inside or np.allclose(y, want)
    y[:] = np.nan
    tinyres._cpu.matmul(y, a, a)
    assert np.allclose(y, want)
    n = min(2 * n, 2048)
check(0)
"""
    run(CHILD + program, *digests())


class Interrupting(observed):
    """Ctrl-C at the moment `at`, counted over what an observer sees of a sweep; `seen` is how many those were."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def moment(self, *what):
        self.seen += 1
        if self.seen == self.at:
            signal.raise_signal(signal.SIGINT)

    before_backward = after_backward = after_sweep = moment


def test_ctrl_c_in_a_sweep(ctrl_c):
    """Wherever it comes, no gradient has changed, and the next sweep of a new graph gives the right ones."""

    def loss():
        return ops.cross_entropy(model(x), np.arange(4))

    model, x = make(0), tinyres.tensor(np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32))
    counting = Interrupting(None)
    with counting:
        loss().backward()
    parameters = list(model.parameters())
    want = [p.grad for p in parameters]
    bits = [g.tobytes() for g in want]
    for at in (1, counting.seen // 3, counting.seen - len(parameters), counting.seen - 1, counting.seen):
        with pytest.raises(KeyboardInterrupt), Interrupting(at):
            loss().backward()
        assert all(p.grad is g for p, g in zip(parameters, want, strict=True))
        assert [p.grad.tobytes() for p in parameters] == bits
    model.zero_grad()
    loss().backward()
    assert [p.grad.tobytes() for p in parameters] == bits


def test_ctrl_c_while_leaves_get_their_gradients(ctrl_c):
    """Then all of them do. The signal comes as the first leaf lets go of its old gradient."""
    interrupt = ctypes.CDLL(None)["raise"]
    interrupt.argtypes = [ctypes.c_int, ctypes.py_object]
    leaves = [tinyres.tensor(np.ones(2), requires_grad=True) for _ in range(5)]
    watches = []
    for x in leaves:
        x.grad = np.ones(2)
        watches.append(weakref.ref(x.grad, functools.partial(interrupt, signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        sum(leaves).sum().backward()
    assert [x.grad.tolist() for x in leaves] == [[2, 2]] * 5


# The end --------------------------------------------------------------------------------------------------------------

KERNELS = {  # calls that a daemon thread repeats, short ones so that one ends at any moment
    "cpu": '_cpu.binary("add", y, a, a)',
    "cpu, a long one": "_cpu.matmul(np.empty((1, 3000, 3000)), np.ones((1, 3000, 3000)), np.ones((1, 3000, 3000)))",
    "emulated": "ops.sum(tinyres.tensor(a, device='emulated'))",  # takes its scratch memory through the interpreter
    "training": "train(model, 0, 1)",
}


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name in (*DEVICES, "training", "cpu, a long one")])
def test_the_interpreter_ends_while_threads_work(kernel):
    """Daemon threads come out of kernels while it ends, and pool threads sleep or work: no hang, no crash."""
    program = """
import tinyres.ops as ops
from tinyres import _cpu
tinyres.options(threads=3)
sys.setswitchinterval(1e-6)  # a thread comes out of Python code as often as out of kernels
model, a = make(0), np.ones(20_000, np.float32)
for device in DEVICES:
    tinyres.tensor(a, device=device)  # loads its kernels
started = threading.Semaphore(0)
def work():
    y = np.empty_like(a)
    while True:
        started.release()
        KERNEL
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(3):
    started.acquire()
print("done")
"""
    for _ in range(3):
        assert run(CHILD + program.replace("KERNEL", KERNELS[kernel]).replace("DEVICES", repr([*DEVICES]))) == "done\n"
