"""Thousands of hostile calls to everything public (hostile.py): each works like the reference or is refused in the
project's own words, and nothing crashes, hangs or writes where it must not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import hostile
from op_case import DEVICES

PROGRAM = Path(__file__).parent / "hostile.py"
COUNTS = {"cpu": 40_000, "emulated": 6_000}
DEATHS = 5  # after so many the rest can wait
FEW_THREADS = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}  # their stacks count as memory


def run(device, count, progress, program=PROGRAM):
    """How often each name worked and was refused, and all that went wrong, in words."""
    counts, problems, first = {}, [], 0
    while first < count and len(problems) < DEATHS:
        progress.write_bytes(bytes(8))
        command = [sys.executable, str(program), device, str(first), str(count - first), str(progress)]
        done = subprocess.run(command, env=os.environ | FEW_THREADS, capture_output=True, text=True)
        if done.returncode < 0:
            number = int.from_bytes(progress.read_bytes(), "little")
            how = (
                "hangs" if done.returncode == -signal.SIGALRM else f"crashes ({signal.Signals(-done.returncode).name})"
            )
            problems.append(f"{how}: {hostile.described(number, device)}")
            first = number + 1
            continue
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        for name, (worked, refused) in report["counts"].items():
            before = counts.get(name, (0, 0))
            counts[name] = before[0] + worked, before[1] + refused
        problems += [f"{problem}: {hostile.described(number, device)}" for number, problem in report["problems"]]
        break
    return counts, problems


@pytest.mark.parametrize("device", [name for name in COUNTS if name in DEVICES])
def test_hostile_calls(device, tmp_path):
    counts, problems = run(device, COUNTS[device], tmp_path / "progress")
    assert not problems, f"{len(problems)} problems; the first:\n" + "\n".join(problems[:5])
    assert sum(map(sum, counts.values())) >= COUNTS[device]
    one_sided = {name: n for name, n in counts.items() if 0 in n}
    assert not one_sided, f"(worked, refused) must both happen: {one_sided}"


@pytest.mark.parametrize("device", [name for name in COUNTS if name in DEVICES])
def test_everything_public_is_here(device):
    assert set(hostile.targets(device)) == set(hostile.public(device))
