"""The gradient checker itself: passes what is right, names what is wrong, sees kinks and never hides behind them."""

import re

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import nn, ops
from tinyres.errors import ArgumentError, DtypeError, GradcheckError, TinyresError


def leaf(values, device=None):
    return tinyres.tensor(np.asarray(values, np.float64), requires_grad=True, device=device)


class Square(tinyres.Function):
    """x * x with a gradient that is wrong in one element; `wrong` (a flat index or None) says which."""

    wrong = None

    def forward(self, x):
        self.saved = x
        return x * x

    def backward(self, dy):
        dx = 2 * self.saved * dy
        if self.wrong is not None:
            dx.flat[self.wrong] *= 1.01
        return dx


def planted(element):
    return type("WrongSquare", (Square,), {"wrong": element}).apply


@pytest.mark.parametrize("device", DEVICES)
def test_right_gradients_pass(device, rng):
    x, w, b = (leaf(rng.standard_normal(s), device) for s in ((2, 4, 4, 2), (3, 3, 2, 3), (3,)))
    report = tinyres.gradcheck(lambda x, w, b: ops.conv2d(x, w, b, padding=1).tanh(), (x, w, b))
    outputs = 2 * 4 * 4 * 3
    assert report.checked == (outputs + 1) * (x.size + w.size + b.size)  # the Jacobian, and one row of random upstream
    assert report.redraws == 0
    assert 0 < report.largest_error < 1e-7


def test_a_single_tensor_and_several_outputs(rng):
    x = leaf(rng.standard_normal(5))
    assert tinyres.gradcheck(Square.apply, x).checked == 6 * 5
    assert tinyres.gradcheck(lambda x: (x * x, x.sum()), [x]).checked == 7 * 5
    assert tinyres.gradcheck(lambda x: (x * x, tinyres.tensor(np.ones(2))), [x]).checked == 8 * 5  # one is constant


@pytest.mark.parametrize("element", (0, 3, 5))
def test_a_wrong_element_is_named(element, rng):
    x = leaf(rng.uniform(1, 2, (2, 3)))
    with pytest.raises(GradcheckError) as caught:
        tinyres.gradcheck(lambda a, b: a + planted(element)(b), [leaf(rng.standard_normal((2, 3))), x], seed=7)
    message = str(caught.value)
    assert message.startswith("[gradcheck] analytic and numeric gradient must agree; got input 1, ")
    at = tuple(int(i) for i in np.unravel_index(element, (2, 3)))
    assert f"element {at}, " in message
    assert "seed 7" in message and "tinyres.gradcheck(fn, inputs, seed=7)" in message and "(2, 3), (2, 3)" in message
    analytic, numeric = (float(re.search(rf"{name} ([-+.\de]+)", message)[1]) for name in ("analytic", "numeric"))
    assert abs(numeric - 2 * x.numpy()[at]) < 1e-6
    assert abs(analytic - 1.01 * numeric) < 1e-5


def test_large_inputs_go_through_projections(rng):
    x = leaf(rng.uniform(1, 2, (40, 50)))
    report = tinyres.gradcheck(lambda x: Square.apply(x).sum(), x, projections=5)
    assert report.checked == 5 * 2
    report = tinyres.gradcheck(Square.apply, x, projections=5)  # a large output too: random rows and directions
    assert report.checked == 5 * 5


@pytest.mark.parametrize("element", (0, 777, 1999))
def test_a_wrong_element_of_a_large_input_is_named(element, rng):
    """A projection only says that something is wrong; halving it finds the element."""

    class Wrong(Square):
        def backward(self, dy):
            dx = 2 * self.saved * dy
            dx.flat[element] += 10 * dy.flat[element]
            return dx

    x = leaf(rng.uniform(1, 2, (40, 50)))
    with pytest.raises(GradcheckError, match=re.escape(f"input 0, element ({element // 50}, {element % 50}), ")):
        tinyres.gradcheck(Wrong.apply, x)


def test_a_missing_and_a_nan_gradient_are_wrong(rng):
    class Missing(Square):
        def backward(self, dy):
            return None

    class NotANumber(Square):
        def backward(self, dy):
            return 2 * self.saved * dy + np.array([0, np.nan, 0])

    class Detached(Square):
        @classmethod
        def apply(cls, x):
            return tinyres.tensor(x.data**2)

    x = leaf(rng.uniform(1, 2, 3))
    for function, element in ((Missing, 0), (NotANumber, 1), (Detached, 0)):
        with pytest.raises(GradcheckError, match=rf"input 0, element \({element},\), analytic"):
            tinyres.gradcheck(function.apply, x)


def test_what_ones_would_hide(rng):
    """Softmax sums to one, so through an upstream gradient of ones a gradient of zero looks right."""

    class Softmax(tinyres.Function):
        def forward(self, x):
            return np.exp(x) / np.exp(x).sum()

        def backward(self, dy):
            return np.zeros_like(dy)

    with pytest.raises(GradcheckError):
        tinyres.gradcheck(Softmax.apply, leaf(rng.standard_normal(4)))


def test_an_upstream_gradient_must_enter_linearly(rng):
    class Squared(Square):
        def backward(self, dy):
            return 2 * self.saved * dy * abs(dy)

    with pytest.raises(GradcheckError):
        tinyres.gradcheck(Squared.apply, leaf(rng.uniform(1, 2, 3)))


KINKS = {
    "relu at zero": (ops.relu, [0.0, 1.0, -1.0]),
    "relu within a step of zero": (ops.relu, [1.0, -1.0, 3e-7]),
    "relu a third of a step from zero": (ops.relu, [1.0, -1.0, 1e-6 / 3]),  # halving the step once looks smooth
    "a tie of max": (lambda x: ops.max(x), [2.0, 1.0, 2.0]),
    "a tie of maximum": (lambda x: ops.maximum(x, 1.5), [2.0, 1.0, 1.5]),
    "a tie in a pooling window": (lambda x: ops.max_pool2d(ops.reshape(x, (1, 2, 2, 1)), 2), [1.0, 0.5, 1.0, 0.0]),
    "add_relu": (lambda x: ops.add_relu(x, x), [1.0, 0.0]),
}


@pytest.mark.parametrize("kink", KINKS)
def test_kinks_are_drawn_again_and_counted(kink):
    fn, values = KINKS[kink]
    x = leaf(values)
    report = tinyres.gradcheck(fn, x)
    assert report.redraws >= 1
    assert np.array_equal(x.numpy(), values)


def test_kinks_in_projections(rng):
    values = rng.uniform(0.5, 1, 1000) * rng.choice((-1, 1), 1000)
    values[123] = 0
    report = tinyres.gradcheck(ops.relu, leaf(values))
    assert report.redraws >= 1


def test_kinks_everywhere_are_an_error():
    """A zigzag finer than the step: no redraw helps."""

    class Zigzag(tinyres.Function):
        def forward(self, x):
            return np.abs(x % 7e-7 - 3.5e-7)

        def backward(self, dy):
            return dy

    x = leaf([0.5])
    with pytest.raises(GradcheckError, match="every point drawn lay on a kink; got points 4, .*seed 3"):
        tinyres.gradcheck(Zigzag.apply, x, seed=3, max_redraws=3)
    assert x.numpy() == [0.5]


@pytest.mark.parametrize("values", ([0.0, 1.0], [1e-9, 1.0], [1.0, -1.0], [1e-3, 1e3]))
def test_a_wrong_gradient_is_no_kink(values):
    """Kinks are judged by the values of the function: a wrong gradient fails at, near and far from one."""

    class WrongReLU(tinyres.Function):
        def forward(self, x):
            self.saved = x
            return np.maximum(x, 0)

        def backward(self, dy):
            return dy * np.where(self.saved > 0, 1.01, 0)

    for _ in range(3):
        with pytest.raises(GradcheckError, match="analytic and numeric gradient must agree"):
            tinyres.gradcheck(WrongReLU.apply, leaf(values))


def test_strong_curvature_is_no_kink():
    """A bend of the function that the step resolves must be compared, not drawn again."""
    x = leaf([0.011, 0.02, -0.013])
    assert tinyres.gradcheck(lambda x: 1 / x, x).redraws == 0
    assert tinyres.gradcheck(lambda x: (x * 2000).exp(), leaf([0.001, 0.004])).redraws == 0
    with pytest.raises(GradcheckError):
        tinyres.gradcheck(lambda x: planted(0)(1 / x), x)


def test_large_values_are_checked_at_their_own_scale():
    assert tinyres.gradcheck(lambda x: x * x, leaf([1e6, -3e4, 1e-3]), atol=1e-3).redraws == 0


def test_inputs_and_gradients_are_left_alone(rng):
    x, other = leaf(rng.standard_normal(3)), leaf(rng.standard_normal(3))
    x.grad = before = np.ones(3)
    data, values = x.data, x.numpy().copy()
    tinyres.gradcheck(lambda x: x * other, x)
    assert x.data is data and np.array_equal(data, values)
    assert x.grad is before and np.array_equal(before, np.ones(3))
    assert other.grad is None
    with pytest.raises(GradcheckError):
        tinyres.gradcheck(planted(1), x)
    assert x.data is data and np.array_equal(data, values) and x.grad is before


def test_the_same_seed_does_the_same(rng):
    values = rng.standard_normal(4)
    reports = [tinyres.gradcheck(ops.exp, leaf(values), seed=s) for s in (1, 1, 2)]
    assert reports[0] == reports[1]


def test_weights_of_a_module():
    """Inputs may be reached by closure, as the parameters of a layer are."""
    layer = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()).to(dtype=np.float64)
    x = leaf(np.random.default_rng(0).standard_normal((2, 3, 3, 2)))
    report = tinyres.gradcheck(lambda *_: layer(x), [x, *layer.parameters()])
    assert report.checked > 0


def test_a_whole_residual_unit(rng):
    unit = nn.Residual(
        nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
    )
    for model in (unit.to(dtype=np.float64), tinyres.fuse(nn.Sequential(unit))):
        x = leaf(rng.standard_normal((2, 4, 4, 2)))
        tinyres.gradcheck(lambda *_, model=model, x=x: model(x), [x, *model.parameters()], max_full=40)


BAD = {
    "fn is no function": (3, lambda: leaf([1.0]), {}, DtypeError),
    "no inputs": (ops.exp, lambda: [], {}, ArgumentError),
    "inputs are no list": (ops.exp, lambda: 3, {}, DtypeError),
    "an array": (ops.exp, lambda: [np.ones(3)], {}, DtypeError),
    "float32": (ops.exp, lambda: tinyres.tensor(np.ones(3, np.float32), requires_grad=True), {}, DtypeError),
    "no gradient wanted": (ops.exp, lambda: tinyres.tensor(np.ones(3)), {}, ArgumentError),
    "a result, not a leaf": (ops.exp, lambda: leaf([1.0]) * 2, {}, ArgumentError),
    "the same input twice": (ops.add, lambda: [leaf([1.0])] * 2, {}, ArgumentError),
    "output is an array": (lambda x: x.data, lambda: leaf([1.0]), {}, DtypeError),
    "output is float32": (lambda x: tinyres.tensor(np.ones(1, np.float32)), lambda: leaf([1.0]), {}, DtypeError),
    "output is not finite": (lambda x: x / 0.0, lambda: leaf([1.0]), {}, ArgumentError),
    "output is random": (ops.dropout, lambda: leaf(np.ones(50)), {}, ArgumentError),
    "eps zero": (ops.exp, lambda: leaf([1.0]), {"eps": 0}, ArgumentError),
    "eps not a number": (ops.exp, lambda: leaf([1.0]), {"eps": float("nan")}, ArgumentError),
    "rtol negative": (ops.exp, lambda: leaf([1.0]), {"rtol": -1}, ArgumentError),
    "atol a string": (ops.exp, lambda: leaf([1.0]), {"atol": "small"}, ArgumentError),
    "max_full negative": (ops.exp, lambda: leaf([1.0]), {"max_full": -1}, ArgumentError),
    "no projections": (ops.exp, lambda: leaf([1.0]), {"projections": 0}, ArgumentError),
    "max_redraws a float": (ops.exp, lambda: leaf([1.0]), {"max_redraws": 1.5}, ArgumentError),
    "a negative seed": (ops.exp, lambda: leaf([1.0]), {"seed": -1}, ArgumentError),
}


@pytest.mark.parametrize("how", BAD)
def test_wrong_calls(how):
    fn, inputs, settings, error = BAD[how]
    with pytest.raises(error, match=r"^\[gradcheck\] ") as caught:
        tinyres.gradcheck(fn, inputs(), **settings)
    assert isinstance(caught.value, TinyresError) and not isinstance(caught.value, GradcheckError)
