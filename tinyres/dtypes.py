"""Element types. bfloat16, the upper half of a float32, is ml_dtypes': NumPy has none. It is imported where it is asked
for, and not before."""

from __future__ import annotations

import functools

import numpy as np

from tinyres.errors import DtypeError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))  # of parameters, their gradients, statistics and losses


def bfloat16() -> np.dtype:
    """The dtype. Raises DtypeError where ml_dtypes is missing."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise DtypeError(f"[dtype] bfloat16 needs ml_dtypes: pip install 'tinyres[bfloat16]' ({error})") from None
    return np.dtype(ml_dtypes.bfloat16)


@functools.lru_cache(16)  # NumPy takes its time to name a type
def is_bfloat16(dtype: np.dtype) -> bool:
    """Whether it is, in the machine's byte order."""
    return dtype.itemsize == 2 and dtype.name == "bfloat16" and dtype.isnative


def is_floating(dtype: np.dtype) -> bool:
    """Whether an activation may be of it."""
    return dtype in FLOATS or is_bfloat16(dtype)


def wide(dtype: np.dtype) -> np.dtype:
    """What parameters, statistics and the gradients of weights are kept in beside activations of `dtype`."""
    return FLOATS[0] if dtype.itemsize == 2 else dtype
