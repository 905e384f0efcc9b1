"""The benchmarks' own code: cases, measuring and checking, tables and plots. Nothing here is a measurement."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres.backend import spec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import kernel_cases  # noqa: E402
import kernels  # noqa: E402
import op_cost  # noqa: E402
import report  # noqa: E402
import train_step  # noqa: E402

MEASURED = [device for device in DEVICES if device in kernels.IMAGES]
LIMITS = {"fma_gflops": 100.0, "copy_gbs": 10.0}
TINY = kernel_cases.all_cases(1, 0)


@pytest.mark.parametrize("device", kernels.IMAGES)
def test_cases_and_kernel_table_agree(device):
    cases = kernel_cases.all_cases(*kernels.IMAGES[device])
    assert {case.kernel for case in cases} == {*spec.MANDATORY, *spec.FUSED}
    assert len({case.name for case in cases}) == len(cases)
    kernel_cases.check_complete(cases)
    with pytest.raises(SystemExit, match="relu"):
        kernel_cases.check_complete([case for case in cases if case.kernel != "relu"])


def test_parameters_are_those_of_the_networks():
    count = {20: kernel_cases.resnet20_parameters(), 50: kernel_cases.resnet50_parameters()}
    assert {depth: sum(map(math.prod, shapes)) for depth, shapes in count.items()} == {20: 269_722, 50: 25_557_032}


def test_operations_and_bytes_of_a_convolution():
    case = next(case for case in TINY if case.name == "conv2d_forward 3x3/1 1x32x32, 16 to 16")
    assert case.flops == 2 * 32 * 32 * 16 * 9 * 16
    assert case.moved == 4 * (2 * 32 * 32 * 16 + 9 * 16 * 16)
    row = kernels.rates(case, 1e-3, LIMITS)
    assert row["bound"] == "arithmetic" and row["share"] == round(case.flops / 100e9 / 1e-3, 3)


class InProcess:
    """kernels.Server without a process around it; JSON as between processes."""

    def __init__(self, device):
        self.server = kernels.Server()
        self.server.side = kernels.Ours(device, 1, "auto")
        self.server.fill, self.server.cases, self.server.ready = None, TINY, None

    def ask(self, **request):
        return json.loads(json.dumps(self.server(request)))


@pytest.mark.parametrize("device", MEASURED)
@pytest.mark.parametrize("name", ["relu 1x32x32x16", "matmul 1x64 by 64x10", "sgd ResNet-20"])
def test_measure(name, device, monkeypatch):
    monkeypatch.setattr(kernels, "TURN", 1e-4)
    monkeypatch.setattr(kernels, "ROTATED", 1 << 20)
    number = next(i for i, case in enumerate(TINY) if case.name == name)
    row = kernels.measure(number, TINY[number], InProcess(device), None, 2, LIMITS)
    assert row["ms"]["median"] > 0 and row["gbs"] > 0 and row["gflops"] > 0
    assert row["checked_by"] == "reference" and row["difference"] <= kernels.TOLERANCE
    assert row["torch_ms"] is None and row["ratio"] is None


def test_differences_are_noticed():
    right = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    want = {"digests": [kernels.digest(right)]}
    assert kernels.largest_difference({"digests": [kernels.digest(right + 1e-6)]}, want, "right") < 1e-5
    wrong = {
        "one block": np.where(np.arange(4)[:, None, None] == 3, 0, right),
        "order": right.transpose(1, 0, 2).copy().reshape(right.shape),
        "shape": right[:, :4],
        "NaN": np.full_like(right, np.nan),
        "a little": right * np.float32(1.001),
    }
    for name, array in wrong.items():
        with pytest.raises(SystemExit, match=name):
            kernels.largest_difference({"digests": [kernels.digest(array)]}, want, name)
    with pytest.raises(SystemExit):
        kernels.largest_difference({"digests": []}, want, "nothing")


def test_kernels_are_chosen_by_their_first_words():
    def names(*words):
        return {TINY[i].kernel for i in kernels.chosen(words, TINY)}

    assert names("add") == {"add", "add_relu"}
    backward = {"conv2d_backward", "conv2d_backward_input", "conv2d_backward_weight"}
    assert names("conv2d_backward", "exp") == {*backward, "exp"}
    assert names() == {case.kernel for case in TINY}
    with pytest.raises(SystemExit, match="con"):
        names("con")


class SlowHost:
    """A clock of a GPU that needs one unit for a fill and two for a call, while the host needs `host` for a call."""

    def __init__(self, host):
        self.host, self.now, self.done = host, 0.0, 0.0

    def fill(self):
        self.done = max(self.done, self.now) + 1

    def call(self, i):
        self.now += self.host
        self.done = max(self.done, self.now) + 2

    def mark(self):
        return max(self.done, self.now)

    def passed(self, mark):
        return self.now >= mark

    def seconds(self, begin, end):
        return end - begin

    def wait(self):
        self.now = max(self.now, self.done)


@pytest.mark.parametrize("host, seconds, ahead", [(0.1, 2, True), (5, 2, True), (50, 50, False)])
def test_the_host_gets_a_head_start(host, seconds, ahead):
    """Kernels' own time even where the host is slower than they are, as long as it can get ahead of them at all."""
    clock = SlowHost(host)
    got, was_ahead = kernels.seconds_in_queue(clock.call, 20, clock, clock.fill)
    assert was_ahead == ahead and (got == seconds if ahead else got > 2)


def test_timed_counts_calls_after_the_warm_up():
    calls = []
    assert len(harness.timed(calls.append, 4, warm_up=2)) == 4
    assert calls == [0, 1, 0, 1, 2, 3]


def machine(**more):
    return {"cpu": "a CPU", "threads": 2, "isa": "avx2", "numpy": "2", "torch": None, **more}


GPU = {"name": "a GPU", "driver": "580", "cupy": "14", "cuda_of_cupy": "13.0"}
HEAD = {"command": "python benchmarks/kernels.py", "date": "2026-01-01 00:00 UTC", "commit": "abc"}
SPREAD = {"median": 2.0, "p20": 1.5, "p80": 2.5}


def kernels_result(**more):
    row = {"kernel": "relu", "label": "8x8", "ms": SPREAD, "torch_ms": {**SPREAD, "median": 3.0}, "ratio": 1.5}
    row.update(gbs=5.0, gflops=0.6, flops_per_byte=0.125, bound="memory", share=0.5, device_alone=True)
    other = {**row, "kernel": "conv2d_forward", "torch_ms": None, "ratio": None, "gflops": 60.0, "flops_per_byte": 40.0}
    other.update(bound="arithmetic", share=0.6, device_alone=False)
    rows = [row, other, {**row, "kernel": "pad", "gflops": 0.0, "flops_per_byte": 0.0}]
    return {"benchmark": "kernels", **HEAD, "machine": machine(), "limits": LIMITS, "rows": rows, **more}


def test_tables_of_kernels():
    text = report.render([kernels_result()])
    assert "| relu 8x8 | 2.000 (1.500 to 2.500) | 5 | 0.6 | 50% | 3 | 1.50x |" in text
    assert "| conv2d_forward 8x8 (host) | 2.000 (1.500 to 2.500) | 5 | 60 | 60% |  |  |" in text
    assert "a CPU, 2 threads, avx2" in text
    text = report.render([kernels_result(device="cuda", machine=machine(gpu=GPU))])
    assert "on the GPU" in text and "a GPU, driver 580" in text


def test_tables_of_limits_and_steps():
    limits = {**LIMITS, "l2_gbs": 50.0, "launch_us": {"stream": 2.5, "graph": 1.3}}
    text = report.render([{"benchmark": "limits", **HEAD, "machine": machine(gpu=GPU), "limits": limits}])
    assert "| launch_us | stream: 2.5, graph: 1.3 |" in text
    competitors = {
        "ours": {"ms": SPREAD, "images_per_second": 1000, "peak_resident_mib": 9, "peak_device_mib": 7},
        "torch_compile": {"failed": "no compiler"},
    }
    step = {"benchmark": "train_step", **HEAD, "machine": machine(gpu=GPU), "device": "cuda", "depth": 20}
    step.update(batch_size=128, competitors=competitors)
    assert "| tinyres | 2.000 (1.500 to 2.500) | 1,000 | 1 | 7 MiB |" in report.render([step])


def test_tables_of_models_and_of_inference():
    step = {"benchmark": "train_step", **HEAD, "machine": machine(), "model": "resnet50", "inference": True}
    step.update(batch_size=1, competitors={"ours": {"ms": SPREAD, "images_per_second": 9, "peak_resident_mib": 9}})
    assert report.render([step]).startswith("Inference of ResNet-50, batch 1, float32:")
    assert report.headline_train_step(step) == "ResNet-50 inference: 2 ms, 9 images/s"


def test_operations_and_bytes_of_a_step():
    x, w, y = (np.zeros(shape, np.float32) for shape in ((2, 5, 5, 3), (3, 3, 3, 4), (2, 3, 3, 4)))
    flops = 2 * y.size * 27

    def work(name, result, *args, **kwargs):
        return train_step.work(name, args, kwargs, result)

    assert work("conv2d_forward", y, x, w, (1, 1), (0, 0)) == (flops, x.nbytes + w.nbytes + y.nbytes)
    assert work("conv2d_backward_input", x, y, w, x.shape, (1, 1), (0, 0))[0] == flops
    assert work("conv2d_backward_weight", w, y, x, w.shape, (1, 1), (0, 0))[0] == flops
    a, b = np.zeros((6, 5), np.float32), np.zeros((6, 7), np.float32)
    assert work("matmul", np.zeros((5, 7)), a, b, transpose_a=True)[0] == 2 * 5 * 7 * 6
    assert work("matmul", np.zeros((5, 6)), a.T, b, transpose_b=True)[0] == 2 * 5 * 6 * 6
    assert work("sgd", None, [a, b], None, [a, b], [0.0], 0.1) == (0, 2 * (a.nbytes + b.nbytes))


@pytest.mark.parametrize("inference", (False, True))
def test_our_side_of_a_step(inference, tmp_path, capsys):
    train_step.write_inputs(tmp_path / "inputs.npz", "resnet20", 2, inference)
    with np.load(tmp_path / "inputs.npz") as file:
        ours = train_step.Ours("resnet20", dict(file), 1, "cpu", inference)
    first = ours.value(ours.step(0))
    assert math.isfinite(first) and ours.value(ours.step(1)) != first
    ours.reset()
    assert ours.value(ours.step(0)) == pytest.approx(first, rel=1e-6)
    began = time.perf_counter()
    profile = ours.profile(1)
    elapsed = time.perf_counter() - began
    assert ("sgd" in profile["kernels"]) != inference
    convolution = profile["kernels"]["conv2d_bias_forward" if inference else "conv2d_forward"]
    assert convolution["calls"] == 19 and convolution["flops"] > 0.99 * 2 * 2 * 40.5e6
    assert 0 < 2e-3 * sum(row["ms"] for row in profile["kernels"].values()) < elapsed, "ms of one of two steps"
    train_step.print_profile(profile, LIMITS)
    assert "Python and everything else" in capsys.readouterr().out


def test_a_busy_core_is_left_alone_again():
    with train_step.busy_core(0) as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_the_cost_of_ops(monkeypatch):
    monkeypatch.setattr(op_cost, "LINKS", 3)
    monkeypatch.setattr(harness, "bind", lambda threads: None)
    before = tinyres.options.current()
    server = op_cost.Server()
    try:
        for op in server(dict(do="start", name="ours"))["ops"]:
            record, sweep = server(dict(do="run", op=op, repeats=1))
            assert record > 0 and sweep > 0
    finally:
        tinyres.options(**before)


def test_table_of_pytorch_alone():
    step = {"depth": 20, "precision": "fp32", "mode": "graph", "ms": 0.5, "images_per_second": 256_000}
    result = {"benchmark": "torch_gpu", "date": "", "machine": {"gpu": "a GPU", "torch": "2", "cuda": "13"}}
    result.update(batch_size=128, steps=[step, {"depth": 56, "precision": "fp32", "mode": "eager", "failed": "why"}])
    assert "| ResNet-20 fp32 graph | 0.5 | 256,000 |" in report.render([result])
    assert report.HEADLINES["torch_gpu"](result) == "PyTorch in float32: ResNet-20 graph 0.5 ms"


def test_table_of_long_runs():
    first = {"step": 100, "resident_mib": 60.5, "pool_mib": 3.1, "files": 4, "threads": 2, "objects": 50_000}
    train = {"marks": [first, {**first, "step": 20_000, "resident_mib": 60.75}], "early_ms": 3.2, "ratio": 1.02}
    result = {"benchmark": "soak", "date": "", "commit": "", "command": "", "device": "cpu"}
    result.update(machine=harness.machine(2), parts={"train": train, "sigkill": {"kills": 100}})
    shown = report.render([result])
    assert "| train | 20,000 | 60.75 | 3.1 | 4 | 2 | 50,000 |" in shown and "| sigkill: kills | 100 |" in shown
    told = "20,000 steps: 60.5 MiB resident at step 100, +0.2 since; a step takes 1.02 times what it took at first"
    assert report.HEADLINES["soak"](result) == told


def test_committed_results_have_tables_and_headlines():
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    assert results
    for result in results:
        assert "| --- |" in report.render([result])
        assert report.HEADLINES[result["benchmark"]](result)


def test_the_readme_shows_the_newest_results():
    text = report.overview(report.newest(ROOT / "benchmarks/results"))
    assert text in (ROOT / "README.md").read_text(), "python benchmarks/report.py rewrites it"


if importlib.util.find_spec("matplotlib"):

    def test_roofline(tmp_path):
        path = tmp_path / "roofline.png"
        report.roofline(kernels_result(), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_roofline_needs_operations(tmp_path):
    with pytest.raises(SystemExit, match="measure it anew"):
        report.roofline(kernels_result(rows=[{"gflops": 0.0}]), tmp_path / "none.png")


def test_the_script_for_gpus_is_bash_and_ends_in_time():
    script = ROOT / "benchmarks/on_gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    words = [line.split() for line in script.read_text().splitlines() if line.lstrip().startswith("step ")]
    limits = {name: int(seconds) for _, name, seconds, *_ in words}
    assert len(limits) > 10
    convolutions = limits['"conv_$conv"']  # runs four times
    assert sum(limits.values()) + 3 * convolutions <= 28 * 60
