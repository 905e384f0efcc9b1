"""Scores of photographs from several crops and several networks, and the errors that they make: the papers' testing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tinyres import backend
from tinyres.autograd import Tensor, no_grad, tensor
from tinyres.backend import Array
from tinyres.data import transforms
from tinyres.data.folder import FolderLoader
from tinyres.errors import ArgumentError, DtypeError, NonFiniteError, expect
from tinyres.nn import GlobalAvgPool2d, Module
from tinyres.nn.module import home_of
from tinyres.ops import checks

TESTS = ("center", "10-crop", "multi-scale")
SCALES = (224, 256, 384, 480, 640)  # shorter sides; He et al. 2015, section 3.4


def top_k_errors(scores: ArrayLike, labels: ArrayLike, ks: Sequence[int] = (1, 5)) -> tuple[float, ...]:
    """For each k the share of images, in percent, whose label is not among the k classes of highest score.

    scores  (N, K) numbers, of any kind that grows with likelihood; of equal ones the first is the higher
    labels  (N,) integers in 0 .. K - 1
    Raises ShapeError, DtypeError or ArgumentError for what does not fit, NonFiniteError for a NaN among the scores.
    """
    op = "top_k_errors"
    scores, labels = (np.asarray(backend.host(a.data if isinstance(a, Tensor) else a)) for a in (scores, labels))
    fits = scores.ndim == 2 and scores.size and labels.shape == scores.shape[:1]
    expect(fits, op, "scores must be (N, K), not empty, and labels (N,)", scores=scores.shape, labels=labels.shape)
    expect(scores.dtype.kind in "fiu", op, "scores must be numbers", DtypeError, scores=scores.dtype)
    expect(labels.dtype.kind in "iu", op, "labels must be integers", DtypeError, labels=labels.dtype)
    N, K = scores.shape
    inside = labels.min() >= 0 and labels.max() < K
    expect(inside, op, f"labels must be in 0 .. {K - 1}", ArgumentError, lowest=labels.min(), highest=labels.max())
    expect(not np.isnan(scores).any(), op, "scores must not be NaN", NonFiniteError)
    ks = [checks.integer(op, "k", k, 1) for k in ks]
    expect(all(k <= K for k in ks), op, "k must be at most the number of classes", ArgumentError, ks=ks, classes=K)
    own = scores[np.arange(N), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(K) < labels[:, None]))
    rank = before.sum(axis=1)
    return tuple(100.0 * float((rank >= k).mean()) for k in ks)


def predict(
    models: Module | Sequence[Module],
    images: Sequence[np.ndarray],
    test: str = "center",
    *,
    size: int = 224,
    side: int | None = None,
    scales: Sequence[int] | None = None,
    mean: ArrayLike = 0.0,
    scale: ArrayLike = 1.0,
    batch_size: int = 32,
) -> np.ndarray:
    """Class probabilities (N, K) float64: softmax, averaged over the crops of an image and over the networks.

    models      a network, or several with the same classes: an ensemble. They run in evaluation mode, and are left in
                the mode in which they were
    images      N arrays (H, W, 3) uint8, each of its own size
    test        "center"       the central `size` x `size` crop of the image resized to a shorter side of `side`
                "10-crop"      corners, centre and their flips, of the same size (Krizhevsky et al. 2012)
                "multi-scale"  the whole image at each shorter side of `scales`, and its flip (He et al. 2015, 3.4)
    side        None is 256 in proportion to size 224; scales: None is 224, 256, 384, 480, 640 in proportion
    mean, scale x = (image - mean) * scale on the 0-255 scale, as in FolderLoader. Of a mean image (size, size, 3) whole
                images are given its mean colour
    batch_size  crops of one shape that go through a network together

    The papers' networks need no change for whole images. "Fully convolutional" means the linear layer at every position
    of the last feature map, and the scores averaged over positions; the average of a linear function is the function of
    the average, which is what global pooling before the linear layer computes. VGG has no such pooling: ArgumentError.

    Raises ArgumentError for sizes smaller than the crop and other settings out of range, ShapeError or DtypeError for
    images and means that do not fit, before any network runs; NonFiniteError for a probability that is not finite.
    """
    op = "predict"
    networks = [models] if isinstance(models, Module) else list(models)
    kinds = [type(model).__name__ for model in networks]
    fits = networks and all(isinstance(model, Module) for model in networks)
    expect(fits, op, "models must be Modules, at least one", DtypeError, models=kinds)
    checks.choice(op, "test", test, TESTS)
    batch_size = checks.integer(op, "batch_size", batch_size, 1)
    size = checks.integer(op, "size", size, 1)
    side = max(size, round(size * 256 / 224)) if side is None else checks.integer(op, "side", side, 1)
    expect(side >= size, op, "the shorter side must be at least the crop's", ArgumentError, side=side, size=size)
    scales = [round(size * s / 224) for s in SCALES] if scales is None else scales
    scales = [checks.integer(op, "scales", s, 1) for s in scales]
    expect(scales, op, "scales must not be empty", ArgumentError)
    expect(len(images) > 0, op, "there must be at least one image", images=len(images))
    for image in images:
        transforms.check_image(op, image)
    mean, scale = np.asarray(mean, np.float32), np.asarray(scale, np.float32)
    shapes = [(), (3,), (size, size, 3)]
    expect(mean.shape in shapes, op, f"mean must have one of the shapes {shapes}", mean=mean.shape)
    expect(scale.shape in shapes[:2], op, f"scale must have one of the shapes {shapes[:2]}", scale=scale.shape)
    if test == "multi-scale":
        mean = mean.mean(axis=(0, 1)) if mean.ndim == 3 else mean
        for model in networks:
            pools = any(isinstance(module, GlobalAvgPool2d) for module in model.modules())
            rule = "multi-scale needs a network that takes images of any size, by GlobalAvgPool2d"
            expect(pools, op, rule, ArgumentError, model=type(model).__name__)

    total: Any = 0.0
    for which, crops in _batched(_crops(images, test, size, side, scales), batch_size):
        p = _probabilities(networks, (crops.astype(np.float32) - mean) * scale)
        if np.ndim(total) == 0:
            total = np.zeros((len(images), p.shape[1]))
        np.add.at(total, which, p)
    views = {"center": 1, "10-crop": 10, "multi-scale": 2 * len(scales)}[test]
    return total / views


def _crops(images, test, size, side, scales):
    """(number of the image, crop) for every crop."""
    for i, image in enumerate(images):
        if test == "center":
            box = transforms.center_crop(*image.shape[:2], side, size)
            yield i, transforms.resample(image, box, size, size)
        elif test == "10-crop":
            yield from ((i, crop) for crop in transforms.ten_crops(transforms.resize(image, side), size))
        else:
            for s in scales:
                whole = transforms.resize(image, s)
                yield from ((i, whole), (i, whole[:, ::-1]))


def _batched(crops, batch_size) -> Iterator[tuple[list[int], np.ndarray]]:
    """Crops of one shape together, at most `batch_size` of them."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for i, crop in crops:
        group = waiting.setdefault(crop.shape, [])
        group.append((i, crop))
        if len(group) == batch_size:
            yield [i for i, _ in group], np.stack([crop for _, crop in group])
            del waiting[crop.shape]
    for group in waiting.values():
        yield [i for i, _ in group], np.stack([crop for _, crop in group])


def _probabilities(models, x):
    """Softmax (N, K) float64 of a batch, averaged over the models."""
    total: Any = 0.0
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with no_grad():
            for model in models:
                model.eval()
                logits = backend.host(model(tensor(x, device=home_of(model))).data).astype(np.float64)
                expect(np.isfinite(logits).all(), "predict", "the network's outputs must be finite", NonFiniteError)
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                same = np.ndim(total) == 0 or total.shape == p.shape
                expect(same, "predict", "the networks must have the same classes", got=p.shape, before=np.shape(total))
                total = total + p
    finally:
        for module, training in modes:
            module.training = training
    return total / len(models)


class Errors(NamedTuple):
    """What `evaluate` found: mean -log probability of the label, and top-1 and top-5 errors in percent."""

    loss: float
    top1: float
    top5: float


def evaluate(
    models: Module | Sequence[Module], loader: FolderLoader, test: str = "center", batch_size: int = 32
) -> Errors:
    """The errors of `predict` over all images of `loader`, with its size, side, mean and scale.

    With fewer than five classes top-5 is 0. Raises as `predict` and the loader do.
    """
    checks.choice("evaluate", "test", test, TESTS)
    networks = [models] if isinstance(models, Module) else list(models)
    settings: dict[str, Any] = {"size": loader.size, "side": loader.side, "batch_size": batch_size}
    settings |= {"mean": backend.host(loader.mean), "scale": backend.host(loader.scale)}
    sums = np.zeros(3)
    batches: Iterator[tuple[Any, Array]] = loader.epoch() if test == "center" else loader.images()
    for batch, labels in batches:
        labels = backend.host(labels)
        if test == "center":  # the workers have cropped
            p = np.concatenate(
                [_probabilities(networks, batch[i : i + batch_size]) for i in range(0, len(batch), batch_size)]
            )
        else:
            p = predict(networks, batch, test, **settings)
        own = p[np.arange(len(labels)), labels]
        loss = -np.log(np.maximum(own, np.finfo(np.float64).tiny)).mean()
        sums += len(labels) * np.array([loss, *top_k_errors(p, labels, (1, min(5, p.shape[1])))])
    return Errors(*(float(value) for value in sums / len(loader.folder)))
