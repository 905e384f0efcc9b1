"""Tables and plots from result files.

    python benchmarks/report.py                        # rewrites the results of README.md from benchmarks/results
    python benchmarks/report.py --print                # only prints them
    python benchmarks/report.py FILE ...               # tables of these result files
    python benchmarks/report.py --headlines FILE ...   # a line for each
    python benchmarks/report.py --roofline PNG FILE    # a plot of the kernels in FILE (needs matplotlib)

README.md shows training runs and steps: of each kind of result (benchmark, model, data, batch, threads, machine) the
newest.
"""

import argparse
import json
import math
import pathlib
import statistics

import harness

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NAMES = {
    "ours": "tinyres",
    "ours_direct": "tinyres, direct convolution",
    "torch_eager": "PyTorch eager",
    "torch_compile": "PyTorch compile",
}
RIVALS = {"eager": "torch_eager", "compile": "torch_compile", "ours_direct": "ours_direct"}  # ratio_... in the files
IN_README = ("train_run", "train_step")


def newest(folder):
    """The newest result of each kind, in the order of their kinds."""
    kinds = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("benchmark") not in IN_README:
            continue
        machine = result["machine"]
        kind = [result["benchmark"], network(result), result.get("dataset", ""), result.get("recipe", "")]
        kind += [result.get("inference", False), result.get("batch_size", 0)]
        kind += [machine.get("gpu", {}).get("name", ""), machine["cpu"], machine["threads"], machine["isa"]]
        kind = tuple(map(str, kind))
        if kind not in kinds or kinds[kind]["date"] <= result["date"]:
            kinds[kind] = result
    return [result for _, result in sorted(kinds.items())]


def place(result):
    """Where and when a result was made, in a line under its table."""
    machine = result["machine"]
    if "cpu" not in machine:  # PyTorch on a GPU alone
        return f"<sub>{machine['gpu']}; PyTorch {machine['torch']}, CUDA {machine['cuda']}; {result['date']}</sub>"
    where = f"{machine['cpu']}, {machine['threads']} threads" + (f", {machine['isa']}" if machine["isa"] else "")
    versions = f"NumPy {machine['numpy']}"
    if "gpu" in machine:
        gpu = machine["gpu"]
        where = f"{gpu['name']}, driver {gpu['driver']}; {where}"
        versions = f"CuPy {gpu['cupy']} with CUDA {gpu['cuda_of_cupy']}"
    versions += f", PyTorch {machine['torch']}" if machine["torch"] else ""
    return f"<sub>{where}; {versions}; commit {result['commit']}, {result['date']}: `{result['command']}`</sub>"


def table(head, rows):
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]]
    return "\n".join(lines)


def milliseconds(ms):
    digits = 1 if ms["median"] >= 10 else 3
    return f"{ms['median']:.{digits}f} ({ms['p20']:.{digits}f} to {ms['p80']:.{digits}f})"


# tables -------------------------------------------------------------------------------------------------------------


def train_step(result):
    rows = []
    for name, row in result["competitors"].items():
        if "failed" in row:
            continue
        ratio = result.get(f"ratio_{name.removeprefix('torch_')}")
        rows.append(
            [
                NAMES[name],
                milliseconds(row["ms"]),
                f"{row['images_per_second']:,}",
                f"{ratio:.2f}x" if ratio else "1",
                f"{peak_mib(row):,} MiB",
            ]
        )
    title = f"{what(result)} of {network(result)}, batch {result['batch_size']}, float32{on_gpu(result)}:"
    head = ["", "ms, median (20 to 80 %)", "images/s", "time over ours", "peak memory"]
    return f"{title}\n\n{table(head, rows)}"


def steps(results):
    """Training steps and inference on one machine, a row each."""

    def order(result):
        depth = int(network(result).removeprefix("ResNet-"))
        isa = result["machine"]["isa"] or ""
        return result.get("inference", False), depth, isa, result["batch_size"]

    rows = []
    for result in sorted(results, key=order):
        competitors, ours = result["competitors"], result["competitors"]["ours"]
        theirs = [row for name, row in competitors.items() if name.startswith("torch") and "failed" not in row]
        isa = result["machine"]["isa"]
        rows.append(
            [
                f"{network(result)}, {'inference' if result.get('inference') else 'step'}, batch {result['batch_size']}"
                + (f", {isa}" if isa else ""),
                milliseconds(ours["ms"]).split(" ")[0],
                f"{ours['images_per_second']:,}",
                *(f"{ratio:.2f}x" if ratio else "" for ratio in (result.get(f"ratio_{name}") for name in RIVALS)),
                f"{peak_mib(ours):,} MiB",
                " to ".join(f"{mib:,}" for mib in sorted({peak_mib(row) for row in theirs})) + " MiB",
            ]
        )
    head = ["float32", "tinyres, ms", "images/s", *(NAMES[name] for name in RIVALS.values())]
    head += ["memory, tinyres", "memory, PyTorch"]
    commits = ", ".join(sorted({result["commit"] for result in results}))
    dates = sorted(result["date"] for result in results)
    same = {**results[0], "commit": commits, "date": " to ".join(sorted({dates[0], dates[-1]}))}
    same["machine"] = {**same["machine"], "isa": None}
    same["command"] = "python benchmarks/train_step.py --against torch ... --json benchmarks/results/..."
    title = "Training steps, and inference with batch norm folded; other columns are times over tinyres's own, medians:"
    return f"{title}\n\n{table(head, rows)}\n\n{place(same)}"


def peak_mib(row):
    return row.get("peak_device_mib", row["peak_resident_mib"])


def network(result):
    """`ResNet-20`; files from before there were other models have a depth."""
    return result["model"].replace("resnet", "ResNet-") if "model" in result else f"ResNet-{result['depth']}"


def what(result):
    return "Inference" if result.get("inference") else "A training step"


def on_gpu(result):
    return ", on the GPU" if result.get("device") == "cuda" else ""


def train_run(result):
    rows = [
        [
            NAMES[name],
            f"{row['mean_test_error']:.2f} %",
            f"{row['spread']:.2f}",
            f"{row['peak_resident_mib']:,} MiB",
        ]
        for name, row in result["competitors"].items()
    ]
    recipe, seeds = result["recipe"], len(result["seeds"])
    title = f"Training ResNet-{result['depth']} on {result['dataset']}, {recipe} recipe, {seeds} seeds:"
    return f"{title}\n\n{table(['', 'test error, mean', 'standard deviation', 'peak memory'], rows)}"


def kernels(result):
    rows = []
    for row in result["rows"]:
        torch_ms = row["torch_ms"]
        name = f"{row['kernel']} {row['label']}"
        rows.append(
            [
                name if row.get("device_alone", True) else f"{name} (host)",
                milliseconds(row["ms"]),
                f"{row['gbs']:.4g}" if "gbs" in row else "",
                f"{row['gflops']:.4g}" if "gflops" in row else "",
                f"{row.get('share', row.get('share_of_peak')):.0%}",
                f"{torch_ms['median']:.4g}" if torch_ms else "",
                f"{row['ratio']:.2f}x" if torch_ms else "",
            ]
        )
    limits = result["limits"]
    title = (
        f"Kernels, float32{on_gpu(result)}; limits {limits['fma_gflops']:,} GFLOP/s and {limits['copy_gbs']:,} GB/s; "
        f"{headline_kernels(result)}:"
    )
    head = ["", "ms, median (20 to 80 %)", "GB/s", "GFLOP/s", "of the limit", "PyTorch, ms", "over ours"]
    return f"{title}\n\n{table(head, rows)}"


def limits(result):
    rows = [[name, json.dumps(value).strip("{}").replace('"', "")] for name, value in result["limits"].items()]
    return f"Limits of the machine{on_gpu(result)}:\n\n{table(['', 'measured'], rows)}"


def torch_gpu(result):
    rows = [
        [f"ResNet-{row['depth']} {row['precision']} {row['mode']}", f"{row['ms']:.4g}", f"{row['images_per_second']:,}"]
        for row in result["steps"]
        if "failed" not in row
    ]
    return f"PyTorch's training step, batch {result['batch_size']}:\n\n{table(['', 'ms', 'images/s'], rows)}"


def whole_step(result):
    rows = [
        [f"ResNet-{row['depth']}, batch {row['batch_size']}, {row['precision']}", str(row["launches"])]
        + [f"{row[kind]['median']:.4g}" for kind in ("ms", "direct_ms")]
        + [f"{row['images_per_second']:,}", f"{row['arena_bytes'] / 2**20:.1f}"]
        for row in result["rows"]
    ]
    head = ["", "launches", "ms as a graph", "ms without", "images/s", "MiB of its arena"]
    return f"Training steps as graphs{on_gpu(result)}:\n\n{table(head, rows)}"


def winograd_error(result):
    sides = [name for name in ("winograd", "direct", "torch") if name in result["rows"][0]]
    names = {"winograd": "Winograd", "direct": "direct", "torch": "PyTorch"}
    rows = [
        [f"{row['channels']} channels, {row['size']}x{row['size']}"]
        + [f"{row[side][what]:.1e}" for what in ("y", "dx", "dw") for side in sides]
        for row in result["rows"]
    ]
    head = ["", *(f"{what}, {names[side]}" for what in ("y", "dx", "dw") for side in sides)]
    title = f"Errors of 3x3 layers in float32, relative to float64, batch {result['rows'][0]['batch']}:"
    points = [[name, f"{value:.1e}"] for name, value in result["points"].items()]
    return f"{title}\n\n{table(head, rows)}\n\n{table(['points', 'error of y'], points)}"


def op_cost(result):
    rows = [
        [row["op"], *(f"{value:.2f}" for name in ("ours", "torch") for value in row[name]), f"{row['ratio']:.2f}x"]
        for row in result["rows"]
    ]
    head = ["us", "record", "sweep", "PyTorch: record", "sweep", "our time over PyTorch's"]
    title = f"What an op on a few numbers costs, geometric mean {result['ratio']:.2f}x:"
    return f"{title}\n\n{table(head, rows)}"


def input_pipeline(result):
    rows = []
    for row in result["rows"]:
        rate = row["images_per_second"]
        spread = f"{rate['median']:.0f} ({rate['p20']:.0f} to {rate['p80']:.0f})"
        rows.append([row["view"], str(row["workers"] or ""), spread, f"{row['ratio']:.2f}x"])
    W, H = result["image_size"]
    title = f"Decoding and cropping JPEGs of {W}x{H}, {result['image_bytes'] / 1024:.0f} KiB each:"
    return f"{title}\n\n{table(['', 'processes', 'images/s, median (20 to 80 %)', 'of the plain loop'], rows)}"


def traffic(result):
    kinds = [(kind, side) for kind in ("activations", "others", "asked") for side in ("read", "written")]
    rows = [
        [row["kernel"], row["op"], str(row["launches"]), *(f"{row[side][kind] / 1e6:,.3f}" for kind, side in kinds)]
        for row in result["rows"]
    ]
    total = result["rows"][-1]
    activations, others = (total["read"][kind] + total["written"][kind] for kind in ("activations", "others"))
    sums = [[f"least, level ({level})", least] for level, least in result["floors"].items()]
    sums = [["activations", activations], *sums, ["others", others], ["others: the optimizer's", result["optimizer"]]]
    of_sums = [
        [name, f"{count / 1e6:,.1f}", f"{activations / count:.2f}" if "(" in name else ""] for name, count in sums
    ]
    head = ["kernel", "op", "launches", *(f"{kind} {side}" for kind, side in kinds)]
    chosen = f"{result['precision']}, fuse: {result['fuse']}, conv: {result['conv']}"
    return (
        f"{network(result)}, a training step of {result['batch']} images, {chosen}; MB of global memory:\n\n"
        f"{table(head, rows)}\n\n{table(['of a step', 'MB', 'activations, times'], of_sums)}"
    )


def soak(result):
    names = {"step": "step", "resident_mib": "resident, MiB", "pool_mib": "allocator, MiB", "files": "files",
             "threads": "threads", "objects": "Python's objects"}  # fmt: skip
    rows, others = [], []
    for part, figures in result["parts"].items():
        rows += [[part, *(f"{mark[name]:,}" for name in names)] for mark in figures.get("marks", [])]
        others += [[f"{part}: {name}", f"{value:,}"] for name, value in figures.items() if name != "marks"]
    return f"Long runs:\n\n{table(['', *names.values()], rows)}\n\n{table(['figure', ''], others)}"


def mutation(result):
    parts = {}
    for row in result["rows"]:
        part = parts.setdefault(row["part"], [0, 0])
        part[0] += 1
        part[1] += row["outcome"] != "survived"
    rows = [[name, str(planted), str(killed)] for name, (planted, killed) in parts.items()]
    living = [
        f"- {row['part']}: {row['name']}. {row['reason'] or 'No reason is known.'}"
        for row in result["rows"]
        if row["outcome"] == "survived"
    ]
    survivors = "\n\nSurvivors:\n\n" + "\n".join(living) if living else ""
    return f"Mistakes planted in the engine:\n\n{table(['part', 'planted', 'noticed'], rows)}{survivors}"


# lines --------------------------------------------------------------------------------------------------------------


def headline_train_step(result):
    ours = result["competitors"]["ours"]
    text = f"{network(result)} {'inference' if result.get('inference') else 'step'}: "
    text += f"{ours['ms']['median']:.4g} ms, {ours['images_per_second']:,} images/s"
    for name in ("eager", "compile"):
        if f"ratio_{name}" in result:
            text += f"; PyTorch {name} {result[f'ratio_{name}']:.2f}x that time"
    return text


def headline_train_run(result):
    each = [f"{NAMES[name]} {row['mean_test_error']:.2f} %" for name, row in result["competitors"].items()]
    return f"ResNet-{result['depth']} on {result['dataset']}, test error: {', '.join(each)}"


def headline_kernels(result):
    rows = result["rows"]
    text = f"{len(rows)} cases"
    for bound in ("arithmetic", "memory"):
        shares = [row["share"] for row in rows if row.get("bound") == bound]
        if shares:
            text += f", {statistics.median(shares):.0%} of the {bound} limit in the median"
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if ratios:
        mean, faster = statistics.geometric_mean(ratios), sum(ratio > 1 for ratio in ratios)
        text += f", PyTorch {mean:.2f}x our time in the geometric mean, slower in {faster} of {len(ratios)}"
    return text


def headline_traffic(result):
    moved = sum(result["rows"][-1][side]["activations"] for side in ("read", "written"))
    levels = ", ".join(f"{moved / least:.2f}x level ({level})" for level, least in result["floors"].items())
    launches = result["rows"][-1]["launches"]
    return f"{network(result)}, {launches} launches, {moved / 1e6:,.0f} MB of activations: {levels}"


def headline_limits(result):
    found = result["limits"]
    text = f"{found['fma_gflops']:,} GFLOP/s, copy {found['copy_gbs']:,} GB/s"
    if "launch_us" in found:
        launch = found["launch_us"]
        text += f", L2 {found['l2_gbs']:,} GB/s" if found["l2_gbs"] else ""
        text += f", a launch {launch['stream']} us in a stream, {launch['graph']} us in a graph"
    return text


def headline_torch_gpu(result):
    rows = [row for row in result["steps"] if "failed" not in row and row["precision"] == "fp32"]
    each = [f"ResNet-{row['depth']} {row['mode']} {row['ms']:.4g} ms" for row in rows]
    return f"PyTorch in float32: {', '.join(each)}"


def headline_whole_step(result):
    first = result["rows"][0]
    name = f"ResNet-{first['depth']}, batch {first['batch_size']}, {first['precision']}"
    return f"{name}: a step is {first['launches']} launches and {first['ms']['median']:.4g} ms"


def headline_winograd_error(result):
    worst = max(row["winograd"][what] / row["direct"][what] for row in result["rows"] for what in ("y", "dx", "dw"))
    return f"Winograd's errors are at most {worst:.1f} times those of direct convolution"


def headline_op_cost(result):
    worst = max(result["rows"], key=lambda row: row["ratio"])
    return f"an op costs {result['ratio']:.2f}x PyTorch's, geometric mean; {worst['op']} most, {worst['ratio']:.2f}x"


def headline_input_pipeline(result):
    best = max(result["rows"], key=lambda row: (row["view"] == "scale", row["workers"]))
    rate = best["images_per_second"]["median"]
    return f"{rate:.0f} images/s with {best['workers']} workers, {best['ratio']:.2f}x a plain Pillow loop"


def headline_soak(result):
    figures = result["parts"]["train"]
    first, last = figures["marks"][0], figures["marks"][-1]
    grown = last["resident_mib"] - first["resident_mib"]
    text = (
        f"{last['step']:,} steps: {first['resident_mib']:.1f} MiB resident at step {first['step']}, {grown:+.1f} since"
    )
    return f"{text}; a step takes {figures['ratio']:.2f} times what it took at first"


def headline_mutation(result):
    found = result["totals"]
    return f"the tests notice {found['killed']} of {found['mutants']} planted mistakes, {found['killed_percent']:g} %"


TABLES = {
    "traffic": traffic,
    "input_pipeline": input_pipeline,
    "op_cost": op_cost,
    "soak": soak,
    "mutation": mutation,
    "train_run": train_run,
    "train_step": train_step,
    "kernels": kernels,
    "limits": limits,
    "torch_gpu": torch_gpu,
    "whole_step": whole_step,
    "winograd_error": winograd_error,
}
HEADLINES = {
    "traffic": headline_traffic,
    "input_pipeline": headline_input_pipeline,
    "op_cost": headline_op_cost,
    "soak": headline_soak,
    "mutation": headline_mutation,
    "train_run": headline_train_run,
    "train_step": headline_train_step,
    "kernels": headline_kernels,
    "limits": headline_limits,
    "torch_gpu": headline_torch_gpu,
    "whole_step": headline_whole_step,
    "winograd_error": headline_winograd_error,
}


def render(results):
    """Every result with a table of its own."""
    return "\n\n".join(f"{TABLES[r['benchmark']](r)}\n\n{place(r)}" for r in results)


def overview(results):
    """Results for the README: as `render`, but all steps on a machine in one table."""
    parts, machines = [render([r for r in results if r["benchmark"] != "train_step"])], {}
    for result in results:
        if result["benchmark"] == "train_step":
            machine = result["machine"]
            key = machine["cpu"], machine["threads"], machine.get("gpu", {}).get("name")
            machines.setdefault(key, []).append(result)
    parts += [steps(members) for members in machines.values()]
    return "\n\n".join(filter(None, parts)) or "No results yet: see benchmarks/."


# roofline -----------------------------------------------------------------------------------------------------------

# A kernel belongs to the first group that its name begins with.
GROUPS = {
    "conv2d": "convolution",
    "matmul": "matrix product",
    "batch_norm": "batch norm",
    "max_pool2d": "pooling",
    "avg_pool2d": "pooling",
    "global_avg": "pooling",
    "sum": "reduction",
    "max_backward": "reduction",
    "sgd": "training",
    "augment": "training",
    "cross_entropy": "training",
    "classifier": "training",
    "": "elementwise",
}


def roofline(result, path):
    """Write a PNG: the kernels of a result between the lines of the machine's limits, PyTorch's as hollow points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row.get("gflops")]
    if not rows:
        raise SystemExit("report: no operations are counted in this file; measure it anew by benchmarks/kernels.py")
    limits = result["limits"]
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    points = {}
    for row in rows:
        group = next(group for prefix, group in GROUPS.items() if row["kernel"].startswith(prefix))
        points.setdefault(group, []).append(row)
    for group, members in points.items():
        x, y = [row["flops_per_byte"] for row in members], [row["gflops"] for row in members]
        colour = axes.scatter(x, y, s=18, label=group, zorder=3).get_facecolor()[0]
        compared = [row for row in members if row["torch_ms"]]
        x = [row["flops_per_byte"] for row in compared]
        y = [row["gflops"] * row["ms"]["median"] / row["torch_ms"]["median"] for row in compared]
        axes.scatter(x, y, s=18, facecolors="none", edgecolors=[colour], linewidths=0.6, zorder=2)

    low = min(row["flops_per_byte"] for row in rows) / 2
    ridge = limits["fma_gflops"] / limits["copy_gbs"]
    high = max(2 * ridge, 2 * max(row["flops_per_byte"] for row in rows))
    edges = [low, ridge, high]
    axes.plot(edges, [min(limits["fma_gflops"], limits["copy_gbs"] * x) for x in edges], color="black")
    axes.annotate(f"{limits['fma_gflops']:,} GFLOP/s", (high, limits["fma_gflops"]), ha="right", va="bottom")
    slope = math.sqrt(low * ridge)
    text = f"copy {limits['copy_gbs']:,} GB/s  "
    axes.annotate(text, (slope, limits["copy_gbs"] * slope), ha="right", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    machine = result["machine"]
    name = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['threads']} threads"
    axes.set_title(f"{name}: kernels in float32 (hollow: PyTorch)", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# the command --------------------------------------------------------------------------------------------------------


def rewrite_readme(text):
    readme = harness.ROOT / "README.md"
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"report: README.md needs the lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--print", action="store_true", help="do not touch the README")
    parser.add_argument("--headlines", action="store_true")
    parser.add_argument("--roofline", type=pathlib.Path, metavar="PNG")
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.files]
    if args.roofline:
        if [result["benchmark"] for result in results] != ["kernels"]:
            raise SystemExit("report: --roofline needs one result file of benchmarks/kernels.py")
        roofline(results[0], args.roofline)
    elif args.headlines:
        for path, result in zip(args.files, results, strict=True):
            print(f"{path.stem:16} {HEADLINES[result['benchmark']](result)}")
    elif args.files or args.print:
        print(render(results or newest(harness.ROOT / "benchmarks/results")))
    else:
        rewrite_readme(overview(newest(harness.ROOT / "benchmarks/results")))


if __name__ == "__main__":
    main()
