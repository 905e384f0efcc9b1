"""The papers' CIFAR experiments, as rows of `tinyres.models.catalogue()`: what is run, under which name, how."""

from __future__ import annotations

from typing import Any, NamedTuple

from tinyres.models import Entry, catalogue
from tinyres.models.cifar import BOTTLENECKS
from tinyres.recipes import RECIPES, Recipe

TITLES = {
    "2015-fig6": "plain networks beside residual ones on CIFAR-10",
    "2015-table6": "ResNets of 20 to 1202 layers on CIFAR-10",
    "2016-table1": "what the skip connection does, ResNet-110 on CIFAR-10",
    "2016-table2": "the order of activations, ResNet-110 and 164 on CIFAR-10",
    "2016-table3": "the original and the pre-activation unit on CIFAR-10 and 100",
}
# Rows that an experiment shows as well, catalogued where their error is printed first. Their runs are shared.
ALSO = {
    "2015-fig6": ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"),
    "2016-table1": ("resnet110-original",),
    "2016-table3": (
        "resnet110-original",
        "resnet110-full-preactivation",
        "resnet164-original",
        "resnet164-full-preactivation",
    ),
}
DATASETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}  # the example's names of the papers'
TRAIN_IMAGES = 50_000  # of both

# The example's options that make a network, and what they are unless given.
OPTIONS: dict[str, Any] = {
    "depth": None, "plain": False, "block": None, "unit": "original", "skip": "identity", "scales": None,
    "gate_bias": None, "dropout": None, "shortcut": None,
}  # fmt: skip


def experiments() -> dict[str, list[Entry]]:
    """The rows of each experiment, by the experiment's name, such as "2016-table1"."""
    cifar = [entry for entry in catalogue() if entry.dataset in DATASETS]
    found: dict[str, list[Entry]] = {}
    for entry in cifar:
        name = f"{entry.paper}-{entry.table.lower().replace('.', '').replace(' ', '')}"
        found.setdefault(name, []).append(entry)
    rows = {entry.name: entry for entry in cifar}
    return {name: own + [rows[also] for also in ALSO.get(name, ())] for name, own in sorted(found.items())}


def imagenet() -> list[Entry]:
    """The rows that need ImageNet."""
    return [entry for entry in catalogue() if entry.dataset not in DATASETS]


def recipe_name(entry: Entry) -> str:
    return f"paper{entry.paper}"


def recipe_of(entry: Entry) -> Recipe:
    return RECIPES[recipe_name(entry)]


class Run(NamedTuple):
    """One training run: a row, with another depth and a shorter length where these are given, and a seed.

    dataset  the row's own, as examples/cifar_resnet.py calls it, or "shapes10" to try things out
    """

    entry: Entry
    seed: int
    dataset: str
    depth: int | None = None
    epochs: int | None = None

    @property
    def name(self) -> str:
        """Of the run's folder: resnet20-seed0 at full length, resnet110-dropout-depth20-10epochs-seed0 where cheap."""
        parts = [self.entry.name]
        parts += [self.dataset] if self.dataset != DATASETS[self.entry.dataset] else []
        parts += [f"depth{self.depth}"] if self.depth else []
        parts += [f"{self.epochs}epochs"] if self.epochs else []
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `models.cifar_resnet` for this run, but num_classes."""
        own = {name: value for name, value in self.entry.arguments.items() if name != "num_classes"}
        if self.depth:
            # 164 and 1001 alone say that a network is of bottlenecks; another depth has to be told.
            own |= {"block": "bottleneck"} if own["depth"] in BOTTLENECKS else {}
            own["depth"] = self.depth
        return own

    @property
    def options(self) -> dict[str, Any]:
        """The options of examples/cifar_resnet.py, all that decide the run's result, by their names in config.json."""
        made = {**OPTIONS, **self.arguments, "epochs": self.epochs, "iterations": None, "seed": self.seed}
        made["scales"] = made["scales"] and [*made["scales"]]  # a list, as in JSON
        return made

    def command(self) -> list[str]:
        """These options as words of a command line."""
        words = ["--recipe", recipe_name(self.entry), "--dataset", self.dataset]
        for name, value in self.options.items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False and value != OPTIONS.get(name):
                words.append(f"--{name.replace('_', '-')}={value}")
        return words
