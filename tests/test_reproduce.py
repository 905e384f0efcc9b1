"""tinyres.analysis beside NumPy, and examples/paper/reproduce.py with whole runs on a tiny set."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinyres
from runs import write_tiny_cifar
from tinyres import analysis, models, nn, ops
from tinyres.backend import random
from tinyres.errors import ArgumentError, CheckpointError, DtypeError, ShapeError

PAPER = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture(scope="module")
def paper():
    """The modules of examples/paper, as the script sees them."""
    sys.path.insert(0, str(PAPER))
    try:
        import experiments
        import figures
        import reproduce
        import tables

        return type("Paper", (), {m.__name__: m for m in (experiments, figures, reproduce, tables)})
    finally:
        sys.path.remove(str(PAPER))


# analysis -------------------------------------------------------------------------------------------------------------

X = np.random.default_rng(1).standard_normal((3, 4, 4, 2)).astype(np.float32)
LABELS = np.array([0, 2, 1])


def conv(x, w):
    """A convolution (N, H, W, C) with (R, S, C, K), padded to its own size, in NumPy."""
    R, S = w.shape[:2]
    padded = np.pad(x, ((0, 0), (R // 2, R // 2), (S // 2, S // 2), (0, 0)))
    return np.einsum("nhwcrs,rsck->nhwk", np.lib.stride_tricks.sliding_window_view(padded, (R, S), (1, 2)), w)


def batch_norm(x, module):
    scale = module.gamma.data / np.sqrt(module.running_var + module.eps)
    return (x - module.running_mean) * scale + module.beta.data


def shaken(model):
    """The model with batch norm's parameters and statistics other than ones and zeros."""
    rng = np.random.default_rng(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            C = len(module.running_mean)
            module.gamma.data, module.beta.data = rng.uniform(0.5, 2, (2, C)).astype(np.float32)
            module.running_mean[...], module.running_var[...] = rng.uniform(0.5, 2, (2, C))
    return model


def test_layer_responses():
    block = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Residual(*block))
    shaken(model)
    y = batch_norm(conv(conv(X, model[0].weight.data), model[1].weight.data), model[2])
    inner = batch_norm(conv(y, block[0].weight.data), block[1])
    last = conv(np.maximum(inner, 0), block[3].weight.data)  # no batch norm follows
    expected = {"1": y.std(), "3.branch.0": inner.std(), "3.branch.3": last.std()}
    measured = analysis.layer_responses(model, [X[:2], X[2:]])  # the deviation is over all batches together
    assert list(measured) == list(expected)
    assert measured == pytest.approx(expected, rel=1e-5)


def test_gradient_norms():
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.GlobalAvgPool2d(), nn.Linear(5, 3))
    w, v, b = model[0].weight.data[0, 0], model[2].weight.data, model[2].bias.data
    pooled = (X @ w).mean((1, 2))
    p = np.exp(pooled @ v + b)
    dlogits = (p / p.sum(1, keepdims=True) - np.eye(3)[LABELS]) / 3
    dw = X.mean((1, 2)).T @ (dlogits @ v.T)
    expected = {"0": np.linalg.norm(dw), "2": np.linalg.norm(pooled.T @ dlogits)}
    measured = analysis.gradient_norms(model, X, LABELS)
    assert list(measured) == ["0", "2"] and measured == pytest.approx(expected, rel=1e-5)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("kind", ["identity", "projection", "constant", "shortcut_gate", "exclusive_gate"])
def test_shortcut_shares(kind):
    """Every term by hand: y = S + B with B = f(x w), and both gradients at x."""
    joins = {"constant": lambda: nn.ConstantScale(0.3, 0.9)}
    joins |= {f"{k}_gate": lambda k=k: nn.Gate(2, -0.5, k == "exclusive") for k in ("shortcut", "exclusive")}
    join = joins[kind]() if kind in joins else None
    shortcut = nn.Conv2d(2, 2, 1) if kind == "projection" else None
    unit = nn.Residual(nn.Conv2d(2, 2, 1), shortcut=shortcut, join=join, activation=None)
    model = nn.Sequential(unit, nn.GlobalAvgPool2d(), nn.Linear(2, 3))
    F = unit.branch[0].weight.data[0, 0]
    Fx = X @ F
    if kind in ("identity", "projection"):
        h = np.eye(2) if shortcut is None else shortcut.weight.data[0, 0]
        S, B = X @ h, Fx
    elif kind == "constant":
        S, B = 0.3 * X, 0.9 * Fx
    else:
        wg = join.conv.weight.data[0, 0]
        g = sigmoid(X @ wg - 0.5)
        S, B = (1 - g) * X, (g * Fx if join.exclusive else Fx)
    v, b = model[2].weight.data, model[2].bias.data
    p = np.exp((S + B).mean((1, 2)) @ v + b)
    dlogits = (p / p.sum(1, keepdims=True) - np.eye(3)[LABELS]) / 3
    dy = np.broadcast_to((dlogits @ v.T / 16)[:, None, None], X.shape)
    if kind in ("identity", "projection"):
        dS, dB = dy @ h.T, dy @ F.T
    elif kind == "constant":
        dS, dB = 0.3 * dy, 0.9 * dy @ F.T
    else:
        dg = dy * ((Fx if join.exclusive else 0) - X)
        dS = (1 - g) * dy + (dg * g * (1 - g)) @ wg.T
        dB = (g * dy if join.exclusive else dy) @ F.T
    expected = [np.linalg.norm(s) / (np.linalg.norm(s) + np.linalg.norm(r)) for s, r in ((S, B), (dS, dB))]
    measured = analysis.shortcut_shares(model, X, LABELS)
    assert list(measured) == ["0"] and list(measured["0"]) == pytest.approx(expected, rel=1e-5)


def test_analysis_on_another_device():
    unit = nn.Residual(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), join=nn.Gate(2, -1, exclusive=True))
    model = shaken(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), unit, nn.GlobalAvgPool2d(), nn.Linear(2, 3)))
    here = [function(model, X, LABELS) for function in FUNCTIONS.values()]
    model.to("emulated")
    for function, expected in zip(FUNCTIONS.values(), here, strict=True):
        measured = function(model, X, LABELS)
        assert list(measured) == list(expected)
        for name, value in measured.items():
            assert value == pytest.approx(expected[name], rel=1e-5)


IMAGES = np.random.default_rng(3).standard_normal((4, 32, 32, 3)).astype(np.float32)
FUNCTIONS = {
    "layer_responses": lambda model, x, labels: analysis.layer_responses(model, [x]),
    "gradient_norms": analysis.gradient_norms,
    "shortcut_shares": analysis.shortcut_shares,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_analysis_leaves_no_trace(name):
    model = shaken(models.cifar_resnet(8, skip="dropout", unit="bn_after_add", shortcut="B"))
    model[4].eval()
    ops.cross_entropy(model(tinyres.tensor(IMAGES)), np.arange(4)).backward()
    state = {key: value.copy() for key, value in model.state_dict().items()}
    grads = [parameter.grad.copy() for parameter in model.parameters()]
    before = repr(model), [m.training for m in model.modules()], random.state(), list(state)
    result = FUNCTIONS[name](model, IMAGES, np.arange(4))
    assert FUNCTIONS[name](model, IMAGES, np.arange(4)) == result  # the same draws of dropout again
    with pytest.raises(ShapeError, match="conv2d"):  # and where it fails in the middle
        FUNCTIONS[name](model, IMAGES[..., :2], np.arange(4))
    assert before == (repr(model), [m.training for m in model.modules()], random.state(), list(model.state_dict()))
    assert not any(module._forward_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        np.testing.assert_array_equal(parameter.grad, grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_analysis_refuses(name):
    with pytest.raises(ArgumentError, match=rf"^\[{name}\] needs the model as it was before tinyres.fuse"):
        FUNCTIONS[name](tinyres.fuse(models.cifar_resnet(8)), IMAGES, np.arange(4))
    with pytest.raises(DtypeError, match=rf"^\[{name}\] needs a Module; got model str"):
        FUNCTIONS[name]("model", IMAGES, np.arange(4))
    with pytest.raises(ArgumentError, match="at least one batch"):
        analysis.layer_responses(models.cifar_resnet(8), [])


@pytest.mark.parametrize("entry", [e for e in models.catalogue() if "depth" in e.arguments and e.dataset != "ImageNet"])
def test_analysis_of_the_papers_units(entry):
    """Small networks of every kind of row: each layer and unit is measured, in order."""
    depth = {"single": 5, "bottleneck": 11}.get(entry.arguments.get("block"), 8)
    model = entry.build(depth=depth)
    windows = [m.weight.shape[:2] for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(analysis.layer_responses(model, [IMAGES])) == windows.count((3, 3)) == depth - 1 - (depth == 11) * 6
    assert len(analysis.gradient_norms(model, IMAGES, np.arange(4))) == len(windows) + 1
    shares = analysis.shortcut_shares(model, IMAGES, np.arange(4))
    assert list(shares) == ([] if entry.arguments.get("plain") else ["3", "4", "5"])
    if entry.arguments.get("scales") == (0, 1):
        assert set(shares.values()) == {(0, 0)}  # "This is a plain net" (2016, Table 1)
    else:
        assert all(0 < value < 1 for share in shares.values() for value in share)


# experiments ----------------------------------------------------------------------------------------------------------


def test_every_row_of_the_catalogue_is_listed(paper, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list"])
    assert paper.reproduce.main() == 0
    printed = capsys.readouterr().out
    experiments = paper.experiments.experiments()
    assert set(experiments) == set(paper.experiments.TITLES)
    for entry in models.catalogue():
        assert re.search(rf"^    {re.escape(entry.name)} .*{re.escape(entry.error)}", printed, re.M), entry.name
        if entry.dataset != "ImageNet":
            assert any(entry in rows for rows in experiments.values()), entry.name
    assert "ImageNet: see examples/imagenet_resnet.py" in printed
    for name in ("2015-table6", "2015-fig6", "2016-table1", "2016-table2", "2016-table3"):
        assert f"{name}: " in printed
    names = [entry.name for rows in experiments.values() for entry in rows]
    assert len({name for rows in experiments.values() for name in {entry.name for entry in rows}}) == len(set(names))
    assert all(len({entry.name for entry in rows}) == len(rows) for rows in experiments.values())


def test_a_run_makes_the_network_of_its_row(paper):
    """The words of its command line, read back by the example's own parser, say what the catalogue says."""
    sys.path.insert(0, str(PAPER.parent))
    try:
        import cifar_resnet
    finally:
        sys.path.remove(str(PAPER.parent))
    for rows in paper.experiments.experiments().values():
        for entry in rows:
            for depth in (None, 20):
                run = paper.experiments.Run(entry, 3, paper.experiments.DATASETS[entry.dataset], depth, 7)
                before, sys.argv = sys.argv, ["cifar_resnet.py", *run.command()]
                try:
                    args = vars(cifar_resnet.parse_arguments())
                finally:
                    sys.argv = before
                assert {name: args[name] for name in run.options} == run.options
                assert (args["recipe"], args["seed"], args["epochs"]) == (f"paper{entry.paper}", 3, 7)
                made = {**args, "num_classes": 100 if args["dataset"] == "cifar100" else 10}
                made["scales"] = made["scales"] and tuple(made["scales"])
                arguments = entry.arguments if depth is None else {**entry.arguments, "depth": depth}
                assert {name: made[name] for name in arguments} == arguments, entry.name
                if depth:  # where another depth no longer says so, the row's bottlenecks stay bottlenecks
                    bottlenecks = entry.arguments["depth"] in (164, 1001)
                    assert made["block"] == ("bottleneck" if bottlenecks else entry.arguments.get("block"))


def test_names_of_runs(paper):
    rows = {entry.name: entry for entries in paper.experiments.experiments().values() for entry in entries}
    Run = paper.experiments.Run
    assert Run(rows["resnet20"], 0, "cifar10").name == "resnet20-seed0"
    assert Run(rows["plain56"], 1, "cifar10", None, 10).name == "plain56-10epochs-seed1"
    name = "resnet164-original-cifar100-depth20-10epochs-seed2"
    assert Run(rows["resnet164-original-cifar100"], 2, "cifar100", 20, 10).name == name
    assert Run(rows["resnet20"], 0, "shapes10").name == "resnet20-shapes10-seed0"


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """160 training and 20 test images of noise: one batch of 128 an epoch."""
    return write_tiny_cifar(tmp_path_factory.mktemp("data"), images=32)


def reproduce(paper, *words):
    """The script's exit status, run in this process; the training runs are processes of their own."""
    package = str(Path(tinyres.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", package)
        patch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
        return paper.reproduce.main()


def small(tiny, runs, *words):
    return [*words, "--depth", 8, "--data-dir", tiny, "--runs", runs, "--device", "cpu", "--threads", 1]


@pytest.fixture(scope="module")
def done(paper, tiny, tmp_path_factory):
    """A folder of runs: plain20 and resnet20 at depth 8, two epochs, two seeds; and a Table 1 row of one."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["2015-fig6", "--rows", "plain20", "resnet20", "--epochs", 2]
    assert reproduce(paper, *small(tiny, runs, *words)) == 0
    first = json.loads((runs / "2015-fig6.json").read_text())
    assert reproduce(paper, *small(tiny, runs, *words, "--seeds", 2)) == 0  # one more seed joins the first
    rows = json.loads((runs / "2015-fig6.json").read_text())["rows"]
    for name, row in first["rows"].items():
        for run, record in row["runs"].items():
            assert rows[name]["runs"][run] == record
    words = ["2016-table1", "--rows", "resnet110-exclusive-gate-6", "--epochs", 1]
    assert reproduce(paper, *small(tiny, runs, *words)) == 0
    return runs


def test_results_are_those_of_the_runs(done):
    results = json.loads((done / "2015-fig6.json").read_text())
    assert results["experiment"] == "2015-fig6" and list(results["rows"]) == ["plain20", "resnet20"]
    for name, row in results["rows"].items():
        assert list(row["runs"]) == [f"{name}-depth8-2epochs-seed{seed}" for seed in (0, 1)]
        for seed, (run, record) in enumerate(row["runs"].items()):
            lines = [json.loads(line) for line in (done / run / "metrics.jsonl").read_text().splitlines()]
            assert record["curves"]["test_error"] == [line["test_error"] for line in lines]
            assert record["curves"]["epoch"] == [1, 2] and record["test_error"] == lines[-1]["test_error"]
            assert (record["seed"], record["depth"], record["epochs"], record["iterations"]) == (seed, 8, 2, 2)
            assert (record["dataset"], record["train_images"], record["recipe"]) == ("cifar10", 160, "paper2015")
            assert record["device"] == "cpu" and record["environment"]["tinyres"] == tinyres.__version__
            assert len(record["layer_responses"]) == 7 and len(record["gradient_norms"]) == 8
            assert len(record["shortcut_shares"]) == (0 if name == "plain20" else 3)
    gate = json.loads((done / "2016-table1.json").read_text())["rows"]["resnet110-exclusive-gate-6"]
    assert gate["paper_error"] == "8.70" and "layer_responses" not in next(iter(gate["runs"].values()))
    assert not list(done.glob(".*"))


def test_the_measured_network_is_the_trained_one(done, tiny):
    name = "resnet20-depth8-2epochs-seed1"
    record = json.loads((done / "2015-fig6.json").read_text())["rows"]["resnet20"]["runs"][name]
    dataset = tinyres.data.load("cifar10", tiny)
    pixel_mean = tinyres.data.statistics(dataset.train_images)[0]
    model = models.cifar_resnet(8)
    model.load_state_dict(tinyres.load(done / name / "checkpoint.safetensors")["model"])
    x = ((dataset.test_images - pixel_mean) / 255).astype(np.float32)
    assert analysis.layer_responses(model, [x]) == pytest.approx(record["layer_responses"], rel=1e-3)


def test_complete_runs_are_not_made_again(paper, done, tiny, monkeypatch):
    before = (done / "2015-fig6.json").read_bytes()
    monkeypatch.setattr(subprocess, "Popen", None)
    words = ["2015-fig6", "--rows", "plain20", "resnet20", "--epochs", 2, "--seeds", 2]
    assert reproduce(paper, *small(tiny, done, *words)) == 0
    assert (done / "2015-fig6.json").read_bytes() == before
    # The same rows of another experiment: their runs are shared, and what is not complete is left alone.
    words = ["2015-table6", "--epochs", 2, "--collect"]
    assert reproduce(paper, *small(tiny, done, *words)) == 0
    rows = json.loads((done / "2015-table6.json").read_text())["rows"]
    assert list(rows) == ["resnet20"]
    (done / "2015-table6.json").unlink()


def test_another_run_in_the_folder_is_refused(paper, done, tiny, tmp_path):
    name = "resnet20-depth8-2epochs-seed0"
    folder = tmp_path / name
    folder.mkdir()
    for path in (done / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    words = small(tiny, tmp_path, "2015-table6", "--rows", "resnet20", "--epochs", 2)
    for changed in ({"lr": 0.2}, {"arguments": {**config["arguments"], "unit": "full_preactivation"}}):
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(CheckpointError, match=r"^\[reproduce\] (lr|unit) of the run in .* must be"):
            reproduce(paper, *words)
    assert not (tmp_path / "2015-table6.json").exists()


def test_stopped_and_resumed(paper, tiny, tmp_path, capfd):
    """A terminal's Ctrl-C, at the whole group: the run writes its checkpoint, and the same command ends it."""
    words = [str(word) for word in small(tiny, tmp_path, "2015-table6", "--rows", "resnet20", "--epochs", 40)]
    folder = tmp_path / "resnet20-depth8-40epochs-seed0"
    metrics = folder / "metrics.jsonl"
    env = {**os.environ, "PYTHONPATH": str(Path(tinyres.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    script = subprocess.Popen(
        [sys.executable, PAPER / "reproduce.py", *words], env=env, start_new_session=True, **pipes
    )
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(script.pid, signal.SIGINT)
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == 130, printed
    assert "of 40; the same command with --resume" in printed and f"stopped in {folder.name}; the same" in printed
    assert 2 <= tinyres.load(folder / "checkpoint.safetensors")["step"] < 40
    assert not (tmp_path / "2015-table6.json").exists()
    assert reproduce(paper, *words) == 0
    assert "resuming at step" in capfd.readouterr().out
    (record,) = json.loads((tmp_path / "2015-table6.json").read_text())["rows"]["resnet20"]["runs"].values()
    assert record["curves"]["step"] == list(range(1, 41))


def test_no_data_ends_it_at_once(paper, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    assert reproduce(paper, *small(tmp_path / "absent", tmp_path / "runs", "2015-table6", "--seeds", 2)) == 1
    assert len([words for (words,) in started if "--depth=8" in words]) == 1
    assert "error: [data.load]" in capfd.readouterr().err


def test_a_failed_run_does_not_stop_the_others(paper, tiny, tmp_path, monkeypatch, capsys):
    """As where one row diverges; and a run that ended by a signal that was not ours stops all."""
    tried = []

    def train(run, folder, args):
        tried.append(run.name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return statuses.pop(0)

    monkeypatch.setattr(paper.reproduce, "train", train)
    statuses = [1, 1, 143]
    words = small(tiny, tmp_path, "2015-table6", "--depths", "20", "32", "44", "56")
    assert reproduce(paper, *words) == 143
    assert tried == [f"resnet{depth}-depth8-seed0" for depth in (20, 32, 44)]
    statuses = [1, 1]
    assert reproduce(paper, *small(tiny, tmp_path / "more", "2015-table6", "--depths", "20", "32")) == 1
    assert "failed: resnet20-depth8-seed0, resnet32-depth8-seed0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["2015-table6", "--rows", "plain20"], "rows of 2015-table6 are resnet20, .*; got row plain20"),
        (["2015-table6", "--depths", "21"], r"depths \[20, 32, 44, 56, 110, 1202\]; got depth 21"),
        (["2015-table6", "--seeds", "0"], "seeds must be positive; got seeds 0"),
        (["2016-table2", "--depth", "8", "--collect"], "with block bottleneck, depth must be 9n"),
        (["2016-table3", "--rows", "resnet110-original", "--depths", "164"], "no row has both"),
    ],
)
def test_bad_arguments(paper, tmp_path, words, message):
    with pytest.raises(ArgumentError, match=message):
        reproduce(paper, *words, "--runs", tmp_path)


# the report -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(paper):
    """A Group of made-up runs of a row, with the given test errors."""
    rows = {entry.name: entry for entries in paper.experiments.experiments().values() for entry in entries}

    def group(name, errors=(7.0, 8.0), **changes):
        entry = rows[name]
        run = {
            "depth": entry.arguments["depth"], "iterations": 64_000, "steps_per_epoch": 390, "epochs": 164.1,
            "dataset": paper.experiments.DATASETS[entry.dataset], "train_images": 50_000, "device": "cpu",
            "recipe": f"paper{entry.paper}", "bn_group": None, "train_error": 1.0, "seconds": 60.0,
            "environment": {"tinyres": "1", "threads": 2, "isa": "avx2"}, "gradient_norms": {"0": 1.0, "1": 2.0},
            "layer_responses": {"0": 0.5, "1": 1.0}, "shortcut_shares": {"3": [0.5, 0.6], "4": [0.7, 0.8]},
        }  # fmt: skip
        run["curves"] = {name: [90.0, 50.0] for name in ("epoch", "step", "train_loss", "train_error")}
        runs = [
            {
                **run,
                "seed": seed,
                "test_error": error,
                **changes,
                "curves": {**run["curves"], "test_error": [60, error]},
            }
            for seed, error in enumerate(errors)
        ]
        return paper.tables.Group(entry, runs)

    return group


def test_what_is_called_a_reproduction(paper, group):
    def verdict(*errors, name="resnet20", **changes):
        return paper.tables.verdict(group(name, errors, **changes))

    short = {"iterations": 3_900, "epochs": 10.0}
    assert verdict(7, 8) == "64,000 iterations, 2 seeds: a reproduction"
    assert verdict(7) == "1 seed: not a reproduction"
    assert verdict(7, 8, **short) == "10 epochs of 164, 2 seeds: not a reproduction"
    assert verdict(7, 8, iterations=63_999) == "164.1 epochs of 164, 2 seeds: not a reproduction"
    assert verdict(7, 8, dataset="shapes10", train_images=20_000) == "on shapes10, 2 seeds: not a reproduction"
    assert verdict(7, 8, train_images=45_000) == "45,000 of 50,000 training images, 2 seeds: not a reproduction"
    assert verdict(7, 8, recipe="quick") == "recipe quick, 2 seeds: not a reproduction"
    assert verdict(7, 8, depth=8) == "depth 8 for 20, 2 seeds: not a reproduction"
    assert verdict(7, **short, depth=8) == "depth 8 for 20, 10 epochs of 164, 1 seed: not a reproduction"
    twice = group("resnet20")
    twice.runs[1]["seed"] = 0
    assert "not a reproduction" in paper.tables.verdict(twice)
    for name, table in paper.experiments.experiments().items():
        for entry in table:
            assert "not a reproduction" in verdict(7, 8, name=entry.name, iterations=63_999), name


def test_means_and_medians(paper, group):
    figure = paper.tables.figure_of
    assert figure(group("resnet20", [7])) == "7.00"
    assert figure(group("resnet20", [7, 8])) == "7.50 ± 0.71"
    five = [1.0, 2.0, 3.0, 4.0, 10.0]
    assert figure(group("resnet20", five)) == "4.00 ± 3.54"  # the 2015 paper gives no medians
    assert figure(group("resnet110-original", five)) == "3.00 (median; mean 4.00 ± 3.54)"
    assert figure(group("resnet110-original", five[:4])) == "2.50 ± 1.29"


def test_runs_of_other_lengths_are_not_averaged(paper, group):
    long, short = group("resnet20", [7, 8]).runs, group("resnet20", [20], iterations=3_900, epochs=10.0).runs
    records = {str(i): run for i, run in enumerate(short + long)}
    groups = paper.tables.groups_of(group("resnet20").entry, records)
    assert [[run["test_error"] for run in each.runs] for each in groups] == [[7, 8], [20]]


def results(paper, path, groups):
    rows = {g.entry.name: {"paper_error": g.entry.error, "runs": {f"r{r['seed']}": r for r in g.runs}} for g in groups}
    path.write_text(json.dumps({"experiment": path.stem, "rows": rows}))
    return path


def test_report(paper, done, tmp_path, capsys):
    assert reproduce(paper, "report", "--runs", done, "--out", tmp_path) == 0
    text, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    errors = [
        run["test_error"]
        for run in json.loads((done / "2015-fig6.json").read_text())["rows"]["plain20"]["runs"].values()
    ]
    ours = f"{np.mean(errors):.2f} ± {np.std(errors, ddof=1):.2f}"
    why = "depth 8 for 20, 2 epochs of 64000, 160 of 50,000 training images, 2 seeds: not a reproduction"
    line = next(line for line in text.splitlines() if line.startswith("| plain20 "))
    assert ours in line and line.endswith(f"| 2 epochs, seeds 0, 1 | cifar10 | cpu | {why} |")
    assert ours in page and why in page
    for rows in paper.experiments.experiments().values():
        for entry in rows:
            if entry.name not in ("plain20", "resnet20", "resnet110-exclusive-gate-6"):
                assert re.search(rf"^\| {re.escape(entry.name)} \| [^|]* \| not run \|", text, re.M), entry.name
    assert not re.search(r": a reproduction", text + page)
    # One file, whole: pictures are in it, and each stands beside the Markdown too.
    assert not re.search(r"https?://|<link|<script", page)
    sources = re.findall(r'src="([^"]*)"', page)
    names = re.findall(r"\]\(([^)]*\.png)\)", text)
    assert len(sources) == len(names) >= 6
    for source, name in zip(sources, names, strict=True):
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert png == (tmp_path / name).read_bytes() and png.startswith(b"\x89PNG")
    assert f"{tmp_path}/report.html" in capsys.readouterr().out


def test_report_without_matplotlib_or_results(paper, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert reproduce(paper, "report", "--runs", tmp_path) == 0
    files = [(tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html")]
    for text in (*files, capsys.readouterr().out):
        assert "No figures: they need Matplotlib (pip install" in text
    rows = sum(map(len, paper.experiments.experiments().values()))
    assert (tmp_path / "report" / "report.md").read_text().count("| not run |") == rows


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {"resnet20": {"runs": {"a": {"seed": 0}}}}}', '{"rows": []}'])
def test_report_refuses_other_files(paper, tmp_path, content):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"^\[report\] .*file\.json must be a result file of reproduce\.py"):
        reproduce(paper, "report", "--results", tmp_path / "file.json", "--out", tmp_path)


def test_report_merges_files(paper, group, tmp_path):
    one = results(paper, tmp_path / "one.json", [group("resnet20", [8.1, 8.3])])
    two = results(paper, tmp_path / "two.json", [group("resnet110-original", [6, 6.2, 6.4, 6.6, 9])])
    assert reproduce(paper, "report", "--results", one, two, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| resnet20 | 8.75 | 8.20 ± 0.14 |" in text
    assert "| resnet110-original | 6.61 | 6.40 (median; mean 6.84 ± 1.23) |" in text
    assert text.count("64,000 iterations, 5 seeds: a reproduction") == 3  # in Tables 1, 2 and 3
    with pytest.raises(CheckpointError, match="rows must be in the catalogue; got unknown .'resnet21'"):
        (tmp_path / "three.json").write_text('{"rows": {"resnet21": {"runs": {}}}}')
        reproduce(paper, "report", "--results", tmp_path / "three.json", "--out", tmp_path)


def test_curves_show_test_bold_and_training_dashed(paper, group):
    figure, _ = paper.figures.error_curves([group("plain20", [30, 20]), group("resnet20"), group("resnet56")])
    plain, residual = figure.axes
    assert plain.get_title() == "plain networks" and residual.get_title() == "residual networks"
    test, training = plain.lines
    assert list(test.get_ydata()) == [60, 25] and list(training.get_ydata()) == [90, 50]  # means over the seeds
    assert test.get_linewidth() > training.get_linewidth() and training.get_linestyle() == "--"
    assert (
        len(residual.lines) == 4 and residual.lines[0].get_color() == test.get_color() != residual.lines[2].get_color()
    )
    figure, _ = paper.figures.responses([group("plain20"), group("resnet20")])
    original, ordered = figure.axes
    assert list(original.lines[0].get_ydata()) == [0.5, 1] and list(ordered.lines[0].get_ydata()) == [1, 0.5]


def test_variants_stand_beside_the_original(paper, group):
    rows = [e.name for e in paper.experiments.experiments()["2016-table2"]]
    figure, _ = paper.figures.loss_curves([group(name) for name in rows])
    twins = [axes for axes in figure.axes if axes.lines and axes.lines[0].get_linestyle() == "-"]
    assert len(twins) == 8 and all(axes.lines[0].get_color() == "black" for axes in twins)
    labels = [[line.get_label() for line in axes.lines] for axes in twins]
    assert ["original", "full preactivation"] in labels and all(len(pair) == 2 for pair in labels)
    figure, _ = paper.figures.shares([group("resnet110-original"), group("resnet110-conv1x1")])
    forward, backward = figure.axes
    assert list(forward.lines[0].get_ydata()) == [0.5, 0.7] and list(backward.lines[0].get_ydata()) == [0.6, 0.8]
