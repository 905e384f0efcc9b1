"""CIFAR-10 and CIFAR-100: find them, verify them, read them, and download them when asked to.

Both sets exist in two official forms, "binary" (plain records) and "python" (pickles), each as a .tar.gz archive or
as the folder in it. All four are read; the binary form is preferred, and the pickles go through an unpickler that
can build arrays and containers and nothing else. Archives are read in place: nothing is ever extracted.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyres.errors import DataError, expect

OFFICIAL = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32  # a picture: 1024 red, 1024 green, 1024 blue bytes, each row by row
BLOCK = 1 << 20
LARGEST = 1 << 28  # bytes of a file; the largest official one has 155 MB
TIMEOUT = 30  # seconds without a byte from the server


class Form(NamedTuple):
    """One official form of a set: the archive, the folder in it, the files in that."""

    archive: str
    size: int
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_bytes: int  # in front of a binary record, the label being the last of them; 0 marks the pickled form
    label_key: str = ""  # in the pickles
    names_key: str = ""


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

FORMS = {
    "cifar10": (
        Form(
            archive="cifar-10-binary.tar.gz",
            size=170_052_171,
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train=tuple(f"{batch}.bin" for batch in BATCHES),
            test=("test_batch.bin",),
            meta="batches.meta.txt",
            label_bytes=1,
        ),
        Form(
            archive="cifar-10-python.tar.gz",
            size=170_498_071,
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train=BATCHES,
            test=("test_batch",),
            meta="batches.meta",
            label_bytes=0,
            label_key="labels",
            names_key="label_names",
        ),
    ),
    "cifar100": (
        Form(
            archive="cifar-100-binary.tar.gz",
            size=168_513_733,
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train=("train.bin",),
            test=("test.bin",),
            meta="fine_label_names.txt",
            label_bytes=2,  # coarse, fine
        ),
        Form(
            archive="cifar-100-python.tar.gz",
            size=169_001_437,
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train=("train",),
            test=("test",),
            meta="meta",
            label_bytes=0,
            label_key="fine_labels",
            names_key="fine_label_names",
        ),
    ),
}

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Found(NamedTuple):
    """Where a set lies: `path` is the archive of `form`, or a folder with its files."""

    form: Form
    path: Path


# Find -----------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's cache folder for tinyres: $XDG_CACHE_HOME/tinyres, or what the system uses in its place."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "tinyres"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "tinyres"
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.path.expanduser(usual)) / "tinyres"


def folders(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """The folders that are searched, in order: `data_dir`, $TINYRES_DATA, the cache."""
    named = [data_dir, os.environ.get("TINYRES_DATA"), cache_folder()]
    return [Path(folder) for folder in named if folder]


def find(name: str, data_dir: str | os.PathLike[str] | None = None) -> Found | None:
    """The first place that holds the set `name`, as Found, or None. Nothing is opened yet.

    A searched folder by another than its official name must hold all the images' files, since a file called
    "train" or "test" by itself can be anything; in an official folder `read` says which one is missing.
    """
    for root in folders(data_dir):
        for form in FORMS[name]:
            enough = any if root.absolute().name == form.folder else all
            if enough(os.path.isfile(root / file) for file in form.train + form.test):
                return Found(form, root)
            if os.path.isdir(root / form.folder):
                return Found(form, root / form.folder)
            if os.path.isfile(root / form.archive):
                return Found(form, root / form.archive)
    return None


# Verify ---------------------------------------------------------------------------------------------------------------


def verify(path: Path, form: Form) -> None:
    """Raise DataError unless the archive at `path` has the official size and MD5.

    A good archive is hashed once: a stamp file beside it, where the folder is writable, holds its size and time of
    change, and as long as these stay the same the hash is taken as known.
    """
    stat = path.stat()
    _check(stat.st_size == form.size, path, f"the archive must have {form.size} bytes", bytes=stat.st_size)
    stamp = path.with_name(f".{path.name}.verified")
    verified = f"{form.md5} {stat.st_size} {stat.st_mtime_ns}\n"
    try:
        if stamp.read_text() == verified:
            return
    except (OSError, UnicodeDecodeError):
        pass  # no stamp yet, or none that can be read
    md5 = _md5(path)
    _check(md5 == form.md5, path, f"the archive must have MD5 {form.md5}", md5=md5)
    try:
        stamp.write_text(verified)
    except OSError:
        pass  # a read-only folder: hashed again next time


def _md5(path):
    import hashlib

    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check(condition, where, what, **got):
    """A damaged file: say which, and what is wrong with it."""
    expect(condition, "data.load", f"{where}: {what}", DataError, **got)


# Read -----------------------------------------------------------------------------------------------------------------


def read(name: str, found: Found) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Read a set that `find` found.

    Returns train_images (L, 32, 32, 3) uint8, train_labels (L,) int64, test_images, test_labels and the list of
    class names (the fine ones of CIFAR-100). Raises DataError naming the file and what is wrong with it.
    """
    form, path = found
    wanted = [*form.train, *form.test, form.meta]
    contents = _read_folder(path, wanted) if path.is_dir() else _read_archive(path, form, wanted)
    parts = {}
    classes = None
    for file, content in contents:
        where = path / file
        if file == form.meta:
            classes = _class_names(where, content, form)
        elif form.label_bytes:
            parts[file] = _records(where, content, form)
        else:
            parts[file] = _pickled_batch(where, content, form)
    for file in form.train + form.test:
        _check(file in parts, path / file, "the file is missing")
        _check_labels(path / file, parts[file][1], NUM_CLASSES[name])
    if classes is None:
        _check(name == "cifar10", path / form.meta, "the file is missing")
        classes = list(CIFAR10_NAMES)
    count = len(classes)
    _check(count == NUM_CLASSES[name], path / form.meta, f"must name {NUM_CLASSES[name]} classes", names=count)
    return *_join([parts.pop(file) for file in form.train]), *_join([parts.pop(file) for file in form.test]), classes


def _read_folder(path, wanted):
    for file in wanted:
        where = path / file
        try:
            if not where.exists():
                continue  # `read` knows which files it cannot do without
            _check(where.is_file(), where, "cannot be read: it is no regular file")  # a pipe would be waited for
            _check_size(where, where.stat().st_size)
            yield file, where.read_bytes()
        except OSError as error:
            raise DataError(f"[data.load] {where}: cannot be read: {error.strerror or error}") from error


def _read_archive(path, form, wanted):
    """Contents of the wanted members in one pass. Members are matched by their exact names and never extracted, so
    absolute names, parent folders and links in an archive lead nowhere."""
    import tarfile

    members = {f"{form.folder}/{file}": file for file in wanted}
    try:
        verify(path, form)
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.name in members and member.isreg():
                    file = members[member.name]
                    _check_size(path / file, member.size)
                    yield file, archive.extractfile(member).read()
    except DataError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        reason = str(error) or type(error).__name__
        raise DataError(f"[data.load] {path}: the archive cannot be read: {reason}") from error


def _check_size(where, size):
    _check(size <= LARGEST, where, f"the file must have at most {LARGEST} bytes", bytes=size)


def _records(where, content, form):
    """Pictures (L, 3, 32, 32) uint8 and labels (L,) uint8 of a binary file, as views of its bytes."""
    size = form.label_bytes + PIXELS
    rule = f"the file is empty or truncated: its size must be a multiple of {size} bytes"
    _check(content and len(content) % size == 0, where, rule, bytes=len(content))
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, form.label_bytes :].reshape(-1, 3, 32, 32), records[:, form.label_bytes - 1]


def _check_labels(where, labels, num_classes):
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        record = int(wrong[0])
        _check(False, where, f"labels must lie in 0 .. {num_classes - 1}", record=record, label=int(labels[record]))


def _join(parts):
    """One NHWC array from CHW parts. A part is dropped as soon as it is copied, and `np.empty` takes memory only as
    it is filled, so that little more than one copy of the set is held at any time."""
    count = sum(len(labels) for _, labels in parts)
    images = np.empty((count, 32, 32, 3), np.uint8)
    labels = np.empty(count, np.int64)
    start = 0
    while parts:
        part_images, part_labels = parts.pop(0)
        stop = start + len(part_labels)
        images[start:stop] = part_images.transpose(0, 2, 3, 1)
        labels[start:stop] = part_labels
        start = stop
    return images, labels


def _class_names(where, content, form):
    if form.label_bytes:
        try:
            return content.decode("ascii").split()
        except UnicodeDecodeError:
            _check(False, where, "must be a text file with a class name a line")
    names = _unpickle(where, content).get(form.names_key)
    names_fit = isinstance(names, list) and all(isinstance(name, (str, bytes)) for name in names)
    _check(names_fit, where, f"must hold a list of class names under {form.names_key!r}")
    return [_text(name) for name in names]


# The pickled form -----------------------------------------------------------------------------------------------------


class _Dtype:
    """Stands in for numpy.dtype: remembers the code, and ignores byte order and alignment, which bytes have not."""

    def __init__(self, code, align=False, copy=False):
        self.code = _text(code)

    def __setstate__(self, state):
        pass


class _Array:
    """Stands in for numpy.ndarray. NumPy's own classes would take any state from a file, in C, on trust."""

    data = np.empty(0, np.uint8)  # of one that never gets its state

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content, dtype, shape, order):
        code = dtype.code if isinstance(dtype, _Dtype) else None
        expect(code in ("u1", "uint8"), "data.load", "arrays must be uint8", DataError, dtype=code)
        self.data = np.frombuffer(content, np.uint8).reshape(shape, order=order)
        return self


def _reconstruct(kind, shape, code):
    return _Array()


def _frombuffer(content, dtype, shape, order):
    return _Array().fill(content, dtype, shape, order)


def _encode(text, encoding):
    expect(encoding in ("latin1", b"latin1"), "data.load", "bytes must be coded as latin1", DataError, coded=encoding)
    return text.encode("latin1")


def _bytes(*content):
    """Stands in for bytes, which would take a number too, and that much memory."""
    expect(all(isinstance(x, (bytes, bytearray)) for x in content), "data.load", "bytes must be of bytes", DataError)
    return bytes(*content)


def _bytearray(content=b"", *encoding):
    return bytearray(_encode(content, *encoding) if encoding else _bytes(content))


ALLOWED = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _encode}
for _package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    ALLOWED[f"{_package}.numeric", "_frombuffer"] = _frombuffer
for _package in ("__builtin__", "builtins"):  # Python 2 and 3
    ALLOWED.update({(_package, kind.__name__): kind for kind in (list, tuple, dict, set, frozenset)})
    ALLOWED.update({(_package, "bytes"): _bytes, (_package, "bytearray"): _bytearray})

MEMO = ("PUT", "BINPUT", "LONG_BINPUT")
NESTS = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
MOST_NESTED = 1 << 16  # CIFAR-100's 50,000 file names are so many tuples in some pickles


def _check_opcodes(content):
    """Refuse what Python's unpickler takes on trust: it makes room for the highest number that something is to be
    remembered by, and recurses in C over tuples in tuples to hash them, until the stack overflows."""
    import pickletools

    nested = 0
    for place, (opcode, value, _) in enumerate(pickletools.genops(content)):
        if opcode.name in MEMO:
            expect(value <= place, "data.load", "memo numbers must be given in turn", DataError, number=value)
        nested += opcode.name in NESTS
    expect(nested <= MOST_NESTED, "data.load", f"must have at most {MOST_NESTED} tuples", DataError, tuples=nested)


class _Unpickler(pickle.Unpickler):
    """Builds arrays of bytes and plain containers; any other name is refused, and never imported."""

    def find_class(self, module, name):
        rule = f"refused: it asks for {module}.{name}, which no CIFAR file needs"
        expect((module, name) in ALLOWED, "data.load", rule, DataError)
        return ALLOWED[module, name]


def _text(value):
    return value.decode("latin1") if isinstance(value, bytes) else value


def _unpickle(where, content):
    try:
        _check_opcodes(content)
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()  # "bytes": what strings were in Python 2
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).removeprefix("[data.load] ") or type(error).__name__
        raise DataError(f"[data.load] {where}: bad pickle: {reason}") from error
    _check(isinstance(value, dict), where, "bad pickle: must hold a dict", type=type(value).__name__)
    return {_text(key): item for key, item in value.items()}


def _pickled_batch(where, content, form):
    """Pictures (L, 3, 32, 32) uint8 and labels (L,) of a pickled batch."""
    batch = _unpickle(where, content)
    data, labels = batch.get("data"), batch.get(form.label_key)
    _check(isinstance(data, _Array), where, "must hold an array under 'data'", type=type(data).__name__)
    data = data.data
    shape_fits = data.ndim == 2 and data.shape[1] == PIXELS and len(data) > 0
    _check(shape_fits, where, f"'data' must be (L, {PIXELS})", shape=data.shape)
    kinds_fit = isinstance(labels, list) and all(type(label) is int and label.bit_length() < 512 for label in labels)
    _check(kinds_fit, where, f"must hold a list of integers under {form.label_key!r}")
    _check(len(labels) == len(data), where, "must hold a label for each picture", images=len(data), labels=len(labels))
    return data.reshape(-1, 3, 32, 32), np.array(labels, object)  # as they are: int64 does not hold any integer


# Download -------------------------------------------------------------------------------------------------------------


def download(name: str, data_dir: str | os.PathLike[str] | None = None) -> Found:
    """Fetch the binary archive into `data_dir`, $TINYRES_DATA or the cache, whichever is first; returns its Found.

    The server is the official one, or $TINYRES_CIFAR_URL. Bytes go into a .part file, from which an interrupted
    download goes on; once size and MD5 are right it is moved into place in one step. Raises DataError with the
    address and the reason.
    """
    form = FORMS[name][0]
    base = os.environ.get("TINYRES_CIFAR_URL") or OFFICIAL
    url = base.rstrip("/") + "/" + form.archive
    target = folders(data_dir)[0] / form.archive
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        try:
            _fetch(url, part, form)
        finally:
            if not part.stat().st_size:
                part.unlink()
        md5 = _md5(part)
        if md5 != form.md5:
            part.unlink()  # nothing to go on from
        _check(md5 == form.md5, url, f"the download must have MD5 {form.md5}; it was thrown away", md5=md5)
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"[data.load] {target}: cannot be written: {error.strerror or error}") from error
    return Found(form, target)


def _fetch(url, part, form):
    """Fill `part` up to the archive's size; a broken connection is taken up again while each one gets further."""
    reached, reason = -1, None
    with _progress(form) as progress:
        while (have := part.stat().st_size) < form.size:
            kept = f"; {have} of {form.size} bytes stay in {part} and the next download goes on from there"
            _check(have > reached, url, f"cannot be downloaded: {reason}{kept if have else ''}")
            reached = have
            reason = _receive(url, part, have, form.size, progress)


def _receive(url, part, have, size, progress):
    """One request for the bytes from `have` on. Returns why it ended early, if it did."""
    import http.client
    import urllib.request

    try:
        headers = {"User-Agent": "tinyres", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            if not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
                have = 0  # a server without ranges sends everything again
            length = response.headers.get("Content-Length")
            expected = length is None or int(length) == size - have
            _check(expected, url, f"the server must send the {size - have} bytes of the archive", bytes=length)
            progress.update(have - progress.n)
            with open(part, "r+b") as file:
                file.seek(have)
                file.truncate()
                while have < size and (block := response.read(min(BLOCK, size - have))):
                    file.write(block)
                    have += len(block)
                    progress.update(len(block))
        return "the connection closed early"
    except DataError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        return str(error) or type(error).__name__


class _NoProgress:
    """tqdm's interface, as far as it is used here, for machines without it."""

    n = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def update(self, count):
        self.n += count


def _progress(form):
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoProgress()
    return tqdm(total=form.size, unit="B", unit_scale=True, desc=form.archive, disable=None)  # None: terminals only
