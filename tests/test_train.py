"""The pieces of the training loop, and whole runs of examples/cifar_resnet.py on a tiny set."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyres
from tinyres import nn, train
from tinyres.backend import random
from tinyres.errors import CheckpointError, NonFiniteError

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar_resnet.py"

FILES = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "curves.png"}

# Runs the example; argv: when a Ctrl-C arrives (steps, or "load"; comma between), the example, its own arguments
DRIVER = """
import runpy, signal, sys
from tinyres import data

class Loader(data.Loader):
    def __init__(self, *arguments, **settings):
        self.stop_at("load")
        super().__init__(*arguments, **settings)

    def batch(self, step):
        self.stop_at(str(step))
        return super().batch(step)

    def stop_at(self, now):
        for _ in range(stops.count(now)):
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program in the background of a shell goes without
stops = sys.argv[1].split(",")
data.Loader = Loader
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in CIFAR-10's binary form with 50 training and 20 test images of noise: 3 batches of 16 an epoch."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in [(f"data_batch_{i}", 10) for i in range(1, 6)] + [("test_batch", 20)]:
        records = rng.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, count)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


@pytest.fixture(scope="module")
def run(tiny):
    """Run the example in a process of its own and return what it printed."""
    package = Path(tinyres.__file__).parents[1]

    def run(out, *arguments, stop_at="", status=0):
        command = [sys.executable, "-c", DRIVER, str(stop_at), str(EXAMPLE), "--out", str(out), "--device", "cpu"]
        command += ["--depth", "8", "--batch-size", "16", *arguments]
        env = {**os.environ, "PYTHONPATH": str(package), "TINYRES_DATA": str(tiny)}
        done = subprocess.run(command, cwd=tiny, env=env, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def metrics(out, *, timing=False):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timing or k not in ("seconds", "images_per_second")} for line in lines]


def leaves(tree, path=()):
    """Every value of a checkpoint but the times, by path; arrays as dtype, shape and bytes."""
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in leaves(item, (*path, key)).items()}
    if isinstance(tree, list):
        return {k: v for i, item in enumerate(tree) for k, v in leaves(item, (*path, i)).items()}
    if isinstance(tree, np.ndarray):
        tree = (tree.dtype.str, tree.shape, tree.tobytes())
    return {} if "seconds" in path else {path: tree}


def state(out):
    return leaves(tinyres.load(out / "checkpoint.safetensors"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of 7 steps that nothing disturbed: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(out, "--iterations", "7")


def test_a_run_writes_its_files(whole):
    out, printed = whole
    assert {path.name for path in out.iterdir()} == FILES
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == "quick" and config["device"] == "cpu" and config["total_steps"] == 7
    assert config["environment"]["isa"] in ("baseline", "avx2", "avx512")
    lines = metrics(out, timing=True)
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line in lines:
        assert line.keys() >= {"epoch", "lr", "train_loss", "train_error", "test_error", "images_per_second", "seconds"}
        assert 0 <= line["test_error"] <= 100 and 0 <= line["train_error"] <= 100 and line["images_per_second"] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "a part of cifar10: 50 training and 20 test images" in printed and "test      error" in printed
    assert "\r" not in printed and len(printed.splitlines()) < 24


def test_stopped_and_resumed_equals_never_stopped(run, whole, tmp_path):
    """Stopped in mid-epoch and once more at an epoch's end: the same tensors, sums and metrics."""
    out = tmp_path / "run"
    printed = run(out, "--iterations", "7", "--resume", stop_at=1, status=130)  # afresh: there is no checkpoint yet
    assert "stopped at step 2 of 7" in printed
    printed = run(out, "--iterations", "7", "--resume", stop_at=5, status=130)
    assert "resuming at step 2" in printed and "stopped at step 6 of 7" in printed
    with open(out / "metrics.jsonl", "a") as file:  # as if killed between the line and the checkpoint of step 7
        file.write('{"step": 7, "test_error": 0.0}\n{"step"')
    run(out, "--iterations", "7", "--resume")
    assert state(out) == state(whole[0])
    assert metrics(out) == metrics(whole[0])
    before = (out / "metrics.jsonl").read_bytes()
    run(out, "--iterations", "7", "--resume")  # a complete run has nothing left to do
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_says_when_the_kernels_are_others(run, tmp_path, monkeypatch):
    run(tmp_path / "run", "--iterations", "1")
    monkeypatch.setenv("TINYRES_CPU_ISA", "baseline")
    assert "other kernels than before" in run(tmp_path / "run", "--iterations", "1", "--resume")


def test_resume_refuses_another_run(run, whole):
    printed = run(whole[0], "--iterations", "7", "--resume", "--lr", "0.2", status=1)
    assert "[resume] lr must be that of the run in" in printed and "checkpoint 0.4, now 0.2" in printed
    printed = run(whole[0], "--iterations", "7", "--resume", "--precision", "bfloat16", status=1)
    assert "[resume] precision must be that of the run in" in printed and "float32, now bfloat16" in printed
    assert "Traceback" not in printed


def test_afresh_replaces_the_old_run(run, whole, tmp_path):
    out = tmp_path / "run"
    run(out, "--iterations", "1", "--seed", "1")
    before = state(out), metrics(out)
    printed = run(out, "--iterations", "7")
    assert state(out) == state(whole[0]) and metrics(out) == metrics(whole[0])
    assert f"the old checkpoint is now {out}/checkpoint.previous.safetensors" in printed
    for kept in ("checkpoint.safetensors", "metrics.jsonl"):
        (out / kept.replace(".", ".previous.")).replace(out / kept)
    assert (state(out), metrics(out)) == before


def test_stopped_at_once(run, tmp_path):
    """A Ctrl-C while the data are loaded, and a second one in the loop."""
    for stop_at in ("load", "1,1"):
        printed = run(tmp_path / "run", "--iterations", "7", stop_at=stop_at, status=130)
        assert printed.endswith("stopped at once\n") and "Traceback" not in printed


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        printed = run(out, "--iterations", "1", status=1)
        assert str(out) in printed.splitlines()[-1] and printed.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in printed


def test_resume_refuses_garbage_in_the_metrics(run, tmp_path):
    out = tmp_path / "run"
    run(out, "--iterations", "1")
    with open(out / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    before = (out / "metrics.jsonl").read_bytes()
    printed = run(out, "--iterations", "1", "--resume", status=1)
    assert f"error: [metrics] {out}/metrics.jsonl, line 2: " in printed and "Traceback" not in printed
    assert (out / "metrics.jsonl").read_bytes() == before


def test_paper_recipe(run, tmp_path):
    run(tmp_path / "run", "--recipe", "paper2015", "--epochs", "4", "--iterations", "9", "--no-augment", "--plain")
    # 12 steps of the schedule, of which 9 are run: the rate falls at 6 and at 9
    assert [(line["step"], line["lr"]) for line in metrics(tmp_path / "run")] == [
        (3, 0.1), (6, 0.1), (9, pytest.approx(0.01)),
    ]  # fmt: skip


def test_every_choice_of_network_and_recipe(run, tmp_path):
    """One step of each; what the layers then do is tested in test_models.py and test_recipes.py."""
    out = tmp_path / "run"
    run(out, "--iterations", "1", "--unit", "full_preactivation", "--skip", "exclusive_gate", "--gate-bias", "-6")
    assert json.loads((out / "config.json").read_text())["model"] == "resnet8-full_preactivation-exclusive_gate--6"
    out = tmp_path / "other"
    run(out, "--iterations", "1", "--recipe", "akamaster", "--bn-group", "4", "--no-norm-decay", "--recompute-bn",
        "--skip", "constant", "--scales", "0.5", "1", "--block", "single")  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["bn_group"], config["norm_decay"]) == ("resnet8-single-constant-0.5-1.0", 4, False)
    assert "[bn_group] a group must have" in run(tmp_path / "none", "--bn-group", "0", status=1)
    assert "scales is for skip constant" in run(tmp_path / "none", "--scales", "1", "1", status=1)


def test_deep_nets_warm_up(run, tmp_path):
    run(tmp_path / "run", "--recipe", "paper2015", "--depth", "110", "--batch-size", "2", "--iterations", "1")
    assert [line["lr"] for line in metrics(tmp_path / "run")] == [0.01]


def test_the_warm_up_ends_with_the_training_error(run, tmp_path):
    """All images are of one class, so that the error soon falls: the rate goes from 0.01 to 0.1, once."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / f"{name}.bin").write_bytes(bytes([3] + [100] * 3072) * 4)
    run(tmp_path / "run", "--data-dir", str(folder), "--recipe", "paper2015", "--depth", "110", "--batch-size", "4",
        "--iterations", "60")  # fmt: skip
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates == sorted(rates) and set(rates) == {0.01, 0.1}


def test_a_diverging_run_names_step_and_layer(run, tmp_path):
    printed = run(tmp_path / "run", "--recipe", "paper2015", "--iterations", "9", "--lr", "1e30", status=1)
    message = r"error: \[train\] the loss must be finite; got \S+ at step \d+: .* is \S+ \(\w+\)"
    assert re.search(message, printed), printed
    assert "Traceback" not in printed


def test_a_run_that_diverges_in_its_last_step(run, tmp_path):
    """Only the evaluation can see it: no metrics, no checkpoint."""
    printed = run(tmp_path / "run", "--iterations", "1", "--lr", "1e10", status=1)
    message = r"error: \[train\] the test loss must be finite; got \S+ at step 1: the first layer .* is \S+ \(\w+\)"
    assert re.search(message, printed), printed
    assert metrics(tmp_path / "run") == [] and not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_bad_settings_are_one_line(run, tmp_path):
    for arguments in (
        ["--depth", "21"],
        ["--iterations", "0"],
        ["--batch-size", "0"],
        ["--threads", "0"],
        ["--lr", "nan"],
        ["--seed", "-1"],
    ):
        printed = run(tmp_path / "run", *arguments, status=1)
        assert printed.splitlines()[-1].startswith("error: [") and "Traceback" not in printed, printed


# The pieces


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x):
        return self.rest(self.first(x))


def test_check_finite_names_the_first_layer():
    model, x = Layers(), np.ones((2, 4), np.float32)
    train.check_finite(1.5, model, x, 3)
    with pytest.raises(NonFiniteError, match="at step 3: .*layer's output is finite, the loss function overflowed"):
        train.check_finite(float("inf"), model, x, 3)
    model.rest[0].weight.data[1, 2] = np.inf
    model.rest[3].weight.data[0, 0] = np.nan
    draws = random.state()
    with pytest.raises(NonFiniteError, match=r"got nan at step 3: .* is rest\.0 \(Linear\); its weight was not finite"):
        train.check_finite(float("nan"), model, x, 3)
    assert random.state() == draws
    x[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="at step 3: the input batch itself is not finite"):
        train.check_finite(float("nan"), model, x, 3)


def test_check_finite_leaves_the_buffers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.copy() for name, value in model.state_dict().items()}
    x = np.full((2, 5, 5, 3), 3e38, np.float32)
    with pytest.raises(NonFiniteError, match=r"is \w*0 \(Conv2d\)$"):
        train.check_finite(float("nan"), model, x, 0)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


class Three:
    """A loader of three points."""

    def epoch(self):
        yield np.array([[9, 0], [0, 9]], np.float32), np.array([0, 1])
        yield np.array([[9, 0]], np.float32), np.array([1])


def test_evaluate():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    model[0].weight.data[...] = np.eye(2)
    model[0].bias.data[...] = 0
    model[1].eval()
    loss, error = train.evaluate(model, Three())
    assert error == pytest.approx(100 / 3) and loss == pytest.approx((9 + 3 * np.log1p(np.exp(-9))) / 3)
    assert model.training and model[0].training and not model[1].training
    model[0].weight.data[...] = np.nan
    with pytest.raises(NonFiniteError, match=r"the test loss must be finite; got nan at step 7: .* is 0 \(Linear\)"):
        train.evaluate(model, Three(), 7)
    assert model.training and model[0].training and not model[1].training


def test_the_device_is_the_models():
    model = nn.Sequential(nn.Linear(2, 2)).to("reference")
    assert np.isfinite(train.evaluate(model, Three())).all()
    with pytest.raises(NonFiniteError, match="every layer's output is finite"):
        train.check_finite(float("nan"), model, np.ones((1, 2), np.float32), 0)
    assert np.isfinite(train.evaluate(nn.Flatten(), Three())).all()  # no parameters: the default device


def test_metrics_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = train.MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step=step, loss=0.1 * step)
    assert [line["step"] for line in train.MetricsLog(path, 20).lines] == [10, 20]
    assert [line["loss"] for line in train.read_metrics(path)] == [1.0, 2.0]
    log = train.MetricsLog(path)
    assert log.lines == [] and path.read_text() == ""
    with pytest.raises(NonFiniteError, match=r"^\[metrics\] "):
        log.write(step=1, loss=float("nan"))
    assert log.lines == [] and path.read_text() == ""


@pytest.mark.parametrize("garbage", [b"{", b"\xff", b"", b"[1]", b'{"loss": 1}', b'{"step": "1"}'])
def test_garbage_in_metrics_is_named(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n{"st')
    with pytest.raises(CheckpointError, match=r"^\[metrics\] .*metrics\.jsonl, line 2: "):
        train.read_metrics(path)


def test_progress_in_plain_lines():
    stream, running = io.StringIO(), train.Running()
    with train.Progress(4, every=0.0, stream=stream) as progress:
        for _ in range(4):
            running.add(2.5, tinyres.tensor(np.eye(3, dtype=np.float32)), np.array([0, 1, 1]), 0.5)
            progress.update(running)
        progress.line("done")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/4  loss 2.500  error 33.3 %  6 images/s  0:") and lines[3].endswith("0:00 left")
    assert len(lines) == 5 and lines[4] == "done"


def test_progress_without_figures():
    stream = io.StringIO()
    with train.Progress(2, every=0.0, stream=stream) as progress:
        progress.update(None)
    assert stream.getvalue().startswith("step 1/2  0:00 left")


def test_progress_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream, running = Terminal(), train.Running()
    with train.Progress(2, stream=stream) as progress:
        running.add(2.5, tinyres.tensor(np.eye(3, dtype=np.float32)), np.array([0, 1, 1]), 0.5)
        progress.update(running)
        progress.update(running)
    assert "loss 2.500  error 33.3 %" in stream.getvalue() and "2/2" in stream.getvalue()


@pytest.mark.parametrize("number", train.Interrupt.SIGNALS)
def test_interrupt(number, capfd):
    before = signal.getsignal(number)
    with train.Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(number)
        assert interrupt.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_curves_without_matplotlib_or_epochs(tmp_path, monkeypatch):
    assert "no epoch is done yet" in train.plot_curves(tmp_path / "absent", tmp_path / "curves.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    note = train.plot_curves(tmp_path / "absent", tmp_path / "curves.png")
    assert "pip install matplotlib" in note and "\n" not in note and not any(tmp_path.iterdir())


def test_durations_and_memory():
    assert [train.duration(s) for s in (0, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]
    assert 2**20 < train.peak_memory() < 2**40
