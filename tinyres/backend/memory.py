"""The allocator of the host: every activation, gradient and scratch buffer is taken here and comes back here.

Blocks return to their size's free list when the last array that views them dies, and are handed out again: a
training loop in its steady state asks the system for nothing. `stats()` counts, so that a test can hold it to that.
The pool itself is csrc/memory.cpp, because kernels take their scratch from it too.
"""

from __future__ import annotations

from tinyres import _cpu

# (shape, dtype) -> an uninitialised dense array, 64-byte aligned. Every output of every op is taken by this.
empty = _cpu.empty


def stats() -> dict[str, int]:
    """Counters as a dict: system_allocations, taken, bytes_in_use, peak_bytes_in_use, bytes_held."""
    return _cpu.memory_stats()


def reset_peak() -> None:
    """Start a new measurement of peak_bytes_in_use."""
    _cpu.memory_reset_peak()


def release() -> None:
    """Give every block that is not in use back to the system."""
    _cpu.memory_release()
