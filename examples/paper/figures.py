"""Figures of the papers, drawn from our runs, as PNG: curves, layer responses, gradients and shares of shortcuts.

`draw` gives the figures of one experiment: a set for each setting (length, data, depth), so that no figure shows runs
side by side that cannot be compared. Matplotlib is imported only here, and only where something is drawn.
"""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import numpy as np

# Okabe and Ito's colours, which differ for the colour-blind too; black is for what others are compared with.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
WIDTH, HEIGHT = 4.6, 3.4  # of a panel, in inches
COLUMNS = 3


class Setting(NamedTuple):
    """What runs in one figure have in common. `dataset` and `depth` are None where they are the row's own."""

    epochs: float
    iterations: int
    dataset: str | None
    depth: int | None

    def words(self):
        parts = [f"{self.epochs:.4g} epoch{'' if self.epochs == 1 else 's'}, {self.iterations:,} iterations"]
        parts += [f"networks of {self.depth} layers"] if self.depth else []
        parts += [f"data {self.dataset}"] if self.dataset else []
        return ", ".join(parts)


class Drawn(NamedTuple):
    name: str  # of its file, without .png
    caption: str
    png: bytes


def missing():
    """None, or a sentence that says why there will be no figures."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "No figures: they need Matplotlib (pip install 'tinyres[plot]')."
    return None


def draw(experiment, groups):
    """The figures of `experiment` from its Groups of runs (tables.Group)."""
    if experiment == "2015-table6":  # all of its rows stand in the figures of 2015-fig6
        return []
    settings = {}
    for group in groups:
        settings.setdefault(group.setting, []).append(group)
    if experiment.startswith("2016"):  # which compares: the original unit alone is no figure
        settings = {key: members for key, members in settings.items() if not all(map(_is_original, members))}
    drawn = []
    for number, (setting, members) in enumerate(settings.items(), 1):
        for kind, draw_one in (DRAWN_2015 if experiment.startswith("2015") else DRAWN_2016).items():
            figure, caption = draw_one(members)
            if figure is not None:
                seeds = "; mean over seeds" if any(len(group.runs) > 1 for group in members) else ""
                text = f"{caption} Here {setting.words()}{seeds}."
                drawn.append(Drawn(f"{experiment}-{kind}-{number}", text, _png(figure)))
    return drawn


# 2015 -------------------------------------------------------------------------------------------------------------


def error_curves(groups):
    """Training and test error of plain and residual networks, as 2015, Fig. 6."""
    sides = {"plain": [g for g in groups if _is_plain(g)], "residual": [g for g in groups if not _is_plain(g)]}
    sides = {name: members for name, members in sides.items() if members}
    figure, axes = _panels(len(sides), sharey=True)
    depths = sorted({group.entry.arguments["depth"] for group in groups})
    for panel, (name, members) in zip(axes, sides.items(), strict=True):
        for group in members:
            colour = COLOURS[depths.index(group.entry.arguments["depth"]) % len(COLOURS)]
            x, test = _curve(group, "test_error")
            _, training = _curve(group, "train_error")
            panel.plot(x, test.mean(0), color=colour, linewidth=2, marker=_marker(x))
            if len(test) > 1:
                panel.fill_between(x, test.min(0), test.max(0), color=colour, alpha=0.2, linewidth=0)
            panel.plot(x, training.mean(0), color=colour, linewidth=1.3, linestyle="--", marker=_marker(x))
        panel.set(title=f"{name} networks", xlabel=_time(groups[0])[1], ylim=(0, _top(groups)))
    axes[0].set_ylabel("error (%)")
    handles = [_line(COLOURS[i % len(COLOURS)], f"{depth} layers") for i, depth in enumerate(depths)]
    _legend(axes[-1], [*handles, _line("black", "test", linewidth=2), _line("black", "training", linestyle="--")])
    return figure, "Test error (bold, with the range of the seeds) and training error (dashed) as in 2015, Fig. 6."


def responses(groups):
    """Standard deviations of layer responses in their order and sorted, as 2015, Fig. 7."""
    groups = [group for group in groups if "layer_responses" in group.runs[0]]
    if not groups:
        return None, ""
    figure, axes = _panels(2, sharey=True)
    depths = sorted({group.entry.arguments["depth"] for group in groups})
    for group in groups:
        values = _mean_of(group, "layer_responses")
        colour = COLOURS[depths.index(group.entry.arguments["depth"]) % len(COLOURS)]
        style = {"color": colour, "linestyle": "--" if _is_plain(group) else "-", "linewidth": 1.6}
        for panel, ordered in zip(axes, (values, np.sort(values)[::-1]), strict=True):
            panel.plot(np.arange(1, len(values) + 1), ordered, label=_label_2015(group), **style)
    axes[0].set(title="original order", ylabel="standard deviation of the response", xlabel="3x3 layer")
    axes[0].set_ylim(0, 1.05 * max(line.get_ydata().max() for line in axes[0].lines))
    axes[1].set(title="sorted by magnitude", xlabel="rank of the layer")
    _legend(axes[-1])
    text = "Responses of the 3x3 layers after batch norm, before ReLU or addition, on test images, as in 2015, Fig. 7."
    return figure, text


def gradients_2015(groups):
    figure, axes = _panels(1)
    depths = sorted({group.entry.arguments["depth"] for group in groups})
    for group in groups:
        values = _mean_of(group, "gradient_norms")
        colour = COLOURS[depths.index(group.entry.arguments["depth"]) % len(COLOURS)]
        style = {"color": colour, "linestyle": "--" if _is_plain(group) else "-", "linewidth": 1.6}
        axes[0].plot(np.arange(1, len(values) + 1), values, label=_label_2015(group), **style)
    axes[0].set(xlabel="layer", ylabel="norm of the gradient by the weights")
    _logarithmic(axes[0])
    _legend(axes[0])
    return figure, GRADIENTS


# 2016 -------------------------------------------------------------------------------------------------------------


def loss_curves(groups):
    """Training loss and test error, each variant beside the original unit, as 2016, Fig. 3 and 6."""
    comparisons = {}
    for group in groups:
        if not _is_original(group):
            made = group.entry.arguments
            kind = (_family(group), made.get("unit"), made.get("skip"))
            comparisons.setdefault(kind, []).append(group)
    panels = [[*_baselines(groups, members[0]), *members] for members in comparisons.values()]
    figure, axes = _panels(len(panels))
    columns = min(len(panels), COLUMNS)
    for i, (panel, members) in enumerate(zip(axes, panels, strict=True)):
        right = panel.twinx()
        for group in members:
            style = _style(group, members)
            x, test = _curve(group, "test_error")
            _, loss = _curve(group, "train_loss")
            right.plot(x, test.mean(0), linewidth=2, **style, marker=_marker(x), label=_label_2016(group))
            panel.plot(x, loss.mean(0), linewidth=1.3, color=style["color"], linestyle="--", marker=_marker(x))
        panel.set(xlabel=_time(members[0])[1], title=f"{_family_words(members[-1])}: {_kind(members[-1])}")
        _logarithmic(panel)
        right.set(ylim=(0, _top(members)))
        right.locator_params(axis="y", nbins=5)
        if i % columns == 0:  # between panels the labels of two axes would meet
            panel.set_ylabel("training loss (dashed)")
        if i % columns == columns - 1 or i == len(panels) - 1:
            right.set_ylabel("test error in % (solid)")
        panel.legend(*right.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return figure, "Training loss (dashed, left axis) and test error (solid, right axis), as in 2016, Fig. 3 and 6."


def gradients_2016(groups):
    figure, families = _by_family(groups)
    for panel, members in families:
        for group in members:
            values = _mean_of(group, "gradient_norms")
            panel.plot(np.arange(1, len(values) + 1), values, **_style(group, members), label=_label_2016(group))
        panel.set(xlabel="layer", title=_family_words(members[0]), ylabel="norm of the gradient by the weights")
        _logarithmic(panel)
        _legend(panel)
    return figure, GRADIENTS


def shares(groups):
    figure, families = _by_family([group for group in groups if group.runs[0]["shortcut_shares"]], columns=2)
    for i, (panel, members) in enumerate(families):
        direction = i % 2
        for group in members:
            values = _mean_of(group, "shortcut_shares")[:, direction]
            panel.plot(np.arange(1, len(values) + 1), values, **_style(group, members), label=_label_2016(group))
        panel.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":")
        title = f"{_family_words(members[0])}: {('forward', 'backward')[direction]}"
        panel.set(xlabel="residual unit", ylabel="share of the shortcut", ylim=(-0.03, 1.03), title=title)
        if direction:
            _legend(panel)
    return figure, SHARES


SHARES = (
    "Share of the signal that passes each residual unit of trained networks by its shortcut: forward, of the two terms "
    "that are added; backward, of the two gradients that meet at the unit's input (2016, Eqns. 3 to 8). Dotted: half."
)
GRADIENTS = (
    "Norm of the loss's gradient by each layer's weights in trained networks, on a batch of training images; without "
    "the layers of shortcuts and gates."
)
DRAWN_2015 = {"curves": error_curves, "responses": responses, "gradients": gradients_2015}
DRAWN_2016 = {"curves": loss_curves, "gradients": gradients_2016, "shares": shares}


# what they share --------------------------------------------------------------------------------------------------


def _is_plain(group):
    return group.entry.arguments.get("plain", False)


def _is_original(group):
    made = group.entry.arguments
    return made.get("unit", "original") == "original" and made.get("skip", "identity") == "identity"


def _family(group):
    """Of networks that differ by their units' activations and skips alone."""
    made = group.entry.arguments
    return made["depth"], made.get("block"), made.get("num_classes", 10)


def _order(group):
    depth, block, classes = _family(group)
    return classes, depth, block is not None


def _family_words(group):
    depth, block, classes = _family(group)
    words = f"ResNet-{group.setting.depth or depth}"
    words += f" for {depth}" if group.setting.depth else ""
    return words + (", 1-layer units" if block == "single" else "") + (f", CIFAR-{classes}" if classes != 10 else "")


def _baselines(groups, group):
    return [other for other in groups if _is_original(other) and _family(other) == _family(group)]


def _label_2015(group):
    return f"{'plain' if _is_plain(group) else 'ResNet'}-{group.entry.arguments['depth']}"


def _kind(group):
    """Of a unit: its order of activations or its skip, the one that is not the original's."""
    made = group.entry.arguments
    kinds = [name for name in (made.get("unit", "original"), made.get("skip", "identity")) if name != "identity"]
    return kinds[-1].replace("_", " ")


def _label_2016(group):
    """The kind of unit with its parameters: "constant 0.5, 1", "exclusive gate, bias -6"."""
    made = group.entry.arguments
    words = _kind(group)
    if "scales" in made:
        words += " " + ", ".join(f"{scale:g}" for scale in made["scales"])
    return words + (f", bias {made['gate_bias']:g}" if "gate_bias" in made else "")


def _style(group, members):
    """A colour and a line style among the groups of a panel; black for the original unit."""
    if _is_original(group):
        return {"color": "black"}
    variants = [other.entry.name for other in members if not _is_original(other)]
    i = variants.index(group.entry.name)
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}


def _time(group):
    """(values of the x axis, its label): iterations as the papers have them, epochs in a short run."""
    curves = group.runs[0]["curves"]
    if group.runs[0]["iterations"] >= 32_000:
        return np.array(curves["step"]) / 1e4, "iteration (1e4)"
    return np.array(curves["epoch"]), "epoch"


def _marker(x):
    """Points where there are so few that a line may not show."""
    return "." if len(x) <= 20 else None


def _curve(group, name):
    """x (epochs,) and y (seeds, epochs) of a curve."""
    return _time(group)[0], np.array([run["curves"][name] for run in group.runs])


def _mean_of(group, name):
    """A measured figure by layer or unit, (layers, ...): the mean over the seeds.

    Layers of shortcuts and gates are left out, so that the n-th layer is the n-th in all networks of a depth.
    """

    def values(run):
        return [value for layer, value in run[name].items() if not re.search(r"\.(shortcut|join)\b", layer)]

    return np.array([values(run) for run in group.runs]).mean(0)


def _top(groups):
    """Where the axis of errors ends: the papers' 20 %, or above twice the final errors where these are higher."""
    last = max(run["test_error"] for group in groups for run in group.runs)
    return 20 if last <= 12 else min(100, 2 * last)


def _panels(count, columns=COLUMNS, sharey=False):
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns + 1.4, HEIGHT * rows + 0.3), layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, sharey=sharey, squeeze=False)))
    for panel in axes[count:]:
        panel.remove()
    for panel in axes[:count]:
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.margins(x=0.02)
        panel.locator_params(axis="x", integer=True)
    return figure, axes[:count]


def _by_family(groups, columns=1):
    """A figure and its (panel, the groups in it): for each family as many panels as there are columns."""
    families = {}
    for group in sorted(groups, key=lambda group: (*_order(group), not _is_original(group))):
        families.setdefault(_family(group), []).append(group)
    if not families:
        return None, []
    figure, axes = _panels(columns * len(families), columns if columns > 1 else 2)
    each = [members for members in families.values() for _ in range(columns)]
    return figure, list(zip(axes, each, strict=True))


def _logarithmic(panel):
    """A logarithmic y axis; one too short for powers of ten has 0.2, 0.3, 0.5, ... as well."""
    from matplotlib.ticker import LogLocator

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high < 100 * low:
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")


def _line(colour, label, **style):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **style)


def _legend(panel, handles=None):
    """Beside the panel, where it covers no curve."""
    handles = handles or panel.get_legend_handles_labels()[0]
    panel.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, handlelength=2.5)


def _png(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
