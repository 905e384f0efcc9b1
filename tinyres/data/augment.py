"""Batches: normalised, cropped and flipped on the fly from uint8 images, as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from tinyres import backend
from tinyres.backend import Array, Device, random
from tinyres.errors import ArgumentError, DtypeError, ShapeError, expect, out_of_memory

PADDING = 4  # pixels of zeros around an image before the crop; sec. 4.2 of "Deep Residual Learning"
CHUNK = 500  # images summed at a time by `statistics`: small temporaries, and squares that fit into 32 bits


class Loader:
    """Batches of a data set for training and evaluation.

    images, labels  NumPy arrays (L, H, W, C) uint8 and (L,) integers. Kept, not copied; a GPU gets a copy of its own
    batch_size      images in a batch
    seed            of the order and the augmentation: 0 .. 2**64 - 1; None is that of `tinyres.manual_seed`, as it is
                    when the loader is made
    mean, scale     x = (image - mean) * scale on the 0-255 scale; mean (H, W, C), (C,) or a number, scale (C,) or a
                    number
    augment         pad with 4 pixels of zeros, crop to the old size at random, flip left to right half of the time
    shuffle         draw a new order every epoch; the last partial batch of the order is dropped
    device          where the batches are made

    `batch(step)` depends on nothing but the arguments above and `step`, so a resumed run sees what the first run
    would have seen. Raises ShapeError, DtypeError or ArgumentError for arguments that do not fit.
    """

    device: Device
    images: Array
    labels: Array
    batch_size: int
    mean: Array
    scale: Array
    augment: bool
    shuffle: bool
    steps_per_epoch: int

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int | None = None,
        mean: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        augment: bool = False,
        shuffle: bool = False,
        device: str | Device = "cpu",
    ) -> None:
        def check(condition, rule, error=ShapeError, **got):
            expect(condition, "data.Loader", rule, error, **got)

        def is_integer(value):
            return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))

        arrays = isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)
        kinds = {"images": type(images).__name__, "labels": type(labels).__name__}
        check(arrays, "images and labels must be NumPy arrays", DtypeError, **kinds)
        check(images.dtype == np.uint8, "images must be uint8", DtypeError, images=images.dtype)
        check(images.ndim == 4 and images.size, "images must be (L, H, W, C) and not empty", images=images.shape)
        check(labels.dtype.kind in "iu", "labels must be integers", DtypeError, labels=labels.dtype)
        check(labels.shape == images.shape[:1], "labels must be (L,)", labels=labels.shape, images=images.shape)
        check(labels.min() >= 0, "labels must not be negative", ArgumentError, label=labels.min())
        check(is_integer(batch_size), "batch_size must be an integer", DtypeError, batch_size=repr(batch_size))
        check(batch_size >= 1, "batch_size must be at least 1", ArgumentError, batch_size=batch_size)
        seed = random.seed() if seed is None else seed
        check(is_integer(seed), "seed must be an integer", DtypeError, seed=repr(seed))
        check(0 <= seed < 2**64, "seed must lie in 0 .. 2**64 - 1", ArgumentError, seed=seed)
        flags = {"augment": augment, "shuffle": shuffle}
        check(all(isinstance(f, bool) for f in flags.values()), "augment, shuffle must be bools", DtypeError, **flags)
        enough = not shuffle or batch_size <= len(images)
        rule = "batch_size must be at most the number of images, as partial batches are dropped when shuffling"
        check(enough, rule, ArgumentError, batch_size=batch_size, images=len(images))

        _, H, W, C = images.shape
        self.device = backend.get(device)
        self.images = self.device.asarray(np.ascontiguousarray(images))
        self.labels = self.device.asarray(labels, np.int64)
        self._in_order = self.device.asarray(np.arange(len(images)))
        self.batch_size = batch_size = int(batch_size)
        self.mean = constant("data.Loader", "mean", mean, (H, W, C), [(), (C,), (H, W, C)], self.device)
        self.scale = constant("data.Loader", "scale", scale, (C,), [(), (C,)], self.device)
        self.augment, self.shuffle = augment, shuffle
        # The last partial batch counts only where nothing is shuffled.
        self.steps_per_epoch = len(images) // batch_size if shuffle else -(-len(images) // batch_size)
        self._order_stream, self._augment_stream = random.Stream(seed, "order"), random.Stream(seed, "augment")
        self._order_of = -1, self._in_order  # (epoch, its order): a cache, a step's batch does not depend on it

    def batch(self, step: int) -> tuple[Array, Array]:
        """The batch of training step 0, 1, 2, ...: x (N, H, W, C) float32 and labels (N,) int64."""
        whole = isinstance(step, (int, np.integer)) and not isinstance(step, np.timedelta64)
        rule = "step must be an integer in 0 .. 2**63 - 1"
        expect(whole and 0 <= step < 2**63, "data.Loader", rule, ArgumentError, step=repr(step))
        step = int(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        index = self.order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        if not self.augment:
            return self._make(index)
        # Drawn on the host and sent along, a few hundred bytes a batch: only the order is large enough to be kept.
        moves, places = len(index), 2 * PADDING + 1
        top, left, flip = self._augment_stream.uniform(step, 3 * moves).reshape(3, moves)
        top, left = ((np.floor(draw * places) - PADDING).astype(np.int32) for draw in (top, left))
        return self._make(index, top, left, (flip < 0.5).astype(np.uint8))

    def epoch(self) -> Iterator[tuple[Array, Array]]:
        """Every image once, in order and not augmented, as (x, labels) batches; the last one may be smaller."""
        for start in range(0, len(self.images), self.batch_size):
            yield self._make(self._in_order[start : start + self.batch_size])

    def order(self, epoch: int) -> Array:
        """The images of an epoch by number, on the device: not to be written to."""
        if not self.shuffle:
            return self._in_order
        if self._order_of[0] != epoch:
            self._order_of = epoch, self.device.asarray(self._order_stream.permutation(epoch, len(self.images)))
        return self._order_of[1]

    @property
    def augment_key(self) -> int:
        """Of the stream of random numbers whose draw `step` moves and flips the images of that step."""
        return self._augment_stream.key

    def _make(self, index, top=None, left=None, flip=None):
        if top is None:
            top = left = np.zeros(len(index), np.int32)
            flip = np.zeros(len(index), np.uint8)
        try:
            choices = [self.device.asarray(choice) for choice in (top, left, flip)]
            x = self.device.kernels.augment(self.images, index, *choices, self.mean, self.scale)
            return x, self.labels[index]
        except MemoryError as error:
            out_of_memory("data.Loader", f"making a batch of {len(index)}", error)


def constant(
    op: str, name: str, value: ArrayLike, shape: tuple[int, ...], shapes: list[tuple[int, ...]], device: Device
) -> Array:
    """A loader's mean or scale as a dense float32 array of `shape`, on the device; it must have one of `shapes`."""
    try:
        value = np.asarray(value)
        if value.dtype.kind == "c":
            raise TypeError("its imaginary part would be lost")
        with np.errstate(over="ignore"):  # an infinity is refused below
            value = value.astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        raise DtypeError(f"[{op}] {name} must hold numbers; got {name} {value!r}") from None
    expect(value.shape in shapes, op, f"{name} must have one of the shapes {shapes}", got=value.shape)
    expect(np.isfinite(value).all(), op, f"{name} must be finite", ArgumentError, **{name: value})
    return device.asarray(np.ascontiguousarray(np.broadcast_to(value, shape)))


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and spread of uint8 images (L, H, W, C) on the 0-255 scale, all float32.

    Returns pixel_mean (H, W, C), channel_mean (C,) and channel_std (C,), the last two over all pixels of all images.
    The sums are of integers, and so exact. Raises ShapeError or DtypeError for anything but such images.
    """
    is_uint8 = isinstance(images, np.ndarray) and images.dtype == np.uint8
    expect(is_uint8, "data.statistics", "images must be a uint8 array", DtypeError, got=type(images).__name__)
    fits = images.ndim == 4 and images.size > 0
    expect(fits, "data.statistics", "images must be (L, H, W, C) and not empty", images=images.shape)
    total = np.zeros(images.shape[1:], np.int64)
    squares = np.zeros(images.shape[1:], np.int64)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].astype(np.uint32)
        total += chunk.sum(axis=0, dtype=np.uint32)
        squares += np.multiply(chunk, chunk, out=chunk).sum(axis=0, dtype=np.uint32)
    count = images.size // images.shape[-1]
    channel_mean = total.sum(axis=(0, 1)) / count
    variance = squares.sum(axis=(0, 1)) / count - channel_mean**2
    pixel_mean = total / len(images)
    channel_std = np.sqrt(np.maximum(variance, 0))
    return pixel_mean.astype(np.float32), channel_mean.astype(np.float32), channel_std.astype(np.float32)
