"""The extension as it was built: instruction sets, allocator, thread pool, raw bindings, import time."""

import gc
import os
import signal
import statistics
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from tinyres import _cpu


def run_python(program, **environment):
    """The finished process of `python -c program`."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Instruction sets ---------------------------------------------------------------------------------------------

# One sum of each kind that the vector width could break: odd lengths, every lane.
ADD = """
import numpy as np
from tinyres import _cpu
for n in range(1, 70):
    for dtype in ("float32", "float64"):
        a, y = np.arange(n, dtype=dtype), np.full(n, np.nan, dtype)
        _cpu.add_relu(y, a, a)
        assert (y == 2 * a).all(), (n, dtype)
print(_cpu.isa())
"""


def test_the_widest_instruction_set_is_the_default():
    assert _cpu.isas()[0] == "baseline"
    assert run_python("from tinyres import _cpu; print(_cpu.isa())", TINYRES_CPU_ISA="").stdout.split() == [
        _cpu.isas()[-1]
    ]


@pytest.mark.parametrize("isa", _cpu.isas())
def test_every_supported_instruction_set_can_be_forced(isa):
    result = run_python(ADD, TINYRES_CPU_ISA=isa)
    assert result.stdout.split() == [isa], result.stderr


NORMALISED = """
import hashlib
import numpy as np
import tinyres
from tinyres import ops
x = np.random.default_rng(0).standard_normal((1000, 32)).astype(np.float32)
y = ops.batch_norm(tinyres.tensor(x), tinyres.tensor(np.ones(32, np.float32)), tinyres.tensor(np.zeros(32, np.float32)))
print(hashlib.sha256(y.numpy()).hexdigest())
"""


def test_each_instruction_set_has_kernels_of_its_own():
    """Which add up rows in another order: the default gives the bits of the widest set, and of no other."""
    bits = [run_python(NORMALISED, TINYRES_CPU_ISA=isa).stdout for isa in (*_cpu.isas(), "")]
    assert all(bits) and bits[-1] == bits[-2] and len(set(bits)) == len(bits) - 1


def test_an_unknown_instruction_set_is_refused():
    result = run_python("import tinyres._cpu", TINYRES_CPU_ISA="mmx")
    assert result.returncode == 1
    possible = ", ".join(_cpu.isas())
    assert f"ImportError: TINYRES_CPU_ISA=mmx cannot be used here; possible: {possible}" in result.stderr


# Allocator ----------------------------------------------------------------------------------------------------


def test_empty_gives_the_array_asked_for():
    for shape in [(), (0,), (3,), (2, 0, 5), (3, 4, 5)]:
        for dtype in ["float32", np.float64, np.dtype("int32"), "uint8"]:
            array = _cpu.empty(shape, dtype)
            assert array.shape == shape and array.dtype == np.dtype(dtype)
            assert array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % 64 == 0


def test_a_block_comes_back_when_its_last_view_dies():
    array = _cpu.empty((1000, 37), "float32")
    address, held = array.ctypes.data, _cpu.memory_stats()
    row = array[3:5].reshape(-1)
    del array
    assert _cpu.memory_stats()["bytes_in_use"] == held["bytes_in_use"]
    other = _cpu.empty((1000, 37), "float32")
    assert other.ctypes.data != address
    del row
    assert _cpu.memory_stats()["bytes_in_use"] == held["bytes_in_use"]
    again = _cpu.empty((1000, 37), "float32")
    assert again.ctypes.data == address


def test_the_steady_state_asks_the_system_for_nothing():
    def step():
        return [_cpu.empty((n, 16), "float32") for n in (1, 7, 100, 5000, 100_000)]

    step()
    before = _cpu.memory_stats()
    for _ in range(10):
        step()
    after = _cpu.memory_stats()
    assert after["system_allocations"] == before["system_allocations"]
    assert after["taken"] == before["taken"] + 50


def test_rounding_loses_at_most_an_eighth():
    gc.collect()
    for bytes in [513, 1000, 4097, 10_000, 2**20 + 1, 3 * 2**20 - 5, 2**22]:
        before = _cpu.memory_stats()["bytes_in_use"]
        block = _cpu.empty((bytes,), "uint8")
        used = _cpu.memory_stats()["bytes_in_use"] - before
        assert bytes <= used <= 1.125 * bytes + 64
        del block


def test_peak_and_release():
    _cpu.memory_reset_peak()
    before = _cpu.memory_stats()
    assert before["peak_bytes_in_use"] == before["bytes_in_use"]
    del_me = _cpu.empty((2**20,), "uint8")
    del del_me
    _cpu.empty((1,), "uint8")  # a smaller one after it
    after = _cpu.memory_stats()
    assert after["peak_bytes_in_use"] >= before["bytes_in_use"] + 2**20
    assert after["bytes_in_use"] == before["bytes_in_use"]
    _cpu.memory_release()
    assert _cpu.memory_stats()["bytes_held"] == after["bytes_in_use"]


# Thread pool --------------------------------------------------------------------------------------------------


def large_sum():
    a = np.arange(300_000, dtype=np.float32)
    y = _cpu.empty(a.shape, a.dtype)
    _cpu.binary("add", y, a, a)
    return bool((y == 2 * a).all())


def test_set_threads_lasts_until_reset():
    assert _cpu.threads() == _cpu.default_threads() >= 1
    try:
        for count in (1, 2, 3, 17):
            _cpu.set_threads(count)
            assert _cpu.threads() == count
            assert large_sum()
    finally:
        _cpu.set_threads(0)
    assert _cpu.threads() == _cpu.default_threads()


@pytest.mark.parametrize("value, expected", [("3", 3), ("2,4", 2), ("nonsense", None), ("0", None), ("-1", None)])
def test_omp_num_threads_is_honoured(value, expected):
    result = run_python("from tinyres import _cpu; print(_cpu.threads())", OMP_NUM_THREADS=value)
    assert int(result.stdout) == (expected or len(os.sched_getaffinity(0))), result.stderr


def test_affinity_is_honoured():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from tinyres import _cpu; print(_cpu.threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    assert result.stdout.split() == [b"1"], result.stderr


@pytest.mark.parametrize("value, bound", [("true", True), ("CLOSE", True), ("false", False)])
def test_omp_proc_bind_is_honoured(value, bound):
    program = """
import os, sys, time
import numpy as np
cpus = sorted(os.sched_getaffinity(0))
from tinyres import _cpu
def affinities():
    a = np.ones(300_000, np.float32)
    _cpu.binary("add", a.copy(), a, a)
    return sorted(sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task"))
_cpu.set_threads(2)
expected = sorted([cpus[:1], [cpus[1 % len(cpus)]]]) if sys.argv[1] == "True" else [cpus, cpus]
deadline = time.monotonic() + 30  # a worker binds itself as soon as it runs
while affinities() != expected and time.monotonic() < deadline:
    time.sleep(0.01)
assert affinities() == expected, affinities()
child = os.fork()
if child == 0:
    os._exit(0 if _cpu.default_threads() == len(cpus) and affinities()[0] == expected[0] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("OMP_")}
    environment |= {"OMP_PROC_BIND": value, "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(bound)], env=environment, capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_the_pool_survives_a_fork():
    assert _cpu.threads() == _cpu.default_threads()  # which is kept, but not for the child
    _cpu.set_threads(4)
    assert large_sum()  # the parent has workers, which the child does not inherit
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        good = all(large_sum() for _ in range(20)) and len(os.listdir("/proc/self/task")) > 1  # workers of its own
        os.environ["OMP_NUM_THREADS"] = "3"
        _cpu.set_threads(0)
        os._exit(0 if good and _cpu.threads() == 3 else 1)
    _, status = os.waitpid(child, 0)
    _cpu.set_threads(0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_calls_from_several_python_threads():
    program = """
import sys, threading
import numpy as np
from tinyres import _cpu
_cpu.set_threads(4)
good = []
def work():
    _cpu.set_threads(3)
    a = np.arange(300_000, dtype=np.float32)
    y = np.empty_like(a)
    for _ in range(50):
        y[:] = np.nan
        _cpu.binary("add", y, a, a)
        good.append(bool((y == 2 * a).all()))
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(good), all(good), _cpu.threads())
"""
    result = run_python(program)
    assert result.stdout.split() == ["150", "True", "4"], result.stderr
    assert result.returncode == 0


# Raw bindings -------------------------------------------------------------------------------------------------


def f32(*shape):
    return np.ones(shape, np.float32)


def bf16(*shape):
    return np.ones(shape, ml_dtypes.bfloat16)


def i32(*shape):
    return np.zeros(shape, np.int32)


def i64(*shape):
    return np.zeros(shape, np.int64)


def u8(*shape):
    return np.zeros(shape, np.uint8)


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(n):
    return np.zeros(4 * n + 1, np.uint8)[1:].view(np.float32)


X, W, Y = f32(2, 5, 5, 3), f32(3, 3, 3, 4), f32(2, 3, 3, 4)
ONES, ZEROS = (1, 1), (0, 0)
POOLED = f32(2, 2, 2, 3)

MALFORMED = {
    "no array": ("add_relu", [1.0, 2], f32(2), f32(2)),
    "none": ("add_relu", None, f32(2), f32(2)),
    "integers": ("add_relu", i32(2), i32(2), i32(2)),
    "half": ("unary", "exp", np.ones(2, np.float16), np.ones(2, np.float16)),
    "two dtypes": ("add_relu", f32(2), f32(2), np.ones(2)),
    "other byte order": ("add_relu", *[np.ones(2, ">f4")] * 3),
    "objects": ("fill", np.array([None, None]), 1.0),
    "shapes": ("add_relu", f32(2, 3), f32(2, 3), f32(3, 2)),
    "not dense": ("add_relu", f32(4), f32(8)[::2], f32(4)),
    "output not dense": ("fill", f32(4, 4).T[1:], 0.0),
    "read-only output": ("add_relu", read_only(f32(2)), f32(2), f32(2)),
    "read-only copy": ("copy", read_only(f32(2)), f32(2)),
    "unaligned": ("add_relu", unaligned(4), f32(4), f32(4)),
    "odd strides": ("copy", f32(2), np.zeros(2, [("a", "f4"), ("b", "u1")])["a"]),
    "unknown binary": ("binary", "power", f32(2), f32(2), f32(2)),
    "unknown unary": ("unary", "", f32(2), f32(2)),
    "no name": ("unary", None, f32(2), f32(2)),
    "backward of exp": ("unary_backward", "exp", f32(2), f32(2), f32(2)),
    "broadcast shapes": ("binary", "add", f32(2, 3), f32(2, 3), f32(2)),
    "broadcast output": ("binary", "add", f32(3), f32(2, 3), f32(3)),
    "broadcast copy": ("copy", f32(2, 3), f32(2, 1, 3)),
    "dropout of everything": ("dropout", f32(2), f32(2), 1.0, 0, 0),
    "dropout by nan": ("dropout", f32(2), f32(2), float("nan"), 0, 0),
    "negative key": ("dropout", f32(2), f32(2), 0.5, -1, 0),
    "sum rank": ("sum", f32(4), f32(3, 4)),
    "sum shape": ("sum", f32(2, 5), f32(2, 3, 4)),
    "sum dtype": ("sum", f32(2, 4), f32(2, 3, 4).astype(np.float64)),
    "matmul inner": ("matmul", f32(1, 2, 3), f32(1, 2, 4), f32(1, 5, 3)),
    "matmul batch": ("matmul", f32(2, 2, 3), f32(1, 2, 4), f32(2, 4, 3)),
    "matmul rank": ("matmul", f32(2, 3), f32(1, 2, 4), f32(1, 4, 3)),
    "matmul flat": ("matmul", f32(3), f32(4), f32(4, 3)),
    "conv2d bias": ("conv2d_bias_forward", Y, X, W, f32(3), None, True, ONES, ZEROS, "auto"),
    "conv2d residual": ("conv2d_bias_forward", Y, X, W, f32(4), X, True, ONES, ZEROS, "auto"),
    "conv2d channels": ("conv2d_forward", Y, X, f32(3, 3, 2, 4), ONES, ZEROS, "auto"),
    "conv2d rank": ("conv2d_forward", Y, X[0], W, ONES, ZEROS, "auto"),
    "conv2d output": ("conv2d_forward", f32(2, 4, 3, 4), X, W, ONES, ZEROS, "auto"),
    "conv2d stride 0": ("conv2d_forward", Y, X, W, (0, 1), ZEROS, "auto"),
    "conv2d negative padding": ("conv2d_forward", Y, X, W, ONES, (-1, 0), "auto"),
    "conv2d huge padding": ("conv2d_forward", Y, X, W, (2**62, 2**62), (2**61, 2**61), "auto"),
    "conv2d fractional stride": ("conv2d_forward", Y, X, W, (1.5, 1), ZEROS, "auto"),
    "conv2d three strides": ("conv2d_forward", Y, X, W, (1, 1, 1), ZEROS, "auto"),
    "conv2d window too large": ("conv2d_forward", Y, X, f32(6, 3, 3, 4), ONES, ZEROS, "auto"),
    "conv2d algorithm": ("conv2d_forward", Y, X, W, ONES, ZEROS, "fft"),
    "conv2d gradient": ("conv2d_backward_weight", f32(3, 3, 4, 4), Y, X, ONES, ZEROS, "auto"),
    "pool channels": ("avg_pool2d_forward", f32(2, 2, 2, 4), X, (3, 3), (2, 2), ZEROS),
    "pool padding": ("max_pool2d_forward", f32(2, 9, 9, 3), i32(2, 9, 9, 3), X, (1, 1), ONES, (2, 2)),
    "pool argmax dtype": ("max_pool2d_forward", POOLED, i64(2, 2, 2, 3), X, (3, 3), (2, 2), ZEROS),
    "pool argmax outside": ("max_pool2d_backward", X, POOLED, i32(2, 2, 2, 3) + 9, (3, 3), (2, 2), ZEROS),
    "pool argmax negative": ("max_pool2d_backward", X, POOLED, i32(2, 2, 2, 3) - 1, (3, 3), (2, 2), ZEROS),
    "pool argmax in padding": ("max_pool2d_backward", X, f32(2, 3, 3, 3), i32(2, 3, 3, 3), (3, 3), (2, 2), ONES),
    "global pool": ("global_avg_pool2d_forward", f32(2, 4), X),
    "global pool of nothing": ("global_avg_pool2d_forward", f32(2, 3), f32(2, 0, 5, 3)),
    "batch_norm channels": ("batch_norm_inference", X, X, f32(3), f32(3), f32(3), f32(4), None, False, 1e-5),
    "batch_norm scalar": ("batch_norm_inference", f32(), f32(), *[f32(1)] * 4, None, False, 1e-5),
    "batch_norm half running": (
        *("batch_norm_forward", X, f32(3), f32(3), f32(3), None),
        *(X, f32(3), f32(3), None, False, 0.1, 1e-5),
    ),
    "batch_norm two masks": ("batch_norm_backward", X, None, f32(3), f32(3), X, X, X, f32(3), f32(3), f32(3), f32(3)),
    "label too large": ("cross_entropy", f32(), f32(2, 3), f32(2, 3), i64(2) + 3, 0.0),
    "label negative": ("cross_entropy", f32(), f32(2, 3), f32(2, 3), i64(2) - 1, 0.0),
    "labels int32": ("cross_entropy", f32(), f32(2, 3), f32(2, 3), i32(2), 0.0),
    "no logits": ("cross_entropy", f32(), f32(0, 3), f32(0, 3), i64(0), 0.0),
    "sgd lengths": ("sgd", [f32(2)], None, [], [0.0], 0.1, 0.0, False, None),
    "sgd velocities": ("sgd", [f32(2)], None, [f32(2)], [0.0], 0.1, 0.9, False, None),
    "sgd gradient": ("sgd", [f32(2)], [f32(2)], [f32(3)], [0.0], 0.1, 0.9, False, None),
    "sgd two dtypes": ("sgd", [f32(2), np.ones(2)], None, [f32(2), np.ones(2)], [0.0, 0.0], 0.1, 0.0, False, None),
    "sgd parts of another shape": ("sgd", [f32(2)], None, [f32(2, 3)], [0.0], 0.1, 0.0, False, None),
    "sgd no parts": ("sgd", [f32(2)], None, [f32(0, 2)], [0.0], 0.1, 0.0, False, None),
    "sgd float32 lr": ("sgd", [f32(2)], None, [f32(2)], [0.0], f32(), 0.0, False, None),
    "sgd copies of another dtype": ("sgd", [f32(2)], None, [f32(2)], [0.0], 0.1, 0.0, False, [f32(2)]),
    "sgd copies of another shape": ("sgd", [f32(2)], None, [f32(2)], [0.0], 0.1, 0.0, False, [bf16(3)]),
    "sgd copies of float64": ("sgd", [np.ones(2)], None, [np.ones(2)], [0.0], 0.1, 0.0, False, [bf16(2)]),
    "sgd too few copies": ("sgd", [f32(2)], None, [f32(2)], [0.0], 0.1, 0.0, False, []),
    "augment index": (
        *("augment", f32(1, 4, 4, 3), u8(2, 4, 4, 3), i64(1) + 2),
        *(i32(1), i32(1), u8(1), f32(4, 4, 3), f32(3)),
    ),
    "augment image size": (
        *("augment", f32(1, 4, 4, 3), u8(2, 5, 4, 3), i64(1)),
        *(i32(1), i32(1), u8(1), f32(4, 4, 3), f32(3)),
    ),
    "philox dtype": ("philox", i32(4), 1, 2),
    "empty negative": ("empty", (2, -1), "float32"),
    "empty of objects": ("empty", (2,), object),
    "empty of text": ("empty", (2,), "U3"),
    "empty fraction": ("empty", (1.5,), "float32"),
    "empty unknown dtype": ("empty", (2,), "float33"),
    "too few": ("add_relu", f32(2)),
    "too many threads": ("set_threads", 100_000),
    "negative threads": ("set_threads", -1),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_bindings_refuse_malformed_calls(case):
    name, *arguments = MALFORMED[case]
    with pytest.raises((ValueError, TypeError)):
        getattr(_cpu, name)(*arguments)


@pytest.mark.parametrize(
    "allocator, error", [(None, "ValueError"), ("lambda n: None", "TypeError"), ("lambda n: bytes[:1]", "TypeError")]
)
def test_cuda_kernels_need_an_allocator(allocator, error):
    program = f"""
import numpy as np
from tinyres import _emulated
bytes = np.empty(1 << 20, np.uint8)
{f"_emulated.connect({allocator}, None)" if allocator else ""}
y, x = np.ones((1, 1), np.float32), np.ones((1, 100_000, 1), np.float32)
try:
    _emulated.sum(y, x)
except {error}:
    print("refused")
"""
    assert run_python(program).stdout.split() == ["refused"]


def test_a_refusal_names_the_kernel_and_the_argument():
    with pytest.raises(ValueError, match=r"^\[add_relu\] b must have shape \(2, 3\); got \(3, 2\)$"):
        _cpu.add_relu(f32(2, 3), f32(2, 3), f32(3, 2))
    with pytest.raises(TypeError, match=r"^\[cross_entropy\] labels must be int64; got int32$"):
        _cpu.cross_entropy(f32(), f32(2, 3), f32(2, 3), i32(2), 0.0)


@pytest.mark.parametrize("shape", [(2**50,), (2**40, 2**40)])
def test_more_memory_than_there_is(shape):
    with pytest.raises(MemoryError):
        _cpu.empty(shape, "uint8")


def test_empty_arrays_pass_through():
    _cpu.binary("add", f32(0, 3), f32(0, 3), f32(0, 3))
    _cpu.copy(f32(0), f32(0))
    _cpu.conv2d_forward(f32(0, 3, 3, 4), f32(0, 5, 5, 3), W, ONES, ZEROS, "auto")
    dw = f32(3, 3, 3, 4)
    _cpu.conv2d_backward_weight(dw, f32(0, 3, 3, 4), f32(0, 5, 5, 3), ONES, ZEROS, "auto")
    assert (dw == 0).all()
    y = f32(2, 3, 4)
    _cpu.matmul(y, f32(2, 3, 0), f32(2, 0, 4))
    assert (y == 0).all()


# Import -------------------------------------------------------------------------------------------------------


def test_import_costs_at_most_twice_numpy():
    def seconds(module):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)
        return time.perf_counter() - start

    # Compiled once, as by everybody who imports it twice.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    # Rounds, since a machine with other work, or another clock rate, is as slow or fast for all three.
    rounds = [[seconds(module) for module in ("this", "numpy", "tinyres")] for _ in range(7)]
    ratios = [(tinyres - bare) / (numpy - bare) for bare, numpy, tinyres in rounds]
    assert statistics.median(ratios) <= 2, ratios
