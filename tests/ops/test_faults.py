"""Planted faults: the checks are worth what they catch.

Each op gets mistakes that people make in its gradient, planted in a kernel or in the op's backward, and one element
of each of its gradients made wrong by about one percent. The gradient check must fail on every one of them.
"""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, away_from_zero, distinct, normal, positive
from tinyres import ops
from tinyres.autograd import Function
from tinyres.errors import GradcheckError
from tinyres.ops.conv2d import Conv2dAddReLU
from tinyres.ops.elementwise import Add, Div, Dropout, Exp, Log, Mul, Neg, Sub
from tinyres.ops.head import ClassifierLoss
from tinyres.ops.linear import Linear
from tinyres.ops.loss import CrossEntropy
from tinyres.ops.reduce import Mean, Sum
from tinyres.ops.shape import Concatenate, Pad, Reshape, Transpose

LABELS = np.array([2, 0, 3])
right_add_relu = Conv2dAddReLU.backward
MEAN, VAR = np.array([0.5, -1.0]), np.array([0.5, 2.0])

# One small case an op: what the faults below are planted into.
OPS = {
    "add": Case("add", ops.add, normal(2, 3), normal(3)),
    "sub": Case("sub", ops.sub, normal(2, 3), normal(3)),
    "mul": Case("mul", ops.mul, normal(2, 3), normal(3)),
    "div": Case("div", ops.div, normal(2, 3), positive(3)),
    "pow": Case("pow", ops.pow, positive(2, 3), normal(3)),
    "maximum": Case("maximum", ops.maximum, distinct(2, 3), distinct(3)),
    "neg": Case("neg", ops.neg, normal(5)),
    "exp": Case("exp", ops.exp, normal(5)),
    "log": Case("log", ops.log, positive(5)),
    "sqrt": Case("sqrt", ops.sqrt, positive(5)),
    "sigmoid": Case("sigmoid", ops.sigmoid, normal(5)),
    "tanh": Case("tanh", ops.tanh, normal(5)),
    "relu": Case("relu", ops.relu, away_from_zero(9)),
    "dropout": Case("dropout", ops.dropout, normal(9)),
    "sum": Case("sum", lambda x: ops.sum(x, axis=1), normal(2, 3)),
    "mean": Case("mean", lambda x: ops.mean(x, axis=0), normal(2, 3)),
    "max": Case("max", lambda x: ops.max(x, axis=1), distinct(2, 3)),
    "reshape": Case("reshape", lambda x: ops.reshape(x, (3, 2)), normal(2, 3)),
    "flatten": Case("flatten", ops.flatten, normal(2, 3, 2)),
    "transpose": Case("transpose", lambda x: ops.transpose(x, (1, 2, 0)), normal(3, 3, 3)),
    "getitem": Case("getitem", lambda x: ops.getitem(x, slice(1, 6, 2)), normal(6)),
    "pad": Case("pad", lambda x: ops.pad(x, ((1, 2),)), normal(3)),
    "concatenate": Case("concatenate", lambda *xs: ops.concatenate(xs), normal(2, 2), normal(2, 2)),
    "matmul": Case("matmul", ops.matmul, normal(3, 3), normal(3, 3)),
    "linear": Case("linear", ops.linear, normal(3, 3), normal(3, 3), normal(3)),
    "conv2d": Case(
        "conv2d", lambda x, w, b: ops.conv2d(x, w, b, stride=(2, 1), padding=1),
        normal(1, 4, 2, 2), normal(3, 4, 2, 2), normal(2),
    ),
    "conv2d_relu": Case(
        "conv2d_relu", lambda x, w, b: ops.conv2d_relu(x, w, b, stride=(2, 1), padding=1),
        normal(1, 4, 2, 2), normal(3, 4, 2, 2), normal(2),
    ),
    "conv2d_add_relu": Case(
        "conv2d_add_relu", ops.conv2d_add_relu, normal(1, 3, 3, 2), normal(1, 2, 2, 2), normal(2, 2, 2, 2), normal(2)
    ),
    "max_pool2d": Case("max_pool2d", lambda x: ops.max_pool2d(x, 2), distinct(1, 4, 4, 2)),
    "avg_pool2d": Case("avg_pool2d", lambda x: ops.avg_pool2d(x, 2, 1, 1), normal(1, 3, 3, 2)),
    "global_avg_pool2d": Case("global_avg_pool2d", ops.global_avg_pool2d, normal(2, 2, 3, 2)),
    "batch_norm": Case("batch_norm", ops.batch_norm, normal(5, 2), positive(2), normal(2)),
    "batch_norm_relu": Case("batch_norm_relu", ops.batch_norm_relu, normal(5, 2), positive(2), normal(2)),
    "batch_norm_add_relu": Case(
        "batch_norm_add_relu", ops.batch_norm_add_relu, normal(5, 2), normal(5, 2), positive(2), normal(2)
    ),
    "add_relu": Case("add_relu", ops.add_relu, away_from_zero(9), lambda rng: rng.uniform(-0.05, 0.05, 9)),
    "cross_entropy": Case("cross_entropy", lambda x: ops.cross_entropy(x, LABELS, 0.2), normal(3, 4)),
    "classifier_loss": Case(
        "classifier_loss",
        lambda x, w, b: ops.classifier_loss(x, w, b, LABELS),
        normal(3, 2, 2, 2),
        normal(2, 4),
        normal(4),
    ),
}  # fmt: skip


def _evaluation(op):
    """A case of `op` that uses the running statistics."""
    draws = OPS[op].draws
    return Case(f"{op}, evaluation", lambda *xs: getattr(ops, op)(*xs, MEAN, VAR, training=False), *draws)


def test_every_op_is_here():
    others = {"cast"}  # it has no float64 to be checked in: tests/test_precision.py
    assert set(OPS) == set(ops.__all__) - others == {op for op, *_ in FAULTS}


def _functions(base=Function):
    for cls in base.__subclasses__():
        yield from _functions(cls)
        if cls.__module__.startswith("tinyres.ops."):
            yield cls


@pytest.mark.parametrize("name", OPS)
def test_one_wrong_element_is_found_and_named(name, monkeypatch, rng):
    """Of each input's gradient one element is made wrong by a percent; the report names input and element."""
    case = OPS[name]
    tinyres.gradcheck(case.seeded, case.tensors("cpu"))
    for i, array in enumerate(case.arrays()):
        at = tuple(int(rng.integers(n)) for n in array.shape)
        with monkeypatch.context() as planted:
            for cls in _functions():
                planted.setattr(cls, "backward", _one_wrong(cls.backward, i, at))
            with pytest.raises(GradcheckError) as caught:
                tinyres.gradcheck(case.seeded, case.tensors("cpu"))
        assert f"input {i}, element {at}, analytic" in str(caught.value)


def _one_wrong(right, i, at):
    def backward(self, *dys):
        dxs = right(self, *dys)
        dxs = list(dxs) if isinstance(dxs, tuple) else [dxs]
        dxs[i] = dxs[i].copy()
        dxs[i][at] += 0.01 * (1 + abs(dxs[i][at]))
        return tuple(dxs)

    return backward


def _kernel(name, faulty):
    """Replace a kernel of the device by `faulty(right kernel, *arguments)`."""

    def plant(monkeypatch, device):
        kernels = tinyres.backend.get(device).kernels
        right = getattr(kernels, name)

        def planted(*args, overwrite=False, **kwargs):  # never over dy, which faults look at
            return faulty(right, *args, **kwargs)

        monkeypatch.setattr(kernels, name, planted)

    return plant


def _backward(cls, faulty):
    """Replace a Function's backward by `faulty(node, dy)`."""
    return lambda monkeypatch, device: monkeypatch.setattr(cls, "backward", faulty)


def _scaled(place, factor):
    """Multiply one of a kernel's results (None: its only one)."""

    def faulty(right, *args):
        results = right(*args)
        if place is None:
            return results * factor
        return tuple(r * factor if i == place else r for i, r in enumerate(results))

    return faulty


def _no_mean_term(right, dy, x, *rest):
    """Batch norm's dx without the gradient through the batch's mean."""
    gamma, (mean, inv_std) = rest[0], rest[-2:]
    dx, *others = right(dy, x, *rest)
    masked = dy * (gamma * (x - mean) * inv_std + rest[1] > 0) if len(rest) == 4 else dy
    rows = tuple(range(x.ndim - 1))
    return dx + gamma * inv_std * masked.mean(rows), *others


def _no_variance_term(right, dy, x, gamma, mean, inv_std):
    """Batch norm's dx without the gradient through the batch's variance."""
    dx, dgamma, dbeta = right(dy, x, gamma, mean, inv_std)
    return gamma * inv_std * (dy - dy.mean(0)), dgamma, dbeta


def _unmasked(right, dy, x, y, *rest):
    """A fused backward that forgets the ReLU."""
    return right(dy, x, np.ones_like(y), *rest)


def _never_negative(right, dy, x, gamma, beta, *rest):
    """A fused backward that forgets the ReLU."""
    return right(dy, x, gamma, beta + 1e6, *rest)


def _residual_unmasked(right, dy, *rest):
    dx, _, dgamma, dbeta = right(dy, *rest)
    return dx, dy, dgamma, dbeta


def _swapped_stride(right, dy, other, shape, stride, *rest):
    return right(dy, other, shape, stride[::-1], *rest)


def _overwritten(right, dy, w, x_shape, stride, padding, total):
    dx = right(dy, w, x_shape, stride, padding)
    if total is None:
        return dx
    total[...] = dx
    return total


def _border_doubled(right, dy, *rest):
    """Windows half in the padding divided by the pixels that they hold."""
    factor = np.full_like(dy, 2)
    factor[:, 1:-1, 1:-1] = 1
    return right(dy * factor, *rest)


def _flat_target(right, logits, labels, smoothing):
    """Cross-entropy whose gradient misses the smoothing that its value has."""
    return right(logits, labels, smoothing)[0], right(logits, labels, 0.0)[1]


def _summed_loss(right, logits, labels, smoothing):
    loss, dlogits = right(logits, labels, smoothing)
    return loss, dlogits * len(labels)


def _pooled_twice(right, x, *args):
    """The gradient of an average that is divided by its pixels once more."""
    loss, dx, *others = right(x, *args)
    return loss, dx / (x.shape[1] * x.shape[2]), *others


# Both strides give two steps over either side, so that no size betrays the exchange.
SHORTCUT = Case(
    "beside a shortcut", lambda x, w: ops.conv2d(x, w, padding=1) * x, normal(1, 3, 3, 2), normal(3, 3, 2, 2)
)
STRIDES = Case("strides", lambda x, w: ops.conv2d(x, w, stride=(2, 3)), normal(1, 5, 5, 1), normal(2, 2, 1, 2))

_draws = iter(range(1, 1_000_000))

# (op, what is wrong, how to plant it[, another case])
FAULTS = [
    ("add", "broadcasting takes the first row, not the sum",
     _kernel("sum_to", lambda right, x, s: x.reshape(-1, *s)[0].copy())),
    ("add", "a gradient is missing", _backward(Add, lambda self, dy: (dy, None))),
    ("sub", "sign of b", _backward(Sub, Add.backward)),
    ("mul", "a's factor for b", _backward(Mul, lambda self, dy: (dy * self.saved[0], (dy * self.saved[0]).sum(0)))),
    ("div", "sign of b",
     _backward(Div, lambda self, dy: (dy / self.saved[1], (dy * self.saved[0] / self.saved[1] ** 2).sum(0)))),
    ("pow", "exponent not lowered",
     _kernel("pow_backward", lambda right, dy, a, b, y: (dy * b * y, right(dy, a, b, y)[1]))),
    ("pow", "logarithm forgotten", _kernel("pow_backward", lambda right, dy, a, b, y: (right(dy, a, b, y)[0], dy * y))),
    ("maximum", "both sides get all", _kernel("maximum_backward", lambda right, dy, a, b: (dy.copy(), dy.copy()))),
    ("maximum", "sides exchanged", _kernel("maximum_backward", lambda right, dy, a, b: right(dy, a, b)[::-1])),
    ("neg", "sign", _backward(Neg, lambda self, dy: dy)),
    ("exp", "constant", _backward(Exp, lambda self, dy: dy)),
    ("log", "logarithm for reciprocal", _backward(Log, lambda self, dy: dy / np.log(self.saved))),
    ("sqrt", "factor of two", _kernel("sqrt_backward", _scaled(None, 2))),
    ("sigmoid", "1 - y forgotten", _kernel("sigmoid_backward", lambda right, dy, y: dy * y)),
    ("tanh", "1 - y for 1 - y y", _kernel("tanh_backward", lambda right, dy, y: dy * (1 - y))),
    ("relu", "no mask", _kernel("relu_backward", lambda right, dy, y: dy.copy())),
    ("relu", "mask of dy, not of y", _kernel("relu_backward", lambda right, dy, y: dy * (dy > 0))),
    ("dropout", "another mask",
     _backward(Dropout, lambda self, dy: self.kernels.dropout(dy, self.saved[0], (self.saved[1][0], next(_draws))))),
    ("dropout", "scale forgotten", _backward(Dropout, lambda self, dy: self.kernels.dropout(dy, *self.saved) * 0.5)),
    ("sum", "divided as a mean", _backward(Sum, lambda self, dy: np.repeat(dy[:, None] / 3, 3, axis=1))),
    ("mean", "not divided", _backward(Mean, lambda self, dy: np.repeat(dy[None], 2, axis=0))),
    ("max", "every element gets it", _kernel("max_backward", lambda right, dy, x, y, axes: dy + 0 * x)),
    ("reshape", "columns first", _backward(Reshape, lambda self, dy: dy.reshape(self.saved, order="F"))),
    ("flatten", "columns first", _backward(Reshape, lambda self, dy: dy.reshape(self.saved, order="F"))),
    ("transpose", "not inverted", _backward(Transpose, lambda self, dy: dy.transpose(self.saved))),
    ("getitem", "stride lost", _kernel("scatter", lambda right, dy, s, index: right(dy, s, (slice(1, 4), ...)))),
    ("pad", "off by one",
     _backward(Pad, lambda self, dy: dy[tuple(slice(s.start - 1, s.stop - 1) for s in self.saved)])),
    ("concatenate", "order", _backward(Concatenate, lambda self, dy: (dy[2:], dy[:2]))),
    ("matmul", "transposes forgotten", _kernel("matmul", lambda right, a, b, **transposed: right(a, b))),
    ("linear", "transposes forgotten", _kernel("matmul", lambda right, a, b, **transposed: right(a, b))),
    ("linear", "bias gets the mean",
     _backward(Linear, lambda self, dy: (dy @ self.saved[1].T, self.saved[0].T @ dy, dy.mean(0)))),
    ("conv2d", "stride swapped for x", _kernel("conv2d_backward_input", _swapped_stride), STRIDES),
    ("conv2d", "stride swapped for w", _kernel("conv2d_backward_weight", _swapped_stride), STRIDES),
    ("conv2d", "window turned for x",
     _kernel("conv2d_backward_input", lambda right, dy, w, *rest: right(dy, w[::-1, ::-1], *rest))),
    ("conv2d", "window turned for w",
     _kernel("conv2d_backward_weight", lambda right, *args: right(*args)[::-1, ::-1].copy())),
    ("conv2d", "written over the shortcut's gradient", _kernel("conv2d_backward_input", _overwritten), SHORTCUT),
    ("conv2d", "not added to the shortcut's gradient", _kernel("conv2d_backward_input",
        lambda right, *args: right(*args) if args[5] is None else args[5]), SHORTCUT),
    ("conv2d", "only the first image",
     _kernel("conv2d_backward_weight", lambda right, dy, x, *rest: right(dy[:1], x[:1], *rest)), Case(
        "two images", ops.conv2d, normal(2, 3, 3, 1), normal(2, 2, 1, 2))),
    ("conv2d_relu", "no mask", _kernel("relu_backward", lambda right, dy, y: dy.copy())),
    ("conv2d_relu", "bias gets the mean", _kernel("sum", lambda right, *args: right(*args) / 2)),
    ("conv2d_add_relu", "no mask", _kernel("relu_backward", lambda right, dy, y: dy.copy())),
    ("conv2d_add_relu", "residual without the mask", _backward(
        Conv2dAddReLU, lambda self, dy: (lambda dx, _, dw, db: (dx, dy, dw, db))(*right_add_relu(self, dy)))),
    ("max_pool2d", "first pixel, not the largest",
     _kernel("max_pool2d_backward", lambda right, dy, argmax, *rest: right(dy, argmax * 0, *rest))),
    ("avg_pool2d", "divisor", _kernel("avg_pool2d_backward", _scaled(None, 2))),
    ("avg_pool2d", "padding not counted in the divisor", _kernel("avg_pool2d_backward", _border_doubled)),
    ("global_avg_pool2d", "divisor", _kernel("global_avg_pool2d_backward", _scaled(None, 6))),
    ("batch_norm", "mean term dropped", _kernel("batch_norm_backward", _no_mean_term)),
    ("batch_norm", "variance term dropped", _kernel("batch_norm_backward", _no_variance_term)),
    ("batch_norm", "dgamma not normalised",
     _kernel("batch_norm_backward", lambda right, dy, x, *rest: (right(dy, x, *rest)[0], (dy * x).sum(0), dy.sum(0)))),
    ("batch_norm", "sign of dbeta", _kernel("batch_norm_backward", _scaled(2, -1))),
    ("batch_norm", "evaluation without gamma",
     _kernel("batch_norm_inference_backward", _scaled(0, 0.5)), _evaluation("batch_norm")),
    ("batch_norm_relu", "mean term dropped", _kernel("batch_norm_relu_backward", _no_mean_term)),
    ("batch_norm_relu", "no mask", _kernel("batch_norm_relu_backward", _never_negative)),
    ("batch_norm_relu", "evaluation without a mask",
     _kernel("relu_backward", lambda right, dy, y: dy.copy()), _evaluation("batch_norm_relu")),
    ("batch_norm_add_relu", "no mask", _kernel("batch_norm_add_relu_backward", _unmasked)),
    ("batch_norm_add_relu", "residual without the mask", _kernel("batch_norm_add_relu_backward", _residual_unmasked)),
    ("batch_norm_add_relu", "evaluation without a mask",
     _kernel("relu_backward", lambda right, dy, y: dy.copy()), _evaluation("batch_norm_add_relu")),
    ("add_relu", "no mask", _kernel("relu_backward", lambda right, dy, y: dy.copy())),
    ("cross_entropy", "smoothing missing", _kernel("cross_entropy", _flat_target)),
    ("cross_entropy", "sum for mean", _kernel("cross_entropy", _summed_loss)),
    ("cross_entropy", "upstream gradient ignored", _backward(CrossEntropy, lambda self, dy: self.saved)),
    ("classifier_loss", "divided twice by the pixels", _kernel("classifier", _pooled_twice)),
    ("classifier_loss", "sign of db", _kernel("classifier", _scaled(3, -1))),
    ("classifier_loss", "upstream gradient ignored", _backward(ClassifierLoss, lambda self, dy: tuple(self.saved))),
]  # fmt: skip


# The faults are written in NumPy, so they can be planted where arrays are NumPy's.
@pytest.mark.parametrize("device", [name for name in DEVICES if tinyres.backend.get(name).xp is np])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1]}")
def test_the_check_fails_on(fault, device, monkeypatch):
    op, _, plant, case = fault if len(fault) == 4 else (*fault, OPS[fault[0]])
    tinyres.gradcheck(case.seeded, case.tensors(device))
    plant(monkeypatch, device)
    with pytest.raises(GradcheckError, match="analytic and numeric gradient must agree"):
        tinyres.gradcheck(case.seeded, case.tensors(device))
