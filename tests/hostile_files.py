"""Hostile files: a corpus, and mutants of it, against everything in tinyres that reads a file somebody else wrote.

    python tests/hostile_files.py write                  make tests/corpus anew
    python tests/hostile_files.py check FOLDER [MUTANTS [SEED]]

A file that is called good must load, every other one of the corpus must be refused, and a mutant may be either. To
refuse is to raise the project's own error with the file's name in it. `check` watches for all else: other exceptions,
code that is run, files written elsewhere than beside it; test_hostile_files.py for crashes, hangs and memory.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from tinyres import checkpoint, models, torch_weights, train
from tinyres.data import cifar, transforms
from tinyres.errors import TinyresError

CORPUS = Path(__file__).parent / "corpus"

# What reads the files of a kind; a good one is for the first reader ---------------------------------------------------

BINARY, PICKLED = (form._replace(train=("data_batch_1",), test=("test_batch",)) for form in cifar.FORMS["cifar10"])
NETWORK = models.imagenet_resnet(18, filters=1, num_classes=2, shortcut="B")


def read_cifar(form, path, **place):
    """The files of `form` beside `path`, of which it takes one's place."""
    return cifar.read("cifar10", cifar.Found(form._replace(**place), path.parent))


def read_archive(path):
    content = path.read_bytes()
    forged = BINARY._replace(size=len(content), md5=hashlib.md5(content).hexdigest())
    return cifar.read("cifar10", cifar.Found(forged, path))


READERS = {
    "safetensors": [checkpoint.load, lambda path: torch_weights.import_torch(NETWORK, path)],
    "metrics": [train.read_metrics],
    "pickle": [
        lambda path: read_cifar(PICKLED, path, train=(path.name,)),
        lambda path: read_cifar(PICKLED, path, meta=path.name),
    ],
    "records": [
        lambda path: read_cifar(BINARY, path, train=(path.name,)),
        lambda path: read_cifar(BINARY, path, meta=path.name),
    ],
    "archive": [read_archive, lambda path: cifar.read("cifar10", cifar.Found(cifar.FORMS["cifar10"][0], path))],
    "image": [transforms.decode],
}


# The corpus -----------------------------------------------------------------------------------------------------------


def safetensors_file(header, body=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def checkpoint_file(tree, header=None, body=b"", **metadata):
    """A checkpoint whose checksum is right, as long as its arrays are those of `header`, uint8 or none."""
    header = header or {}
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(body[begin:end], np.uint8).reshape(entry["shape"])
    crc = checkpoint._checksum(tree, arrays)
    metadata = {"format": "tinyres", "version": "1", "tree": tree, "crc32": crc, **metadata}
    return safetensors_file({"__metadata__": metadata, **header}, body)


def safetensors_corpus():
    four, byte = bytes(4), tensor("U8", (1,), (0, 1))
    tree = {
        "model": {"w": np.arange(6, dtype=np.float32)},
        "rest": [np.ones((2, 0)), np.int8(3), None, "a/b"],
        "step": 7,
    }
    return {
        "good": checkpoint.serialize(tree),
        "empty": b"",
        "short": bytes(7),
        "no_header": bytes(8),
        "header_past_the_end": safetensors_file(b"{}", length=3),
        "header_of_2_63_bytes": safetensors_file(b"{}", length=2**63),
        "header_of_2_64_bytes": safetensors_file(b"{}", length=2**64 - 1),
        "header_of_100_mb": safetensors_file(b"{}", length=10**8),
        "header_no_object": safetensors_file(b"[1]"),
        "header_not_utf8": safetensors_file(b'{"\xff\xfe":{}}'),
        "header_surrogate": safetensors_file(b'{"\\ud800":' + json.dumps(byte).encode() + b"}", b"\0"),
        "header_nul": safetensors_file(b"\0" * 100),
        "overlap": safetensors_file({"a": tensor(), "b": tensor()}, four),
        "gap": safetensors_file({"a": tensor(), "b": tensor(offsets=(8, 12))}, four * 3),
        "past_the_end": safetensors_file({"a": tensor(offsets=(0, 4))}, b"\0"),
        "bytes_too_many": safetensors_file({"a": tensor()}, four + b"\0"),
        "offsets_2_63": safetensors_file({"a": tensor(offsets=(2**63, 2**63 + 4))}, four),
        "offsets_negative": safetensors_file({"a": tensor(offsets=(-4, 0))}, four),
        "offsets_reversed": safetensors_file({"a": tensor(offsets=(4, 0))}, four),
        "shape_negative": safetensors_file({"a": tensor(shape=(-1,))}, four),
        "shape_overflows": safetensors_file({"a": tensor(shape=(2**32, 2**32), offsets=(0, 0))}),
        "shape_wraps_to_4": safetensors_file({"a": tensor("U8", (2**62 + 1, 4))}, four),
        "shape_huge_and_empty": safetensors_file({"a": tensor(shape=(0, 2**62), offsets=(0, 0))}),
        "shape_of_100_axes": safetensors_file({"a": tensor("U8", (1,) * 100, (0, 1))}, b"\0"),
        "shape_is_text": safetensors_file({"a": {**tensor(), "shape": "1"}}, four),
        "dtype_unknown": safetensors_file({"a": tensor("F31")}, four),
        "dtype_number": safetensors_file({"a": tensor(5)}, four),
        "dtype_bfloat16": safetensors_file({"a": tensor("BF16", (2,))}, four),
        "dtype_float8": safetensors_file({"a": tensor("F8_E4M3", (4,))}, four),
        "dtype_float4": safetensors_file({"a": tensor("F4", (8,))}, four),
        "twice_a_name": safetensors_file(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), four),
        "twice_metadata": safetensors_file(b'{"__metadata__":{"format":"tinyres"},"__metadata__":{}}'),
        "metadata_number": safetensors_file(b'{"__metadata__":{"format":1}}'),
        "metadata_missing": safetensors_file({"__metadata__": {"format": "tinyres", "version": "1"}}),
        "of_pytorch": safetensors_file({"__metadata__": {"format": "pt"}, "conv1.weight": tensor()}, four),
        "newer_version": checkpoint_file("{}", version="2"),
        "float8_in_checkpoint": safetensors_file(
            {**json.loads(checkpoint_file("{}")[8:]), "a": tensor("F8_E5M2", (4,))}, four
        ),
        "tree_is_a_number": checkpoint_file("5"),
        "tree_is_a_list": checkpoint_file("[null]", {"0": byte}, b"\0"),
        "tree_without_the_place": checkpoint_file("{}", {"a/b/c": byte}, b"\0"),
        "tree_place_past_the_end": checkpoint_file('{"a": []}', {f"a/{10**30}": byte}, b"\0"),
        "tree_long_number": checkpoint_file('{"a": %s}' % ("9" * 5000)),
        "tree_no_json": checkpoint_file("{"),
        "pickle": pickle.dumps({"w": [1.0]}),
        "archive": b"PK\x03\x04" + bytes(60),
    }


def metrics_corpus():
    line = b'{"step": 3, "loss": 0.5}\n'
    return {
        "good": line + b'{"step": 4, "loss": 1e-3, "name": "\\u00e4"}\n{"st',
        "nan": line + b'{"step": 4, "loss": NaN}\n',
        "overflow": line + b'{"step": 4, "loss": 1e999}\n',
        "long_number": b'{"step": %s}\n' % (b"9" * 5000),
        "not_utf8": line + b'{"step": 4, "a": "\xff\xfe"}\n',
        "utf16": '{"step": 3}\n'.encode("utf-16"),
        "nul": line + bytes(200) + b"\n",
        "no_object": b"[3]\n",
        "no_step": b'{"loss": 1}\n',
        "step_text": b'{"step": "3"}\n',
        "step_fraction": b'{"step": 3.5}\n',
        "blank_line": line + b"\n" + line,
    }


class Calls:
    """Pickled as a call of something that no data file should call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def pickled_batch(**changes):
    return pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [3], **changes}, 2)


def nested_key(levels):
    """A dict whose key is a tuple in a tuple in a tuple: to hash it is to recurse in C."""
    return b"\x80\x02})" + b"\x85" * levels + b"Ns."


def pickle_corpus():
    numpy_array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nNNtR"
    good = pickled_batch()
    return {
        "good": good,
        "good_protocol_5": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}, 5),
        "open": pickle.dumps(Calls(open, "victim", "w")),
        "eval": pickle.dumps(Calls(eval, "open('victim', 'w')")),
        "exec": pickle.dumps(Calls(exec, "open('victim', 'w')")),
        "system": b"cos\nsystem\n(S'touch victim'\ntR.",
        "system_by_inst": b"(S'touch victim'\nios\nsystem\n.",
        "system_by_obj": b"(cos\nsystem\nS'touch victim'\no.",
        "system_by_stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch victim\x85R.",
        "popen": b"csubprocess\nPopen\n((lS'touch'\naS'victim'\natR.",
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "numpy_load": b"cnumpy\nload\n(S'victim'\ntR.",
        "import": b"c__builtin__\n__import__\n(S'os'\ntR.",
        "dotted_name": b"\x80\x04\x8c\x08builtins\x8c\x0fdict.__class__.\x93.",
        "codec": pickle.dumps(Calls(__import__("_codecs").encode, "aa", "zlib")),
        "persistent": b"Pvictim\n.",
        "extension": b"\x80\x02\x82\x01.",
        "state_of_a_class": b"c__builtin__\ndict\n}S'pop'\nNsb.",
        "bytearray_of_1_gb": b"c__builtin__\nbytearray\n(I1073741824\ntR.",
        "bytes_of_1_gb": b"c__builtin__\nbytes\n(I1073741824\ntR.",
        "new_bytearray_of_1_gb": b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x40\x85\x81.",
        "memo_of_1_gb": b"\x80\x02Nr\x00\x00\x00\x04.",
        "memo_in_text": b"\x80\x02Np67108864\n.",
        "bytes_claim_2_60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b".",
        "bytearray_claims_2_40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "text_claims_2_31": b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b".",
        "frame_claims_2_62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "integer_claims_2_31": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "integer_claims_less_than_0": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        "protocol_255": b"\x80\xff}.",
        "empty": b"",
        "no_stop": good[:-1],
        "cut": good[: len(good) // 2],
        "no_dict": pickle.dumps([1, 2], 2),
        "stack_empty": b"\x80\x02s.",
        "mark_missing": b"\x80\x02}u.",
        "memo_missing": b"\x80\x02h\x05.",
        "list_in_itself": b"\x80\x02]q\x00h\x00a.",
        "list_as_key": b"\x80\x02}]Ns.",
        "array_without_state": b"}(S'data'\n" + numpy_array + b"S'labels'\n(lI3\nau.",
        "array_of_objects": pickled_batch(data=np.array([[None]])),
        "array_of_floats": pickled_batch(data=np.zeros((1, 8))),
        "array_of_another_shape": good.replace(b"M\x00\x0c", b"M\x00\x0d"),
        "array_of_a_negative_shape": good.replace(b"K\x01M\x00\x0c", b"J\xff\xff\xff\xffM\x00\x0d"),
        "array_is_a_list": pickled_batch(data=[0] * 8),
        "label_of_10000_digits": pickled_batch(labels=[10**9999]),
        "label_out_of_range": pickled_batch(labels=[10]),
        "label_fraction": pickled_batch(labels=[3.0]),
        "label_bool": pickled_batch(labels=[True]),
        "labels_missing": pickle.dumps({"data": np.zeros((1, 3072), np.uint8)}, 2),
        "names_are_numbers": pickle.dumps({"label_names": [1, 2]}, 2),
    }


def records_corpus():
    record = b"\3" + bytes(3072)
    return {
        "good": record,
        "empty": b"",
        "cut": record[:-1],
        "label_out_of_range": record + b"\n" + record[1:],
        "names_not_ascii": "airplane\xe4".encode(),
    }


def tar_file(*members):
    """A .tar.gz of (name, content or None, changes of its TarInfo)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=9) as archive:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            for field, value in changes.items():
                setattr(info, field, value)
            archive.addfile(info, data and io.BytesIO(data))
    return gzip.compress(gzip.decompress(content.getvalue()), 9, mtime=0)


def raw_header(name, kind, size=b"00000000000\0", tail=b""):
    """A tar header with these bytes, whatever they mean, and the right checksum; `tail` stands at 345."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:136] = b"0000644\0" + b"0000000\0" * 2 + size
    header[136:148], header[156:157], header[257:265] = b"00000000000\0", kind, b"ustar  \0"
    header[345 : 345 + len(tail)] = tail
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def archive_corpus():
    record = b"\3" + bytes(3072)
    train_name, test_name = (f"{BINARY.folder}/{file}" for file in (*BINARY.train, *BINARY.test))
    name = train_name.encode()
    both = (train_name, record, {}), (test_name, record, {})
    test_only = both[1]
    good = tar_file(*both)
    kinds = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "block_device": tarfile.BLKTYPE,
        "pipe": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
    }

    def claims(size, kind=b"0", tail=b""):
        return gzip.compress(raw_header(name, kind, size, tail) + record + bytes(511), 9, mtime=0)

    def pax(**records):
        content = b""
        for key, value in records.items():
            text = f" {key.replace('__', '.')}={value}\n".encode()
            length = next(n for n in range(len(text), len(text) + 9) if len(str(n)) + len(text) == n)
            content += str(length).encode() + text
        header = raw_header(b"pax", b"x", b"%011o\0" % len(content)) + content + bytes(-len(content) % 512)
        return gzip.compress(
            header + raw_header(name, b"0", b"%011o\0" % len(record)) + record + bytes(511), 9, mtime=0
        )

    sparse_map = b"00000000000\0" + b"00000000001\0"
    huge = b"\x80" + bytes(3) + struct.pack(">Q", 2**50)
    return {
        "good": good,
        "good_beside_absolute": tar_file(("/victim", b"x", {}), *both),
        "good_beside_parent": tar_file(("../victim", b"x", {}), (f"{BINARY.folder}/../../victim", b"x", {}), *both),
        "good_beside_link": tar_file(
            ("out", None, {"type": tarfile.SYMTYPE, "linkname": "/"}), ("out/victim", b"x", {}), *both
        ),
        "good_twice": tar_file(*both, *both),
        **{
            f"wanted_is_a_{kind}": tar_file((train_name, None, {"type": code, "linkname": "/etc/passwd"}), test_only)
            for kind, code in kinds.items()
        },
        "wanted_is_absolute": tar_file(("/" + train_name, record, {}), test_only),
        "wanted_by_a_detour": tar_file((f"x/../{train_name}", record, {}), test_only),
        "empty": b"",
        "no_gzip": b"cifar" * 100,
        "no_members": tar_file(),
        "no_tar": gzip.compress(b"text" * 500, mtime=0),
        "gzip_cut": good[: len(good) // 2],
        "gzip_header_only": good[:10],
        "gzip_damaged": good[:40] + bytes([good[40] ^ 255]) + good[41:],
        "zlib": zlib.compress(gzip.decompress(good)),
        "tar_cut": gzip.compress(gzip.decompress(good)[:2000], mtime=0),
        "size_2_50": claims(huge),
        "size_negative": claims(b"\xff" * 11 + b"\x00"),
        "size_no_number": claims(b"99999999999\0"),
        "size_of_a_name_2_50": gzip.compress(raw_header(b"././@LongLink", b"L", huge) + bytes(4096), mtime=0),
        "name_of_4_mb": gzip.compress(
            raw_header(b"././@LongLink", b"L", b"%011o\0" % 2**22) + bytes(2**22), 9, mtime=0
        ),
        "sparse_2_30": claims(b"00000000001\0", b"S", bytes(41) + sparse_map + bytes(72) + b"\0" + b"%011o\0" % 2**30),
        "pax_size_2_50": pax(size=2**50),
        "pax_size_negative": pax(size=-512),
        "pax_size_no_number": pax(size="many"),
        "pax_sparse_2_50": pax(GNU__sparse__major=1, GNU__sparse__minor=0, GNU__sparse__realsize=2**50),
        "pax_sparse_map": pax(GNU__sparse__size=2**50, GNU__sparse__map="0,1,x"),
        "pax_path": pax(path="/victim"),
        "pax_garbage": gzip.compress(raw_header(b"pax", b"x", b"00000000144\0") + b"9" * 512, mtime=0),
    }


def png(width, height, *chunks):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # a bit a pixel
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", header), *chunks, (b"IEND", b"")])


def image_corpus():
    def saved(form, **settings):
        file = io.BytesIO()
        pixels = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(12, 16, 3)
        Image.fromarray(pixels).save(file, form, **settings)
        return file.getvalue()

    jpeg, whole_png = saved("JPEG"), saved("PNG")
    frame = jpeg.index(b"\xff\xc0") + 5  # height and width, 16 bits each
    pixels = (b"IDAT", zlib.compress(bytes(2 * 8)))
    return {
        "good_jpeg": jpeg,
        "good_progressive": saved("JPEG", progressive=True),
        "good_png": whole_png,
        "good_palette": png(8, 8, pixels),
        "empty": b"",
        "text": b"no picture",
        "gif": saved("GIF"),
        "tiff": saved("TIFF"),
        "jpeg_start_only": jpeg[:2],
        "jpeg_cut": jpeg[:-60],
        "jpeg_without_tables": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :],
        "jpeg_65500_x_65500": jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :],
        "jpeg_0_x_0": jpeg[:frame] + bytes(4) + jpeg[frame + 4 :],
        "jpeg_segment_past_the_end": jpeg[:2] + b"\xff\xe1\xff\xff" + jpeg[2:40],
        "png_signature_only": whole_png[:8],
        "png_cut": whole_png[:-40],
        "png_damaged": whole_png[:30] + b"\0" + whole_png[31:],
        "png_2_31_x_2_31": png(2**31 - 1, 2**31 - 1, pixels),
        "png_20000_x_20000": png(20000, 20000, pixels),
        "png_100_mpx": png(10000, 10000, (b"IDAT", zlib.compress(bytes(1251 * 10000), 9))),
        "png_0_x_0": png(0, 0, pixels),
        "png_too_few_pixels": png(800, 800, pixels),
        "png_no_pixels": png(8, 8),
        "png_chunk_past_the_end": whole_png[:33] + b"\xff\xff\xff\xffIDAT",
        "png_text_bomb": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22), 9)), pixels),
        "png_profile_bomb": png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**22), 9)), pixels),
    }


MAKERS = {
    "safetensors": safetensors_corpus,
    "metrics": metrics_corpus,
    "pickle": pickle_corpus,
    "records": records_corpus,
    "archive": archive_corpus,
    "image": image_corpus,
}

# Too large to commit.
LARGE = {
    "safetensors": {
        "header_nested": lambda: safetensors_file(b'{"a":' * 100_000),
        "tree_nested": lambda: checkpoint_file('{"a":' * 100_000),
    },
    "metrics": {"nested": lambda: b'{"step":' * 100_000 + b"\n"},
    "pickle": {
        "key_nested": lambda: nested_key(200_000),
        "key_nested_in_a_set": lambda: b"\x80\x04(" + nested_key(200_000)[4:-3] + b"\x91.",
        "lists_nested": lambda: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "memo_of_all": lambda: b"\x80\x02" + b"".join(b"Nr" + struct.pack("<I", i * 1000) for i in range(10**4)) + b".",
    },
}


def write_corpus():
    for kind, make in MAKERS.items():
        (CORPUS / kind).mkdir(parents=True, exist_ok=True)
        for old in (CORPUS / kind).iterdir():
            old.unlink()
        for name, content in make().items():
            (CORPUS / kind / name).write_bytes(content)


# Watching -------------------------------------------------------------------------------------------------------------

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown", "os.truncate", "shutil.", "socket.",
    "ctypes.", "pickle.find_class",
)  # fmt: skip


class Watch:
    """What a reader does that none should, by Python's audit events. A hook cannot be taken away again."""

    def __init__(self):
        self.folder, self.on, self.seen = None, False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and os.path.dirname(os.path.abspath(os.fsdecode(path))) != self.folder:
                self.seen.append((event, arguments))
        elif event.startswith(FORBIDDEN):
            self.seen.append((event, arguments))


def refuses(reader, path, watch):
    """Whether the reader refuses the file at `path`, in the one way there is to refuse."""
    watch.on = True
    try:
        reader(path)
        refused = False
    except TinyresError as error:
        refused = True
        assert path.name in str(error), f"{path} must be named; got {error}"
    finally:
        watch.on = False
    assert not watch.seen, f"{path}: {watch.seen}"
    return refused


# Mutants --------------------------------------------------------------------------------------------------------------


def mutate(draw, content, other):
    """`content` with one to four changes: bytes and bits changed, cut out, doubled, or put in from `other`."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 1, 2, 4, 8, draw.randrange(1, 600)))
        match draw.randrange(7):
            case 0:
                content[at : at + 1] = bytes([draw.randrange(256)])
            case 1 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 2:
                del content[at:]
            case 3:
                del content[at : at + length]
            case 4:
                content[at:at] = content[at : at + length]
            case 5:
                content[at : at + length] = draw.choice((b"\0", b"\xff", b"\x7f", b"9")) * length
            case 6:
                start = draw.randrange(len(other) + 1)
                content[at:at] = other[start : start + length]
    return bytes(content)


class Equal:
    """Stands in for a checksum, so that mutants get past it: it guards against accidents, not against intent."""

    def __init__(self, tree, arrays):
        pass

    def __eq__(self, other):
        return True


CHECKSUMS = (checkpoint._checksum, Equal)


def mutants(kind, count, seed):
    draw = random.Random(f"{kind} {seed}")
    files = [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]
    if kind == "archive":  # a mutant of what is compressed is no archive at all, most of the time
        files = [content for content in files if content[:2] == b"\x1f\x8b" and len(content) < 2000]
    for _ in range(count):
        content, other = draw.choice(files), draw.choice(files)
        if kind == "archive" and draw.random() < 0.8:
            try:
                yield gzip.compress(mutate(draw, gzip.decompress(content), gzip.decompress(other)), 1)
                continue
            except (OSError, EOFError, zlib.error):
                pass
        yield mutate(draw, content, other)


def check(folder, count=0, seed=0):
    """The corpus, then `count` mutants of each kind, as far as they go.

    Returns by kind the number of files, of mutants, of mutants refused, and the MiB of memory that they took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # where relative names of hostile files lead, and are seen
    watch = Watch()
    figures = {}
    for kind, readers in READERS.items():
        place = folder / "files" / kind
        place.mkdir(parents=True)
        watch.folder = str(place)
        files = {path.name: path.read_bytes() for path in sorted((CORPUS / kind).iterdir())}
        for name in BINARY.train + BINARY.test if "good" in files else ():
            (place / name).write_bytes(files["good"])
        good = next(name for name in files if name.startswith("good"))
        (place / good).write_bytes(files[good])
        readers[0](place / good)  # so that all is imported, which the watch would take for an attack
        large = {name: make() for name, make in LARGE.get(kind, {}).items()}
        before = train.peak_memory()
        for name, content in {**files, **large}.items():
            (place / name).write_bytes(content)
            for number, reader in enumerate(readers):
                good = name.startswith("good") and number == 0
                assert refuses(reader, place / name, watch) != good, f"{kind}/{name} is {'good' if good else 'hostile'}"
        refused = 0
        for number, content in enumerate(mutants(kind, count, seed)):
            (place / "mutant").unlink(missing_ok=True)
            (place / "mutant").write_bytes(content)
            for reader in readers:
                with mock.patch.object(checkpoint, "_checksum", CHECKSUMS[number % 2]):
                    try:
                        refused += refuses(reader, place / "mutant", watch) and reader is readers[0]
                    except BaseException:
                        print(f"mutant {number} of {kind}, seed {seed}: {content[:1000]!r}", file=sys.stderr)
                        raise
        figures[kind] = {"files": len(files), "mutants": count, "refused": refused}
        figures[kind]["MiB"] = round((train.peak_memory() - before) / 2**20)
    assert os.listdir(folder) == ["files"], f"nothing must be written here; got {os.listdir(folder)}"
    return figures


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_corpus()
    else:
        folder, *numbers = sys.argv[2:]
        print(json.dumps(check(Path(folder).absolute(), *map(int, numbers))))
