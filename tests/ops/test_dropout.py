"""Dropout: the mask is a pure function of seed and draw number, the same on every device."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES, Case, checks_of, normal
from tinyres import ops
from tinyres.backend import random

CASES = [
    Case("half", lambda x: ops.dropout(x, 0.5), normal(5, 17)),
    Case("little", lambda x: ops.dropout(x, 0.1), normal(3, 5, 7)),
    Case("nothing", lambda x: ops.dropout(x, 0.0) * 1, normal(5)),
    Case("evaluation", lambda x: ops.dropout(x, 0.5, training=False) * 1, normal(5)),
    Case("a scalar", lambda x: ops.dropout(x, 0.5), normal()),
    Case("more elements than one chunk of a thread", lambda x: ops.dropout(x, 0.3) * 2, normal(70, 1009)),
    Case("two layers draw different masks", lambda x: ops.dropout(ops.dropout(x, 0.5), 0.5), normal(5, 17)),
]

test_cases = checks_of(CASES)


def _dropped(p, device, n=100_000):
    x = tinyres.tensor(np.ones(n, np.float32), requires_grad=True, device=device)
    y = ops.dropout(x, p)
    y.backward(np.ones(n, np.float32))
    assert np.array_equal(y.numpy(), tinyres.backend.host(x.grad)), "forward and backward must use one mask"
    return y.numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_share_and_scale(p, device):
    y = _dropped(p, device)
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / (1 - p)))}
    assert abs((y == 0).mean() - p) < 0.005  # three standard deviations of the share at p = 0.5
    assert abs(y.mean() - 1) < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_draw_decide_the_mask(device):
    tinyres.manual_seed(3)
    first, second = _dropped(0.5, device), _dropped(0.5, device)
    tinyres.manual_seed(3)
    again = _dropped(0.5, device)
    tinyres.manual_seed(4)
    other = _dropped(0.5, device)
    assert np.array_equal(first, again)
    for different in (second, other):
        assert abs((first == different).mean() - 0.5) < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_a_number_equal_to_p_is_kept(device):
    words = random.Stream(0, "dropout").bits(0, 7) >> 8
    numbers = words / 2**24
    for p in numbers:
        tinyres.manual_seed(0)
        y = ops.dropout(tinyres.tensor(np.ones(7), device=device), float(p))
        assert np.array_equal(y.numpy() != 0, numbers >= p)


def test_devices_agree_to_the_bit():
    masks = []
    for device in DEVICES:
        tinyres.manual_seed(11)
        masks.append(_dropped(0.25, device).tobytes())
    assert len(set(masks)) == 1
