"""Rewrite the results table of the README from the newest result files.

    python benchmarks/report.py            # reads benchmarks/results/*.json, rewrites README.md between its markers
    python benchmarks/report.py --print    # only prints

Of each kind of result (benchmark, depth, data, threads, instruction set, CPU) the newest file counts.
"""

import argparse
import json

import harness

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NAMES = {"ours": "tinyres", "torch_eager": "PyTorch eager", "torch_compile": "PyTorch compile"}


def newest(folder):
    """The newest result of each kind, in the order of their kinds."""
    kinds = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "benchmark" not in result:
            continue
        machine = result["machine"]
        kind = [result["benchmark"], result.get("depth", 0), result.get("dataset", ""), result.get("recipe", "")]
        kind = tuple(map(str, kind + [machine["cpu"], machine["threads"], machine["isa"]]))
        if kind not in kinds or kinds[kind]["date"] <= result["date"]:
            kinds[kind] = result
    return [result for _, result in sorted(kinds.items())]


def place(result):
    """Where and when a result was made, in a line under its table."""
    machine = result["machine"]
    isa = f", {machine['isa']}" if machine["isa"] else ""
    versions = f"NumPy {machine['numpy']}" + (f", PyTorch {machine['torch']}" if machine["torch"] else "")
    return (
        f"<sub>{machine['cpu']}, {machine['threads']} threads{isa}; {versions}; "
        f"commit {result['commit']}, {result['date']}: `{result['command']}`</sub>"
    )


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]]
    return "\n".join(lines)


def train_step(result):
    rows = []
    for name, row in result["competitors"].items():
        if "failed" in row:
            continue
        ratio = result.get(f"ratio_{name.removeprefix('torch_')}")
        ms = row["ms"]
        rows.append(
            [
                NAMES[name],
                f"{ms['median']:.1f} ({ms['p20']:.1f} to {ms['p80']:.1f})",
                f"{row['images_per_second']:,}",
                f"{ratio:.2f}x" if ratio else "1",
                f"{row['peak_resident_mib']:,} MiB",
            ]
        )
    title = f"A training step of ResNet-{result['depth']}, batch {result['batch_size']}, float32:"
    head = ["", "ms, median (20 to 80 %)", "images/s", "time over ours", "peak memory"]
    return f"{title}\n\n{table(head, rows)}"


def train_run(result):
    rows = [
        [
            NAMES[name],
            f"{row['mean_test_error']:.2f} %",
            f"{row['peak_resident_mib']:,} MiB",
        ]
        for name, row in result["competitors"].items()
    ]
    recipe, seeds = result["recipe"], len(result["seeds"])
    title = f"Training ResNet-{result['depth']} on {result['dataset']}, {recipe} recipe, mean of {seeds} seeds:"
    return f"{title}\n\n{table(['', 'test error', 'peak memory'], rows)}"


RENDER = {"train_run": train_run, "train_step": train_step}


def render(results):
    parts = [f"{RENDER[r['benchmark']](r)}\n\n{place(r)}" for r in results if r["benchmark"] in RENDER]
    return "\n\n".join(parts) or "No results yet: see benchmarks/."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="do not touch the README")
    args = parser.parse_args()
    text = render(newest(harness.ROOT / "benchmarks/results"))
    if args.print:
        print(text)
        return
    readme = harness.ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"report: README.md needs the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
