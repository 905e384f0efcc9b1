"""The end of a classifier as one op: global average pooling, a linear layer and softmax cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyres.autograd import Function, Tensor, gradients_in_parts
from tinyres.backend import Array
from tinyres.errors import ArgumentError, DeviceError, DtypeError, ShapeError, expect
from tinyres.ops import checks
from tinyres.ops.cast import lowered, rounded, widened
from tinyres.ops.loss import checked_labels

LIMIT = 11000  # of C + 2 K, as in csrc/kernels.h


class ClassifierLoss(Function):
    fresh_gradients = True

    def forward(self, x, w, b, labels, smoothing, metrics):
        k = self.kernels
        w, b = rounded(k, w, x.dtype), rounded(k, b, x.dtype)  # as in conv2d.py
        if True not in self.needs:
            return k.classifier_inference(x, w, b, labels, smoothing, metrics)
        loss, *self.saved = k.classifier(x, w, b, labels, smoothing, metrics, gradients_in_parts.hold())
        return loss

    def backward(self, dy):
        if self.seeded:
            return tuple(self.saved)
        k = self.kernels
        return tuple([k.cast(k.mul(widened(k, g), dy), g.dtype) for g in self.saved])


def classifier_loss(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    labels: Tensor | Array | Sequence[int],
    label_smoothing: float = 0.0,
    metrics: Array | None = None,
) -> Tensor:
    """cross_entropy(linear(global_avg_pool2d(x), w, b), labels, label_smoothing), forward and backward in one kernel
    where the device has one, with float32 or better in between.

    x        (N, H, W, C)
    w, b     (C, K) and (K,); dtypes as in `conv2d`
    labels, label_smoothing  as in `cross_entropy`
    metrics  None, or a float64 array (4,) of the device, zeros at first, updated in place: added to it are the sum of
             the images' losses, how many images have their largest logit (the first of equals; NaN is larger than any)
             elsewhere than their label says, and how many images there are. The last element is the kernels' own
    C + 2 K is at most 11000, what a block of the kernel can keep: there linear and cross_entropy are better off alone.
    Returns a scalar. Raises ShapeError, DtypeError, DeviceError or ArgumentError for what does not fit.
    """
    op = "classifier_loss"
    checks.beside(op, x=x, w=w, b=b)
    checks.rank(op, "x", x, "NHWC")
    checks.rank(op, "w", w, "CK")
    fits = x.shape[3] == w.shape[0] and b.shape == w.shape[1:]
    expect(fits, op, "channels of x and rows of w must agree, and b be (K,)", x=x.shape, w=w.shape, b=b.shape)
    expect(w.shape[0] + 2 * w.shape[1] <= LIMIT, op, f"C + 2 K must be at most {LIMIT}", w=w.shape)
    array = checked_labels(op, labels, x.shape[0], w.shape[1], x.device)
    smoothing = checks.fraction(op, "label_smoothing", label_smoothing, one=True)
    if metrics is not None:
        given = type(metrics).__name__
        expect(x.device.owns(metrics), op, "metrics must be an array of the device of x", DeviceError, metrics=given)
        expect(metrics.dtype == np.float64, op, "metrics must be float64", DtypeError, metrics=metrics.dtype)
        flags = metrics.flags
        plain = metrics.shape == (4,) and flags.c_contiguous and getattr(flags, "writeable", True)
        expect(plain, op, "metrics must be (4,), dense and writable", ShapeError, metrics=metrics.shape)
        zero = not isinstance(metrics, np.ndarray) or metrics[3] == 0  # to look at a GPU's is to wait
        expect(zero, op, "the last element of metrics must be 0", ArgumentError, metrics=metrics)
    return ClassifierLoss.apply(lowered(x), w, b, labels=array, smoothing=smoothing, metrics=metrics)
