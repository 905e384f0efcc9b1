"""Winograd's algorithm: its matrices, its errors beside those of direct convolution, when it is chosen.

tests/test_isas.py runs this file for every instruction set.
"""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinyres
from cases import Geometry
from tinyres import backend, ops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
import winograd_error  # noqa: E402

EPS = np.finfo(np.float32).eps
NAMES = ("y", "dx", "dw")


def geometry(N, H, W, C, K, padding=1):
    return Geometry(N, H, W, C, K, 3, 3, padding=(padding, padding))


# Tiles are 4x4, blocks of channels 16, vectors 4 to 16; groups of tiles 8 to 64; weights over 1 MiB go in phases.
GEOMETRIES = {
    "one of everything": geometry(1, 1, 1, 1, 1),
    "one tile, no border": geometry(1, 6, 6, 16, 16, 0),
    "one pixel out": geometry(2, 3, 3, 15, 17, 0),
    "rows and columns of unequal tiles": geometry(3, 5, 7, 3, 17),
    "under and over a block": geometry(1, 9, 4, 15, 33),
    "over two blocks, padding 2": geometry(2, 6, 5, 33, 15, 2),
    "padding beyond the window: dx leaves out pixels of dy": geometry(1, 4, 9, 17, 1, 3),
    "padding beyond the image": geometry(1, 1, 1, 2, 3, 4),
    "padding differs by side": Geometry(1, 3, 70, 48, 16, 3, 3, padding=(0, 3)),
    "several groups and parts": geometry(9, 32, 32, 16, 16),
    "a group that is not full": geometry(19, 8, 8, 32, 16),
    "in phases": geometry(3, 13, 15, 130, 70),
    "in phases, filters in an odd block": geometry(2, 7, 7, 512, 48),
}


def arrays_of(g, dtype=np.float32):
    rng = np.random.default_rng(g.N + 10 * g.H + 100 * g.W + 1000 * g.C)
    return [rng.standard_normal(shape).astype(dtype) for shape in (g.x, g.w, g.y)]


def all_three(g, arrays, algorithm, device="cpu"):
    """y, dx, dw."""
    x, w, dy = arrays
    kernels = backend.get(device).kernels
    with tinyres.options(conv=algorithm):
        return (
            kernels.conv2d_forward(x, w, g.stride, g.padding),
            kernels.conv2d_backward_input(dy, w, g.x, g.stride, g.padding),
            kernels.conv2d_backward_weight(dy, x, g.w, g.stride, g.padding),
        )


def bits(results):
    return [result.tobytes() for result in results]


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def assert_near(g, got, least=lambda i: 2 * EPS):
    """Errors against float64 within five times direct convolution's, or those of result i within 5 * least(i): on a few
    products direct convolution may happen to make no error."""
    arrays = arrays_of(g)
    wanted = all_three(g, [a.astype(np.float64) for a in arrays], "auto", "reference")
    directs = all_three(g, arrays, "direct")
    for i, (name, result, direct, want) in enumerate(zip(NAMES, got, directs, wanted, strict=True)):
        assert result.dtype == np.float32 and result.shape == want.shape
        allowed = 5 * max(error(direct, want), least(i))
        assert error(result, want) <= allowed, f"{name}: error {error(result, want):.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_errors_are_bounded_by_those_of_direct_convolution(name):
    g = GEOMETRIES[name]
    got = all_three(g, arrays_of(g), "winograd")
    assert_near(g, got)
    if g.C >= 3 and g.K >= 3:
        assert bits(got) != bits(all_three(g, arrays_of(g), "direct")), "this must not be direct convolution"


sizes, channels = st.integers(1, 14), st.integers(1, 5) | st.sampled_from((15, 16, 17, 33))


@given(N=st.integers(1, 3), H=sizes, W=sizes, C=channels, K=channels, padding=st.tuples(*[st.integers(0, 4)] * 2))
def test_any_geometry(N, H, W, C, K, padding):
    H, W = max(H, 3 - 2 * padding[0]), max(W, 3 - 2 * padding[1])
    g = Geometry(N, H, W, C, K, 3, 3, padding=padding)
    arrays = arrays_of(g)
    got = all_three(g, arrays, "winograd")
    # A single output may be a small difference of large products: rounding is then measured by those.
    wanted = all_three(g, [a.astype(np.float64) for a in arrays], "auto", "reference")
    magnitudes = all_three(g, [abs(a.astype(np.float64)) for a in arrays], "auto", "reference")
    assert_near(g, got, lambda i: 4 * EPS * np.linalg.norm(magnitudes[i]) / np.linalg.norm(wanted[i]))
    for threads in (1, 3):
        with tinyres.options(threads=threads):
            assert bits(all_three(g, arrays, "winograd")) == bits(got)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_same_bits_twice_and_for_any_threads(name):
    g = GEOMETRIES[name]
    want = bits(all_three(g, arrays_of(g), "winograd"))
    for threads in (1, 1, 2, 3, 4):
        with tinyres.options(threads=threads):
            assert bits(all_three(g, arrays_of(g), "winograd")) == want, threads


@pytest.mark.parametrize("name", GEOMETRIES)
def test_nothing_is_read_before_it_is_written(name):
    """Outputs and scratch come from the pool: with NaN in all its waiting blocks the bits are the same."""
    g = GEOMETRIES[name]
    arrays = arrays_of(g)
    want = bits(all_three(g, arrays, "winograd"))
    backend.memory.release()
    # The pool's sizes: multiples of 64 bytes, then eight to a doubling. More of each than a call holds at a time.
    sizes = [64 * i for i in range(1, 8)] + [64 * 2**e * i for e in range(14) for i in range(8, 16)]
    blocks = [backend.memory.empty((size // 4,), np.float32) for size in sizes for _ in range(2 if size > 2**20 else 6)]
    for block in blocks:
        block.fill(np.nan)
    del blocks, block
    before = backend.memory.stats()["system_allocations"]
    with tinyres.options(threads=1):
        got = bits(all_three(g, arrays, "winograd"))
    assert backend.memory.stats()["system_allocations"] == before, "a block that was not poisoned"
    backend.memory.release()
    assert got == want


def test_the_steady_state_asks_the_system_for_nothing():
    for g in (GEOMETRIES["several groups and parts"], GEOMETRIES["in phases"]):
        arrays = arrays_of(g)
        with tinyres.options(threads=1):  # more may hold more scratch at a time in one call than in another
            all_three(g, arrays, "winograd")
            before = backend.memory.stats()["system_allocations"]
            for _ in range(3):
                all_three(g, arrays, "winograd")
        assert backend.memory.stats()["system_allocations"] == before


def test_several_phases():
    """With so many channels the scratch of a phase has room for 112 of 128 tiles: the next goes on from there."""
    g = geometry(8, 15, 15, 2048, 16)
    arrays = arrays_of(g)
    y, dx, dw = all_three(g, arrays, "winograd")
    one = geometry(1, 15, 15, 2048, 16)
    for n in range(g.N):
        alone = all_three(one, (arrays[0][n : n + 1], arrays[1], arrays[2][n : n + 1]), "winograd")
        assert bits(alone[:2]) == bits((y[n : n + 1], dx[n : n + 1]))
    assert error(dw, all_three(g, arrays, "direct")[2]) < 1e-5


def test_nan_stays_visible():
    g = geometry(1, 9, 9, 16, 16)
    x, w, dy = arrays_of(g)
    x[0, 4, 4, 3] = dy[0, 4, 4, 5] = np.nan
    y, dx, dw = all_three(g, (x, w, dy), "winograd")
    assert np.isnan(y[0, 3:6, 3:6]).all() and np.isnan(dx[0, 3:6, 3:6]).all()
    assert np.isnan(dw[:, :, 3, :]).all() and np.isnan(dw[:, :, :, 5]).all()


# When it is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "g, chosen",
    [
        (geometry(1, 16, 16, 64, 64), True),  # 16 tiles
        (geometry(1, 12, 16, 80, 80), False),  # 12 tiles: transforming the weights does not pay
        (geometry(16, 16, 16, 16, 16), True),  # 256 tiles of 16 x 16 channels
        (geometry(15, 16, 16, 16, 16), False),  # too little work
        (geometry(20, 16, 16, 15, 16), False),  # less than a block of channels
        (geometry(20, 16, 16, 16, 15), False),  # or of filters
        (geometry(300, 3, 3, 16, 16), True),  # 9 of 16 outputs lie in the image
        (geometry(300, 2, 2, 16, 16), False),  # 4 of 16
        (Geometry(16, 16, 16, 16, 16, 3, 3, (2, 2), (1, 1)), False),
        (Geometry(16, 16, 16, 16, 16, 3, 3, (1, 2), (1, 1)), False),
        (Geometry(16, 16, 16, 16, 16, 1, 3, padding=(0, 1)), False),
        (Geometry(16, 16, 16, 16, 16, 5, 5, padding=(2, 2)), False),
    ],
    ids=str,
)
def test_auto_takes_it_where_it_pays(g, chosen):
    arrays = arrays_of(g)
    auto, direct, winograd = (bits(all_three(g, arrays, a)) for a in ("auto", "direct", "winograd"))
    assert auto == (winograd if chosen else direct)
    assert (auto == direct) == (not chosen)
    if (g.R, g.S) != (3, 3) or g.stride != (1, 1):
        assert winograd == direct, "elsewhere it means direct"


def test_float64_is_always_direct():
    g = geometry(2, 16, 16, 16, 16)
    arrays = arrays_of(g, np.float64)
    auto, direct, winograd = (bits(all_three(g, arrays, a)) for a in ("auto", "direct", "winograd"))
    assert auto == direct == winograd


def test_gradients_are_checked_under_the_option():
    g = geometry(2, 4, 4, 2, 3)
    x, w, _ = (tinyres.tensor(a, requires_grad=True) for a in arrays_of(g, np.float64))
    with tinyres.options(conv="winograd"):
        assert tinyres.gradcheck(lambda x, w: ops.conv2d(x, w, padding=1), (x, w)).checked > 0


# The matrices -------------------------------------------------------------------------------------------------------


def test_the_matrices_compute_a_correlation_exactly():
    A, B, G = winograd_error.matrices("3/4", "3/2")
    rng = np.random.default_rng(0)
    x, w = (np.array(rng.integers(-9, 10, n), object) for n in (6, 3))
    want = [sum(x[i + j] * w[j] for j in range(3)) for i in range(4)]
    assert list(A @ ((G @ w) * (B @ x))) == want
    dy = np.array(rng.integers(-9, 10, 4), object)
    assert list(G.T @ ((B @ x) * (A.T @ dy))) == [sum(x[i + j] * dy[i] for i in range(4)) for j in range(3)]


def test_the_constants_of_A_and_B_are_exact_in_float32():
    for matrix in winograd_error.matrices("3/4", "3/2")[:2]:
        assert all(Fraction(float(np.float32(float(value)))) == value for value in matrix.flat)


# Planted faults -----------------------------------------------------------------------------------------------------

PROGRAM = """
#include "winograd.cpp"
#include <cstdio>
#include <cstdlib>
using namespace tinyres;
int main(int, char** argv) {
  i64 n[6];
  for (int i = 0; i < 6; i++) n[i] = std::atoll(argv[i + 1]);
  const i64 P = n[1] + 2 * n[5] - 2, Q = n[2] + 2 * n[5] - 2;
  const Window s{n[0], n[1], n[2], n[3], n[4], 3, 3, P, Q, 1, 1, n[5], n[5]};
  const i64 xs = s.N * s.H * s.W * s.C, ws = 9 * s.C * s.K, ys = s.N * P * Q * s.K;
  const Scratch<float> x(xs), w(ws), dy(ys), y(ys), dx(xs), dw(ws);
  if (std::fread(x.get(), 4, xs, stdin) + std::fread(w.get(), 4, ws, stdin) + std::fread(dy.get(), 4, ys, stdin) == 0)
    return 1;
  TINYRES_TARGET::winograd_forward(y.get(), x.get(), w.get(), {}, s);
  TINYRES_TARGET::winograd_backward_input(dx.get(), dy.get(), w.get(), s, false);
  TINYRES_TARGET::winograd_backward_weight(dw.get(), dy.get(), x.get(), s);
  std::fwrite(y.get(), 4, ys, stdout), std::fwrite(dx.get(), 4, xs, stdout), std::fwrite(dw.get(), 4, ws, stdout);
}
"""

# (what is wrong, the code, what stands there instead, which results are)
FAULTS = [
    ("a sign of B", "x[4] - (a2 + b2) * x[2]", "x[4] + (a2 + b2) * x[2]", "y dx dw"),
    ("a constant, in the fifth digit", "b2 = b * b", "b2 = b * b * 1.00003f", "y dx dw"),
    ("points exchanged in A", "y[2] = a2 * sum_a + b2 * sum_b", "y[2] = b2 * sum_a + a2 * sum_b", "y dx"),
    ("infinity forgotten in the adjoint of A", "dy[HALF == 0 ? 0 : 3]", "dy[HALF == 0 ? 0 : 2]", "dw"),
    ("a sign of G's adjoint", "dw[1] = difference_a + difference_b", "dw[1] = difference_a - difference_b", "dw"),
    ("the padding of the input gradient", "2 - s.pad_h, 2 - s.pad_w", "1 - s.pad_h, 2 - s.pad_w", "dx"),
    ("taps of the input gradient not reversed", "w + 8 * s.C * s.K, -s.C * s.K", "w, s.C * s.K", "dx"),
    ("the first row of an image taken for padding", "h + i >= 0 &&", "h + i > 0 &&", "y dx dw"),
    ("the last channel of a block left out", "c < least(BLOCK, C - c0)", "c < least(BLOCK, C - c0) - 1", "y dx"),
    ("the last tile of a group left out", "t < least(GROUP, tiles)", "t < least(GROUP, tiles) - 1", "dw"),
]  # fmt: skip


# One instruction set is enough for a test of the tests.
if "TINYRES_CPU_ISA" not in os.environ:

    @pytest.fixture(scope="module")
    def run_fault(tmp_path_factory):
        """Results of the kernels with a piece of their code replaced; all are compiled at once."""
        folder, compiler = tmp_path_factory.mktemp("faults"), os.environ.get("CXX", "g++")
        source = (ROOT / "csrc/cpu/winograd.cpp").read_text()
        flags = ["-std=c++17", "-O1", "-Wno-psabi", "-pthread", f"-I{ROOT}/csrc/cpu", f"-I{ROOT}/csrc"]
        flags += ["-DTINYRES_TARGET=baseline", "-DTINYRES_VECTOR_BYTES=16"]
        for name in ("memory", "parallel"):
            subprocess.run([compiler, *flags, "-c", ROOT / f"csrc/{name}.cpp", "-o", folder / f"{name}.o"], check=True)

        def build(job):
            number, (code, instead) = job
            place = folder / str(number)
            place.mkdir()
            assert source.count(code) == 1, code
            (place / "winograd.cpp").write_text(source.replace(code, instead))
            (place / "main.cpp").write_text(PROGRAM)
            objects = [folder / "memory.o", folder / "parallel.o"]
            subprocess.run([compiler, *flags, place / "main.cpp", *objects, "-o", place / "main"], check=True)
            return place / "main"

        changes = [("TASKS = 16", "TASKS = 16"), *((code, instead) for _, code, instead, _ in FAULTS)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            programs = dict(zip([None, *(f[0] for f in FAULTS)], pool.map(build, enumerate(changes)), strict=True))

        def run(fault, g):
            sizes = map(str, (g.N, g.H, g.W, g.C, g.K, g.padding[0]))
            data = b"".join(a.tobytes() for a in arrays_of(g))
            done = subprocess.run([programs[fault], *sizes], input=data, capture_output=True, check=True)
            shapes = (g.y, g.x, g.w)
            ends = [0, *itertools.accumulate(int(np.prod(shape)) for shape in shapes)]
            flat = np.frombuffer(done.stdout, np.float32)
            return [flat[a:b].reshape(s) for a, b, s in zip(ends, ends[1:], shapes, strict=False)]

        return run

    def test_the_program_with_no_fault_passes(run_fault):
        g = geometry(3, 9, 10, 18, 20)
        assert_near(g, run_fault(None, g))

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
    def test_a_planted_fault_is_noticed(run_fault, fault):
        g = geometry(3, 9, 10, 18, 20)
        got, right = run_fault(fault[0], g), all_three(g, arrays_of(g), "winograd")
        for i, name in enumerate(NAMES):
            results = [*right]
            results[i] = got[i]
            if name in fault[3].split():
                with pytest.raises(AssertionError, match=rf"^{name}: error"):
                    assert_near(g, results)
            else:
                assert_near(g, results)


# The page -----------------------------------------------------------------------------------------------------------


def test_the_page_has_the_committed_errors():
    result = json.loads((ROOT / "benchmarks/results/winograd_error.json").read_text())
    assert report.winograd_error(result) in (ROOT / "docs/winograd.md").read_text()
    for row in result["rows"]:
        assert all(row["winograd"][name] <= 5 * row["direct"][name] for name in NAMES)
    assert result["points"]["0, ±3/4, ±3/2"] < 0.6 * result["points"]["0, ±1, ±2"]


def test_the_table_of_errors_is_measured():
    """On small layers: errors of the expected size, and the emulation in NumPy makes those of the kernel."""
    row = winograd_error.measure((2, 8, 16), "none")
    assert 1e-7 < row["direct"]["y"] < row["winograd"]["y"] < 1e-6
    x, w, dy = winograd_error.drawn((2, 8, 16), 0)
    y = winograd_error.ours("direct", *(a.astype(np.float64) for a in (x, w, dy)))[0]
    ours, emulated = winograd_error.ours("winograd", x, w, dy)[0], winograd_error.emulated("3/4", "3/2", x, w)
    assert error(emulated, y) < 2 * error(ours, y) < 4 * error(emulated, y)
