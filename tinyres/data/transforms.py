"""What is done to a photograph on its way to a network: decoding, crops, flips, colour noise.

A crop is a box (left, top, right, bottom) of the image, in pixels and fractions of them, that `resample` brings to its
size. So "resize, then crop" resamples only what the crop shows, to the same pixels (Pillow's rounding moves some by a
level of 256, few by two). Functions that choose at random take their draws as an argument and have no state.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tinyres.errors import ArgumentError, DataError, DtypeError, expect, fail

Box = tuple[float, float, float, float]

SIDES = (256, 480)  # the shorter side of training images; He et al. 2015, section 3.4
TRIES = 10  # of `scale_aspect_crop`
SCALE_DRAWS, SCALE_ASPECT_DRAWS = 3, 4 * TRIES

# Of the colours of ImageNet's pixels on the 0-1 scale, as in github.com/facebookarchive/fb.resnet.torch; RGB.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def pillow() -> ModuleType:
    """The module PIL.Image. Raises DataError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        fail("data.transforms", "photographs need Pillow: pip install tinyres[image]", DataError)
    return Image


def decode(path: str | os.PathLike[str]) -> np.ndarray:
    """The JPEG or PNG file at `path`, whatever it is called, as (H, W, 3) uint8, RGB.

    Grey, palette and CMYK images are converted, 16 bits cut to 8, and alpha dropped; EXIF rotations are not applied.
    Raises DataError, naming the file and the reason, for what cannot be read or decoded to its end, and for more than
    PIL.Image.MAX_IMAGE_PIXELS (90 million) pixels: a file of a few bytes can claim any number.
    """
    Image = pillow()
    rule = f"{os.fspath(path)}: cannot be decoded: it is no regular file"  # a pipe would be waited for
    expect(os.path.isfile(path) or not os.path.exists(path), "data.decode", rule, DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are right or an exception comes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
                    return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
                return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"[data.decode] {os.fspath(path)}: cannot be decoded: {reason}") from error


def check_image(op: str, image: Any) -> np.ndarray:
    """`image`, which must be (H, W, 3) uint8 and not empty."""
    given = isinstance(image, np.ndarray) and image.dtype == np.uint8
    expect(given, op, "an image must be a uint8 array", DtypeError, got=getattr(image, "dtype", type(image).__name__))
    fits = image.ndim == 3 and image.shape[2] == 3 and image.size
    expect(fits, op, "an image must be (H, W, 3) and not empty", image=image.shape)
    return image


# Sizes and boxes ------------------------------------------------------------------------------------------------------


def resized(H: int, W: int, side: int) -> tuple[int, int]:
    """Height and width of an H x W image once its shorter side is `side`."""
    short = min(H, W)
    return (2 * H * side + short) // (2 * short), (2 * W * side + short) // (2 * short)


def _crop_of_resized(H, W, side, size, vertical, horizontal):
    """The size x size crop of the image resized to `side`, at these shares of the room that there is, as a box."""
    op = "data.transforms"
    expect(side >= size, op, "the shorter side must be at least the crop's", ArgumentError, side=side, crop=size)
    h, w = resized(H, W, side)
    top, left = vertical(h - size), horizontal(w - size)
    return left * W / w, top * H / h, (left + size) * W / w, (top + size) * H / h


def center_crop(H: int, W: int, side: int, size: int) -> Box:
    """The size x size centre of an H x W image whose shorter side is resized to `side`.

    Raises ArgumentError for a `side` below `size`.
    """
    return _crop_of_resized(H, W, side, size, lambda room: (room + 1) // 2, lambda room: (room + 1) // 2)


def scale_crop(H: int, W: int, draw: Sequence[float], size: int, sides: tuple[int, int] = SIDES) -> Box:
    """A size x size crop at random from the image resized to a shorter side drawn from sides[0] .. sides[1].

    draw  SCALE_DRAWS numbers in [0, 1)
    Source: Simonyan and Zisserman 2014; He et al. 2015, section 3.4. Raises ArgumentError for sides below `size`.
    """
    side = sides[0] + int(draw[0] * (sides[1] - sides[0] + 1))
    _, down, right = draw
    return _crop_of_resized(H, W, side, size, lambda room: int(down * (room + 1)), lambda room: int(right * (room + 1)))


def scale_aspect_crop(H: int, W: int, draw: Sequence[float]) -> Box:
    """A rectangle at random of 8 to 100 % of the image's area, width over height 3/4 to 4/3; to be made a square.

    draw  SCALE_ASPECT_DRAWS numbers in [0, 1): area, aspect and place of each of ten tries; where none of them fits,
          the largest central square
    Source: Szegedy et al. 2015, section 6; used in He et al. 2016, Table 5. The aspect's logarithm is uniform.
    """
    for area, aspect, down, right in np.reshape(draw, (TRIES, 4)):
        pixels = (0.08 + 0.92 * area) * H * W
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= W and 0 < h <= H:
            left, top = int(right * (W - w + 1)), int(down * (H - h + 1))
            return left, top, left + w, top + h
    short = min(H, W)
    left, top = (W - short) // 2, (H - short) // 2
    return left, top, left + short, top + short


# Pixels ---------------------------------------------------------------------------------------------------------------


def resample(image: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """The box of an image (H, W, 3) uint8 as (height, width, 3) uint8: bilinear, averaging where it shrinks."""
    Image = pillow()
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box))


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """The whole image (H, W, 3) uint8 with a shorter side of `side`."""
    H, W = image.shape[:2]
    return resample(image, (0, 0, W, H), *resized(H, W, side))


def ten_crops(image: np.ndarray, size: int) -> np.ndarray:
    """Corners and centre of an image (H, W, 3), size x size, and their flips: (10, size, size, 3).

    Source: Krizhevsky et al. 2012, section 4.1. Raises ArgumentError for an image smaller than the crop.
    """
    H, W = image.shape[:2]
    rule = "the image must be at least as large as its crops"
    expect(min(H, W) >= size, "data.transforms", rule, ArgumentError, image=(H, W), crop=size)
    down, right = H - size, W - size
    places = [(0, 0), (0, right), (down, 0), (down, right), ((down + 1) // 2, (right + 1) // 2)]
    crops = np.stack([image[top : top + size, left : left + size] for top, left in places])
    return np.concatenate([crops, crops[:, :, ::-1]])


def color_noise(draw: np.ndarray, sigma: float = 0.1) -> np.ndarray:
    """What is added to all pixels of an image: (N, 3) on the 0-255 scale.

    draw  (N, 3) from N(0, 1), one for each principal component of ImageNet's colours
    Source: Krizhevsky et al. 2012, section 4.1, "fancy PCA".
    """
    return 255 * (sigma * draw * EIGENVALUES) @ EIGENVECTORS.T
