"""Checkpoints: what goes in comes out, and a damaged file is refused with a clear sentence."""

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import tinyres
from tinyres import checkpoint
from tinyres.errors import CheckpointError

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool", "complex64")

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["a/b", "~", "~1", "/", ""])
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | keys
    | arrays.arrays(st.sampled_from(DTYPES), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
trees = st.recursive(leaves, lambda tree: st.lists(tree, max_size=3) | st.dictionaries(keys, tree, max_size=3))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tinyres.save(path, **tree)
    assert_same(tinyres.load(path), tree)


def test_layouts_and_scalars(tmp_path):
    grid = np.arange(24.0).reshape(2, 3, 4)
    view, big = grid.transpose(2, 0, 1)[::2], np.arange(3, dtype=">i4")
    tinyres.save(tmp_path / "c", view=view, big=big, scalar=np.float32(0.1), pair=(1, 2))
    tree = tinyres.load(tmp_path / "c")
    np.testing.assert_array_equal(tree["view"], view)
    np.testing.assert_array_equal(tree["big"], [0, 1, 2])
    assert tree["scalar"].shape == () and tree["scalar"].dtype == np.float32 and tree["scalar"] == np.float32(0.1)
    assert tree["pair"] == [1, 2]
    tree["view"] += 1  # the arrays are the caller's own


def test_model_and_optimizer_by_their_state_dict(tmp_path):
    model = tinyres.nn.Sequential(tinyres.nn.Conv2d(3, 4, 3, padding=1), tinyres.nn.BatchNorm2d(4))
    optimizer = tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    tinyres.save(tmp_path / "c", model=model, optimizer=optimizer)
    tree = tinyres.load(tmp_path / "c")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(tree["model"][name], value)
    model.load_state_dict(tree["model"])
    optimizer.load_state_dict(tree["optimizer"])


def test_tensors_as_their_arrays(tmp_path):
    w, b = tinyres.nn.Parameter(np.ones((2, 3), np.float32)), tinyres.tensor(np.arange(3))
    tinyres.save(tmp_path / "c", w=w, rest={"b": [b]})
    assert_same(tinyres.load(tmp_path / "c"), {"w": w.numpy(), "rest": {"b": [b.numpy()]}})


@pytest.mark.parametrize(
    "items",
    [
        {"x": object()},
        {"x": {1: 2}},
        {"x": {"y": {3.0}}},
        {"x": np.array("text")},
        {"x": np.array([None])},
        {"__metadata__": np.ones(2)},
        {"\ud800": np.ones(2)},
    ],
)
def test_what_cannot_be_stored(tmp_path, items):
    with pytest.raises(CheckpointError, match="save"):
        tinyres.save(tmp_path / "c", **items)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        tinyres.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        tinyres.load(tmp_path)


def test_every_damage_is_noticed(tmp_path):
    """Each truncation and each flipped bit: refused, or (spaces that pad the header) the tree unchanged."""
    path = tmp_path / "c"
    tree = {"weights": {"w": np.arange(6, dtype=np.float32)}, "step": 7}
    tinyres.save(path, **tree)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    damaged += [
        whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8)
    ]
    refused = 0
    for content in damaged:
        path.unlink()  # a file that is cut to nothing and written again is waited for by some file systems
        path.write_bytes(content)
        try:
            assert_same(tinyres.load(path), tree)
        except CheckpointError:
            refused += 1
    assert refused >= len(damaged) - 8


def test_edited_shapes_are_noticed(tmp_path):
    """Of as many elements, which the format itself takes."""
    path = tmp_path / "c"
    tinyres.save(path, w=np.zeros((2, 3)))
    content = path.read_bytes()
    assert content.count(b"[2,3]") == 1
    path.write_bytes(content.replace(b"[2,3]", b"[3,2]"))
    with pytest.raises(CheckpointError, match="checksum"):
        tinyres.load(path)


def test_foreign_and_newer_files(tmp_path):
    def write(metadata):
        header = json.dumps({"__metadata__": metadata}).encode()
        (tmp_path / "c").write_bytes(struct.pack("<Q", len(header)) + header)

    write({"format": "pt"})
    with pytest.raises(CheckpointError, match="must be a checkpoint of tinyres; got .* format pt"):
        tinyres.load(tmp_path / "c")
    write({"format": "tinyres", "version": "2"})
    with pytest.raises(CheckpointError, match="format version 1; got .* version 2"):
        tinyres.load(tmp_path / "c")
    write({"format": "tinyres", "version": "1"})
    with pytest.raises(CheckpointError, match="malformed"):
        tinyres.load(tmp_path / "c")
    (tmp_path / "c").write_bytes(b"PK\x03\x04 an archive of something else")
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        tinyres.load(tmp_path / "c")


def test_a_tree_without_end(tmp_path):
    tree = []
    tree.append(tree)
    with pytest.raises(CheckpointError, match=r"^\[save\] the items cannot be stored"):
        tinyres.save(tmp_path / "c", tree=tree)
    assert list(tmp_path.iterdir()) == []


# Files that cannot be written -----------------------------------------------------------------------------------------


def broken(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "c"
    tinyres.save(path, step=1)
    if fails == "open":
        monkeypatch.setattr(checkpoint, "open", broken, raising=False)
    else:
        monkeypatch.setattr(checkpoint.os, fails, broken)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'$"):
        tinyres.save(path, step=2)
    monkeypatch.undo()
    assert tinyres.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("room", [0, 1, 100, 4096])
def test_a_disk_that_is_full(tmp_path, room):
    """For real: the system lets no file grow past `room` bytes."""
    path = tmp_path / "c"
    tinyres.save(path, w=np.zeros(5000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'$"):
            tinyres.save(path, w=np.ones(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tinyres.load(path)["w"].sum() == 0 and os.listdir(tmp_path) == ["c"]


def test_a_folder_that_is_read_only_or_gone():
    with tempfile.TemporaryDirectory() as place:  # pytest's folder is one that only its owner may look into
        path = Path(place) / "folder" / "c"
        os.chmod(place, 0o755)
        path.parent.mkdir()
        tinyres.save(path, step=1)
        user = os.geteuid()
        path.parent.chmod(0o555)
        if user == 0:  # whom no permission stops
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=f"'{path}'"):
                tinyres.save(path, step=2)
        finally:
            os.seteuid(user)
        path.parent.chmod(0o755)
        assert tinyres.load(path) == {"step": 1} and os.listdir(path.parent) == ["c"]
        path.parent.rename(Path(place) / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"'{path}'"):
            tinyres.save(path, step=2)
        assert tinyres.load(Path(place) / "elsewhere" / "c") == {"step": 1}


def test_the_file_before_is_kept(tmp_path, monkeypatch):
    path, kept = tmp_path / "c", tmp_path / "kept"
    for content in (b"1", b"2", b"3"):
        checkpoint.write_atomic(path, content, kept)
    assert path.read_bytes() == b"3" and kept.read_bytes() == b"2"
    replace, moves = os.replace, []

    def killed(*paths):
        moves.append(paths)
        if len(moves) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomic(path, b"4", kept)
    assert kept.read_bytes() == b"3" and os.listdir(tmp_path) == ["kept"]  # and so `Run` looks there too


def test_drafts_of_the_dead_are_removed(tmp_path):
    """Also one of an earlier process by this one's number; but not those of the living, nor other files."""
    path = tmp_path / "a[b].c"
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    for process in (dead.pid, os.getpid(), 10**30):
        (tmp_path / f".a[b].c.{process}.1.tmp").touch()
    kept = {f".a[b].c.{os.getppid()}.1.tmp", ".a[b].c.x.1.tmp", ".a[b].c.tmp", f".ab.c.{dead.pid}.1.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    tinyres.save(path, step=1)
    assert set(os.listdir(tmp_path)) == {path.name, *kept}


def test_many_threads_save_to_one_path(tmp_path):
    def save(step):
        for _ in range(30):
            tinyres.save(tmp_path / "c", step=step)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save, range(4)))
    assert tinyres.load(tmp_path / "c")["step"] in range(4) and os.listdir(tmp_path) == ["c"]
