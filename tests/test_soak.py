"""Short forms of the long runs of tests/soak.py, and that they notice what must not be."""

import pytest

import soak
from op_case import DEVICES


def test_training_stays_flat():
    assert [mark["step"] for mark in soak.train(400, every=100)["marks"]] == [100, 400]


def test_the_allocator_keeps_the_sizes_seen_and_no_more():
    soak.vary(400)


if "emulated" in DEVICES:

    def test_the_emulation_gives_everything_back():
        soak.emulate(12)


@pytest.mark.parametrize(
    "name, grown, noticed",
    [("files", 1, True), ("threads", 1, True), ("objects", 100, True), ("objects", 99, False),
     ("resident_mib", 1.1, True), ("resident_mib", 1.0, False), ("pool_mib", 9, False)],
)  # fmt: skip
def test_what_counts_as_flat(name, grown, noticed):
    first = {"step": 100, "resident_mib": 60.0, "pool_mib": 5.0, "files": 4, "threads": 2, "objects": 1000}
    later = {**first, "step": 200, name: first[name] + grown}
    if noticed:
        with pytest.raises(AssertionError, match=f"{name} must not grow"):
            soak.expect_flat([first, later])
    else:
        soak.expect_flat([first, later])
