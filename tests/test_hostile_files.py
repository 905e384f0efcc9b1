"""Files made to do harm: each is refused in the project's own words; see hostile_files.py for what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hostile_files
import tinyres
from tinyres import nn, train
from tinyres.backend import random
from tinyres.data import cifar
from tinyres.data.folder import ImageFolder
from tinyres.errors import DataError, TinyresError

MUTANTS = 1000  # of each of the six kinds


def test_corpus_and_mutants(tmp_path):
    """In a process of its own, so that a crash is one of that, and the memory its alone."""
    command = [sys.executable, hostile_files.__file__, "check", tmp_path / "check", str(MUTANTS)]
    env = {**os.environ, "PYTHONPATH": str(Path(tinyres.__file__).parents[1])}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind, figures in json.loads(done.stdout).items():
        assert figures["files"] >= 5 and figures["refused"] > MUTANTS / 4, kind
        assert figures["MiB"] < 256, f"{kind}: {figures['MiB']} MiB"


def test_the_corpus_is_what_the_script_writes():
    """By name: bytes hang on the versions of zlib and Pillow."""
    for kind, make in hostile_files.MAKERS.items():
        assert {path.name for path in (hostile_files.CORPUS / kind).iterdir()} == set(make())


def changes(tree, path=()):
    """(path, tree with one change) for every value and list or dict of a tree: left out, or of another kind."""
    for key in list(tree if isinstance(tree, dict) else range(len(tree))):
        before = tree[key]
        for other in (None, "x", -1, 1.5, True, [], {}, [[]], {"x": 1}, np.zeros(3, np.float32), np.array(["a"])):
            tree[key] = other
            yield (*path, key), tree
        if isinstance(tree, dict):
            del tree[key]
            yield (*path, key), tree
            restored = {**tree, key: before}
            tree.clear()
            tree.update(restored)
        tree[key] = before
        if isinstance(before, (dict, list)):
            for below, _ in changes(before, (*path, key)):
                yield below, tree


def test_a_checkpoint_of_other_things_than_a_runs(tmp_path, monkeypatch, capsys):
    """Any value of a run's checkpoint replaced: refused, or what the run would take if it were its own."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer, running = tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9), train.Running()
    parts = {"model": model, "optimizer": optimizer, "running": running}
    train.Run(tmp_path, {"lr": 0.1}, {"device": "cpu"}, resume=False).save(**parts)
    saved = tinyres.load(tmp_path / "checkpoint.safetensors")
    refused = 0
    for path, tree in changes(saved):
        monkeypatch.setattr(train, "load", lambda _, tree=tree: dict(tree))
        try:
            run = train.Run(tmp_path, {"lr": 0.1}, {"device": "cpu"}, resume=True)
            run.restore(**parts)
            run.save(**parts)  # the state that it took is one to go on with
            random.next_draw("init")
        except TinyresError as error:
            refused += 1
            assert "checkpoint.safetensors" in str(error) or f"of the run in {tmp_path}" in str(error), path
        except Exception as error:
            raise AssertionError(f"{path}: {error!r}") from error
    assert refused > 200
    capsys.readouterr()
    random.manual_seed(0)


# Folders: what git does not keep --------------------------------------------------------------------------------------


def folder_of(place):
    (place / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(place / "cat" / "a.png")
    return place / "cat"


@pytest.mark.parametrize("hostile", ["loop", "dangling", "folder", "pipe", "device"])
def test_what_is_called_an_image(tmp_path, hostile):
    path = folder_of(tmp_path) / "b.png"
    match hostile:
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to("nowhere")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)  # to open it is to wait for somebody who writes into it
        case "device":
            path.symlink_to("/dev/zero")
    images = ImageFolder(tmp_path)
    assert images.read(0).shape == (4, 4, 3)
    with pytest.raises(DataError, match=r"b\.png: cannot be decoded: "):
        images.read(1)


def test_folders_in_circles(tmp_path):
    inside = folder_of(tmp_path)
    (inside / "up").symlink_to(tmp_path)
    (tmp_path / "up").symlink_to(tmp_path.parent)
    with pytest.raises(DataError, match="up: a class must have at least one image"):
        ImageFolder(tmp_path)
    (tmp_path / "up").unlink()
    assert len(ImageFolder(tmp_path)) == 1
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(DataError, match="self: cannot be read: "):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("position", (0, 1), ids=("binary", "python"))
def test_cifar_files_that_are_none(tmp_path, position, monkeypatch):
    form = cifar.FORMS["cifar10"][position]
    os.mkfifo(tmp_path / form.train[0])
    with pytest.raises(DataError, match=rf"{form.train[0]}: cannot be read: it is no regular file"):
        cifar.read("cifar10", cifar.Found(form, tmp_path))
    (tmp_path / form.train[0]).unlink()
    with open(tmp_path / form.train[0], "wb") as file:
        file.truncate(2**40)  # takes no room on disk
    with pytest.raises(DataError, match=rf"{form.train[0]}: the file must have at most \d+ bytes; got bytes {2**40}"):
        cifar.read("cifar10", cifar.Found(form, tmp_path))
