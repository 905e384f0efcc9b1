"""Initial weights, drawn from the random stream "init" (`tinyres.manual_seed`)."""

from __future__ import annotations

import math

import numpy as np

from tinyres.backend import random
from tinyres.errors import expect


def he_normal(shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """N(0, 2 / fan_in), float32: keeps the variance of activations through ReLU layers (He et al. 2015, "Delving
    deep into rectifiers", equation 10)."""
    n = math.prod(shape)
    expect(n < 2**32, "he_normal", "a parameter must have fewer than 2**32 elements", shape=shape)
    stream, draw = random.next_draw("init")
    return (stream.normal(draw, n) * math.sqrt(2 / fan_in)).astype(np.float32).reshape(shape)
