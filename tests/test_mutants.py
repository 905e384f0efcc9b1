"""The table of `make mutation` (tests/mutation): each mutant still fits the code, and its tests are there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "mutation"))

import run as mutation  # noqa: E402
from mutants import MUTANTS, PARTS  # noqa: E402


def test_every_mutant_changes_one_place():
    for part, mutant in MUTANTS:
        count = (ROOT / part.file).read_text().count(mutant.old)
        assert count == 1, f"{part.name}: {mutant.name}: stands {count} times in {part.file}"
        assert mutant.new != mutant.old
    assert len({mutation.key(*each) for each in MUTANTS}) == len(MUTANTS) >= 60


def test_the_tests_that_are_asked_exist():
    selections = {part.tests for part in PARTS} | {part.wider for part in PARTS}
    selections |= {mutant.tests for _, mutant in MUTANTS if mutant.tests}
    for selection in selections:
        words = shlex.split(selection)
        assert "-k" not in words or words.index("-k") == len(words) - 2, selection
        for path in words[: words.index("-k")] if "-k" in words else words:
            assert (ROOT / path).exists(), path


OUTPUT = """
tests/test_a.py::test_one[3-x] PASSED [ 50%]
tests/test_a.py::test_two {end}
"""
SUMMARY = """
=== short test summary info ===
FAILED tests/test_a.py::test_two - AssertionError: no - not so
=== 1 failed, 1 passed in 0.10s ===
"""


@pytest.mark.parametrize(
    "status, output, kind, by",
    [
        (0, OUTPUT.format(end="PASSED [100%]"), "passed", ""),
        (1, OUTPUT.format(end="FAILED [100%]") + SUMMARY, "killed", "tests/test_a.py::test_two"),
        (2, "ERROR tests/test_b.py\n!!! stopping after 1 failures !!!", "killed", "tests/test_b.py"),
        (4, "ImportError while loading conftest", "killed", "import"),
        (-11, OUTPUT.format(end="Fatal Python error: Segmentation fault"), "crash", "tests/test_a.py::test_two"),
    ],
)
def test_what_a_run_of_the_tests_says(status, output, kind, by):
    found = mutation.outcome(status, output, 1.0)
    assert found.kind == kind and re.match(re.escape(by), found.by)
