"""Results beside the papers' numbers: what may be called a reproduction, Markdown, and one HTML page."""

from __future__ import annotations

import base64
import html
import json
import statistics
from typing import Any, NamedTuple

import figures
from experiments import DATASETS, TITLES, TRAIN_IMAGES, experiments, recipe_name, recipe_of

from tinyres.checkpoint import write_atomic
from tinyres.errors import CheckpointError, expect
from tinyres.models import Entry
from tinyres.recipes import RECIPES
from tinyres.train import duration

HEAD = ["row", "paper, test error %", "ours, test error %", "training error %", "made of", "data", "device", "verdict"]
KEYS = (  # of a run in a result file
    "seed", "depth", "epochs", "iterations", "steps_per_epoch", "dataset", "train_images", "recipe", "bn_group",
    "device", "environment", "seconds", "test_error", "train_error", "curves", "gradient_norms", "shortcut_shares",
)  # fmt: skip
MEDIAN_OF = 5  # runs, of which the 2016 paper gives the median


class Group(NamedTuple):
    """Runs of one row that differ by nothing but the seed and the device."""

    entry: Entry
    runs: list[dict[str, Any]]  # by seed, as reproduce.py wrote them

    @property
    def setting(self):
        """What has to be the same for curves to be drawn in one figure."""
        run = self.runs[0]
        replaced = run["depth"] if run["depth"] != self.entry.arguments["depth"] else None
        other = run["dataset"] if run["dataset"] != DATASETS[self.entry.dataset] else None
        return figures.Setting(run["epochs"], run["iterations"], other, replaced)


def groups_of(entry, records):
    """The runs of a row, the ones of equal length, data and depth together; the longest first."""
    found = {}
    for run in records.values():
        key = run["iterations"], run["dataset"], run["train_images"], run["depth"], run["recipe"], run["bn_group"]
        found.setdefault(key, []).append(run)
    ordered = sorted(found.items(), key=lambda item: (-item[0][0], str(item[0])))
    return [Group(entry, sorted(runs, key=lambda run: run["seed"])) for _, runs in ordered]


def shortcomings(group):
    """Why these runs are not the paper's experiment, in words; [] where they are."""
    run, entry, recipe = group.runs[0], group.entry, recipe_of(group.entry)
    words = []
    if run["depth"] != entry.arguments["depth"]:
        words.append(f"depth {run['depth']} for {entry.arguments['depth']}")
    if run["iterations"] < recipe.iterations:
        paper = recipe.iterations / run["steps_per_epoch"]
        words.append(f"{plural(run['epochs'], 'epoch')} of {paper:.0f}")
    if run["recipe"] != recipe_name(entry):
        words.append(f"recipe {run['recipe']}")
    if run["dataset"] != DATASETS[entry.dataset]:
        words.append(f"on {run['dataset']}")
    elif run["train_images"] < TRAIN_IMAGES:
        words.append(f"{run['train_images']:,} of {TRAIN_IMAGES:,} training images")
    return words


def verdict(group):
    """Such as "10 epochs of 164, 2 seeds: not a reproduction": only full runs of several seeds are one."""
    words, seeds = shortcomings(group), len({run["seed"] for run in group.runs})
    if words or seeds == 1:
        return f"{', '.join([*words, plural(seeds, 'seed')])}: not a reproduction"
    return f"{group.runs[0]['iterations']:,} iterations, {seeds} seeds: a reproduction"


def plural(count, word):
    return f"{count:.4g} {word}" + ("" if count == 1 else "s")


def figure_of(group, name="test_error"):
    """Mean and standard deviation over the seeds; before them the median, where the paper gives the median of five."""
    values = [run[name] for run in group.runs]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    if group.entry.paper == "2016" and len(values) >= MEDIAN_OF:
        return f"{statistics.median(values):.2f} (median; mean {text})"
    return text


def table_of(entries, results):
    """The cells of an experiment's table, without head: a line a group, and "not run" where there is none."""
    rows = []
    for entry in entries:
        paper = entry.error.replace("+-", "±") or "a curve"
        groups = groups_of(entry, results.get(entry.name, {}))
        if not groups:
            rows.append([entry.name, paper, "not run", *[""] * (len(HEAD) - 3)])
        for group in groups:
            runs = group.runs
            seeds = ", ".join(str(run["seed"]) for run in runs)
            made = f"{plural(runs[0]['epochs'], 'epoch')}, seed{'s' if len(runs) > 1 else ''} {seeds}"
            devices = ", ".join(sorted({run["device"] for run in runs}))
            figure, training = figure_of(group), figure_of(group, "train_error").split(" (")[0]
            rows.append([entry.name, paper, figure, training, made, runs[0]["dataset"], devices, verdict(group)])
    return rows


def runs_of(entries, results):
    """A line for each run, with where it was made."""
    head = ["run", "test error %", "training error %", "iterations", "time", "device", "tinyres", "commit"]
    rows = []
    for entry in entries:
        for name, run in results.get(entry.name, {}).items():
            made = run["environment"]
            device = f"{run['device']}, {made['threads']} threads, {made['isa']}"
            rows.append([name, f"{run['test_error']:.2f}", f"{run['train_error']:.2f}", f"{run['iterations']:,}"])
            rows[-1] += [duration(run["seconds"]), device, made["tinyres"], made.get("commit") or "unknown"]
    return head, rows


def read(paths):
    """{row name: {run name: run}} of all files together; a run that several hold is of the last.

    Raises CheckpointError for a file that reproduce.py did not write.
    """
    results = {}
    for path in paths:
        try:
            for name, row in json.loads(path.read_text())["rows"].items():
                for run in row["runs"].values():
                    _ = [run[key] for key in KEYS]
                results.setdefault(name, {}).update(row["runs"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"[report] {path} must be a result file of reproduce.py; {error!r}") from None
    return results


def report(paths, out):
    """Write report.html, report.md and the Markdown's figures into the folder `out`; returns 0."""
    results, everything = read(paths), experiments()
    known = {entry.name for rows in everything.values() for entry in rows}
    unknown = sorted(set(results) - known)
    expect(not unknown, "report", "rows must be in the catalogue", CheckpointError, unknown=unknown)
    note = figures.missing()
    sections = []
    for name, entries in everything.items():
        groups = [group for entry in entries for group in groups_of(entry, results.get(entry.name, {}))]
        drawn = [] if note else figures.draw(name, groups)
        sections.append((name, entries, drawn))
    out.mkdir(parents=True, exist_ok=True)
    for _, _, drawn in sections:
        for figure in drawn:
            write_atomic(out / f"{figure.name}.png", figure.png)
    write_atomic(out / "report.md", markdown(sections, results, note).encode())
    write_atomic(out / "report.html", page(sections, results, note).encode())
    print(f"{out}/report.html, {out}/report.md" + (f"\n{note}" if note else ""))
    return 0


INTRODUCTION = [
    "Error on the whole test set after the last epoch, mean ± standard deviation over seeds. Only runs of the paper's "
    "length, depth and data with more than one seed are called a reproduction; all others show no more than that the "
    'experiment can be run. "fail" is the paper\'s word for an error above 20 %. The training error is the running one '
    "of the last epoch, on augmented images.",
    "Known to differ from the papers: "
    + "; ".join(f"{name}: {RECIPES[name].departs}" for name in ("paper2015", "paper2016") if RECIPES[name].departs)
    + ".",
    "The ImageNet tables of both papers belong to examples/imagenet_resnet.py.",
]


def markdown(sections, results, note):
    def table(head, rows):
        return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])

    parts = ["# The papers' CIFAR experiments", *INTRODUCTION, *([note] if note else [])]
    for name, entries, drawn in sections:
        parts += [f"## {name}: {TITLES[name]}", table(HEAD, table_of(entries, results))]
        parts += [f"![{figure.caption}]({figure.name}.png)\n\n{figure.caption}" for figure in drawn]
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
.scroll { overflow-x: auto }
td.absent { color: #767676 }
figure { margin: 1.5rem 0 } img { max-width: 100% } figcaption { color: #444; font-size: 14px; max-width: 55rem }
"""


def page(sections, results, note):
    """The whole report as one HTML text that refers to no other file."""

    def paragraph(text):
        return f"<p>{html.escape(text)}</p>"

    def table(head, rows):
        def line(cells, tag):
            kinds = [' class="absent"' if cell == "not run" else "" for cell in cells]
            each = [f"<{tag}{k}>{html.escape(cell)}</{tag}>" for cell, k in zip(cells, kinds, strict=True)]
            return f"<tr>{''.join(each)}</tr>"

        lines = [line(head, "th"), *(line(row, "td") for row in rows)]
        return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"

    parts = [paragraph(text) for text in (*INTRODUCTION, note) if text]
    for name, entries, drawn in sections:
        parts += [f"<h2>{name}: {html.escape(TITLES[name])}</h2>", table(HEAD, table_of(entries, results))]
        for figure in drawn:
            uri = "data:image/png;base64," + base64.b64encode(figure.png).decode()
            caption = html.escape(figure.caption)
            parts.append(f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        head, rows = runs_of(entries, results)
        if rows:
            parts.append(f"<details><summary>{len(rows)} runs</summary>{table(head, rows)}</details>")
    title = "The papers' CIFAR experiments"
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    body = "\n".join([f"<h1>{title}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n'
