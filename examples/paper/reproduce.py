"""Run the CIFAR experiments of He et al. 2015 and 2016, row by row, and report them beside the papers' numbers.

    python examples/paper/reproduce.py --list                               the experiments and their rows
    python examples/paper/reproduce.py 2015-table6 --depths 20 56 --seeds 3     the papers' 64k iterations
    python examples/paper/reproduce.py 2015-fig6 --depths 20 56 --epochs 10     short: no reproduction, and reported so
    python examples/paper/reproduce.py 2016-table1 --depth 20 --epochs 10       the same ablations of small networks
    python examples/paper/reproduce.py report                               runs/paper/report/report.html, report.md

A run is examples/cifar_resnet.py with the recipe of the row's paper, one at a time, in the folder
RUNS/<row>[-depth<D>][-<n>epochs]-seed<k>. One that is complete there is not made again, one that was stopped goes on:
so the same command may be stopped (Ctrl-C: the run writes its checkpoint first) and given again at any time. After
each run its figures and what tinyres.analysis measures in the trained network join those in RUNS/<experiment>.json.

Exit status: 0 when all is done, 1 on an error or where a run failed, 128 + signal number when stopped.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import tables
from experiments import DATASETS, TITLES, Run, experiments, imagenet, recipe_name, recipe_of

import tinyres
from tinyres import analysis, backend, data
from tinyres.checkpoint import write_atomic
from tinyres.errors import ArgumentError, CheckpointError, DeviceError, TinyresError, expect
from tinyres.train import Interrupt, read_metrics

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cifar_resnet.py"
RUNS = Path("runs/paper")
BATCH_SIZE = 128  # the papers'
RESPONSE_IMAGES = 1_000  # of the test set, for layer responses; gradients are those of one batch of training images
CURVES = ("epoch", "step", "train_loss", "train_error", "test_error")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print all experiments with their rows")
    runs = argparse.ArgumentParser(add_help=False)
    add = runs.add_argument
    add("--rows", nargs="+", metavar="ROW", help="only these rows, as --list names them")
    add("--depths", type=int, nargs="+", metavar="D", help="only rows of these depths")
    add("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (1)")
    add("--epochs", type=int, metavar="E", help="shorter runs: the paper's schedule shrunk to E epochs")
    add("--depth", type=int, metavar="D", help="networks of another depth in all rows; 20 fits every kind of unit")
    add(
        "--dataset",
        choices=("paper", "shapes10"),
        default="paper",
        help="shapes10: the built-in set, to try things out",
    )
    add("--data-dir", type=Path, help="where CIFAR lies; else $TINYRES_DATA, else the user's cache folder")
    add("--device", choices=("auto", "cpu", "emulated", "cuda"), default="auto", help="auto: cuda if it can be had")
    add("--threads", type=int, help="CPU threads (all)")
    add("--collect", action="store_true", help="train nothing, only gather the runs that are complete")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help=f"of runs and results ({RUNS})")
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT or report")
    for name in experiments():
        commands.add_parser(name, parents=[runs, place], help=TITLES[name], description=TITLES[name])
    text = "a page of all results beside the papers' numbers"
    report = commands.add_parser("report", parents=[place], help=text, description=text)
    report.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="result files (RUNS/*.json)")
    report.add_argument("--out", type=Path, metavar="DIR", help="where the page goes (RUNS/report)")
    args = parser.parse_args()
    if not args.list and args.command is None:
        parser.error("name an experiment, or report, or --list")
    return args


def main():
    args = parse_arguments()
    if args.list:
        print_list()
        return 0
    if args.command == "report":
        return tables.report(args.results or sorted(args.runs.glob("*.json")), args.out or args.runs / "report")
    return run_experiment(args)


def print_list():
    for name, rows in experiments().items():
        print(f"{name}: {TITLES[name]}")
        for entry in rows:
            print(f"    {entry.name:40} {entry.dataset:10} {entry.error:22} {recipe_name(entry)}")
    print("ImageNet: see examples/imagenet_resnet.py")
    for entry in imagenet():
        print(f"    {entry.name:40} {entry.paper}, {entry.table:12} {entry.error}")


def planned(args):
    """The runs that the arguments ask for: all rows with the first seed, then all with the second, ..."""
    rows, op = experiments()[args.command], "reproduce"
    names = [entry.name for entry in rows]
    for name in args.rows or ():
        expect(name in names, op, f"rows of {args.command} are {', '.join(names)}", ArgumentError, row=name)
    depths = sorted({entry.arguments["depth"] for entry in rows})
    for depth in args.depths or ():
        expect(depth in depths, op, f"rows of {args.command} have the depths {depths}", ArgumentError, depth=depth)
    for name in ("seeds", "epochs", "depth"):
        value = getattr(args, name)
        expect(value is None or value > 0, op, f"{name} must be positive", ArgumentError, **{name: value})
    runs = [
        Run(entry, seed, args.dataset if args.dataset != "paper" else DATASETS[entry.dataset], args.depth, args.epochs)
        for seed in range(args.seeds)
        for entry in rows
        if (not args.rows or entry.name in args.rows) and (not args.depths or entry.arguments["depth"] in args.depths)
    ]
    expect(runs, op, "no row has both such a name and such a depth", ArgumentError, rows=args.rows, depths=args.depths)
    if args.depth:
        for run in runs[: len(runs) // args.seeds]:  # a depth that does not fit is found before anything is run
            run.entry.build(**run.arguments)
    return runs


def run_experiment(args):
    tinyres.options(threads=args.threads)
    failed = []
    for run in planned(args):
        folder = args.runs / run.name
        if not args.collect and not is_complete(folder, run):
            print(f"{run.name}: {'going on' if folder.exists() else 'starting'}", flush=True)
            status = train(run, folder, args)
            if status >= 128:
                print(f"stopped in {run.name}; the same command goes on from there")
                return status
            if status:
                if not (folder / "config.json").exists():  # the data, a setting: it would be the same for all
                    return 1
                failed.append(run.name)
                continue
        if is_complete(folder, run):
            collect(run, folder, args.runs / f"{args.command}.json", args.data_dir)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def train(run, folder, args):
    """Run the example to its end and return its exit status, 128 + signal number where a signal ended it or us.

    Ctrl-C and SIGTERM that arrive meanwhile are passed on to it.
    """
    words = [*run.command(), "--device", args.device, "--out", str(folder), "--resume"]
    words += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    words += ["--threads", str(args.threads)] if args.threads else []
    arrived, sent = [], 0
    before = {n: signal.signal(n, lambda number, frame: arrived.append(number)) for n in Interrupt.SIGNALS}
    try:
        # In a session of its own, so that a Ctrl-C of the terminal reaches it once, through us: two stop it at once.
        child = subprocess.Popen([sys.executable, str(EXAMPLE), *words], start_new_session=True)
        while True:
            try:
                status = child.wait(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                for number in arrived[sent:]:
                    child.send_signal(number)
                    sent += 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 0 and arrived:  # too late for the run, which is complete
        return 128 + arrived[0]
    return 128 - status if status < 0 else status


# results ------------------------------------------------------------------------------------------------------------


def is_complete(folder, run):
    """Whether the run in `folder` has done all of its steps. Raises CheckpointError where it is not `run`."""
    config, lines = read_json(folder / "config.json"), read_metrics(folder / "metrics.jsonl")
    if not (config and lines and (folder / "checkpoint.safetensors").exists()):
        return False
    wanted = {"dataset": run.dataset, "recipe": recipe_name(run.entry), "lr": recipe_of(run.entry).lr, "augment": True}
    wanted |= {"batch_size": BATCH_SIZE, "seed": run.seed}
    before = [(name, config[name], value) for name, value in wanted.items()]
    options = {**run.options, "validation": False}
    before += [(name, config["arguments"].get(name), value) for name, value in options.items()]
    for name, was, value in before:
        rule = f"{name} of the run in {folder} must be {value}"
        expect(was == value, "reproduce", rule, CheckpointError, **{name: was})
    return lines[-1]["step"] == config["total_steps"]


def collect(run, folder, path, data_dir=None):
    """Put the complete run in `folder` into the result file at `path`, beside what it holds."""
    held = read_json(path) or {"experiment": path.stem, "rows": {}}
    expect(held.get("experiment") == path.stem, "reproduce", f"{path} must be its results", CheckpointError)
    row = held["rows"].setdefault(run.entry.name, {"paper_error": run.entry.error, "runs": {}})
    lines = read_metrics(folder / "metrics.jsonl")
    curves = {name: [short(line[name]) for line in lines] for name in CURVES}
    if row["runs"].get(run.name, {}).get("curves") == curves:
        return
    print(f"{run.name}: test error {lines[-1]['test_error']:.2f} %; measuring the trained network", flush=True)
    config = read_json(folder / "config.json")
    row["runs"][run.name] = {
        "seed": run.seed,
        "depth": run.options["depth"],
        "epochs": lines[-1]["epoch"],
        "iterations": lines[-1]["step"],
        "steps_per_epoch": config["steps_per_epoch"],
        "dataset": config["dataset"],
        "train_images": config["train_images"],
        "recipe": config["recipe"],
        "device": config["device"],
        "bn_group": config.get("bn_group"),
        "environment": config["environment"],
        "test_error": lines[-1]["test_error"],
        "train_error": lines[-1]["train_error"],
        "seconds": lines[-1]["seconds"],
        "curves": curves,
        **measure(run, folder, config, data_dir or config["arguments"]["data_dir"]),
    }
    order = [entry.name for entry in experiments()[path.stem]]
    held["rows"] = dict(sorted(held["rows"].items(), key=lambda item: order.index(item[0])))
    text = json.dumps(held, indent=1, allow_nan=False)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a curve on one line
    write_atomic(path, f"{text}\n".encode())


def short(value):
    """A number with five digits, which is more than any of these figures means; a whole one as it is."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def measure(run, folder, config, data_dir):
    """What tinyres.analysis finds in the trained network, as JSON."""
    try:
        device = backend.get(config["device"]).name
    except DeviceError:
        device = "cpu"
    backend.use(device)
    dataset = data.load(config["dataset"], data_dir)
    mean, scale = recipe_of(run.entry).normalise(dataset.train_images)

    def loader(images, labels, count):
        return data.Loader(images[:count], labels[:count], BATCH_SIZE, mean=mean, scale=scale, device=device)

    model = run.entry.build(**run.arguments)
    model.load_state_dict(tinyres.load(folder / "checkpoint.safetensors")["model"])
    test = loader(dataset.test_images, dataset.test_labels, RESPONSE_IMAGES)
    x, labels = loader(dataset.train_images, dataset.train_labels, BATCH_SIZE).batch(0)

    gradients, shares = (f(model, x, labels) for f in (analysis.gradient_norms, analysis.shortcut_shares))
    measured = {
        "gradient_norms": {name: short(norm) for name, norm in gradients.items()},
        "shortcut_shares": {name: [short(part) for part in share] for name, share in shares.items()},
    }
    if run.entry.paper == "2015":
        responses = analysis.layer_responses(model, (x for x, _ in test.epoch()))
        measured["layer_responses"] = {name: short(deviation) for name, deviation in responses.items()}
    return measured


def read_json(path):
    """The content of a JSON file; None if there is none. Raises CheckpointError where it is no JSON object."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    expect(isinstance(content, dict), "reproduce", f"{path} must hold a JSON object", CheckpointError)
    return content


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TinyresError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # between two runs: what is written is whole, the rest is made by the same command
        print("stopped", file=sys.stderr)
        sys.exit(130)
