"""The pieces of the training loop, and whole runs of examples/cifar_resnet.py on a tiny set."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from runs import FILES, metrics, state, write_tiny_cifar
from tinyres import nn, train
from tinyres.backend import random
from tinyres.errors import CheckpointError, NonFiniteError

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar_resnet.py"
CHECKPOINT = "checkpoint.safetensors"

# Runs the example; argv: what happens when, with commas between, the example, its own arguments. "3" is a Ctrl-C at
# step 3, "load" one while data are loaded; at "full3" the disk is full, no file may outgrow 100 bytes, and at "room3"
# it no longer is.
DRIVER = """
import resource, runpy, signal, sys
from tinyres import data

class Loader(data.Loader):
    def __init__(self, *arguments, **settings):
        self.stop_at("load")
        super().__init__(*arguments, **settings)

    def batch(self, step):
        self.stop_at(str(step))
        return super().batch(step)

    def stop_at(self, now):
        for event, room in (("full", 100), ("room", resource.RLIM_INFINITY)):
            if event + now in stops:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
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
    """50 training and 20 test images of noise: 3 batches of 16 an epoch."""
    return write_tiny_cifar(tmp_path_factory.mktemp("data"))


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


@pytest.mark.skipif("emulated" not in DEVICES, reason="the emulation was not built")
def test_steps_as_graphs(run, tmp_path):
    """A run whose steps are captured, and the same stopped and resumed before any was."""
    settings = "--device", "emulated", "--graph", "on", "--precision", "bfloat16", "--batch-size", "4"
    settings += "--recipe", "paper2015"
    run(tmp_path / "whole", *settings, "--iterations", "5")
    run(tmp_path / "run", *settings, "--iterations", "3")
    run(tmp_path / "run", *settings, "--iterations", "5", "--resume")
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    [line] = metrics(tmp_path / "whole")
    assert line == metrics(tmp_path / "run")[-1] and line["step"] == 5 and 0 < line["train_loss"] < 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]["graph"] == "on"


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


def test_a_disk_that_is_full_for_a_while(run, whole, tmp_path):
    """Neither the checkpoint nor more than half a line of metrics can be written at step 3; at step 6 all can."""
    out = tmp_path / "run"
    printed = run(out, "--iterations", "7", stop_at="full2,room5")
    notes = [line for line in printed.splitlines() if "not written" in line]
    wanted = [f"not written: [Errno 27] File too large: '{out}/{name}'" for name in ("metrics.jsonl", CHECKPOINT)]
    assert [note.split(";")[0] for note in notes] == wanted
    assert state(out) == state(whole[0]) and metrics(out) == metrics(whole[0])


def test_a_disk_that_is_full_to_the_end(run, whole, tmp_path):
    """Status 1, the checkpoint of step 3 as it was, and the run goes on from there."""
    out = tmp_path / "run"
    printed = run(out, "--iterations", "7", stop_at="full4", status=1)
    assert printed.count("not written: ") == 4 and "epoch 2: train loss" in printed and "Traceback" not in printed
    assert f"error: [Errno 27] File too large: '{out}/{CHECKPOINT}'\n" in printed
    assert tinyres.load(out / CHECKPOINT)["step"] == 3
    printed = run(out, "--iterations", "7", "--resume")
    assert "resuming at step 3" in printed
    assert state(out) == state(whole[0]) and metrics(out) == metrics(whole[0])


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
    model[0].eval()
    loss, error = train.evaluate(model, Three())
    assert error == pytest.approx(100 / 3) and loss == pytest.approx((9 + 3 * np.log1p(np.exp(-9))) / 3)
    assert model.training and not model[0].training and model[1].training
    model[0].weight.data[...] = np.nan
    with pytest.raises(NonFiniteError, match=r"the test loss must be finite; got nan at step 7: .* is 0 \(Linear\)"):
        train.evaluate(model, Three(), 7)
    assert model.training and not model[0].training and model[1].training


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


def test_metrics_that_cannot_be_written(tmp_path, monkeypatch):
    """They come with the next line, or at the end, and half a line goes."""
    path = tmp_path / "metrics.jsonl"
    log = train.MetricsLog(path)
    log.write(step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (2, 3):
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # a line and a half
        try:
            with pytest.raises(OSError, match=f"'{path}'$"):
                log.write(step=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b'{"step": 1}\n{"st'
    log.write(step=4)
    assert [line["step"] for line in train.read_metrics(path)] == [1, 2, 3, 4]
    path.unlink()
    log.write(step=5)
    assert train.read_metrics(path) == log.lines and len(log.lines) == 5
    path.write_bytes(b"")
    log.complete()
    assert train.read_metrics(path) == log.lines
    monkeypatch.setattr(train, "write_atomic", None)
    log.complete()  # nothing is to be done


class Part:
    """Something that a run saves and restores."""

    def __init__(self, value=None):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def run_in(out, *, resume=True, **settings):
    return train.Run(out, {"lr": 0.1, **settings}, {"device": "cpu"}, resume)


@pytest.fixture
def saved_twice(tmp_path):
    """A run's folder with checkpoints of steps 1 and 2, the later one's `part` being twenty."""
    run = run_in(tmp_path)
    for run.step in (1, 2):
        run.save(part=Part(10 * run.step))
        run.metrics.write(step=run.step)
    return tmp_path


def test_a_damaged_checkpoint_has_a_backup(saved_twice, capsys):
    """Whatever bit of it is flipped, the run goes on: from there (spaces that pad the header) or the one before."""
    path, backup = saved_twice / CHECKPOINT, (saved_twice / "checkpoint.backup.safetensors").read_bytes()
    whole, metrics = path.read_bytes(), (saved_twice / "metrics.jsonl").read_bytes()
    steps = []
    for place in range(0, len(whole), 3):
        damaged = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        (saved_twice / "metrics.jsonl").write_bytes(metrics)
        run, part = run_in(saved_twice), Part()
        run.restore(part=part)
        assert part.value == 10 * run.step and [line["step"] for line in run.metrics.lines][-1] == run.step
        steps.append(run.step)
        if run.step == 1:
            assert (saved_twice / "checkpoint.unreadable.safetensors").read_bytes() == damaged and not path.exists()
        assert (saved_twice / "checkpoint.backup.safetensors").read_bytes() == backup
    assert steps.count(1) >= len(steps) - 8
    assert f"going on from {saved_twice}/checkpoint.backup.safetensors\nresuming at step 1" in capsys.readouterr().out


def test_killed_between_the_two_moves(saved_twice):
    os.replace(saved_twice / CHECKPOINT, saved_twice / "checkpoint.backup.safetensors")
    run = run_in(saved_twice)
    assert run.step == 2 and run.saved["part"] == {"value": 20}
    run.step = 3
    run.save(part=Part(30))
    assert tinyres.load(saved_twice / CHECKPOINT)["step"] == 3
    assert tinyres.load(saved_twice / "checkpoint.backup.safetensors")["step"] == 2


def test_checkpoints_that_a_run_cannot_go_on_from(saved_twice):
    """Of other settings, both damaged, of a newer version, of no run, of another model: all stays as it was."""

    def refused(message, **settings):
        before = {path.name: path.read_bytes() for path in saved_twice.iterdir()}
        with pytest.raises(CheckpointError, match=message):
            run = run_in(saved_twice, **settings)
            run.restore(part=nn.Linear(2, 2))
        assert {path.name: path.read_bytes() for path in saved_twice.iterdir()} == before

    path, backup = saved_twice / CHECKPOINT, saved_twice / "checkpoint.backup.safetensors"
    refused(r"^\[resume\] lr must be that of the run in .*; got checkpoint 0.1, now 0.2", lr=0.2)
    refused(rf"^\[resume\] {path}: part does not fit: .*missing weight; .*unexpected value")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(r"lr must be", lr=0.2)
    backup.write_bytes(b"")
    refused(rf"^\[load\] {path} is no readable safetensors file")
    backup.unlink()
    refused(rf"^\[load\] {path} is no readable safetensors file")
    path.write_bytes(content.replace(b'"version":"1"', b'"version":"2"'))
    refused(r"reads checkpoints of format version 1; got .* version 2")
    tinyres.save(path, weights=np.ones(2))
    refused(rf"^\[resume\] {path} must be the checkpoint of a run")


def test_afresh_takes_the_backup_along(saved_twice):
    run_in(saved_twice, resume=False)
    names = {"checkpoint.previous.safetensors", "checkpoint.backup.previous.safetensors", "metrics.previous.jsonl"}
    assert {path.name for path in saved_twice.iterdir()} == {*names, "metrics.jsonl"}


def test_a_run_goes_on_with_its_random_numbers(tmp_path):
    first = train.Run(tmp_path, {}, {}, False)
    for name in random.STREAMS[1:]:
        random.next_draw(name)
    state = random.state()
    first.save()
    tinyres.manual_seed(9)
    train.Run(tmp_path, {}, {}, True).restore()
    assert random.state() == state


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


def test_curves_that_cannot_be_written(tmp_path):
    line = {"step": 1, "test_error": 1.0, "train_error": 1.0, "train_loss": 1.0, "lr": 0.1}
    train.MetricsLog(tmp_path / "metrics.jsonl").write(**line)
    note = train.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "absent" / "curves.png")
    assert note.startswith("no curves.png: [Errno 2]")


def test_durations_and_memory():
    assert [train.duration(s) for s in (0, 59.6, 3599, 3600, 90061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]
    assert 2**20 < train.peak_memory() < 2**40
