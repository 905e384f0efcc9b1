"""The papers' training recipes and those of two well-known reproductions, as records: RECIPES for CIFAR, and IMAGENET.

What a record does not say is the same in all of them: SGD; images cropped and flipped at random; weights drawn from a
normal distribution of variance 2 / fan-in; every parameter decayed, those of batch norm too, as in the reproductions
that match the papers' figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyres import data
from tinyres.errors import ArgumentError, expect
from tinyres.optim import schedules

# Of ImageNet's channels, on the 0-255 scale.
IMAGENET_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
IMAGENET_STD = np.array([58.395, 57.12, 57.375], np.float32)


@dataclass(frozen=True)
class WarmUp:
    """A lower rate at the beginning: for some iterations, or until the training error has fallen below a bound."""

    divisor: float  # of the rate
    iterations: int | None = None
    until_error: float | None = None  # in percent, over about the last hundred batches
    from_depth: int = 0  # only networks of so many layers


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    iterations, epochs  the length, in one of the two
    milestones     shares of the length at which the rate is divided by ten; None for one cycle over the whole run
    normalisation  of images: "pixel_mean" subtracts the mean image, "channel" subtracts each channel's mean and divides
                   by its standard deviation, "imagenet" does so with those of ImageNet
    augmentation   of ImageNet's images, see data.folder.AUGMENTATIONS; CIFAR's are padded by 4 pixels and cropped
    source, departs  where the recipe stands, and what is known to be different here
    """

    source: str
    lr: float
    iterations: int | None = None
    epochs: int | None = None
    milestones: tuple[float, ...] | None = None
    batch_size: int = 128
    nesterov: bool = False
    momentum: float = 0.9
    weight_decay: float = 1e-4
    normalisation: str = "pixel_mean"
    augmentation: str = "scale"
    warm_up: WarmUp | None = None
    departs: str = ""

    def length(self, steps_per_epoch: int) -> int:
        """The recipe's length in iterations."""
        return self.iterations if self.iterations is not None else (self.epochs or 1) * steps_per_epoch

    def limits(self, steps_per_epoch: int, epochs: int | None, iterations: int | None) -> tuple[int, int]:
        """(where a run stops, the length of its schedule), in iterations.

        epochs      another length than the recipe's, or None
        iterations  where it stops in that, if earlier, or None; without `epochs` it may lie behind the recipe's end
        """
        length = self.length(steps_per_epoch) if epochs is None else epochs * steps_per_epoch
        total = length if iterations is None else iterations if epochs is None else min(length, iterations)
        return total, total if self.milestones is None else length  # one cycle is over where the run stops

    def schedule(self, total: int, lr: float | None = None) -> Callable[[int], float]:
        """The rate by iteration in a run of `total` iterations, with its highest rate `lr` (the recipe's)."""
        expect(total >= 1, "recipe", "a run must have at least one iteration", ArgumentError, total=total)
        lr = self.lr if lr is None else lr
        if self.milestones is None:
            return schedules.one_cycle(lr, total)
        return schedules.step_decay(lr, [round(share * total) for share in self.milestones], 0.1)

    def normalise(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mean and scale for data.Loader, from the training images (L, H, W, C) uint8."""
        if self.normalisation == "imagenet":
            return IMAGENET_MEAN, 1 / IMAGENET_STD
        pixel_mean, channel_mean, channel_std = data.statistics(images)
        if self.normalisation == "channel":
            return channel_mean, 1 / channel_std
        return pixel_mean, np.full(images.shape[-1], 1 / 255, np.float32)


EPOCH = 390  # iterations of 128 images in CIFAR's 50,000, without the last partial batch

RECIPES = {
    "quick": Recipe(
        "one cycle up to a rate that only so short a run takes well",
        lr=0.4,
        epochs=8,
        nesterov=True,
        weight_decay=5e-4,
        normalisation="channel",
    ),
    "paper2015": Recipe(
        "He et al. 2015, section 4.2",
        lr=0.1,
        iterations=64_000,
        milestones=(1 / 2, 3 / 4),  # 32k and 48k
        warm_up=WarmUp(10, until_error=80.0, from_depth=110),
        departs="the paper's batch norm sees groups of 64 images, those of one of its two GPUs (--bn-group 64)",
    ),
    "paper2016": Recipe(
        "He et al. 2016, appendix",
        lr=0.1,
        iterations=64_000,
        milestones=(1 / 2, 3 / 4),  # 32k and 48k
        warm_up=WarmUp(10, iterations=400),
        departs="as paper2015",
    ),
    "fb": Recipe(
        "github.com/facebookarchive/fb.resnet.torch, TRAINING.md",
        lr=0.1,
        iterations=164 * EPOCH,
        milestones=(81 / 164, 122 / 164),
        nesterov=True,
        normalisation="channel",
        departs="weights are drawn by fan-out there",
    ),
    "akamaster": Recipe(
        "github.com/akamaster/pytorch_resnet_cifar10",
        lr=0.1,
        iterations=200 * EPOCH,
        milestones=(1 / 2, 3 / 4),
        normalisation="imagenet",
        warm_up=WarmUp(10, iterations=EPOCH, from_depth=110),
        departs="crops have black borders there, here of the mean colour; its warm-up was meant to last an epoch, as"
        " here, but went on to the first milestone (issue 21)",
    ),
}

IMAGENET = {
    "paper2015": Recipe(
        "He et al. 2015, section 3.4",
        lr=0.1,
        epochs=120,  # 600k iterations
        milestones=(1 / 4, 1 / 2),
        batch_size=256,
        departs="the rate falls at a quarter and a half of the length, in the paper where the error stops falling",
    ),
    "paper2016": Recipe(
        "He et al. 2016, appendix",
        lr=0.1,
        epochs=90,
        milestones=(1 / 3, 2 / 3),
        batch_size=256,
        departs="the paper does not say how long it trains after 60 epochs",
    ),
    "fb": Recipe(
        "github.com/facebookarchive/fb.resnet.torch",
        lr=0.1,
        epochs=90,
        milestones=(1 / 3, 2 / 3),
        batch_size=256,
        nesterov=True,
        normalisation="imagenet",
        augmentation="scale-aspect",
        departs="no jitter of brightness, contrast and saturation here; weights are drawn by fan-out there",
    ),
}
