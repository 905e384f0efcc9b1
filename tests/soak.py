"""Long runs: memory, file handles, threads, Python's objects and the time of a step stay as they were.

    python tests/soak.py [PART ...] [--json FILE]

`make soak` runs every part and keeps the figures in benchmarks/results/soak.json; a promise that is broken ends it.
tests/test_soak.py runs short forms.
"""

import argparse
import gc
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tinyres
from tinyres import _cpu, backend, nn, ops, optim
from tinyres.data import Loader
from tinyres.train import evaluate

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import harness  # noqa: E402

MIB = 1 << 20


def vitals(step):
    """What the process holds after `step` steps."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "resident_mib": round(pages * resource.getpagesize() / MIB, 2),
        "pool_mib": round(backend.memory.stats()["bytes_held"] / MIB, 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
    }


def expect_flat(marks):
    """Raise unless nothing has grown since the first of `marks`, which are `vitals`: no file and no thread more, fewer
    than a hundred of Python's objects, resident memory by 1 % or 1 MiB at most."""
    first = marks[0]
    for mark in marks[1:]:
        allowed = {"files": 0, "threads": 0, "objects": 99, "resident_mib": max(0.01 * first["resident_mib"], 1)}
        for name, most in allowed.items():
            assert mark[name] - first[name] <= most, f"{name} must not grow; got {first}, then {mark}"


def network(channels):
    """A fused network with everything that keeps a state: batch norm, dropout, a shortcut."""
    return tinyres.fuse(
        nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Residual(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
            ),
            nn.MaxPool2d(2),
            nn.Dropout(0.1),
            nn.GlobalAvgPool2d(),
            nn.Linear(channels, 10),
        )
    )


def train_step(model, optimizer, x, labels):
    loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    value = loss.item()
    assert np.isfinite(value), value


def train(steps=20_000, every=1_000):
    """A small net trained as programs do: a loader with augmentation, the loss read at each step, and now and then an
    evaluation and a checkpoint, written and read."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (512, 24, 24, 3)).astype(np.uint8), rng.integers(0, 10, 512)
    tinyres.manual_seed(0)
    loader = Loader(images, labels, 8, mean=128, scale=1 / 64, augment=True, shuffle=True)
    test_loader = Loader(images[:64], labels[:64], 8, mean=128, scale=1 / 64)
    model = network(16)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    clocks = time.perf_counter, time.process_time  # what others run on the machine shows in the first alone
    seconds, marks = np.full((steps, 2), np.nan), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        for step in range(1, steps + 1):
            began = [clock() for clock in clocks]
            train_step(model, optimizer, *loader.batch(step))
            seconds[step - 1] = [clock() - start for clock, start in zip(clocks, began, strict=True)]
            if step == 50 or step % every == 0:  # the first one before the first mark: what it takes is no growth
                evaluate(model, test_loader)
                tinyres.save(path, model=model, optimizer=optimizer, step=step)
                saved = tinyres.load(path)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            if step in (100, 1_000, 10_000, steps):
                marks.append(vitals(step))
    expect_flat(marks)
    early, late = np.median(seconds[steps // 20 : steps * 3 // 20], axis=0), np.median(seconds[-steps // 10 :], axis=0)
    figures = {"early_ms": 1e3 * early[0], "late_ms": 1e3 * late[0]}
    figures |= {"ratio": late[0] / early[0], "cpu_ratio": late[1] / early[1]}
    return {"marks": marks, **{name: round(float(value), 3) for name, value in figures.items()}}


def train_long():
    figures = train()
    assert figures["cpu_ratio"] <= 1.3, f"the time of a step must not grow; got {figures}"
    return figures


def vary(steps=4_000):
    """Batches of ever other sizes: the allocator's blocks are those of the sizes seen, not of the steps made."""
    rng = np.random.default_rng(0)
    kinds = [(n, size, size, 3) for n, size in itertools.product((1, 2, 3, 5, 8, 13, 16), (7, 8, 12, 16, 19, 24, 32))]
    model = network(8)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
    marks = []
    backend.memory.release()
    backend.memory.reset_peak()
    for step in range(1, steps + 1):
        shape = kinds[rng.integers(len(kinds))] if step > len(kinds) else kinds[step - 1]
        train_step(model, optimizer, rng.standard_normal(shape, np.float32), np.arange(shape[0]) % 10)
        if step in (steps // 4, steps // 2, steps):
            marks.append(vitals(step))
    expect_flat(marks)
    peak = backend.memory.stats()["peak_bytes_in_use"] / MIB
    assert marks[-1]["pool_mib"] <= 1.02 * marks[0]["pool_mib"], f"the pool must not grow; got {marks}"
    return {"kinds": len(kinds), "marks": marks, "peak_in_use_mib": round(peak, 2)}


def emulate(steps=60):
    """The CUDA kernels, compiled for the CPU: blocks of threads and shared memory are given back too."""
    rng = np.random.default_rng(0)
    backend.use("emulated")
    try:
        model, marks = network(4), []
        optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for step in range(1, steps + 1):
            train_step(model, optimizer, rng.standard_normal((2, 8, 8, 3), np.float32), np.arange(2))
            if step in (steps // 3, steps):
                marks.append(vitals(step))
    finally:
        backend.use("cpu")
    expect_flat(marks)
    return {"marks": marks}


def sigkill():
    import kill

    with tempfile.TemporaryDirectory() as folder:
        return kill.run(100, Path(folder))


PARTS = {"train": train_long, "vary": vary, "emulate": emulate, "sigkill": sigkill}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none for all")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}")
    parts = {}
    for name in args.parts or PARTS:
        began = time.perf_counter()
        figures = PARTS[name]()
        parts[name] = {**figures, "seconds": round(time.perf_counter() - began, 1)}
        print(name, json.dumps(parts[name]), flush=True)
    if args.json:
        harness.write_json(args.json, harness.result("soak", _cpu.threads(), _cpu.isa(), parts=parts))


if __name__ == "__main__":
    main()
