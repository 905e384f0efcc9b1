"""Data sets as uint8 arrays in memory, and the loader that makes training batches of them."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from tinyres.data import cifar
from tinyres.data.augment import Loader, statistics
from tinyres.data.shapes import shapes10
from tinyres.errors import ArgumentError, DataError, DtypeError, expect

__all__ = ["NAMES", "Dataset", "Loader", "held_out", "load", "shapes10", "statistics"]

NAMES = ("auto", "cifar10", "cifar100", "shapes10")
OFFICIAL_COUNTS = (50_000, 10_000)


class Dataset(NamedTuple):
    """A data set in memory.

    name            "cifar10", "cifar100" or "shapes10"
    train_images    (L, 32, 32, 3) uint8, C-contiguous; so are test_images
    train_labels    (L,) int64; so are test_labels
    classes         list of str, by label
    source          where it came from: a path, or how it was made
    note            a line worth showing to the user, or ""
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    source: str
    note: str = ""


def load(name: str = "auto", data_dir: str | os.PathLike[str] | None = None, download: bool = False) -> Dataset:
    """Load a data set: "cifar10", "cifar100", "shapes10", or "auto": cifar10 if it is there, else shapes10.

    CIFAR is looked for in `data_dir`, then $TINYRES_DATA, then the user's cache folder: each may be the extracted
    folder, or hold that or the archive, in the binary or the python form. Only with `download=True` is anything
    fetched, into the first of these folders (see `cifar.download`). Returns a Dataset.
    Raises DataError for a set that is missing or damaged, naming the file and what is wrong with it; ArgumentError
    or DtypeError for arguments that make no sense.
    """
    known = isinstance(name, str) and name in NAMES
    expect(known, "data.load", f"name must be one of {', '.join(NAMES)}", ArgumentError, name=repr(name))
    kind_fits = data_dir is None or isinstance(data_dir, (str, os.PathLike))
    expect(kind_fits, "data.load", "data_dir must be a path or None", DtypeError, data_dir=repr(data_dir))
    expect(isinstance(download, bool), "data.load", "download must be a bool", DtypeError, download=repr(download))
    there = data_dir is None or download or os.path.isdir(data_dir)
    expect(there, "data.load", "data_dir must be an existing folder", DataError, data_dir=data_dir)

    if name == "shapes10":
        return _shapes()
    wanted = "cifar10" if name == "auto" else name
    found = cifar.find(wanted, data_dir)
    if found is None and download:
        found = cifar.download(wanted, data_dir)
    if found is None:
        searched = ", ".join(str(folder) for folder in cifar.folders(data_dir))
        if name == "auto":
            return _shapes(f"no CIFAR-10 in {searched}: using shapes10; --download (download=True) fetches it")
        archives = " or ".join(form.archive for form in cifar.FORMS[wanted])
        raise DataError(f"[data.load] no {wanted} in {searched}: download=True fetches it, or put {archives} there")
    arrays = cifar.read(wanted, found)
    counts = len(arrays[0]), len(arrays[2])
    note = "" if counts == OFFICIAL_COUNTS else f"a part of {wanted}: {counts[0]} training and {counts[1]} test images"
    return Dataset(wanted, *arrays, source=str(found.path), note=note)


def held_out(dataset: Dataset, count: int) -> Dataset:
    """`dataset` for making choices: the last `count` training images are the test set, and not trained on."""
    images, labels = dataset.train_images, dataset.train_labels
    fits = isinstance(count, int) and 0 < count < len(images)
    expect(fits, "data.held_out", f"count must be in 1 .. {len(images) - 1}", ArgumentError, count=count)
    note = f"the last {count:,} of {len(images):,} training images of {dataset.name} held out to test on"
    parts = images[:-count], labels[:-count], images[-count:], labels[-count:]
    return Dataset(dataset.name, *parts, dataset.classes, dataset.source, note)


def _shapes(note=""):
    return Dataset("shapes10", *shapes10(), source="drawn from seed 0", note=note)
