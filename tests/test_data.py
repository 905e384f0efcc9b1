"""Data: every form of CIFAR, every kind of damage, the download, shapes10, and the loader's repeatability."""

import hashlib
import http.server
import io
import pickle
import signal
import struct
import tarfile
import threading
import time
import zlib

import numpy as np
import pytest

from op_case import DEVICES
from tinyres import data
from tinyres.backend.random import Stream
from tinyres.data import cifar
from tinyres.errors import ArgumentError, DataError, DtypeError, ShapeError

CIFAR_SETS = ("cifar10", "cifar100")


@pytest.fixture(autouse=True)
def nothing_from_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("TINYRES_DATA", raising=False)
    monkeypatch.delenv("TINYRES_CIFAR_URL", raising=False)


# Small sets in the official forms ---------------------------------------------------------------------------------


def drawn(name, count=6, seed=0):
    """Random pictures (count, 3, 32, 32) and labels, the highest label among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, cifar.NUM_CLASSES[name], count)
    labels[-1] = cifar.NUM_CLASSES[name] - 1
    return rng.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8), labels


def class_names(name):
    return list(cifar.CIFAR10_NAMES) if name == "cifar10" else [f"fine_{i}" for i in range(100)]


def binary_file(form, pictures, labels):
    coarse = [np.zeros((len(labels), form.label_bytes - 1))]
    return np.hstack([*coarse, labels[:, None], pictures.reshape(-1, 3072)]).astype(np.uint8).tobytes()


def python2_pickle(form, pictures, labels):
    """A batch as Python 2 pickled it: byte strings, protocol 2, NumPy's old module names."""

    def string(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNN" + integer(-1) * 2
    shape = b"(" + integer(len(labels)) + integer(3072) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"K\x00tb" + b"\x89" + string(pictures.tobytes()) + b"tb"
    items = string(b"data") + array + string(form.label_key.encode())
    return b"\x80\x02}(" + items + b"](" + b"".join(map(integer, labels.tolist())) + b"eu."


def python3_pickle(protocol, encode_keys=False):
    def dump(form, pictures, labels):
        batch = {"data": pictures.reshape(-1, 3072), form.label_key: labels.tolist()}
        batch = {key.encode(): value for key, value in batch.items()} if encode_keys else batch
        return pickle.dumps(batch, protocol)

    return dump


def files_of(name, form, batch_file=None):
    """The files of a small set, and the (images, labels) that it should be read as."""
    write = batch_file or (binary_file if form.label_bytes else python2_pickle)
    files, parts = {}, []
    for i, file in enumerate(form.train + form.test):
        pictures, labels = drawn(name, 6 + i, seed=i)
        files[file] = write(form, pictures, labels)
        parts.append((pictures.transpose(0, 2, 3, 1), labels))
    train, test = parts[: len(form.train)], parts[len(form.train) :]
    names = class_names(name)
    files[form.meta] = "\n".join(names).encode() if form.label_bytes else pickle.dumps({form.names_key: names}, 2)
    return files, [np.concatenate(p) for p in (*zip(*train, strict=True), *zip(*test, strict=True))]


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def declare_official(monkeypatch, name, position, content):
    """Let `content` be the official archive of a form for this test."""
    forms = list(cifar.FORMS[name])
    forms[position] = forms[position]._replace(size=len(content), md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(cifar.FORMS, name, tuple(forms))
    return forms[position]


def official_archive(monkeypatch, folder, name, position=0, extra=()):
    form = cifar.FORMS[name][position]
    files, expected = files_of(name, form)
    members = {**dict(extra), **{f"{form.folder}/{file}": content for file, content in files.items()}}
    path = write_archive(folder / form.archive, members)
    return path, declare_official(monkeypatch, name, position, path.read_bytes()), expected


def assert_holds(dataset, expected):
    for got, want in zip(dataset[1:5], expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64
    assert dataset.train_images.flags.c_contiguous and dataset.test_images.flags.c_contiguous
    assert dataset.classes == class_names(dataset.name)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CIFAR_SETS)
@pytest.mark.parametrize("position", (0, 1), ids=("binary", "python"))
@pytest.mark.parametrize("place", ("itself", "inside", "archive"))
def test_every_form_in_every_place(tmp_path, monkeypatch, name, position, place):
    form = cifar.FORMS[name][position]
    if place == "archive":
        path, _, expected = official_archive(monkeypatch, tmp_path, name, position)
    else:
        files, expected = files_of(name, form)
        path = write_folder(tmp_path if place == "itself" else tmp_path / form.folder, files)
    dataset = data.load(name, tmp_path)
    assert_holds(dataset, expected)
    assert dataset.name == name and dataset.source == str(path)
    assert dataset.note.startswith(f"a part of {name}: ")


def test_searched_in_order_and_binary_first(tmp_path, monkeypatch):
    binary, python = cifar.FORMS["cifar10"]
    roots = [tmp_path / "given", tmp_path / "variable", tmp_path / "cache" / "tinyres"]
    monkeypatch.setenv("TINYRES_DATA", str(roots[1]))
    roots[0].mkdir()
    for root in reversed(roots):
        for form in (python, binary):
            folder = write_folder(root / form.folder, files_of("cifar10", form)[0])
            assert data.load("cifar10", roots[0]).source == str(folder)
    assert data.load("cifar10").source == str(roots[1] / binary.folder)
    assert data.load("auto", roots[0]).name == "cifar10"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("encode_keys", (False, True))
def test_pickles_of_python_3(tmp_path, protocol, encode_keys):
    files, expected = files_of("cifar100", cifar.FORMS["cifar100"][1], python3_pickle(protocol, encode_keys))
    assert_holds(data.load("cifar100", write_folder(tmp_path, files)), expected)


def test_names_are_built_in_for_cifar10_only(tmp_path):
    for name in CIFAR_SETS:
        form = cifar.FORMS[name][0]
        files, _ = files_of(name, form)
        del files[form.meta]
        write_folder(tmp_path / form.folder, files)
    assert data.load("cifar10", tmp_path).classes == cifar.CIFAR10_NAMES
    with pytest.raises(DataError, match=r"fine_label_names\.txt: the file is missing"):
        data.load("cifar100", tmp_path)


def test_a_file_called_test_or_train_is_no_cifar100(tmp_path, monkeypatch):
    form = cifar.FORMS["cifar100"][1]
    for file in ("test", "train"):
        root = write_folder(tmp_path / file, {file: b"#!/bin/sh"})
        with pytest.raises(DataError, match=r"no cifar100 in"):
            data.load("cifar100", root)
    official = write_folder(tmp_path / form.folder, {"train": b""})
    monkeypatch.chdir(official)
    for folder in (official, tmp_path, "."):
        assert cifar.find("cifar100", folder).form == form  # `read` names the missing file
    assert cifar.find("cifar100", tmp_path / "train") is None


# Damage ---------------------------------------------------------------------------------------------------------------


def cut(content):
    return content[:-1]


def damage_label(name, record, label):
    label_bytes = cifar.FORMS[name][0].label_bytes

    def damage(content):
        content = bytearray(content)
        content[record * (label_bytes + 3072) + label_bytes - 1] = label
        return bytes(content)

    return damage


@pytest.mark.parametrize(
    "name, file, damage, message",
    [
        ("cifar10", "data_batch_2.bin", cut, r"truncated: .* multiple of 3073 bytes; got bytes 21510"),
        ("cifar10", "test_batch.bin", lambda content: b"", r"empty or truncated"),
        ("cifar10", "data_batch_5.bin", None, r"the file is missing"),
        ("cifar10", "batches.meta.txt", lambda content: b"\xff\xfe", r"text file"),
        ("cifar10", "batches.meta.txt", lambda content: b"cat dog", r"must name 10 classes; got names 2"),
        ("cifar10", "data_batch_1.bin", damage_label("cifar10", 3, 10), r"0 \.\. 9; got record 3, label 10"),
        ("cifar100", "train.bin", cut, r"multiple of 3074 bytes"),
        ("cifar100", "test.bin", damage_label("cifar100", 1, 100), r"0 \.\. 99; got record 1, label 100"),
    ],
)
def test_damaged_binary_file_is_named(tmp_path, name, file, damage, message):
    files, _ = files_of(name, cifar.FORMS[name][0])
    content = files.pop(file)
    if damage:
        files[file] = damage(content)
    write_folder(tmp_path / cifar.FORMS[name][0].folder, files)
    with pytest.raises(DataError, match=rf"^\[data\.load\] .*{file}: .*{message}"):
        data.load(name, tmp_path)


def batch(**changes):
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **changes}, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (batch()[:-20], r"bad pickle"),
        (b"", r"bad pickle"),
        (b"no pickle at all", r"bad pickle"),
        (pickle.dumps([1, 2]), r"must hold a dict; got type list"),
        (pickle.dumps({"labels": [0]}), r"must hold an array under 'data'; got type NoneType"),
        (batch(data=np.zeros((2, 3071), np.uint8)), r"'data' must be \(L, 3072\); got shape \(2, 3071\)"),
        (batch(data=np.zeros((2, 3072), np.float32)), r"bad pickle: arrays must be uint8; got dtype f4"),
        (batch(data=np.array([None])), r"bad pickle: arrays must be uint8; got dtype O8"),
        (batch().replace(b"K\x02M\x00\x0c", b"K\x09M\x00\x0c"), r"bad pickle: cannot reshape"),
        (batch(labels=None), r"list of integers under 'labels'"),
        (batch(labels=[0, "1"]), r"list of integers under 'labels'"),
        (batch(labels=[0]), r"a label for each picture; got images 2, labels 1"),
        (batch(labels=[0, -1]), r"0 \.\. 9; got record 1, label -1"),
        (batch(labels=[10**30, 1]), rf"got record 0, label {10**30}"),
    ],
)
def test_damaged_pickle_is_named(tmp_path, content, message):
    files, _ = files_of("cifar10", cifar.FORMS["cifar10"][1])
    write_folder(tmp_path, {**files, "data_batch_3": content})
    with pytest.raises(DataError, match=rf"^\[data\.load\] .*data_batch_3: .*{message}"):
        data.load("cifar10", tmp_path)


class Runs:
    """Pickled as a call of something that no data file should call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_pickle_that_runs_code_is_refused(tmp_path):
    victim = tmp_path / "victim"
    attacks = {
        "open": pickle.dumps(Runs(open, str(victim), "w")),
        "eval": pickle.dumps(Runs(eval, f"open({str(victim)!r}, 'w')")),
        "system": b"cos\nsystem\n(S'touch " + str(victim).encode() + b"'\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
        "latin1; got coded zlib": pickle.dumps(Runs(__import__("_codecs").encode, "aa", "zlib")),
    }
    files, _ = files_of("cifar10", cifar.FORMS["cifar10"][1])
    for asked, content in attacks.items():
        write_folder(tmp_path / "set", {**files, "data_batch_1": content})
        with pytest.raises(DataError, match=rf"data_batch_1: bad pickle: .*{asked}"):
            data.load("cifar10", tmp_path / "set")
    assert not victim.exists()


def test_arrays_of_newer_numpy_and_in_column_order(tmp_path):
    def dump(form, pictures, labels):
        batch = {"data": np.asfortranarray(pictures.reshape(-1, 3072)), form.label_key: labels.tolist()}
        return pickle.dumps(batch, 2).replace(b"numpy.core", b"numpy._core")

    files, expected = files_of("cifar100", cifar.FORMS["cifar100"][1], dump)
    assert_holds(data.load("cifar100", write_folder(tmp_path, files)), expected)


def test_unreadable_file_is_named(tmp_path):
    files, _ = files_of("cifar10", cifar.FORMS["cifar10"][0])
    del files["test_batch.bin"]
    folder = write_folder(tmp_path / cifar.FORMS["cifar10"][0].folder, files)
    (folder / "test_batch.bin").mkdir()
    with pytest.raises(DataError, match=r"test_batch\.bin: cannot be read"):
        data.load("cifar10", tmp_path)


# Archives -------------------------------------------------------------------------------------------------------------


def test_archive_of_wrong_size_or_hash(tmp_path, monkeypatch):
    path, form, _ = official_archive(monkeypatch, tmp_path, "cifar10")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{form.archive}: .* {form.size} bytes; got bytes {form.size - 1}"):
        data.load("cifar10", tmp_path)
    content[100] ^= 1
    path.write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    with pytest.raises(DataError, match=rf"{form.archive}: .* MD5 {form.md5}; got md5 {md5}"):
        data.load("cifar10", tmp_path)


def test_archive_is_hashed_once(tmp_path, monkeypatch):
    path, _, expected = official_archive(monkeypatch, tmp_path, "cifar10")
    hashed = []
    md5 = cifar._md5
    monkeypatch.setattr(cifar, "_md5", lambda path: hashed.append(path) or md5(path))
    for _ in range(2):
        assert_holds(data.load("cifar10", tmp_path), expected)
    assert hashed == [path]
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])  # a change after the stamp is seen
    with pytest.raises(DataError, match="MD5"):
        data.load("cifar10", tmp_path)


def test_members_outside_of_the_folder_lead_nowhere(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    outside = {"../escaped": b"x", str(tmp_path / "absolute"): b"x", "cifar-10-batches-bin/../../up": b"x"}
    _, form, expected = official_archive(monkeypatch, root, "cifar10", extra=outside)
    assert_holds(data.load("cifar10", root), expected)
    assert sorted(file.name for file in tmp_path.rglob("*")) == sorted(
        [root.name, form.archive, f".{form.archive}.verified"]
    )


def test_wanted_member_that_is_a_link_counts_as_missing(tmp_path, monkeypatch):
    form = cifar.FORMS["cifar100"][0]
    files, _ = files_of("cifar100", form)
    target = tmp_path / "target.bin"
    target.write_bytes(files.pop("test.bin"))
    path = tmp_path / form.archive
    with tarfile.open(path, "w:gz") as archive:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{form.folder}/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo(f"{form.folder}/test.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(target)
        archive.addfile(link)
    declare_official(monkeypatch, "cifar100", 0, path.read_bytes())
    with pytest.raises(DataError, match=r"test\.bin: the file is missing"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", zlib.compress(b"x" * 99)], ids=["empty", "text", "zlib"])
def test_archive_that_is_none(tmp_path, monkeypatch, content):
    form = declare_official(monkeypatch, "cifar10", 0, content)
    (tmp_path / form.archive).write_bytes(content)
    with pytest.raises(DataError, match=rf"{form.archive}: the archive cannot be read"):
        data.load("cifar10", tmp_path)


# Missing sets and the arguments of load -------------------------------------------------------------------------------


def test_missing_set_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYRES_DATA", "/nowhere")
    with pytest.raises(DataError, match=rf"no cifar100 in {tmp_path}, .*nowhere, .*download=True .* cifar-100-binary"):
        data.load("cifar100", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_auto_without_cifar_is_shapes10(monkeypatch):
    monkeypatch.setattr(data, "shapes10", lambda: data.shapes.shapes10(train=10, test=10))
    dataset = data.load("auto")
    assert dataset.name == "shapes10" and dataset.train_images.shape == (10, 32, 32, 3)
    assert "download" in dataset.note and "\n" not in dataset.note
    assert data.load("shapes10").note == ""


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"name": "mnist"}, ArgumentError),
        ({"name": None}, ArgumentError),
        ({"name": ["cifar10"]}, ArgumentError),
        ({"name": "cifar10", "data_dir": 3}, DtypeError),
        ({"name": "cifar10", "data_dir": "/no/such/folder"}, DataError),
        ({"name": "auto", "data_dir": "/no/such/folder"}, DataError),
        ({"name": "cifar10", "download": "yes"}, DtypeError),
    ],
)
def test_load_refuses(arguments, error):
    with pytest.raises(error, match=r"^\[data\.load\] "):
        data.load(**arguments)


# Download -------------------------------------------------------------------------------------------------------------


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `content` under any name; sends at most `breaks_after` bytes a request, then calls `stall` if there is
    one; and no ranges if so told."""

    content, breaks_after, stall, ranges, requests = b"", None, None, True, []

    def do_GET(self):
        wanted = self.headers["Range"]
        self.requests.append((self.path, wanted))
        if not self.path.startswith("/mirror/cifar-"):
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        self.wfile.write(body[: self.breaks_after])
        if self.stall:
            self.stall()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A server of a small CIFAR-10 archive, and what that archive holds."""
    (tmp_path / "made").mkdir()
    path, form, expected = official_archive(monkeypatch, tmp_path / "made", "cifar10")
    handler = type("Handler", (Mirror,), {"content": path.read_bytes(), "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("TINYRES_CIFAR_URL", f"http://127.0.0.1:{server.server_port}/mirror")
    handler.form, handler.expected, handler.part = form, expected, tmp_path / "new" / f"{form.archive}.part"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_once(mirror, tmp_path):
    for _ in range(2):
        dataset = data.load("cifar10", tmp_path / "new", download=True)
        assert_holds(dataset, mirror.expected)
        assert dataset.source == str(tmp_path / "new" / mirror.form.archive)
    assert mirror.requests == [(f"/mirror/{mirror.form.archive}", None)]
    assert not mirror.part.exists()


def test_download_into_the_variable_or_the_cache(mirror, tmp_path, monkeypatch):
    assert data.load("auto", download=True).source == str(tmp_path / "cache" / "tinyres" / mirror.form.archive)
    (tmp_path / "cache" / "tinyres" / mirror.form.archive).unlink()
    monkeypatch.setenv("TINYRES_DATA", str(tmp_path / "variable"))
    assert data.load("auto", download=True).source == str(tmp_path / "variable" / mirror.form.archive)


def test_download_goes_on_after_breaks(mirror, tmp_path):
    size = mirror.form.size
    mirror.breaks_after = size // 3 + 1
    assert_holds(data.load("cifar10", tmp_path / "new", download=True), mirror.expected)
    starts = [None, f"bytes={size // 3 + 1}-", f"bytes={2 * (size // 3 + 1)}-"]
    assert [wanted for _, wanted in mirror.requests] == starts


@pytest.mark.parametrize("ranges", (True, False))
def test_download_goes_on_from_a_partial_file(mirror, tmp_path, ranges):
    mirror.ranges = ranges
    write_folder(tmp_path / "new", {mirror.part.name: mirror.content[:1000]})
    assert_holds(data.load("cifar10", tmp_path / "new", download=True), mirror.expected)
    assert [wanted for _, wanted in mirror.requests] == ["bytes=1000-"]


def test_download_without_tqdm(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert_holds(data.load("cifar10", tmp_path / "new", download=True), mirror.expected)


def test_download_that_stops_keeps_its_part(mirror, tmp_path):
    mirror.breaks_after, mirror.ranges = 1000, False
    with pytest.raises(DataError, match=rf"{mirror.form.archive}: cannot be downloaded: .* 1000 of {mirror.form.size}"):
        data.load("cifar10", tmp_path / "new", download=True)
    assert mirror.part.read_bytes() == mirror.content[:1000] and len(mirror.requests) == 2


def test_ctrl_c_in_a_download(mirror, tmp_path, monkeypatch):
    """While it waits for bytes: those that came are kept, and the next download goes on from there."""
    sent, received = 1000, threading.Event()

    class Progress(cifar._NoProgress):
        def update(self, count):
            super().update(count)
            if self.n == sent:
                received.set()

    def stall(handler):
        assert received.wait(60)
        time.sleep(0.1)  # for the other side to wait again; a signal just before would be seen when that ends
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        handler.rfile.read(1)  # until the other side hangs up

    monkeypatch.setattr(cifar, "_progress", lambda form: Progress())
    monkeypatch.setattr(cifar, "BLOCK", 250)
    monkeypatch.setattr(cifar, "TIMEOUT", 2)
    mirror.breaks_after, mirror.stall = sent, stall
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this behind
    try:
        with pytest.raises(KeyboardInterrupt):
            data.load("cifar10", tmp_path / "new", download=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list((tmp_path / "new").iterdir()) == [mirror.part]
    assert mirror.part.read_bytes() == mirror.content[:sent]
    mirror.breaks_after = mirror.stall = None
    assert_holds(data.load("cifar10", tmp_path / "new", download=True), mirror.expected)
    assert [wanted for _, wanted in mirror.requests] == [None, f"bytes={sent}-"]
    assert not mirror.part.exists()


def test_download_of_another_file(mirror, tmp_path):
    original = mirror.content
    mirror.content = original + b"more"
    with pytest.raises(DataError, match=rf"must send the {len(original)} bytes .*; got bytes {len(original) + 4}"):
        data.load("cifar10", tmp_path / "new", download=True)
    mirror.content = b"x" * len(original)
    with pytest.raises(DataError, match=rf"must have MD5 {mirror.form.md5}; it was thrown away"):
        data.load("cifar10", tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("url", ("http://127.0.0.1:1", "no address", "http://127.0.0.1:99999", "{mirror}/missing"))
def test_download_from_nowhere(mirror, tmp_path, monkeypatch, url):
    monkeypatch.setenv("TINYRES_CIFAR_URL", url.format(mirror=cifar.os.environ["TINYRES_CIFAR_URL"]))
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: cannot be downloaded: ") as error:
        data.load("cifar10", tmp_path / "new", download=True)
    assert " 0 of " not in str(error.value) and list((tmp_path / "new").iterdir()) == []


# shapes10 -------------------------------------------------------------------------------------------------------------


def test_shapes10_is_the_same_everywhere():
    images, labels, test_images, test_labels, classes = data.shapes10(train=300, test=10)
    assert images.shape == (300, 32, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (300,) and labels.dtype == np.int64 and len(classes) == 10
    assert test_images.shape == (10, 32, 32, 3) and test_labels.shape == (10,)
    assert not np.array_equal(images[:10], test_images)
    np.testing.assert_array_equal(np.bincount(labels[:250]), [25] * 10)
    # Recorded once: shapes.py keeps to operations that round alike on every machine.
    assert zlib.crc32(images.tobytes() + labels.astype("<i8").tobytes()) == 3822925637
    again = data.shapes10(train=20, test=10)
    np.testing.assert_array_equal(again[0], images[:20])
    np.testing.assert_array_equal(again[2], test_images)
    assert not np.array_equal(data.shapes10(train=20, test=10, seed=1)[0], images[:20])


def test_shapes10_is_out_of_reach_of_a_linear_classifier():
    images, labels, test_images, test_labels, _ = data.shapes10(train=5000, test=1000)

    def rows(images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 128 - 1
        return np.hstack([pixels, np.ones((len(pixels), 1), np.float32)])

    x, one_hot = rows(images), np.eye(10, dtype=np.float32)[labels]
    weights = np.zeros((x.shape[1], 10), np.float32)
    for step in range(400):  # softmax regression by gradient descent
        part = slice(step * 500 % len(x), step * 500 % len(x) + 500)
        logits = x[part] @ weights
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        weights -= 0.01 / 500 * (x[part].T @ (p - one_hot[part]))
    ridge = np.linalg.solve(x.T @ x + 1e4 * np.eye(x.shape[1], dtype=np.float32), x.T @ one_hot)
    for classifier in (weights, ridge):
        test_error = np.mean((rows(test_images) @ classifier).argmax(axis=1) != test_labels)
        assert test_error > 0.5


@pytest.mark.parametrize("name, value", [("train", 0), ("test", -1), ("train", 2.5), ("seed", 2**64), ("seed", "0")])
def test_shapes10_refuses(name, value):
    with pytest.raises((ArgumentError, DtypeError), match=rf"^\[data\.shapes10\] {name} must .*; got {name} "):
        data.shapes10(**{name: value})


# Loader and statistics ------------------------------------------------------------------------------------------------


def numbered(count, C=3, seed=0):
    """Random images that are all different, and labels that number them."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, C)).astype(np.uint8), np.arange(count)


@pytest.mark.parametrize("augment", (False, True))
@pytest.mark.parametrize("shuffle", (False, True))
def test_a_batch_is_a_function_of_seed_and_step(augment, shuffle):
    images, labels = numbered(25)
    mean = np.random.default_rng(1).uniform(0, 255, images.shape[1:])

    def loader(seed=3, device="reference"):
        return data.Loader(images, labels, 4, seed, mean, augment=augment, shuffle=shuffle, device=device)

    one = loader()
    assert one.steps_per_epoch == (6 if shuffle else 7)
    forward = [one.batch(step) for step in range(14)]
    assert {x.dtype.name for x, _ in forward} == {"float32"} and {y.dtype.name for _, y in forward} == {"int64"}
    for step in (13, 2, 7, 2):
        for other in (one, *(loader(device=device) for device in DEVICES)):
            for got, want in zip(other.batch(step), forward[step], strict=True):
                np.testing.assert_array_equal(got, want)
    assert shuffle or np.array_equal(forward[0][0], forward[7][0]) == (not augment), "crops are drawn anew every epoch"
    different = any(not np.array_equal(loader(seed=4).batch(step)[0], forward[step][0]) for step in range(3))
    assert different == (augment or shuffle)


def test_an_epoch_shows_every_image_once_in_a_new_order():
    images, labels = numbered(24)
    loader = data.Loader(images, labels, 6, shuffle=True, device="reference")
    orders = [np.concatenate([loader.batch(4 * epoch + i)[1] for i in range(4)]) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(24))
    assert len({tuple(order) for order in orders}) == 3
    np.testing.assert_array_equal(orders[2], Stream(0, "order").permutation(2, 24))


def test_evaluation_is_in_order_and_complete():
    images, labels = numbered(10)
    mean, scale = np.float32([10, 20, 30]), np.float32([0.5, 1, 2])
    loader = data.Loader(images, labels, 4, mean=mean, scale=scale, augment=True, shuffle=True, device="reference")
    batches = list(loader.epoch())
    assert [len(y) for _, y in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), labels)
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), (images.astype(np.float32) - mean) * scale)


def test_augmentation_crops_and_flips_as_stated():
    images, labels = numbered(200, C=1)
    pixel_mean = np.random.default_rng(1).uniform(0, 255, (32, 32, 1)).astype(np.float32)
    x, index = data.Loader(images, labels, 200, mean=pixel_mean, augment=True, device="reference").batch(0)
    seen = set()
    for picture, label in zip(x, index, strict=True):
        plain = images[label].astype(np.float32) - pixel_mean
        for flip in (False, True):
            padded = np.pad(plain[:, ::-1] if flip else plain, ((4, 4), (4, 4), (0, 0)))
            crops = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (32, 32))
            seen |= {(flip, *place) for place in np.argwhere((crops == picture[..., 0]).all(axis=(2, 3))).tolist()}
    flips = np.array(sorted(seen))
    assert 100 < len(seen) <= 162  # of 2 x 9 x 9 ways, 200 draws show about 115
    for axis, count in enumerate((2, 9, 9)):
        assert len(set(flips[:, axis])) == count


def test_constants_may_be_numbers_and_labels_of_any_integer_type():
    images, labels = numbered(5)
    for kind in (np.uint8, np.int32, np.uint64):
        x, y = data.Loader(images, labels.astype(kind), 5, mean=128, scale=1 / 64, device="reference").batch(0)
        np.testing.assert_array_equal(x, (images.astype(np.float32) - 128) / 64)
        assert y.dtype == np.int64


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"images": np.zeros((4, 32, 32, 3))}, DtypeError),
        ({"images": [[0]]}, DtypeError),
        ({"images": np.zeros((4, 32, 32), np.uint8)}, ShapeError),
        ({"images": np.zeros((0, 32, 32, 3), np.uint8), "labels": np.zeros(0, int)}, ShapeError),
        ({"labels": np.zeros(3, int)}, ShapeError),
        ({"labels": np.zeros(4)}, DtypeError),
        ({"labels": [0, 1, 2, 3]}, DtypeError),
        ({"labels": np.array([0, 1, -1, 2])}, ArgumentError),
        ({"batch_size": 0}, ArgumentError),
        ({"batch_size": 2.0}, DtypeError),
        ({"batch_size": True}, DtypeError),
        ({"batch_size": 5, "shuffle": True}, ArgumentError),
        ({"seed": -1}, ArgumentError),
        ({"seed": "1"}, DtypeError),
        ({"mean": np.zeros(4)}, ShapeError),
        ({"mean": "grey"}, DtypeError),
        ({"mean": np.nan}, ArgumentError),
        ({"mean": 1e39}, ArgumentError),
        ({"mean": 1j}, DtypeError),
        ({"batch_size": np.timedelta64(1)}, DtypeError),
        ({"scale": np.zeros((32, 32, 3))}, ShapeError),
        ({"scale": [1, 2, [3]]}, DtypeError),
        ({"augment": 1}, DtypeError),
        ({"shuffle": None}, DtypeError),
    ],
)
def test_loader_refuses(arguments, error):
    usual = {"images": np.zeros((4, 32, 32, 3), np.uint8), "labels": np.arange(4), "batch_size": 2}
    with pytest.raises(error, match=r"^\[data\.Loader\] "):
        data.Loader(**{**usual, "device": "reference", **arguments})


@pytest.mark.parametrize("step", (-1, 0.5, "0", None, 2**63, 10**400, np.timedelta64(1)))
def test_loader_refuses_a_step(step):
    with pytest.raises(ArgumentError, match=r"^\[data\.Loader\] step must be"):
        data.Loader(*numbered(4), 2, device="reference").batch(step)


def test_statistics():
    images = np.random.default_rng(0).integers(0, 256, (1203, 5, 4, 2)).astype(np.uint8)
    images[..., 1] //= 3
    pixel_mean, channel_mean, channel_std = data.statistics(images)
    assert pixel_mean.dtype == channel_mean.dtype == channel_std.dtype == np.float32
    np.testing.assert_allclose(pixel_mean, images.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(channel_mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(channel_std, images.std(axis=(0, 1, 2)), rtol=1e-6)
    with pytest.raises(DtypeError):
        data.statistics(images.astype(np.float32))
    with pytest.raises(ShapeError):
        data.statistics(images[0])


def test_a_batch_size_of_few_bits():
    """-(-8 // 3) is not a uint8."""
    loader = data.Loader(*numbered(8), np.uint8(3), device="reference")
    assert loader.steps_per_epoch == 3 and type(loader.steps_per_epoch) is int
