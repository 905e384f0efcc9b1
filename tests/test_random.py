"""The generator: known answers, the same numbers in C++, independence of streams, state."""

import numpy as np
import pytest

import tinyres
from tinyres import _cpu
from tinyres.backend import random
from tinyres.errors import ArgumentError


def test_known_answers():
    """From the test vectors that the authors of Philox publish: counter and key of zeros, and of ones."""
    assert [f"{v:08x}" for v in random.philox(0, 0, 1)[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    # With draw = 2**64 - 1 the upper counter words are all ones; block 0 keeps the lower ones at zero.
    full = random.philox(2**64 - 1, 2**64 - 1, 2)
    assert len(set(full.reshape(-1).tolist())) == 8


@pytest.mark.parametrize("n", (1, 3, 4, 5, 1027))
def test_numpy_and_cpp_agree(n):
    for key, draw in ((0, 0), (2**64 - 1, 7), (0x123456789ABCDEF0, 2**40 + 3)):
        out = np.empty(n, np.uint32)
        _cpu.philox(out, key, draw)
        assert np.array_equal(out, random.philox(key, draw, -(-n // 4)).reshape(-1)[:n])


def test_distributions():
    stream, n = random.Stream(3, "init"), 200_000
    u, z = stream.uniform(0, n), stream.normal(1, n)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**3).mean()) < 0.05
    assert sorted(stream.permutation(0, 1000)) == list(range(1000))


def test_uniform_numbers_are_all_53_bits_and_never_one(monkeypatch):
    stream = random.Stream(0, "init")
    words = [int(word) for word in stream.bits(7, 200)]
    want = [(high >> 5 << 26 | low >> 6) / 2**53 for high, low in zip(words[::2], words[1::2], strict=True)]
    assert stream.uniform(7, 100).tolist() == want
    monkeypatch.setattr(random.Stream, "bits", lambda self, draw, n: np.full(n, 2**32 - 1, np.uint32))
    assert stream.uniform(0, 1) == 1 - 2**-53


def test_streams_draws_and_seeds_differ():
    first = {
        (seed, name, draw): tuple(random.Stream(seed, name).bits(draw, 4))
        for seed in (0, 1, 2**63)
        for name in random.STREAMS
        for draw in (0, 1)
    }
    assert len(set(first.values())) == len(first)


def test_manual_seed_repeats_initialisation_and_dropout():
    def draw():
        tinyres.manual_seed(11)
        layer = tinyres.nn.Conv2d(3, 4, 3)
        return layer.weight.numpy().copy(), tinyres.ops.dropout(tinyres.tensor(np.ones(50))).numpy()

    for a, b in zip(draw(), draw(), strict=True):
        assert np.array_equal(a, b)


def test_dropout_does_not_shift_other_streams():
    tinyres.manual_seed(4)
    tinyres.ops.dropout(tinyres.tensor(np.ones(5)))
    with_dropout = tinyres.nn.Linear(3, 4).weight.numpy()
    tinyres.manual_seed(4)
    assert np.array_equal(with_dropout, tinyres.nn.Linear(3, 4).weight.numpy())


def test_state_goes_on():
    random.next_draw("dropout")
    saved = random.state()
    _, draw = random.next_draw("dropout")
    tinyres.manual_seed(99)
    random.set_state(saved)
    assert random.next_draw("dropout")[1] == draw and random.seed() == saved["seed"]


@pytest.mark.parametrize("seed", (-1, 2**64, 1.5, "a", None, True, np.timedelta64(1)))
def test_bad_seeds(seed):
    with pytest.raises(ArgumentError):
        tinyres.manual_seed(seed)


def test_bad_names_and_states():
    with pytest.raises(ArgumentError):
        random.Stream(0, "noise")
    with pytest.raises(ArgumentError):
        random.set_state({"seed": 1})
