"""Counting bytes in the emulation (csrc/cuda/compat/host/traffic.*) and what benchmarks/traffic.py makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
import traffic  # noqa: E402


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/cuda/traffic_test.cpp, compiled as `-DTINYRES_TRAFFIC=ON` has the kernels compiled."""
    folder = tmp_path_factory.mktemp("traffic")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    common = [*compiler, "-O1", "-DTINYRES_TRAFFIC", "-Icsrc", "-Itests/cuda"]
    instrumented = ["-fsanitize=thread", "-fno-tree-vectorize", "-fno-tree-loop-distribute-patterns"]
    sources = {"csrc/cuda/compat/host/traffic.cpp": [], "tests/cuda/traffic_test.cpp": instrumented}
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    output = folder / "traffic_test"
    commands = [
        [*common, *flags, "-c", source, "-o", target]
        for (source, flags), target in zip(sources.items(), objects, strict=True)
    ]
    for command in (*commands, [*compiler, *objects, "-o", output, "-ldl"]):
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    return output


@pytest.mark.parametrize("schedule", ("forward", "random:1"))
def test_kernels_of_known_traffic(program, schedule):
    """And a kernel's name is found by where it lies."""
    environment = {**os.environ, "TINYRES_SCHEDULE": schedule}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    name, offset = done.stdout.split()[:2]
    assert traffic.kernel_names(program)[int(offset)] == name


def test_the_least_that_a_step_moves():
    """ResNet-20's stem and first stage by hand, in units of the stage's outputs; whole networks from there."""
    E = 128 * 32 * 32 * 16 * 2
    stem, first, second = (15.375, 10.375, 5.375), (22, 15, 11), (22, 16, 12)
    strided = (28 / 2, 19 / 2, 17 / 2)  # 16 to 32 channels: E is half of the former, Ei whole
    for level, *parts in zip(traffic.LEVELS, stem, first, second, strided, strict=True):
        of_stem, of_first, of_second, of_strided = parts
        blocks = of_first + of_second
        stage = (of_strided + of_second / 2) * (1 + 1 / 2)  # stage 3 moves half of stage 2
        assert traffic.floors(8, 128, 2)[level] == E * (of_stem + blocks + stage)
        assert traffic.floors(20, 128, 2)[level] == E * (of_stem + blocks + stage + 2 * blocks * (1 + 1 / 2 + 1 / 4))
        assert traffic.floors(20, 8, 4)[level] == traffic.floors(20, 128, 2)[level] / 8


def test_rows_and_report():
    launches = [
        ("conv2d_forward", 16, (2, 1, 1), (256, 1, 1), (400, 64, 32), (128, 128, 0)),
        ("sgd", 32, (1, 1, 1), (256, 1, 1), (10, 0, 32), (5, 0, 32)),
        ("conv2d_forward", 16, (4, 1, 1), (256, 1, 1), (600, 96, 32), (128, 64, 64)),
    ]
    rows = traffic.rows_of(launches, {16: "convolve", 32: "update"})
    assert [(row["kernel"], row["op"], row["launches"]) for row in rows] == [
        ("convolve", "conv2d_forward", 2),
        ("update", "sgd", 1),
        ("total", "", 3),
    ]
    assert rows[0]["read"] == {"asked": 1000, "activations": 160, "others": 64}
    assert rows[2]["written"] == {"asked": 261, "activations": 192, "others": 96}
    chosen = {"depth": 20, "batch": 64, "precision": "bfloat16", "fuse": "layer", "conv": "auto"}
    result = {**chosen, "rows": rows, "floors": {"a": 176, "b": 352, "c": 704}, "optimizer": 20}
    text = report.traffic(result)
    assert "| convolve | conv2d_forward | 2 | 0.000 |" in text
    assert all(f"({level}) | 0.0 | {times} |" in text for level, times in (("a", "2.00"), ("b", "1.00"), ("c", "0.50")))
    assert "3 launches, 0 MB of activations: 2.00x level (a), 1.00x level (b)" in report.headline_traffic(result)
