"""Softmax cross-entropy, from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinyres.autograd import Function, Tensor
from tinyres.backend import Array, Device
from tinyres.errors import ArgumentError, DeviceError, DtypeError, ShapeError, expect
from tinyres.ops import checks
from tinyres.ops.cast import widened


class CrossEntropy(Function):
    fresh_gradients = True

    def forward(self, logits, labels, smoothing):
        # The gradient costs next to nothing once the softmax is there, so the kernel gives both.
        loss, self.saved = self.kernels.cross_entropy(logits, labels, smoothing)
        return loss

    def backward(self, dy):
        k = self.kernels  # dy is a loss's, float32 beside bfloat16 logits
        return k.cast(k.mul(widened(k, self.saved), dy), self.saved.dtype)


def cross_entropy(logits: Tensor, labels: Tensor | Array | Sequence[int], label_smoothing: float = 0.0) -> Tensor:
    """The mean over N of -sum_k target_k log softmax(logits)_k.

    logits  (N, K); bfloat16 ones too give a float32 loss
    labels  (N,) integers in 0 .. K-1: list, NumPy array, or array or Tensor of the logits' device. On a GPU labels
            that lie there already are trusted, as to look at them is to wait: one out of range makes the loss NaN
    label_smoothing  e in [0, 1]: the target is 1 - e + e/K at the label and e/K elsewhere
    Returns a scalar. Raises ShapeError, DtypeError, DeviceError or ArgumentError for what does not fit.
    """
    op = "cross_entropy"
    checks.operands(op, logits=logits)
    checks.rank(op, "logits", logits, "NK")
    N, K = logits.shape
    array = checked_labels(op, labels, N, K, logits.device)
    smoothing = checks.fraction(op, "label_smoothing", label_smoothing, one=True)
    return CrossEntropy.apply(logits, labels=array, smoothing=smoothing)


def checked_labels(op: str, labels: Tensor | Array | Sequence[int], N: int, K: int, device: Device) -> Array:
    """`labels` of N images and K classes, as `cross_entropy` takes them, as an int64 array of the device."""
    array: Any = labels.data if isinstance(labels, Tensor) else labels
    if isinstance(array, (list, tuple)):
        try:
            array = np.asarray(array)
        except ValueError as error:
            raise ShapeError(f"[{op}] labels must be integers, one an image ({error})") from None
    expect(
        isinstance(array, np.ndarray) or device.owns(array),
        op,
        "labels must be an array of the host or on the device of the images",
        DeviceError,
        labels=type(array).__name__,
    )
    expect(array.dtype.kind in "iu", op, "labels must be integers", DtypeError, labels=array.dtype)
    expect(array.shape == (N,), op, "labels must be one an image", images=N, labels=array.shape)
    if isinstance(array, np.ndarray):
        low, high = int(array.min()), int(array.max())
        expect(0 <= low and high < K, op, f"labels must be in 0 .. {K - 1}", ArgumentError, smallest=low, largest=high)
    return device.asarray(array, np.int64)
