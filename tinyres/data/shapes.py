"""shapes10: a built-in set in CIFAR's form, drawn from a seed, for machines without CIFAR.

Each 32x32 picture shows one of ten shapes, anywhere, in any size, rotation and pair of colours, over a textured
background with a bar and a blob that mean nothing, under noise. No pixel by itself says anything about the class,
so a linear classifier gets little further than guessing, while a small residual network learns the set in minutes.

Only operations that IEEE 754 rounds exactly are used on pixels (no sines, no library sums), so that a seed gives
the same bits on every machine.
"""

from __future__ import annotations

import math

import numpy as np

from tinyres.errors import ArgumentError, DtypeError, expect

CLASSES = ["circle", "ring", "crescent", "square", "triangle", "star", "cross", "hourglass", "stripes", "checker"]

SIZE = 32
CHUNK = 250  # images drawn together: few enough for the temporaries to stay in the cache
ANGLES = 256

# Tables of the host's float64 sine, rounded to float32: the last-bit differences between libraries round away.
COSINE = np.array([math.cos(2 * math.pi * k / ANGLES) for k in range(ANGLES)], np.float32)
SINE = np.array([math.sin(2 * math.pi * k / ANGLES) for k in range(ANGLES)], np.float32)
PENTAGON = [(math.cos(math.pi * (0.5 + 0.4 * k)), math.sin(math.pi * (0.5 + 0.4 * k))) for k in range(5)]


def shapes10(
    train: int = 20_000, test: int = 4_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Draw the set: `train` and `test` images, classes balanced within every 250 of them.

    Returns train_images (train, 32, 32, 3) uint8, train_labels (train,) int64, test_images, test_labels and the
    list of class names. The same seed gives the same bits, and a smaller set is the beginning of a larger one.
    Raises DtypeError or ArgumentError for counts that are no positive integers and seeds outside 0 .. 2**64 - 1.
    """
    for name, value, low, high in (("train", train, 1, 10**7), ("test", test, 1, 10**7), ("seed", seed, 0, 2**64 - 1)):
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        expect(integer, "data.shapes10", f"{name} must be an integer", DtypeError, **{name: repr(value)})
        rule = f"{name} must lie in {low} .. {high}"
        expect(low <= value <= high, "data.shapes10", rule, ArgumentError, **{name: value})
    return *_split(train, seed, 0), *_split(test, seed, 1), list(CLASSES)


def _split(count, seed, split):
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        # Whole chunks are drawn, each from its own key, so that the number of images changes none of them.
        key = np.array([seed, 2 * (start // CHUNK) + split], np.uint64)
        drawn, classes = _chunk(np.random.Generator(np.random.Philox(key=key)))
        images[start : start + CHUNK] = drawn[: count - start]
        labels[start : start + CHUNK] = classes[: count - start]
    return images, labels


def _chunk(rng):
    """CHUNK images (CHUNK, 32, 32, 3) uint8 and their labels, in random order."""

    def uniform(low, high, *shape):
        return low + (high - low) * rng.random((CHUNK, *shape), np.float32)

    def pixels(values):  # one value an image, ready to be combined with (CHUNK, 32, 32)
        return values[:, None, None]

    def placed(reach, sizes, stretch):
        """Pixel coordinates in the frame of something moved, turned and scaled at random, and its scale."""
        angle = (rng.random(CHUNK, np.float32) * ANGLES).astype(np.int64)
        cosine, sine = pixels(COSINE[angle]), pixels(SINE[angle])
        x = axis[None, None, :] - pixels(uniform(-reach, reach))
        y = axis[None, :, None] - pixels(uniform(-reach, reach))
        size = pixels(uniform(*sizes))
        ratio = pixels(uniform(*stretch))
        return (x * cosine + y * sine) / (size * ratio), (y * cosine - x * sine) * (ratio / size), size

    def blend(picture, coverage, color):
        picture += coverage[..., None] * (color - picture)

    axis = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
    labels = np.repeat(np.arange(len(CLASSES)), CHUNK // len(CLASSES))

    # Background: a triangle wave between two shades of one colour.
    ground = uniform(0, 1, 1, 1, 3)
    u, _, _ = placed(16, (5, 30), (1, 1))
    wave = np.abs(u - np.floor(u) - np.float32(0.5)) * np.float32(2)
    picture = ground + (wave[..., None] - np.float32(0.5)) * uniform(-0.5, 0.5, 1, 1, 3)

    # A bar and a blob that belong to no class, under the shape.
    u, v, size = placed(12, (1, 2), (1, 1))
    blend(picture, _coverage(np.abs(u) - 1, size), uniform(0, 1, 1, 1, 3))
    u, v, size = placed(14, (2, 4), (0.7, 1.4))
    blend(picture, _coverage(np.sqrt(u * u + v * v) - 1, size), uniform(0, 1, 1, 1, 3))

    # The shape itself. Every channel differs from the ground by at least 0.25, in either direction.
    u, v, size = placed(5, (6.5, 11), (0.85, 1.15))
    coverage = np.empty_like(u)
    for label, name in enumerate(CLASSES):
        rows = labels == label
        coverage[rows] = _coverage(DISTANCE[name](u[rows], v[rows]), size[rows])
    color = ground + uniform(0.25, 0.75, 1, 1, 3)
    blend(picture, coverage, color - np.floor(color))

    # Noise: the sum of two bytes, of a strength of its own in each image; then light and rounding.
    bits = rng.integers(0, 256, (2, *picture.shape), np.uint8)
    noise = bits[0].astype(np.float32) - bits[1]
    picture = picture * np.float32(200) + noise * uniform(0.05, 0.35, 1, 1, 1) + uniform(0, 55, 1, 1, 1)
    images = np.clip(picture, 0, 255).astype(np.uint8)

    order = np.argsort(rng.random(CHUNK), kind="stable")
    return images[order], labels[order]


def _coverage(distance, size):
    """How much of each pixel lies inside, from the signed distance in units of `size` pixels: soft edges."""
    return np.clip(np.float32(0.5) - distance * size, 0, 1)


# Signed distances, or close bounds of them: below 0 inside. u, v are about -1 .. 1 over the shape. -------------------


def _circle(u, v):
    return np.sqrt(u * u + v * v) - np.float32(0.9)


def _ring(u, v):
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.75)) - np.float32(0.22)


def _crescent(u, v):
    bite = u - np.float32(0.55)
    return np.maximum(_circle(u, v), np.float32(0.8) - np.sqrt(bite * bite + v * v))


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)


def _triangle(u, v):
    return np.maximum(np.abs(u) * np.float32(0.866) + v * np.float32(0.5), -v) - np.float32(0.55)


def _star(u, v):
    # A point lies in a pentagram where it is outside at most one of five half-planes: the second largest decides.
    first = second = np.full_like(u, -np.inf)
    for x, y in PENTAGON:
        side = u * np.float32(x) + v * np.float32(y)
        second = np.maximum(second, np.minimum(first, side))
        first = np.maximum(first, side)
    return second - np.float32(0.34)


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - np.float32(0.95), np.minimum(u, v) - np.float32(0.3))


def _hourglass(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum((u - v) * np.float32(0.7), v - np.float32(0.85))


def _wave(t, period):
    t = t * np.float32(1 / period)
    return (np.abs(t - np.floor(t) - np.float32(0.5)) - np.float32(0.25)) * np.float32(period)


def _stripes(u, v):
    return np.maximum(_circle(u, v), _wave(u, 0.6))


def _checker(u, v):
    a, b = _wave(u, 0.9), _wave(v, 0.9)
    return np.maximum(_circle(u, v), np.maximum(np.minimum(a, b), -np.maximum(a, b)))


DISTANCE = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "hourglass": _hourglass,
    "stripes": _stripes,
    "checker": _checker,
}
