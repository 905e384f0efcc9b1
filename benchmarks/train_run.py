"""Whole training runs on CIFAR-10, ours beside PyTorch's: test error, seconds, peak resident memory.

    python benchmarks/train_run.py --data-dir DIR --seeds 0 1 --json FILE

Runs examples/cifar_resnet.py and peers/torch_cifar.py (channels_last, eager), same recipe, data, batch size and
threads, one after the other for every seed. Peak memory is what the system says of each finished process; PyTorch
keeps the C allocator's defaults here, because the settings that speed it up cost memory.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import harness
from tinyres import _cpu

PROGRAMS = {
    "ours": [harness.ROOT / "examples/cifar_resnet.py"],
    "torch_eager": [harness.ROOT / "benchmarks/peers/torch_cifar.py"],
}


def run(program, arguments, out):
    """Run one program to its end; its last metrics, wall seconds and peak memory."""
    began = time.perf_counter()
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
        "images_per_second": lines[-1]["images_per_second"],
        "training_seconds": lines[-1]["seconds"],
        "wall_seconds": round(time.perf_counter() - began, 1),
        "peak_resident_mib": round(usage.ru_maxrss / 1024),
        "epochs": [{name: line[name] for name in ("epoch", "train_loss", "test_error")} for line in lines],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--recipe", choices=["quick", "paper"], default="quick")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    threads = len(harness.bind(args.threads or 1 << 16))

    common = ["--depth", args.depth, "--dataset", args.dataset, "--recipe", args.recipe, "--threads", threads]
    for name in ("data_dir", "epochs", "iterations"):
        if getattr(args, name) is not None:
            common += [f"--{name.replace('_', '-')}", getattr(args, name)]
    runs = {name: [] for name in PROGRAMS}
    for seed in args.seeds:
        for name, program in PROGRAMS.items():
            with tempfile.TemporaryDirectory() as out:
                runs[name].append({"seed": seed, **run(program, [*common, "--seed", seed], out)})

    competitors = {}
    for name, each in runs.items():
        competitors[name] = {
            "mean_test_error": round(sum(r["test_error"] for r in each) / len(each), 2),
            "mean_training_seconds": round(sum(r["training_seconds"] for r in each) / len(each), 1),
            "peak_resident_mib": max(r["peak_resident_mib"] for r in each),
            "runs": each,
        }
        row = competitors[name]
        print(
            f"{name:14} test error {row['mean_test_error']:.2f} %   {row['mean_training_seconds']:.0f} s   "
            f"{row['peak_resident_mib']} MiB   (seeds {', '.join(map(str, args.seeds))})"
        )
    if args.json:
        fields = {"depth": args.depth, "dataset": args.dataset, "recipe": args.recipe, "seeds": args.seeds}
        harness.write_json(
            args.json, {**harness.result("train_run", threads, _cpu.isa(), **fields), "competitors": competitors}
        )


if __name__ == "__main__":
    main()
