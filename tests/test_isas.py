"""The tests of ops and of Winograd on the instruction sets that this machine has and did not choose: their kernels are
objects of their own, with other vector widths and tiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyres import _cpu

OTHERS = [isa for isa in _cpu.isas() if isa != _cpu.isa()]

# A run within this one has nothing to add, and a machine with one instruction set has no others.
if OTHERS and "TINYRES_CPU_ISA" not in os.environ:

    @pytest.mark.parametrize("isa", OTHERS)
    def test_ops(isa):
        environment = {**os.environ, "TINYRES_CPU_ISA": isa, "TINYRES_HYPOTHESIS": "sanitize"}
        tests = [str(Path(__file__).parent / name) for name in ("ops", "test_winograd.py")]
        others = "not emulated and not reference"  # devices that know no instruction sets
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", others, *tests]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:]
