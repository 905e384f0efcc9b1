"""Training processes killed with SIGKILL and resumed until they are through: the bits of a run never killed.

    python tests/kill.py KILLS FOLDER

Every other one is killed by the clock, whatever it is at, the rest by themselves at an act of writing that is drawn
before: in the middle of a write, with half of it on disk, before an fsync, before a move. Two programs are run:
`train_small` below, which writes a checkpoint every step, and examples/cifar_resnet.py.
"""

import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import tinyres
from runs import metrics, state, write_tiny_cifar
from tinyres import checkpoint, nn, train
from tinyres.data import Loader

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar_resnet.py"
# By name: how it is called, its steps, and how many acts of writing a process may do before it kills itself.
PROGRAMS = {
    "small": (["small"], 60, 90),
    "example": ([str(EXAMPLE), "--depth", "8", "--batch-size", "16", "--epochs", "6", "--device", "cpu"], 18, 25),
}


def run(kills: int, folder: Path, seed: int = 0) -> dict:
    """Kill `kills` processes, a sixth of them of the example, in runs below `folder`; raises unless every run ends
    with the bits of one never killed and with no drafts left. Returns how many were killed while writing for certain,
    how many resumed from a checkpoint, and the runs and steps that came through."""
    draw = random.Random(seed)
    data = write_tiny_cifar(folder / "data")
    figures = {"kills": 0, "while_writing": 0, "resumed": 0, "runs": 0, "steps": 0}
    example_kills = max(kills // 6, 1)
    for name, wanted in (("small", kills - example_kills), ("example", example_kills)):
        command, steps, acts = PROGRAMS[name]
        whole = folder / f"{name}-whole"
        began = time.monotonic()
        assert not live(command, whole, data)
        seconds = time.monotonic() - began
        killed = 0
        for number in itertools.count(1):
            if killed == wanted:
                break
            out = folder / f"{name}-{number}"
            while True:
                figures["resumed"] += any(out.glob("checkpoint*"))
                act = limit = None
                if killed < wanted and killed % 2 == 0:
                    act = draw.randrange(1, acts + 1)
                elif killed < wanted:
                    limit = draw.uniform(0, seconds)
                if not live(command, out, data, act, limit):
                    break
                killed += 1
                figures["while_writing"] += act is not None or any(out.glob(".*.tmp"))
            assert state(out) == state(whole) and metrics(out) == metrics(whole), f"{out} must equal {whole}"
            left = [path.name for path in out.glob(".*")]
            assert not left, f"{out} must hold no drafts; got {left}"
            figures["runs"] += 1
            figures["steps"] += steps
        figures["kills"] += killed
    return figures


def live(command, out, data, act=None, limit=None):
    """One process's life; whether it was killed: by itself at act number `act`, by the clock after `limit` seconds."""
    env = {**os.environ, "TINYRES_DATA": str(data), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(tinyres.__file__).parents[1])
    call = [sys.executable, __file__, "--live", str(act or 0), *command, "--out", str(out), "--resume"]
    process = subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=limit if limit is not None else 120)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
    expected = (0, -signal.SIGKILL) if act or limit is not None else (0,)
    assert process.returncode in expected, f"status {process.returncode}: {printed}"
    return process.returncode != 0


def die_at(moment):
    """Let this process kill itself at act number `moment` from now on."""
    acts = itertools.count(1)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(act):
        def acted(*arguments):
            if next(acts) == moment:
                die()
            return act(*arguments)

        return acted

    def opened(*arguments):
        file = open(*arguments)
        write = file.write

        def write_or_die(content):
            if next(acts) == moment:
                write(content[: len(content) // 2])
                file.flush()
                die()
            return write(content)

        file.write = write_or_die
        return file

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    checkpoint.open = train.open = opened


def train_small(out):
    """Everything that has a state: batch norm, dropout, momentum, shuffled and augmented data, sums in mid-epoch."""
    _, total, _ = PROGRAMS["small"]
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8), draw.integers(0, 4, 24)
    loader = Loader(images, labels, 8, seed=1, scale=1 / 255, augment=True, shuffle=True)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.GlobalAvgPool2d()
    model = tinyres.fuse(nn.Sequential(*layers, nn.Linear(4, 4)))
    optimizer = tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    running = train.Running()
    run = train.Run(out, {"steps": total}, {}, resume=True)
    run.restore(model=model, optimizer=optimizer, running=running)
    while run.step < total:
        x, labels = loader.batch(run.step)
        logits = model(tinyres.tensor(x))
        loss = tinyres.ops.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step += 1
        running.add(loss, logits, labels)
        if run.step % loader.steps_per_epoch == 0:
            run.metrics.write(step=run.step, loss=running.loss, error=running.error)
            running.reset()
        run.save(model=model, optimizer=optimizer, running=running)


if __name__ == "__main__":
    if sys.argv[1] == "--live":
        _, _, moment, program, *arguments = sys.argv
        die_at(int(moment))
        if program == "small":
            train_small(Path(arguments[1]))
        else:
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")
    else:
        print(json.dumps(run(int(sys.argv[1]), Path(sys.argv[2]))))
