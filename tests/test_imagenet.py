"""Photographs: folders, decoding, crops, loaders with worker processes, testing by many crops, and the example."""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyres
from runs import FILES, metrics, state
from tinyres import classify, nn, train
from tinyres.backend.random import Stream
from tinyres.data import folder, transforms
from tinyres.data.folder import AHEAD, FolderLoader, ImageFolder, mean_image
from tinyres.errors import ArgumentError, DataError, DtypeError, NonFiniteError, ShapeError
from tinyres.recipes import IMAGENET_MEAN, IMAGENET_STD

EXAMPLE = Path(__file__).parents[1] / "examples" / "imagenet_resnet.py"
BILINEAR = Image.Resampling.BILINEAR


def photograph(rng, height, width):
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_set(root, rng, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            suffix = ("jpeg", "JPG", "png")[i % 3]
            photograph(rng, 40 + 3 * i, 64 - 4 * i).save(root / name / f"{i}.{suffix}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """13 training and 6 test images of three classes, with files that are none beside them."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    write_set(root / "train", rng, {"bee": 5, "ant": 4, "cat": 4})
    write_set(root / "val", rng, {"bee": 2, "ant": 2, "cat": 2})
    (root / "train" / "bee" / "README.txt").touch()
    (root / "train" / "bee" / ".hidden.png").touch()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "list.txt").touch()
    return root


@pytest.fixture(scope="module")
def images(root):
    return ImageFolder(root / "train")


# Folders and files ------------------------------------------------------------------------------------------------


def test_a_folder(images, root):
    assert images.classes == ["ant", "bee", "cat"]
    assert images.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4 and images.labels.dtype == np.int64
    names = [os.path.relpath(images.files[i], root / "train") for i in range(len(images))]
    assert names == sorted(names) and names[4:7] == ["bee/0.jpeg", "bee/1.JPG", "bee/2.png"]
    np.testing.assert_array_equal(images.read(6), np.asarray(Image.open(root / "train/bee/2.png")))
    part = images.part([6, 0])
    assert part.labels.tolist() == [1, 0] and part.classes == images.classes and len(images) == 13
    np.testing.assert_array_equal(part.read(0), images.read(6))


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(DataError, match=r"^\[data.folder\] .*absent: cannot be read: No such file"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(DataError, match="must hold a folder for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog: a class must have at least one image"):
        ImageFolder(tmp_path)
    with pytest.raises(DtypeError, match="root must be a path"):
        ImageFolder(3)


MODES = {
    "L": ("png", (90, 90, 90)),
    "LA": ("png", (90, 90, 90)),
    "1": ("png", (255, 255, 255)),
    "P": ("png", (200, 40, 90)),
    "RGB": ("png", (200, 40, 90)),
    "RGBA": ("png", (200, 40, 90)),
    "I;16": ("png", (100, 100, 100)),
    "CMYK": ("jpeg", (200, 40, 90)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    suffix, colour = MODES[mode]
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 7), 100 * 256 + 3, np.uint16))
    elif mode in ("L", "LA", "1"):
        image = Image.new(mode, (7, 5), {"L": 90, "LA": (90, 7), "1": 1}[mode])
    elif mode == "RGBA":
        image = Image.new(mode, (7, 5), (*colour, 3))
    else:
        image = Image.new("RGB", (7, 5), colour).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / f"x.{suffix}")
    pixels = transforms.decode(tmp_path / f"x.{suffix}")
    assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colour, (5, 7, 3)), atol=3)


def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    assert transforms.decode(tmp_path / "x.png").reshape(-1, 3).tolist() == [[10, 20, 30]] * 16


def test_only_jpeg_and_png_are_decoded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", format="BMP")
    with pytest.raises(DataError, match=r"x\.png: cannot be decoded: cannot identify image file"):
        transforms.decode(tmp_path / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", format="JPEG")  # one of ImageNet's goes by the wrong name
    assert transforms.decode(tmp_path / "x.png").shape == (4, 4, 3)


def test_without_pillow(monkeypatch, images):
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (lambda: transforms.decode("x.png"), lambda: FolderLoader(images, 2, workers=0)):
        with pytest.raises(DataError, match=r"pip install tinyres\[image\]"):
            call()


# Crops ----------------------------------------------------------------------------------------------------------------


def resized_by_pillow(image, side):
    """The plain way, and the size written out by hand."""
    H, W = image.shape[:2]
    h, w = (side, int(W * side / H + 0.5)) if H < W else (int(H * side / W + 0.5), side)
    return np.asarray(Image.fromarray(image).resize((w, h), BILINEAR))


def close_to(got, want):
    """To a level of 256, seldom two: Pillow rounds a box's edges, and the rows before it makes columns of them."""
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 2 and (difference > 1).mean() < 0.01


@pytest.mark.parametrize("H, W", [(40, 64), (64, 40), (50, 50), (31, 90)])
def test_the_centre(H, W):
    image = np.asarray(photograph(np.random.default_rng(1), H, W))
    want = resized_by_pillow(image, 37)
    top, left = round((want.shape[0] - 32) / 2 + 0.01), round((want.shape[1] - 32) / 2 + 0.01)
    got = transforms.resample(image, transforms.center_crop(H, W, 37, 32), 32, 32)
    close_to(got, want[top : top + 32, left : left + 32])


@pytest.mark.parametrize("draw, side, top, left", [
    ((0, 0, 0), 40, 0, 0), ((0.999, 0, 0.999), 50, 0, 80 - 32), ((0.5, 0.999, 0.5), 45, 45 - 32, (72 - 32) // 2),
])  # fmt: skip
def test_the_scale_crop(draw, side, top, left):
    image = np.asarray(photograph(np.random.default_rng(2), 40, 64))
    want = resized_by_pillow(image, side)[top : top + 32, left : left + 32]
    assert want.shape == (32, 32, 3)
    close_to(transforms.resample(image, transforms.scale_crop(40, 64, draw, 32, (40, 50)), 32, 32), want)


def test_all_sides_and_places_are_drawn():
    draws = Stream(0, "augment").uniform(0, 3 * 4000).reshape(-1, 3)
    boxes = np.array([transforms.scale_crop(300, 300, draw, 224) for draw in draws])
    sides = np.round(300 * 224 / (boxes[:, 2] - boxes[:, 0])).astype(int)
    assert sides.min() == 256 and sides.max() == 480 and len(set(sides)) == 225
    assert boxes.min() >= 0 and boxes.max() <= 300 + 1e-9
    np.testing.assert_allclose([boxes[:, 0].min(), boxes[:, 3].max()], [0, 300], atol=1)
    np.testing.assert_allclose(boxes.mean(axis=0)[[0, 1]] + boxes.mean(axis=0)[[2, 3]], 300, rtol=0.02)


def test_the_scale_aspect_crop():
    draws = Stream(0, "augment").uniform(0, 40 * 2000).reshape(-1, 40)
    H, W = 300, 400
    boxes = np.array([transforms.scale_aspect_crop(H, W, draw) for draw in draws])
    assert boxes[:, :2].min() == 0 and boxes[:, 2].max() == W and boxes[:, 3].max() == H
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / (H * W), w / h
    assert 0.078 < area.min() < 0.09 and area.max() > 0.95
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    square = np.array([transforms.scale_aspect_crop(300, 300, draw) for draw in draws])
    aspects = (square[:, 2] - square[:, 0]) / (square[:, 3] - square[:, 1])
    assert abs(np.log(aspects).mean()) < 0.01  # upright as often as broad


def test_where_no_try_fits_it_is_the_central_square():
    assert transforms.scale_aspect_crop(10, 1000, np.full(40, 0.9)) == (495, 0, 505, 10)
    assert transforms.scale_aspect_crop(1000, 10, np.full(40, 0.9)) == (0, 495, 10, 505)


def test_ten_crops(rng):
    image = rng.integers(0, 256, (9, 12, 3), np.uint8)
    got = transforms.ten_crops(image, 6)
    want = [image[:6, :6], image[:6, 6:], image[3:, :6], image[3:, 6:], image[2:8, 3:9]]
    assert got.shape == (10, 6, 6, 3)
    for i, crop in enumerate(want):
        np.testing.assert_array_equal(got[i], crop)
        np.testing.assert_array_equal(got[5 + i], crop[:, ::-1])
    with pytest.raises(ArgumentError, match=r"as large as its crops; got image \(9, 12\), crop 10"):
        transforms.ten_crops(image, 10)


def test_colour_noise(rng):
    draw = rng.standard_normal((4, 3))
    for got, (a, b, c) in zip(transforms.color_noise(draw, 0.1), draw, strict=True):
        red = 25.5 * (-0.5675 * 0.2175 * a + 0.7192 * 0.0188 * b + 0.4009 * 0.0045 * c)
        blue = 25.5 * (-0.5836 * 0.2175 * a - 0.6948 * 0.0188 * b + 0.4203 * 0.0045 * c)
        np.testing.assert_allclose([got[0], got[2]], [red, blue])
    np.testing.assert_allclose(transforms.EIGENVECTORS.T @ transforms.EIGENVECTORS, np.eye(3), atol=1e-3)


# Loaders ------------------------------------------------------------------------------------------------------------


def test_central_crops_normalised(images, rng):
    """Against Pillow alone."""
    mean, scale = rng.uniform(0, 255, (32, 32, 3)).astype(np.float32), np.array([0.5, 2, 1], np.float32)
    loader = FolderLoader(images, 5, size=32, side=36, mean=mean, scale=scale, workers=0)
    assert loader.steps_per_epoch == 3
    batches = list(loader.epoch())
    assert [len(x) for x, _ in batches] == [5, 5, 3]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), images.labels)
    for i, x in enumerate(np.concatenate([x for x, _ in batches])):
        want = resized_by_pillow(images.read(i), 36)
        top, left = -(-(want.shape[0] - 32) // 2), -(-(want.shape[1] - 32) // 2)
        close_to(np.rint(x / scale + mean), want[top : top + 32, left : left + 32])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(loader.batch(4)[0], batches[1][0])  # not shuffled: step 4 is batch 1 of epoch 1


@pytest.mark.parametrize("augmentation", folder.AUGMENTATIONS)
def test_a_training_batch_from_its_draws(images, augmentation):
    """The order, crops, flips and colours of a batch, put together by hand."""
    settings = {"seed": 5, "size": 32, "augmentation": augmentation, "shuffle": True, "workers": 0}
    plain, noisy = (FolderLoader(images, 4, sigma=s, scale=0.5, **settings) for s in (0.0, 0.1))
    assert plain.steps_per_epoch == 3
    x, labels = plain.batch(4)  # epoch 1, batch 1
    index = Stream(5, "order").permutation(1, 13)[4:8]
    np.testing.assert_array_equal(labels, images.labels[index])
    flips = 0
    for n, i in enumerate(index):
        image = images.read(int(i))
        flip, *draw = Stream(5, "augment").uniform(2 * (4 * 4 + n) + 1, 41 if augmentation != "scale" else 4)
        if augmentation == "scale":
            box = transforms.scale_crop(*image.shape[:2], draw, 32, (37, 69))
        else:
            box = transforms.scale_aspect_crop(*image.shape[:2], draw)
        crop = transforms.resample(image, box, 32, 32)
        flips += flip < 0.5
        np.testing.assert_array_equal(x[n], (crop[:, ::-1] if flip < 0.5 else crop) * np.float32(0.5))
    assert 0 < flips < 4  # both kinds have been compared
    noise = transforms.color_noise(Stream(5, "augment").normal(8, 12).reshape(4, 3))
    np.testing.assert_allclose(noisy.batch(4)[0] - x, np.broadcast_to(noise[:, None, None] / 2, x.shape), atol=1e-4)
    np.testing.assert_array_equal(noisy.batch(0)[0].shape, (4, 32, 32, 3))


def everything(loader, steps):
    batches = [loader.batch(step) for step in steps] + [loader.batch(steps[0])]
    for batch in loader.epoch():  # a test in the midst of training, and training in the midst of the test
        batches += [batch, loader.batch(steps[0])]
    arrays = [array.copy() for batch in batches for array in batch]
    return arrays + [array for whole, labels in loader.images() for array in (*whole, labels)]


def test_the_number_of_workers_changes_nothing(images):
    """Nor does the order in which batches are asked for: steps 0 to 3, then back, then far ahead."""
    settings = {"seed": 3, "size": 32, "augmentation": "scale-aspect", "sigma": 0.1, "shuffle": True}
    with FolderLoader(images, 4, workers=0, **settings) as alone:
        want = everything(alone, [0, 1, 2, 3, 1, 9])
    for workers in (1, 3, 6):  # 6: more than images in a batch
        with FolderLoader(images, 4, workers=workers, **settings) as loader:
            got = everything(loader, [0, 1, 2, 3, 1, 9])
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    other = FolderLoader(images, 4, workers=0, **{**settings, "seed": 4})
    assert not np.array_equal(other.batch(0)[0], want[0])
    tinyres.manual_seed(3)
    unseeded = FolderLoader(images, 4, workers=0, **{**settings, "seed": None})
    tinyres.manual_seed(4)
    assert all(np.array_equal(a, b) for a, b in zip(everything(unseeded, [0, 1, 2, 3, 1, 9]), want, strict=True))
    assert not np.array_equal(alone.folder.labels[:4], want[1]) or not np.array_equal(want[1], want[3])


@pytest.mark.parametrize("device", ["reference", "emulated"])
def test_other_devices(images, device):
    settings = {"seed": 3, "size": 16, "augmentation": "scale", "sigma": 0.1, "shuffle": True, "workers": 0}
    settings.update(mean=[120, 110, 100], scale=[0.02, 0.01, 0.03])
    got, want = (FolderLoader(images, 4, device=name, **settings).batch(2) for name in (device, "cpu"))
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])


def test_a_batch_is_ones_own(images):
    """What a batch held does not change when its slot is filled again."""
    with FolderLoader(images, 4, size=32, augmentation="scale", shuffle=True, workers=2) as loader:
        first, labels = loader.batch(0)
        before = first.copy(), labels.copy()
        for step in range(1, 8):
            loader.batch(step)
            assert len(loader._pool.flying) < AHEAD
        np.testing.assert_array_equal(first, before[0])
        np.testing.assert_array_equal(labels, before[1])


@pytest.fixture
def corrupt(tmp_path):
    """Eight images of two classes; 3, the last of its class, is cut off, 5 and 6 are garbage and empty."""
    write_set(tmp_path, np.random.default_rng(1), {"a": 4, "b": 4})
    cut = tmp_path / "a" / "3.jpeg"
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "b" / "1.JPG").write_bytes(b"no picture")
    (tmp_path / "b" / "2.png").write_bytes(b"")
    return ImageFolder(tmp_path)


@pytest.mark.parametrize("workers", [0, 3])
def test_corrupt_files_are_named(corrupt, workers):
    """The first one of a batch, however many workers, and only when its batch is asked for; the loader goes on."""
    with FolderLoader(corrupt, 8, size=32, workers=workers) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"^\[data.decode\] .*a/3\.jpeg: cannot be decoded: .*truncated"):
                loader.batch(0)
    with FolderLoader(corrupt, 2, size=32, workers=workers) as loader:
        loader.batch(0)
        with pytest.raises(DataError, match=r"a/3\.jpeg"):
            loader.batch(1)
        with pytest.raises(DataError, match=r"b/1\.JPG: cannot be decoded: cannot identify"):
            loader.batch(2)
        np.testing.assert_array_equal(loader.batch(4)[1], [0, 0])


@pytest.mark.parametrize("workers", [0, 3])
def test_corrupt_files_are_skipped(corrupt, workers):
    """The next image of the folder stands in; each file is warned of once."""
    good = FolderLoader(corrupt.part([0, 1, 2, 4, 4, 7, 7, 7]), 8, size=32, workers=0)
    with FolderLoader(corrupt, 8, size=32, workers=workers, skip_corrupt=True) as loader:
        with pytest.warns(UserWarning, match="skipped") as caught:
            x, labels = loader.batch(0)
        assert len(caught) == 3 and all("cannot be decoded" in str(warning.message) for warning in caught)
        np.testing.assert_array_equal(x, good.batch(0)[0])
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]  # a stand-in has its own label
        loader.batch(1)  # a second warning would be an error here
        assert [os.path.basename(path) for path in loader.skipped] == ["3.jpeg", "1.JPG", "2.png"]


def test_nothing_but_corrupt_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="at least one image must be readable"):
        FolderLoader(ImageFolder(tmp_path), 1, size=32, workers=0, skip_corrupt=True).batch(0)


def pids_of(loader):
    return [process.pid for process in loader._pool.processes]


def alive(pid):
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def all_gone(pids, seconds=10):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.fixture
def timeout():
    """What hangs fails."""

    def fail(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_killed_worker_is_an_error(images, timeout):
    loader = FolderLoader(images, 4, size=32, workers=2)
    loader.batch(0)
    pids = pids_of(loader)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process ended unexpectedly by SIGKILL \(out of memory\?\)"):
        for step in range(1, 10):
            loader.batch(step)
    with pytest.raises(DataError, match="the loader has been closed, or one of its workers has died"):
        loader.batch(1)
    assert all_gone(pids)


def test_a_worker_killed_at_its_work_is_an_error(images, timeout):
    """It has been asked, nothing more is asked of it, and it will never answer."""
    loader = FolderLoader(images, 4, size=32, workers=2)
    loader.batch(0)
    pid = pids_of(loader)[0]
    os.kill(pid, signal.SIGSTOP)
    loader._pool.send(loader._job, "batch", 1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match="SIGKILL"):
        for _ in range(AHEAD):
            loader._pool.land()
    loader.close()


def test_workers_leave_signals_to_their_owner(images):
    with FolderLoader(images, 4, size=32, workers=1) as loader:
        loader.batch(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pids_of(loader)[0], number)
        for step in range(1, 5):
            loader.batch(step)


def test_closing_stops_the_workers(images):
    with FolderLoader(images, 4, size=32, workers=2) as loader:
        loader.batch(0)
        pids = pids_of(loader)
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    loader.close()
    with pytest.raises(DataError, match="the loader has been closed"):
        loader.batch(0)
    loader = FolderLoader(images, 4, size=32, workers=1)
    loader.batch(0)
    pids = pids_of(loader)
    del loader
    gc.collect()
    assert not any(map(alive, pids))


ORPHANS = """
import os, sys, time
from tinyres.data.folder import FolderLoader, ImageFolder
loader = FolderLoader(ImageFolder(sys.argv[1]), 4, size=32, workers=2)
loader.batch(0)
print(*(process.pid for process in loader._pool.processes), flush=True)
sys.stdin.read(1)
"""


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_workers_do_not_outlive_their_owner(end, root):
    command = [sys.executable, "-W", "error", "-c", ORPHANS, str(root / "train")]
    env = {**os.environ, "PYTHONPATH": str(Path(tinyres.__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as owner:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        if end == "killed":
            owner.kill()
        else:
            owner.stdin.write("x")
            owner.stdin.flush()
        assert owner.wait(20) == (-signal.SIGKILL if end == "killed" else 0)
    assert all_gone(pids)


@pytest.mark.parametrize(
    "error, settings",
    [
        (DtypeError, {"folder": "train"}),
        (ArgumentError, {"batch_size": 0}),
        (DtypeError, {"batch_size": 1.5}),
        (ArgumentError, {"batch_size": 14}),
        (ArgumentError, {"seed": -1}),
        (ArgumentError, {"size": 0}),
        (ArgumentError, {"side": 31}),
        (ArgumentError, {"sides": (31, 40)}),
        (ArgumentError, {"sides": (50, 40)}),
        (ArgumentError, {"sides": 40}),
        (ArgumentError, {"augmentation": "crop"}),
        (ArgumentError, {"sigma": -0.1}),
        (ArgumentError, {"sigma": np.nan}),
        (ShapeError, {"mean": np.zeros((2, 2))}),
        (DtypeError, {"mean": "grey"}),
        (ArgumentError, {"scale": np.inf}),
        (DtypeError, {"shuffle": 1}),
        (ArgumentError, {"workers": -1}),
        (DtypeError, {"skip_corrupt": None}),
    ],
)
def test_arguments_that_do_not_fit(images, error, settings):
    with pytest.raises(error, match=r"^\[[\w. ]+\] .*; got "):
        FolderLoader(**{"folder": images, "batch_size": 4, "size": 32, "shuffle": True, **settings})


def test_steps_are_not_negative(images):
    loader = FolderLoader(images, 4, size=32, workers=0)
    with pytest.raises(ArgumentError, match="step must be at least 0"):
        loader.batch(-1)


def test_the_mean_image(images):
    crops = np.concatenate([x for x, _ in FolderLoader(images, 5, size=32, workers=0).epoch()])
    np.testing.assert_allclose(mean_image(images, 32, workers=0), crops.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(mean_image(images, 32, 2, workers=1), crops[[0, 6]].mean(axis=0), rtol=1e-6)


# Testing --------------------------------------------------------------------------------------------------------------


def test_top_k_errors(rng):
    scores, labels = rng.standard_normal((50, 7)), rng.integers(0, 7, 50)
    order = np.argsort(-scores, axis=1)
    want = [100 * np.mean([labels[i] not in order[i, :k] for i in range(50)]) for k in (1, 3, 7)]
    np.testing.assert_allclose(classify.top_k_errors(scores, labels, (1, 3, 7)), want)
    assert want[0] > want[1] > want[2] == 0
    assert classify.top_k_errors(np.zeros((1, 6)), [4]) == (100, 0)  # of equals the first is the highest, as in argmax
    assert classify.top_k_errors(np.zeros((1, 6)), [5]) == (100, 100)
    assert classify.top_k_errors(tinyres.tensor(np.eye(5, dtype=np.float32)), np.arange(5)) == (0, 0)


@pytest.mark.parametrize(
    "error, scores, labels, ks",
    [
        (ShapeError, np.zeros(5), [0], (1,)),
        (ShapeError, np.zeros((2, 5)), [0], (1,)),
        (ShapeError, np.zeros((0, 5)), [], (1,)),
        (DtypeError, np.zeros((1, 5)), [0.0], (1,)),
        (ArgumentError, np.zeros((1, 5)), [5], (1,)),
        (ArgumentError, np.zeros((1, 5)), [0], (6,)),
        (ArgumentError, np.zeros((1, 5)), [0], (0,)),
        (NonFiniteError, np.full((1, 5), np.nan), [0], (1,)),
    ],
)
def test_top_k_of_nonsense(error, scores, labels, ks):
    with pytest.raises(error, match=r"^\[top_k_errors\] "):
        classify.top_k_errors(scores, labels, ks)


def small_network(seed):
    tinyres.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(*layers, nn.GlobalAvgPool2d(), nn.Linear(8, 6))
    return model


MEAN, SCALE = np.array([120, 110, 100], np.float32), np.array([0.02, 0.01, 0.03], np.float32)


def softmax_of(model, views):
    """The mean of the softmax over views, one after the other."""
    total = 0
    for view in views:
        x = ((view.astype(np.float32) - MEAN) * SCALE)[None]
        with tinyres.no_grad():
            logits = model.eval()(tinyres.tensor(np.ascontiguousarray(x))).numpy()[0].astype(np.float64)
        total = total + np.exp(logits) / np.exp(logits).sum()
    return total / len(views)


def views_of(image, test):
    if test == "multi-scale":
        wholes = [resized_by_pillow(image, s) for s in (24, 40)]
        return [view for whole in wholes for view in (whole, whole[:, ::-1])]
    whole = resized_by_pillow(image, 28)
    H, W = whole.shape[:2]
    y, x = (H - 24 + 1) // 2, (W - 24 + 1) // 2
    places = [(y, x)] if test == "center" else [(0, 0), (0, W - 24), (H - 24, 0), (H - 24, W - 24), (y, x)]
    crops = [whole[top : top + 24, left : left + 24] for top, left in places]
    return crops if test == "center" else crops + [crop[:, ::-1] for crop in crops]


@pytest.mark.parametrize("test", classify.TESTS)
def test_predict_against_a_plain_loop(images, test):
    model, other = small_network(0), small_network(1)
    other.eval()
    model.train()
    chosen = [images.read(i) for i in (0, 1, 5, 5, 9)]
    settings = {"size": 24, "side": 28, "scales": (24, 40), "mean": MEAN, "scale": SCALE}
    got = classify.predict(model, chosen, test, batch_size=3, **settings)
    assert got.shape == (5, 6) and model.training and model[1].training and not other.training
    want = np.stack([softmax_of(model, views_of(image, test)) for image in chosen])
    tolerance = 3e-3 if test == "center" else 1e-6  # a level of difference in a box resampled by itself
    np.testing.assert_allclose(got, want, atol=tolerance)
    assert want.std(axis=0).max() > 4 * tolerance  # the images are told apart
    both = classify.predict([model, other], chosen, test, **settings)
    alone = classify.predict(other, chosen, test, **settings)
    np.testing.assert_allclose(both, (got + alone) / 2, atol=1e-6)
    assert not np.allclose(got, alone, atol=1e-3)


def test_the_mean_colour_of_a_mean_image(images):
    model, chosen = small_network(0), [images.read(2)]
    flat = np.broadcast_to(MEAN, (24, 24, 3)) + np.linspace(-9, 9, 24, dtype=np.float32)[:, None, None]
    settings = {"size": 24, "scales": (30,), "scale": SCALE}
    a = classify.predict(model, chosen, "multi-scale", mean=flat, **settings)
    np.testing.assert_allclose(a, classify.predict(model, chosen, "multi-scale", mean=MEAN, **settings), rtol=1e-4)
    a = classify.predict(model, chosen, "center", mean=flat, **settings)
    assert not np.allclose(a, classify.predict(model, chosen, "center", mean=MEAN, **settings), rtol=1e-4)


def test_the_networks_are_fully_convolutional():
    """The linear layer at every position of the last map, then averaged, is what the network computes."""
    model = tinyres.models.imagenet_resnet(18, num_classes=7, filters=4).eval()
    *body, _, linear = [module for _, module in model.children()]
    with tinyres.no_grad():
        x = tinyres.tensor(np.random.default_rng(0).standard_normal((1, 64, 128, 3)).astype(np.float32))
        features = nn.Sequential(*body)(x).numpy()
        assert features.shape[1:3] == (2, 4)
        scores = features @ linear.weight.numpy() + linear.bias.numpy()
        np.testing.assert_allclose(model(x).numpy(), scores.mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)


def test_what_predict_refuses(images):
    model, image = small_network(0), images.read(0)
    wide = nn.Sequential(nn.GlobalAvgPool2d(), nn.Linear(3, 5))
    for error, arguments, settings in (
        (DtypeError, (["model"], [image]), {}),
        (DtypeError, ([], [image]), {}),
        (ShapeError, (model, []), {}),
        (DtypeError, (model, [image / 255]), {}),
        (ShapeError, (model, [image[..., 0]]), {}),
        (ArgumentError, (model, [image], "11-crop"), {}),
        (ArgumentError, (model, [image]), {"size": 24, "side": 20}),
        (ArgumentError, (model, [image], "10-crop"), {"size": 24, "side": 20}),
        (ArgumentError, (model, [image], "multi-scale"), {"scales": (0,)}),
        (ArgumentError, (model, [image], "multi-scale"), {"scales": ()}),
        (ArgumentError, (model, [image]), {"batch_size": 0}),
        (ShapeError, (model, [image]), {"mean": np.zeros(4)}),
        (ArgumentError, (tinyres.models.vgg(16, 5, image_size=32, filters=1), [image], "multi-scale"), {}),
        (ShapeError, ([model, wide], [image]), {"size": 24}),
    ):
        with pytest.raises(error, match=r"^\[predict\] "):
            classify.predict(*arguments, **settings)
    with pytest.raises(ShapeError, match="the window must fit"):  # too small for the second convolution
        classify.predict(model, [image], "multi-scale", scales=(3,))
    model[0].weight.data[...] = np.nan
    with pytest.raises(NonFiniteError, match=r"^\[predict\] the network's outputs must be finite"):
        classify.predict(model, [image], size=24)


@pytest.mark.parametrize("test", classify.TESTS)
def test_evaluate(images, test):
    model = small_network(3)
    with FolderLoader(images, 5, size=24, side=28, mean=MEAN, scale=SCALE, workers=1) as loader:
        got = classify.evaluate(model, loader, test)
    everyone = [images.read(i) for i in range(13)]
    p = classify.predict(model, everyone, test, size=24, side=28, mean=MEAN, scale=SCALE)
    assert got[1:] == pytest.approx(classify.top_k_errors(p, images.labels))
    assert got.loss == pytest.approx(-np.log(p[np.arange(13), images.labels]).mean(), rel=1e-5)
    if test == "center":
        loader = FolderLoader(images, 5, size=24, side=28, mean=MEAN, scale=SCALE, workers=0)
        assert (got.loss, got.top1) == pytest.approx(train.evaluate(model, loader), rel=1e-5)


# The example ----------------------------------------------------------------------------------------------------------

# Runs the example, of narrow networks, with a Ctrl-C in the step argv[1].
DRIVER = """
import functools, runpy, signal, sys
from tinyres import models
from tinyres.data import folder

class Loader(folder.FolderLoader):
    def batch(self, step):
        if str(step) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return super().batch(step)

stop_at = sys.argv[1]
models.imagenet_resnet = functools.partial(models.imagenet_resnet, filters=8)
folder.FolderLoader = Loader
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NARROW = functools.partial(tinyres.models.imagenet_resnet, filters=8)
SMALL = ["--model", "resnet18", "--crop", "32", "--batch-size", "4", "--epochs", "3", "--device", "cpu"]


@pytest.fixture
def run(root, capfd, monkeypatch):
    """Run the example, of narrow networks, in this process; returns what it printed."""
    monkeypatch.setattr(tinyres.models, "imagenet_resnet", NARROW)

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--data-dir", str(root), *SMALL, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        printed = capfd.readouterr()
        code = end.value.code
        if isinstance(code, str):
            printed, code = (code, ""), 1
        assert code == status, printed
        return "".join(printed)

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_run_and_one_that_was_stopped_and_resumed(run, runs, root):
    """Another number of workers each time, and the same bits."""
    same = ["--iterations", 5, "--mean", "pixel", "--skip", "dropout"]  # dropout draws numbers of its own
    printed = run(*same, "--out", runs / "whole", "--workers", 0)
    assert {path.name for path in (runs / "whole").iterdir()} == FILES
    lines = metrics(runs / "whole")
    assert [line["step"] for line in lines] == [3, 5] and [line["lr"] for line in lines] == [0.1, 0.1 * 0.1]
    for line in lines:
        assert 0 <= line["test_top5_error"] <= line["test_error"] <= 100
    assert "13 training and 6 test images of 3 classes" in printed and "test      error" in printed
    config = json.loads((runs / "whole" / "config.json").read_text())
    assert config["recipe"] == "paper2016" and config["schedule_steps"] == 9 and config["total_steps"] == 5

    out = runs / "stopped"
    example = [str(EXAMPLE), "--data-dir", str(root), *SMALL, *map(str, same), "--out", str(out)]
    command = [sys.executable, "-W", "error", "-c", DRIVER, "3", *example, "--resume", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(tinyres.__file__).parents[1])}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "stopped at step 4 of 5" in done.stdout, done.stdout + done.stderr
    printed = run(*same, "--out", out, "--workers", 1, "--resume")
    assert "resuming at step 4" in printed
    assert state(out) == state(runs / "whole") and metrics(out) == lines

    printed = run(*same, "--out", out, "--resume", "--lr", 0.2, status=1)
    assert "error: [resume] lr must be that of the run in" in printed


def test_images_held_out_and_no_augmentation(run, runs, tmp_path):
    """One image in 25 is tested on and not trained on, without a folder val; training crops are the central ones."""
    rng = np.random.default_rng(1)
    for i in range(51):
        file = tmp_path / "train" / ("ant", "bee", "cat")[i // 20] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(rng, 40, 40 + i % 7).save(file)
    settings = ["--data-dir", tmp_path, "--iterations", 1, "--workers", 0, "--batch-size", 49, "--mean", "channel"]
    printed = run(*settings, "--validation", "--no-augment", "--out", runs / "held")
    assert "49 training and 2 test images of 3 classes" in printed
    config = json.loads((runs / "held" / "config.json").read_text())
    assert config["augmentation"] is None and config["train_images"] == 49

    # The loss of the only batch, from the images that are left: 24 is a bee, 49 a cat.
    tinyres.manual_seed(0)
    photographs, left = ImageFolder(tmp_path / "train"), np.delete(np.arange(51), [24, 49])
    scale = {"mean": IMAGENET_MEAN, "scale": 1 / IMAGENET_STD}
    with FolderLoader(photographs.part(left), 49, size=32, workers=0, **scale) as loader:
        x, labels = next(loader.epoch())
    loss = tinyres.ops.cross_entropy(NARROW(18, num_classes=3)(tinyres.tensor(x)), labels)
    assert metrics(runs / "held")[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_disk_that_is_full(run, tmp_path, monkeypatch):
    """The epoch's end is outlived, the run's end is not."""
    write = train.write_atomic

    def full(path, *arguments):
        if path.name == "checkpoint.safetensors":
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(train, "write_atomic", full)
    printed = run("--iterations", 4, "--out", tmp_path / "run", "--workers", 0, status=1)
    assert printed == f"error: [Errno 28] No space left on device: '{tmp_path}/run/checkpoint.safetensors'"
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 4]


def test_an_ensemble_of_checkpoints(run, runs, root):
    """What the example prints is what `evaluate` finds."""
    run("--iterations", 1, "--out", runs / "plain", "--workers", 0, "--model", "plain18", "--augmentation",
        "scale-aspect", "--mean", "channel", "--no-norm-decay")  # fmt: skip
    run("--iterations", 1, "--out", runs / "other", "--workers", 0, "--seed", 1, "--unit", "full_preactivation",
        "--recipe", "fb")  # fmt: skip
    paths = [runs / name / "checkpoint.safetensors" for name in ("plain", "other")]
    val = ImageFolder(root / "val")
    networks = []
    for path, settings in zip(paths, ({"plain": True}, {"unit": "full_preactivation"}), strict=True):
        networks.append(NARROW(18, num_classes=3, **settings))
        networks[-1].load_state_dict(tinyres.load(path)["model"])
    saved = tinyres.load(paths[0])
    for test, size in (("10-crop", 32), ("multi-scale", 32), ("center", 48)):
        settings = {"size": size, "side": max(37, size), "mean": saved["mean"], "scale": saved["scale"], "workers": 0}
        want = classify.evaluate(networks, FolderLoader(val, 4, **settings), test)
        printed = run("--test", test, "--image-size", size, "--workers", 0, "--evaluate", *paths)
        assert f"6 images, {test}: top-1 error {want.top1:.2f} %, top-5 error {want.top5:.2f} %" in printed

    tinyres.save(runs / "grey.safetensors", **{**saved, "mean": saved["mean"] + 1})
    printed = run("--evaluate", paths[0], runs / "grey.safetensors", status=1)
    assert "must have the same mean and crop" in printed
    tinyres.save(runs / "none.safetensors", step=1)
    printed = run("--evaluate", runs / "none.safetensors", status=1)
    assert "error: [evaluate]" in printed and "must be a checkpoint of this program" in printed


def test_the_example_refuses(run, runs, root, tmp_path):
    for arguments in (
        ["--data-dir", tmp_path],
        ["--batch-size", 14],
        ["--batch-size", 0],
        ["--iterations", 0],
        ["--epochs", 0],
        ["--lr", "nan"],
        ["--model", "vgg16", "--shortcut", "A"],
        ["--model", "plain18", "--unit", "bn_after_add"],
        ["--workers", -1, "--iterations", 1],
        ["--validation"],
    ):
        printed = run("--out", runs / "refused", *arguments, status=1)
        assert printed.startswith("error: [") and "\n" not in printed, printed
    (tmp_path / "train" / "dog").mkdir(parents=True)
    (tmp_path / "val").symlink_to(root / "val")
    photograph(np.random.default_rng(0), 40, 40).save(tmp_path / "train" / "dog" / "x.png")
    printed = run("--out", runs / "refused", "--data-dir", tmp_path, status=1)
    assert "must hold the same classes; got train 1, val 3" in printed


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_measures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parents[1] / "benchmarks"))
    input_pipeline = importlib.import_module("input_pipeline")
    monkeypatch.setattr(input_pipeline, "BATCH", 2)
    assert 50e3 < input_pipeline.draw(tmp_path, 4) < 200e3
    drawn = ImageFolder(tmp_path)
    assert drawn.read(0).shape == (375, 500, 3) and drawn.read(0).std() > 20
    assert input_pipeline.plain([drawn.files[i] for i in range(4)]) > 0
    for view in ("center", "scale", "scale-aspect"):
        assert input_pipeline.pipeline(drawn, view, 0, 4) > 0
