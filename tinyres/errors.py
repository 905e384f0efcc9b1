"""The project's exceptions, and `expect` and `fail`, the one way that a check is written."""

from __future__ import annotations

from typing import NoReturn


class TinyresError(Exception):
    """Base of every error that tinyres raises on purpose."""


class ShapeError(TinyresError, ValueError):
    """Array shapes, ranks or a window geometry that do not fit the operation."""


class DtypeError(TinyresError, TypeError):
    """An array or argument of the wrong type."""


class DeviceError(TinyresError, RuntimeError):
    """A device that is absent, or arrays of two devices in one operation."""


class ArgumentError(TinyresError, ValueError):
    """A setting outside its range: a rate, an option, a label, a name."""


class GraphError(TinyresError, RuntimeError):
    """A backward sweep that the recorded graph cannot give."""


class DataError(TinyresError, ValueError):
    """A data set that is missing, damaged or not what it claims to be."""


class CheckpointError(TinyresError, ValueError):
    """A checkpoint that cannot be read, or does not fit what it is loaded into."""


class NonFiniteError(TinyresError, ArithmeticError):
    """A NaN or an infinity where training needs a number."""


class OutOfMemoryError(TinyresError, MemoryError):
    """Memory that the system does not give. What was in use is unharmed, and what is smaller may still fit."""


class GradcheckError(TinyresError, AssertionError):
    """An analytic gradient that differs from the finite difference."""


def expect(condition: object, op: str, rule: str, error: type[TinyresError] = ShapeError, **got: object) -> None:
    """Raise `error` unless `condition` holds.

    The message is `[op] rule; got name value, name value`, for example
    `[conv2d] input channels of x and w must agree; got x (8, 32, 32, 3), w (3, 3, 16, 16)`.
    """
    if not condition:
        fail(op, rule, error, **got)


def fail(op: str, rule: str, error: type[TinyresError] = ShapeError, /, **got: object) -> NoReturn:
    """Raise `error` as `expect` does; `if ...: fail(...)` is for checks made in every call of an op, where gathering
    what the message would say costs as much as the op."""
    values = ", ".join(f"{name} {value}" for name, value in got.items())
    raise error(f"[{op}] {rule}" + (f"; got {values}" if got else ""))


def out_of_memory(op: str, doing: str, error: MemoryError) -> NoReturn:
    """Raise OutOfMemoryError in place of `error`, the allocator's, NumPy's or CuPy's, which knows the sizes but not
    what `op` was doing."""
    raise OutOfMemoryError(f"[{op}] out of memory {doing}: {error}") from None
