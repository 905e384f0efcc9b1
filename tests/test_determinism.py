"""Which results repeat to the bit: measured, and written down in docs/determinism.md.

python tests/test_determinism.py    measures the devices of this machine and writes the file anew
"""

from pathlib import Path

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, distinct, normal, positive
from tinyres import data, nn, ops

LEDGER = Path(__file__).parent.parent / "docs" / "determinism.md"
THREADS = (1, 2, 3, 4)
COLUMNS = ("cpu", "emulated", "cuda")
UNKNOWN = "not measured"


def cases(n):
    """A case for each op, with a multiple of `n` elements: many, so that threads have something to share out."""
    wide, row, image = normal(n, 33, 65), normal(65), normal(n, 9, 10, 17)
    window, affine = normal(3, 3, 17, 20), (positive(17), normal(17))
    labels = np.arange(16 * n) % 7
    calls = {
        **{name: (wide, row) for name in ("add", "sub", "mul", "maximum")},
        **{name: (wide,) for name in ("neg", "exp", "sigmoid", "tanh", "relu", "dropout", "sum", "mean")},
        **{name: (positive(n, 33, 65),) for name in ("log", "sqrt")},
        "div": (wide, positive(65)),
        "pow": (positive(n, 33, 65), row),
        "add_relu": (wide, wide),
        "max": (distinct(n, 33, 65),),
        "flatten": (wide,),
        "transpose": (wide,),
        "matmul": (normal(16 * n, 65), normal(65, 70)),
        "linear": (normal(16 * n, 65), normal(65, 70), normal(70)),
        "conv2d": (image, window, normal(20)),
        "conv2d_relu": (image, window, normal(20)),
        "conv2d_add_relu": (image, normal(n, 7, 8, 20), window, normal(20)),
        "global_avg_pool2d": (image,),
        **{name: (image, *affine) for name in ("batch_norm", "batch_norm_relu")},
        "batch_norm_add_relu": (image, normal(n, 9, 10, 17), *affine),
    }
    settings = {
        "reshape": (lambda x: ops.reshape(x, (65, -1)), wide),
        "getitem": (lambda x: x[:, ::2], wide),
        "cast": (lambda x: ops.cast(x, "bfloat16") if x.dtype == np.float32 else x * 1, wide),  # not of float64
        "pad": (lambda x: ops.pad(x, ((0, 1), (2, 0), (1, 1))), wide),
        "concatenate": (lambda *xs: ops.concatenate(xs, 1), wide, wide),
        "max_pool2d": (lambda x: ops.max_pool2d(x, 3, 2, 1), image),
        "avg_pool2d": (lambda x: ops.avg_pool2d(x, 3, 2, 1), image),
        "cross_entropy": (lambda x: ops.cross_entropy(x, labels, 0.1), normal(16 * n, 7)),
        "classifier_loss": (
            lambda x, w, b: ops.classifier_loss(x, w, b, labels[:n], 0.1),
            *(image, normal(17, 7), normal(7)),
        ),
    }
    settings |= {name: (getattr(ops, name), *draws) for name, draws in calls.items()}
    return [Case(name, *settings[name]) for name in sorted(settings)]


def repeats(case, device):
    """For forward and backward: whether two runs give the same bits, and whether 1, 2, 3 and 4 threads do."""
    same = {"forward": [True, True], "backward": [True, True]}
    for dtype in (np.float32, np.float64):
        arrays = case.arrays(dtype)
        want = case.run(case.tensors(device, arrays))
        for threads in (None, *THREADS):
            with tinyres.options(threads=threads):
                got = case.run(case.tensors(device, arrays))
            equal = [g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True)]
            for way, parts in (("forward", equal[:1]), ("backward", equal[1:])):
                same[way][threads is not None] &= all(parts)
    return same


def measured(devices):
    """By (op, way) and device, what the ledger says."""
    found = {}
    for device in devices:
        for case in cases(128 if device == "cpu" else 2):
            for way, (runs, threads) in repeats(case, device).items():
                # The threads of a GPU are not ours to count.
                words = ["same bits" if runs else "DIFFERS", "same bits" if threads else "DIFFERS"]
                found[str(case), way, device] = " | ".join(words[:1] if device == "cuda" else words)
    return found


def ledger(found):
    """The file."""
    lines = [
        "# What repeats to the bit",
        "",
        "Each op in float32 and float64, on the inputs of `tests/test_determinism.py`: whether a second run gives the",
        "same bits, and whether 1, 2, 3 and 4 threads do. The test measures it anew and fails where this file differs;",
        "`python tests/test_determinism.py` writes it, for the devices that the machine has. That the bits of one",
        "instruction set are those of another is not promised.",
        "",
        "| op | | cpu: again | cpu: 1 to 4 threads | emulated: again | emulated: 1 to 4 threads | cuda: again |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in sorted({key[:2] for key in found}, key=lambda key: (key[0], key[1] == "backward")):
        blank = {"cuda": UNKNOWN}
        cells = [found.get((name, way, device), blank.get(device, f"{UNKNOWN} | {UNKNOWN}")) for device in COLUMNS]
        lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written():
    """What the file says, as `measured` does."""
    found = {}
    for line in LEDGER.read_text().splitlines() if LEDGER.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[1] in ("forward", "backward"):
            parts = " | ".join(cells[2:4]), " | ".join(cells[4:6]), cells[6]
            found |= {(*cells[:2], device): part for device, part in zip(COLUMNS, parts, strict=True)}
    return found


def test_every_op_is_here():
    assert {str(case) for case in cases(1)} == set(ops.__all__)


def test_the_ledger_is_what_is_measured():
    """A device that this machine lacks, or that the file calls not measured, is left as it stands."""
    before = written()
    known = {device for *_, device in before if any(UNKNOWN not in v for k, v in before.items() if k[2] == device)}
    now = measured([device for device in COLUMNS if device in DEVICES and device in known])
    assert LEDGER.read_text() == ledger(before | now), "python tests/test_determinism.py writes it anew"
    assert "DIFFERS" not in ledger(now), "architecture.md promises that every sum runs over a fixed partition"


def test_the_ledger_can_differ(monkeypatch):
    kernels, noise = tinyres.backend.get("cpu").kernels, np.random.default_rng()
    right = kernels.exp
    monkeypatch.setattr(kernels, "exp", lambda x: right(x) * x.dtype.type(1 + noise.random() / 100))
    (case,) = (case for case in cases(1) if str(case) == "exp")
    assert repeats(case, "cpu") == {"forward": [False, False], "backward": [False, False]}


# Streams ----------------------------------------------------------------------------------------------------------


def run(seed=7, dropout=False, data_seed=None):
    """What chance decides in a few steps of training: initial weights, order, crops; and the dropout masks."""
    tinyres.manual_seed(seed)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    loader = data.Loader(images, np.arange(12), 4, seed=data_seed, augment=True, shuffle=True)
    middle = [nn.Dropout(0.5)] if dropout else []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *middle, nn.GlobalAvgPool2d(), nn.Linear(4, 12))
    weights = [p.numpy().copy() for p in model.parameters()]
    order, crops = [], []
    for step in range(6):
        x, labels = loader.batch(step)
        order.append(labels), crops.append(x)
        model(tinyres.tensor(x))
    late = nn.Linear(3, 5).weight.numpy()  # after as many masks as there were steps
    mask = ops.dropout(tinyres.tensor(np.ones(64))).numpy()
    return {"weights": weights, "order": order, "crops": crops, "late": [late], "mask": [mask]}


def same(a, b, name):
    return all(np.array_equal(x, y) for x, y in zip(a[name], b[name], strict=True))


def test_a_dropout_layer_changes_nothing_else():
    plain, dropped = run(), run(dropout=True)
    assert all(same(plain, dropped, name) for name in ("weights", "late", "order", "crops"))
    assert not same(plain, dropped, "mask"), "the model's masks come before it in their stream"


@pytest.mark.parametrize("dropout", (False, True))
def test_a_seed_repeats_everything(dropout):
    first, again = run(dropout=dropout), run(dropout=dropout)
    assert all(same(first, again, name) for name in first)


def test_what_a_seed_governs():
    """`manual_seed` governs all four; a Loader's own `seed` takes the order of the data and their crops out of it."""
    base, reseeded, reordered = run(), run(seed=8), run(data_seed=8)
    for name in base:
        assert not same(base, reseeded, name), name
        assert same(base, reordered, name) == (name not in ("order", "crops")), name


def test_a_loader_keeps_the_seed_that_it_was_made_under():
    """Made by one seed and used under another, as where a model is initialised anew: no epoch changes its order."""
    tinyres.manual_seed(7)
    images, labels = np.zeros((12, 8, 8, 3), np.uint8), np.arange(12)
    loaders = [data.Loader(images, labels, 4, seed, shuffle=True) for seed in (None, 7)]
    tinyres.manual_seed(8)
    for step in range(6):
        assert np.array_equal(*(loader.batch(step)[1] for loader in loaders))


def trained(seed):
    """Weights, velocities, statistics and losses after a few steps with everything that draws; only this is seeded."""
    tinyres.manual_seed(seed)
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    loader = data.Loader(images, np.arange(24) % 3, 8, scale=1 / 255, augment=True, shuffle=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.GlobalAvgPool2d(),
                          nn.Linear(8, 3))  # fmt: skip
    optimizer = tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(7):
        x, labels = loader.batch(step)
        loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*model.state_dict().values(), *optimizer.state_dict()["velocity"].values(), np.array(losses)]


def test_one_seed_repeats_a_whole_run():
    first, again, other = ([a.tobytes() for a in trained(seed)] for seed in (3, 3, 4))
    assert first == again
    assert not any(a == b for a, b in zip(first, other, strict=True))


if __name__ == "__main__":
    LEDGER.write_text(ledger(written() | measured([device for device in COLUMNS if device in DEVICES])))
