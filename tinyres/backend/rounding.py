"""bfloat16 for kernels written in NumPy, whose own arithmetic on it would round at every step."""

import functools

import numpy as np

from tinyres.backend import spec
from tinyres.dtypes import is_bfloat16, wide


def once(name, kernel):
    """The kernel `name`, which on bfloat16 arrays computes in float64 and rounds each result once."""
    if name in ("cast", "sgd", *spec.NORMED):  # told what to round to; without bfloat16, as weights have none; composed
        return kernel

    @functools.wraps(kernel)
    def rounded(*args, **kwargs):
        copies = []  # (array, its float64 copy)

        def copied(value):
            if isinstance(value, np.ndarray) and is_bfloat16(value.dtype):
                copies.append((value, value.astype(np.float64)))
                return copies[-1][1]
            if isinstance(value, (list, tuple)) and any(isinstance(item, np.ndarray) for item in value):
                return [copied(item) for item in value]
            return value

        args, kwargs = [copied(value) for value in args], {key: copied(value) for key, value in kwargs.items()}
        if not copies:
            return kernel(*args, **kwargs)
        dtype = copies[0][0].dtype

        def stored(i, result):
            for array, copy in copies:
                if result is copy:  # updated in place
                    array[...] = copy
                    return array
            if result.dtype.kind != "f":
                return result
            return result.astype(wide(dtype) if i in spec.WIDE.get(name, ()) else dtype, order="C")

        with np.errstate(over="ignore", invalid="ignore"):
            results = kernel(*args, **kwargs)
            if isinstance(results, tuple):
                return tuple([stored(i, result) for i, result in enumerate(results)])
            return stored(0, results)

    return rounded
