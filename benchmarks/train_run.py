"""Whole training runs on CIFAR-10, ours beside PyTorch's: test error and peak resident memory.

    python benchmarks/train_run.py --data-dir DIR --seeds 0 1 2 --json FILE

Runs examples/cifar_resnet.py, as it is and without Winograd's algorithm, and peers/torch_cifar.py (channels_last,
eager): same recipe, data, batch size and threads, one after the other for every seed. Runs that FILE holds already are
not made again. Time is train_step.py's subject. Peak memory is what the system says of each finished process; PyTorch
keeps the C allocator's defaults here, because the settings that speed it up cost memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import harness
from tinyres import _cpu

PROGRAMS = {
    "ours": [harness.ROOT / "examples/cifar_resnet.py"],
    "ours_direct": [harness.ROOT / "examples/cifar_resnet.py", "--conv", "direct"],
    "torch_eager": [harness.ROOT / "benchmarks/peers/torch_cifar.py"],
}


def run(program, arguments, out):
    """Run one program to its end; its last metrics and peak memory."""
    command = [sys.executable, *map(str, program), *map(str, arguments), "--out", out]
    process = subprocess.Popen(command, env={**os.environ, **harness.THREADS_BOUND})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"train_run: {program[0].name} ended with status {process.returncode}")
    lines = [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {
        "test_error": lines[-1]["test_error"],
        "train_error": lines[-1]["train_error"],
        "peak_resident_mib": round(usage.ru_maxrss / 1024),
        "epochs": [{name: line[name] for name in ("epoch", "train_loss", "test_error")} for line in lines],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--recipe", choices=["quick", "paper2015"], default="quick")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    threads = len(harness.bind(args.threads or 1 << 16))

    common = ["--depth", args.depth, "--dataset", args.dataset, "--recipe", args.recipe, "--threads", threads]
    for name in ("data_dir", "epochs", "iterations"):
        if getattr(args, name) is not None:
            common += [f"--{name.replace('_', '-')}", getattr(args, name)]
    fields = {"depth": args.depth, "dataset": args.dataset, "recipe": args.recipe, "seeds": args.seeds}
    runs = kept(args.json, fields)
    for seed in args.seeds:
        for name, program in PROGRAMS.items():
            if seed in (r["seed"] for r in runs[name]):
                continue
            with tempfile.TemporaryDirectory() as out:
                made = {"seed": seed, "commit": harness.commit(), **run(program, [*common, "--seed", seed], out)}
            runs[name] = sorted([*runs[name], made], key=lambda r: r["seed"])
            if args.json:
                result = harness.result("train_run", threads, _cpu.isa(), **fields)
                harness.write_json(args.json, {**result, "competitors": summaries(runs)})
    for name, row in summaries(runs).items():
        seeds = ", ".join(str(r["seed"]) for r in row["runs"])
        error = f"{row['mean_test_error']:.2f} % (spread {row['spread']})"
        print(f"{name:14} test error {error}   {row['peak_resident_mib']} MiB   (seeds {seeds})")


def kept(path, fields):
    """The runs in the file at `path`, by competitor, of a result that differs by nothing but the seeds."""
    runs = {name: [] for name in PROGRAMS}
    if path and pathlib.Path(path).exists():
        old = json.loads(pathlib.Path(path).read_text())
        if any(old[name] != value for name, value in fields.items() if name != "seeds"):
            raise SystemExit(f"train_run: {path} holds another network, dataset or recipe")
        runs |= {name: row["runs"] for name, row in old["competitors"].items()}
    return runs


def summaries(runs):
    """Mean, spread (standard deviation over seeds) and runs of every competitor that has any."""
    return {
        name: {
            "mean_test_error": round(statistics.mean(r["test_error"] for r in each), 2),
            "spread": round(statistics.stdev(r["test_error"] for r in each), 2) if len(each) > 1 else None,
            "peak_resident_mib": max(r["peak_resident_mib"] for r in each),
            "runs": each,
        }
        for name, each in runs.items()
        if each
    }


if __name__ == "__main__":
    main()
