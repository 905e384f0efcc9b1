"""Checkpoints: a tree of arrays and JSON values in one safetensors file.

The arrays are the file's tensors, so that any safetensors reader can open them. A tensor's name is its path in the
tree, keys joined by "/" and escaped as in a JSON pointer (RFC 6901: "~" is "~0", "/" is "~1"). Everything that is no
array stands in the file's metadata as one JSON text, the tree with a null where an array belongs. A checksum covers
both, since the safetensors format itself has none.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyres import backend
from tinyres.autograd import Tensor
from tinyres.errors import CheckpointError, expect

FORMAT = "tinyres"
VERSION = "1"

_drafts: set[str] = set()  # that threads of this process are writing, by name


def save(path: str | os.PathLike[str], /, **items: Any) -> None:
    """Write `items` to `path`, whole or not at all.

    An item is a dict or list (nested as you like, with str keys) of arrays and JSON values, or anything that has a
    `state_dict()`, which is then saved in its place, as is a Tensor's array in its own. Arrays keep their dtype and
    shape, 0-d ones too; tuples become lists. A file that stood at `path` is replaced only when the new one is safely
    on disk.

    Raises CheckpointError for a value that cannot be stored; OSError, naming the file, where it cannot be written.
    """
    write_atomic(path, serialize(items))


def serialize(items: dict[str, Any]) -> bytes:
    """The content of the file that `save` makes of `items`. Raises CheckpointError as it does."""
    from safetensors.numpy import save as safetensors_file

    arrays: dict[str, np.ndarray] = {}
    try:
        tree = json.dumps(_split(items, (), arrays))
        metadata = {"format": FORMAT, "version": VERSION, "tree": tree, "crc32": _checksum(tree, arrays)}
        return safetensors_file(arrays, metadata)
    except CheckpointError:
        raise
    except Exception as error:  # SafetensorError or TypeError for a dtype, UnicodeError, RecursionError for a tree
        raise CheckpointError(f"[save] the items cannot be stored: {error}") from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tree that `save` wrote to `path`: {item name: ...}, arrays as new NumPy arrays.

    Raises CheckpointError for a file that is missing, truncated, damaged, or not a checkpoint of tinyres.
    """
    from safetensors import SafetensorError, safe_open

    expect(os.path.isfile(path), "load", "there is no checkpoint here", CheckpointError, path=path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            kind, version = metadata.get("format"), metadata.get("version")
            rule = "the file must be a checkpoint of tinyres"
            expect(kind == FORMAT, "load", rule, CheckpointError, path=path, format=kind)
            rule = "this version of tinyres reads checkpoints of format version " + VERSION
            expect(version == VERSION, "load", rule, CheckpointError, path=path, version=version)
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        intact = _checksum(metadata["tree"], arrays) == metadata["crc32"]
        expect(intact, "load", "the checkpoint is damaged: its checksum is wrong", CheckpointError, path=path)
        tree = _join(json.loads(metadata["tree"]), arrays)
        expect(isinstance(tree, dict), "load", f"the items of {path} must have names", CheckpointError)
        return tree
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"[load] {path} is no readable safetensors file: {error}") from error
    except Exception as error:  # a dtype that NumPy lacks, a place that is not in the tree, nesting too deep
        raise CheckpointError(f"[load] {path}: the tree of the checkpoint is malformed: {error!r}") from error


def write_atomic(path: str | os.PathLike[str], content: bytes, keep: str | os.PathLike[str] | None = None) -> None:
    """Replace the file at `path` by the bytes `content`: after a crash at any moment it holds the old or the new.

    keep  where the old file goes, if it is to be kept; a crash between the two moves leaves it there alone
    What is written first is a draft beside `path`, of this process and thread alone; a draft that a killed process
    left is removed by the next one that writes the same file. Raises OSError, naming `path`.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with naming(path):
        try:
            _drafts.add(draft.name)
            _remove_abandoned_drafts(path)
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(draft, path)
        finally:
            _drafts.discard(draft.name)
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename is durable once the folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError from within name `path`: those of a full disk name no file, others would name a draft."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def _remove_abandoned_drafts(path):
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = draft.name.split(".")[-3]
        if process == str(os.getpid()):  # in a container each process has the number of the one before it
            abandoned = draft.name not in _drafts
        else:
            abandoned = process.isdecimal() and not _alive(int(process))
        if abandoned:
            with contextlib.suppress(OSError):  # it is in nobody's way
                draft.unlink()


def _alive(process):
    try:
        os.kill(process, 0)  # no signal, only the question
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _split(value, path, arrays):
    """The JSON part of `value`; its arrays go into `arrays` by their path."""
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, Tensor):
        value = value.data
    value = backend.host(value)
    if isinstance(value, (np.ndarray, np.generic)):
        name = "/".join(key.replace("~", "~0").replace("/", "~1") for key in path)
        expect(name != "__metadata__", "save", "safetensors reserves this name", CheckpointError, name=name)
        arrays[name] = np.asarray(value, value.dtype.newbyteorder("="), order="C")
        return None
    if isinstance(value, dict):
        for key in value:
            expect(isinstance(key, str), "save", "keys must be strings", CheckpointError, key=key, at=path)
        return {key: _split(item, (*path, key), arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, (*path, str(i)), arrays) for i, item in enumerate(value)]
    plain = value is None or isinstance(value, (bool, int, float, str))
    rule = "items must be arrays, Tensors, JSON values, or have state_dict()"
    expect(plain, "save", rule, CheckpointError, at="/".join(path), type=type(value).__name__)
    return value


def _join(tree, arrays):
    for name, array in arrays.items():
        *path, last = (key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))
        place = tree
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = array
    return tree


def _checksum(tree, arrays):
    crc = zlib.crc32(tree.encode())
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return str(crc)
