"""The one random-number generator: Philox4x32-10, counter-based, the same in NumPy, C++ and CUDA.

A number is a pure function of (seed, stream, draw, position), so nothing has to be stored to repeat it: the order
of epoch 7 is draw 7 of the stream "order", the crops of step 1200 are draw 1200 of "augment". The streams are
separate: a dropout layer added to a network does not change the order of the data.

Seed and draw numbers are the process's. Threads that draw at the same time get different draws, but chance says which
thread gets which; a forked child goes on from where its parent was, and draws the same numbers unless seeded anew.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyres.errors import ArgumentError, expect

STREAMS = ("init", "order", "augment", "dropout")

_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def philox(key: int, draw: int, blocks: int) -> np.ndarray:
    """Blocks 0 .. blocks-1 of draw `draw` under the 64-bit `key`: uint32 array of shape (blocks, 4)."""
    block = np.arange(blocks, dtype=np.uint64)
    low, shift = np.uint64(_MASK32), np.uint64(32)
    c0, c1 = block & low, block >> shift
    c2 = np.full_like(block, draw & _MASK32)
    c3 = np.full_like(block, draw >> 32)
    k0, k1 = key & _MASK32, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 numbers in [0, 1), with all 53 bits, from two words of `bits` each."""
    high, low = bits.reshape(-1, 2).T.astype(np.float64)
    return (np.floor(high / 32) * 2.0**26 + np.floor(low / 64)) * 2.0**-53


def _splitmix64(x):
    """Mix a 64-bit integer so that near seeds give far keys (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


class Stream:
    """The numbers of one purpose under one seed; every method is a pure function of the draw number."""

    name: str
    key: int

    def __init__(self, seed: int, name: str) -> None:
        expect(name in STREAMS, "random.Stream", f"name must be one of {', '.join(STREAMS)}", ArgumentError, name=name)
        self.name = name
        self.key = _splitmix64(_splitmix64(_check_seed("random.Stream", seed)) + STREAMS.index(name))

    def bits(self, draw: int, n: int) -> np.ndarray:
        """n uniform uint32 numbers."""
        return philox(self.key, draw, -(-n // 4)).reshape(-1)[:n]

    def uniform(self, draw: int, n: int) -> np.ndarray:
        """n float64 numbers in [0, 1), with all 53 bits."""
        return uniform(self.bits(draw, 2 * n))

    def normal(self, draw: int, n: int) -> np.ndarray:
        """n float64 numbers from N(0, 1) (Box-Muller)."""
        u, v = self.uniform(draw, 2 * n).reshape(2, n)
        return np.sqrt(-2.0 * np.log1p(-u)) * np.cos(2.0 * np.pi * v)

    def permutation(self, draw: int, n: int) -> np.ndarray:
        """The integers 0 .. n-1 in random order, int64."""
        high, low = self.bits(draw, 2 * n).reshape(n, 2).T.astype(np.uint64)
        return np.argsort((high << np.uint64(32)) | low, kind="stable").astype(np.int64)


def _check_seed(op, seed):
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, (bool, np.timedelta64))
    expect(whole and 0 <= seed < 2**64, op, "the seed must be an integer in 0 .. 2**64 - 1", ArgumentError, seed=seed)
    return int(seed)


_seed = 0
_draws = dict.fromkeys(STREAMS, 0)


def manual_seed(seed: int) -> None:
    """Seed everything random, each purpose by a stream of its own.

    Initialisation and dropout start again from their first draw. Data order and augmentation hold no state: a loader
    keeps the seed that is in force when it is made, unless given another, and draws by epoch and step. So a run that
    calls this before anything else repeats its bits, and a dropout layer added to its network changes neither the
    other layers' initial weights nor the order of the data nor their crops.
    Raises ArgumentError unless `seed` is an integer in 0 .. 2**64 - 1.
    """
    global _seed
    _seed = _check_seed("manual_seed", seed)
    _draws.update(dict.fromkeys(STREAMS, 0))


def seed() -> int:
    """The seed in force."""
    return _seed


def next_draw(name: str) -> tuple[Stream, int]:
    """(stream, draw number): the next unused draw of the stream `name`."""
    stream = Stream(_seed, name)
    draw = _draws[name]
    _draws[name] = draw + 1  # right after the reading, with no call between: no other thread gets the same draw
    return stream, draw


def state() -> dict[str, Any]:
    """The generator's whole state as a JSON-able dict; `set_state` goes on from it."""
    return {"seed": _seed, "draws": dict(_draws)}


def set_state(saved: dict[str, Any]) -> None:
    """Go on from what `state` returned. Raises ArgumentError for anything else."""
    global _seed
    valid = isinstance(saved, dict) and set(saved) == {"seed", "draws"} and isinstance(saved["draws"], dict)
    valid = valid and set(saved["draws"]) == set(STREAMS)
    valid = valid and all(type(draw) is int and draw >= 0 for draw in saved["draws"].values())
    expect(valid, "random.set_state", "needs what random.state() returned", ArgumentError, state=saved)
    _seed = _check_seed("random.set_state", saved["seed"])
    _draws.update(saved["draws"])
