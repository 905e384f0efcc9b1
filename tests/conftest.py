"""Settings that all tests share. TINYRES_HYPOTHESIS=soak draws many more examples, anew each time; =sanitize few."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import tinyres
from op_case import ABSENT, DEVICES
from tinyres import _cpu

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60, database=None)
settings.register_profile("sanitize", settings.get_profile("ci"), max_examples=10)
settings.register_profile(
    "soak", deadline=None, max_examples=5000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("TINYRES_HYPOTHESIS", "ci"))


def pytest_report_header():
    absent = f"{len(ABSENT)} absent ({', '.join(ABSENT)})" if ABSENT else "none absent"
    return f"tinyres: devices {', '.join(DEVICES)}; {absent}; CPU kernels {_cpu.isa()}"


@pytest.fixture(autouse=True)
def fresh_state():
    """Each test starts from the same seed, device and options, whatever ran before it."""
    tinyres.manual_seed(0)
    tinyres.backend.use("cpu")
    np.random.seed(0)
    with tinyres.options():
        yield
    tinyres.backend.use("cpu")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
