"""Batches of a step that is counted on the device: the bits of data.Loader's."""

import ml_dtypes
import numpy as np
import pytest

from op_case import DEVICES
from tinyres import data
from tinyres.backend.random import Stream

BF16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
SEED = 11


def loader(device, shuffle, augment, batch=4):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (14, 12, 10, 3)).astype(np.uint8), rng.permutation(14)
    mean, scale = rng.uniform(100, 150, (12, 10, 3)), [1 / 64, 1 / 50, 1 / 3]
    return data.Loader(images, labels, batch, SEED, mean, scale, augment=augment, shuffle=shuffle, device=device)


def state(of, epoch, step):
    """(order, counter) on the device of the loader `of`."""
    order = Stream(SEED, "order").permutation(epoch, 14) if of.shuffle else np.arange(14)
    return of.device.asarray(order), of.device.asarray(np.array([step, 0]))


def batch(of, order, counter, n, dtype=FLOAT32):
    arrays = of.images, of.labels, order, counter, of.mean, of.scale
    key, padding = Stream(SEED, "augment").key, 4 if of.augment else None
    return of.device.kernels.augment_step(*arrays, key, of.batch_size, of.steps_per_epoch, n, dtype, padding)


def assert_equal(of, got, want, dtype=np.float32):
    x, labels = (of.device.numpy(a) for a in got)
    want_x, want_labels = (of.device.numpy(a) for a in want)
    assert x.dtype == dtype and x.tobytes() == want_x.astype(dtype).tobytes()
    assert labels.dtype == np.int64 and labels.tolist() == want_labels.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", (False, True))
@pytest.mark.parametrize("shuffle", (False, True))
def test_batches_are_the_loaders(device, augment, shuffle):
    """Two epochs, counted on by the kernel; the last batch is smaller where nothing is shuffled."""
    of = loader(device, shuffle, augment)
    assert of.steps_per_epoch == (3 if shuffle else 4)
    for dtype in (FLOAT32, BF16):
        step = 0
        for epoch in range(2):
            order, counter = state(of, epoch, step)
            for _ in range(of.steps_per_epoch):
                want = of.batch(step)
                assert_equal(of, batch(of, order, counter, len(want[1]), dtype), want, dtype)
                step += 1
                assert of.device.numpy(counter).tolist() == [step, 0]
    assert len(want[1]) == (4 if shuffle else 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", (2**32 - 1, 2**32 + 5, 2**62 + 1, 2**63 - 1))
def test_far_steps(device, step):
    of = loader(device, False, True)
    want = of.batch(step)
    order, counter = state(of, 0, step)
    assert_equal(of, batch(of, order, counter, len(want[1])), want)
    assert of.device.numpy(counter).view(np.uint64).tolist() == [step + 1, 0]


@pytest.mark.parametrize("device", [name for name in DEVICES if name in ("cpu", "emulated")])
def test_what_the_host_can_see_is_checked(device):
    """Indices and the counter too, before anything is written."""
    of = loader(device, False, True)

    def refused(text, order, counter, n=4, **changed):
        given = {"batch_size": 4, "steps_per_epoch": 4, "padding": 4} | changed
        arrays = of.images, of.labels, np.asarray(order), np.asarray(counter), of.mean, of.scale
        before = arrays[3].tobytes()
        plan = given["batch_size"], given["steps_per_epoch"], n, np.float32, given["padding"]
        with pytest.raises(ValueError, match=rf"\[augment_step\] {text}"):
            of.device.kernels.augment_step(*arrays, 1, *plan)
        assert arrays[3].tobytes() == before

    order = np.arange(14)
    for index in (-1, 14):
        refused("order must lie", np.where(order == 5, index, order), [1, 0])
    refused("order must have that many", order, [3, 0])
    refused("counter must", order, [-1, 0])
    refused("counter must", order, [0, 1])
    refused("counter must have shape", order, [0, 0, 0])
    refused("x must have at most", order, [0, 0], 5)
    refused("x must have an element", order, [0, 0], 0)
    refused("each step", order, [0, 0], steps_per_epoch=5)
    refused("each step", order, [0, 0], steps_per_epoch=0)
    refused("padding must", order, [0, 0], padding=-1)
