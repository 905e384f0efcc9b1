"""An alarm for convolutions that have become slow, in continuous integration.

A kernel is measured against the multiply-adds that this CPU does in the same seconds, never against an absolute time,
and the alarm is half of the share that it has on a quiet machine. Shared machines are noisy: the best of several runs
counts, and only a kernel that is slow in each of a few attempts is slow.
"""

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinyres
from tinyres import _cpu

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import limits  # noqa: E402

ATTEMPTS, RUNS, IMAGES = 5, 20, 16

# The share of the peak of one core on a quiet machine, of direct convolution: in the forward pass, by input, by weight.
LAYERS = {  # H and W, C, K, stride
    (32, 16, 16, 1): (0.75, 0.75, 0.75),
    (16, 32, 32, 1): (0.80, 0.80, 0.85),
    (8, 64, 64, 1): (0.80, 0.80, 0.80),
    (32, 16, 32, 2): (0.65, 0.65, 0.60),
}
PASSES = ("forward", "input", "weight")


def fastest(call):
    best = float("inf")
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def shares(layer, algorithm):
    """By pass, the multiply-adds a second of the layer over those of a loop of nothing else, on one thread."""
    size, C, K, stride = layer
    kernels, out = tinyres.backend.get("cpu").kernels, size // stride
    rng = np.random.default_rng(0)
    shapes = (IMAGES, size, size, C), (3, 3, C, K), (IMAGES, out, out, K)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    geometry = (stride, stride), (1, 1)
    calls = {
        "forward": lambda: kernels.conv2d_forward(x, w, *geometry),
        "input": lambda: kernels.conv2d_backward_input(dy, w, x.shape, *geometry),
        "weight": lambda: kernels.conv2d_backward_weight(dy, x, w.shape, *geometry),
    }
    with tinyres.options(threads=1, conv=algorithm):
        times = {name: fastest(call) for name, call in calls.items()}
    peak = 1e9 * limits.fma_gflops(1, _cpu.isa())
    return {name: 2 * dy.size * 9 * C / seconds / peak for name, seconds in times.items()}


def slow(best, layer):
    """The passes that reach less than half of what is expected of them."""
    return [name for name, expected in zip(PASSES, LAYERS[layer], strict=True) if best[name] < expected / 2]


# The peak is that of a loop which the C compiler makes.
if shutil.which("cc"):

    @pytest.mark.parametrize("algorithm", ("auto", "direct"))
    @pytest.mark.parametrize("layer", LAYERS, ids=str)
    def test_convolutions_use_the_machine(layer, algorithm):
        best = dict.fromkeys(PASSES, 0.0)
        for _ in range(ATTEMPTS):
            best = {name: max(share, best[name]) for name, share in shares(layer, algorithm).items()}
            if not slow(best, layer):
                return
        pytest.fail(f"{', '.join(slow(best, layer))}: shares of the peak {best}, expected {LAYERS[layer]}")

    def test_the_alarm_goes_off(monkeypatch):
        """The readable loops, which nothing was done to make fast, are slow by this measure."""
        monkeypatch.setitem(globals(), "RUNS", 2)
        layer = (8, 64, 64, 1)
        assert slow(shares(layer, "naive"), layer) == list(PASSES)
