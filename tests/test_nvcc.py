"""Where nvcc is found: every CUDA kernel compiles without a warning, and needs what tests/cuda/resources.txt says."""

import shutil

import pytest

import nvcc_resources

COMMITTED = (nvcc_resources.ROOT / "tests/cuda/resources.txt").read_text().splitlines()


def spilling(rows):
    """Kernels whose registers go to memory."""
    return sorted({tuple(row.split()[:3]) for row in rows if row.split()[5] != "0"})


if shutil.which("nvcc"):

    @pytest.fixture(scope="module")
    def rows():
        return nvcc_resources.table()

    def test_no_kernel_spills_more_than_the_table_says(rows):
        assert set(spilling(rows[2:])) <= set(spilling(COMMITTED[2:]))

    def test_resources_are_those_of_the_table(rows):
        """To the register, with the nvcc that the table names; another one has its own ways."""
        if rows[0] == COMMITTED[0]:
            assert rows == COMMITTED, "python tests/nvcc_resources.py > tests/cuda/resources.txt, if it is as meant"


def test_the_table_covers_every_kernel_file():
    named = {row.split()[1] for row in COMMITTED[2:]}
    assert named == {source.name for source in nvcc_resources.SOURCES}
