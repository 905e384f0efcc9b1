"""Run-time choices: the one place for them.

`tinyres.options(threads=1)` applies from here on; as `with tinyres.options(conv="naive"):` it ends with the block.
The choices belong to the current context (`contextvars`), `threads` to the current thread: threads do not see each
other's.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import Any

from tinyres import _cpu, dtypes
from tinyres.errors import ArgumentError, expect

PRECISION = ("float32", "tf32", "bfloat16")
CONV = ("auto", "naive", "direct", "tiled", "winograd", "mma")


@dataclass(frozen=True)
class Options:
    """conv     how convolutions are computed, or auto: the fastest that the device has for the shape, dtype and
             precision.
             On cpu: naive (the readable loops), direct (blocked and vectorised), winograd (a quarter of the products
             for 3x3 windows at stride 1 in float32, docs/winograd.md; direct for all others, and always in float64, so
             that gradient checks stay sharp).
             On cuda and emulated: naive (one thread an output), tiled (a matrix product through shared memory), mma
             (the same on tensor cores, with operands of float32 rounded to tf32; tiled in float64), direct (3x3
             windows, padding 1, stride 1 or 2, of 16, 32 or 64 channels straight from tiles of the image, also on
             tensor cores, operands rounded likewise; mma for all others)
    precision  of what is float32 otherwise; float64 stays float64.
             tf32: convolutions may round what they multiply to 10 bits of mantissa, where the device has tensor cores
             (cuda, emulated); nothing changes elsewhere.
             bfloat16: convolutions, linear layers and matrix products take their inputs in bfloat16, so that all
             activations after the first of them, and their gradients, are bfloat16: half the memory, 8 bits of
             mantissa. Parameters, their gradients, batch norm's statistics and the loss stay float32, and sums run in
             float32. It needs ml_dtypes (pip install 'tinyres[bfloat16]'), and on cuda CuPy 14
    threads  CPU threads; None is OMP_NUM_THREADS where set, else every CPU that this process may use
    """

    conv: str = "auto"
    precision: str = "float32"
    threads: int | None = None

    def __post_init__(self) -> None:
        known = isinstance(self.conv, str) and self.conv in CONV
        expect(known, "options", f"conv must be one of {', '.join(CONV)}", ArgumentError, conv=self.conv)
        known = isinstance(self.precision, str) and self.precision in PRECISION
        rule = f"precision must be one of {', '.join(PRECISION)}"
        expect(known, "options", rule, ArgumentError, precision=self.precision)
        if self.precision == "bfloat16":
            dtypes.bfloat16()
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        valid = self.threads is None or (whole and 1 <= self.threads <= 1024)
        expect(valid, "options", "threads must be None or an integer in 1 .. 1024", ArgumentError, threads=self.threads)


_DEFAULT = Options()
_current = ContextVar("tinyres.options", default=_DEFAULT)


def get() -> Options:
    """The Options in force."""
    return _current.get()


class options:
    """Change options, by name, from here on or for a `with` block.

    Raises ArgumentError for an unknown name or value.
    """

    def __init__(self, **changes: Any) -> None:
        self._before = get()
        names = Options.__dataclass_fields__
        for name in changes:
            expect(name in names, "options", f"the options are {', '.join(names)}", ArgumentError, name=name)
        _apply(replace(self._before, **changes))

    def __enter__(self) -> options:
        return self

    def __exit__(self, *exc: object) -> None:
        _apply(self._before)

    @staticmethod
    def current() -> dict[str, Any]:
        """The options in force as a dict, for records."""
        return asdict(get())


def _apply(chosen):
    _current.set(chosen)
    _cpu.set_threads(chosen.threads or 0)
