"""The CUDA sources without a GPU: that the emulation (csrc/cuda/compat) computes what CUDA promises and still notices
every kind of mistake that it is there to find, and that every kernel is right in every order of its threads.

Each C++ program is built plain; where TINYRES_SANITIZE is set (`make sanitize`), for AddressSanitizer with
UndefinedBehaviorSanitizer and for ThreadSanitizer instead."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATION = {
    "compat_test": "tests/cuda/compat_test.cu",
    "emulation_test": "tests/cuda/emulation_test.cpp",
    "fragments_test": "tests/cuda/fragments_test.cu",
    "planted_bugs": "tests/cuda/planted_bugs.cu",
}
KERNELS = {source.stem: f"tests/cuda/{source.stem}_test.cu" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
del KERNELS["table"]  # no kernels of its own
KERNELS["fused_blocks"] = "tests/cuda/fused_blocks_test.cu"
PROGRAMS = {**EMULATION, **KERNELS}
SANITIZE = "TINYRES_SANITIZE" in os.environ
if SANITIZE:
    BUILDS = {
        "address": ["-O1", "-g1", "-fsanitize=address,undefined"],
        "thread": ["-O1", "-g1", "-fsanitize=thread"],
    }
else:
    BUILDS = {
        "plain": ["-O2"],
        "ucontext": ["-O2", "-DTINYRES_UCONTEXT"],  # for the emulation only
    }
SCHEDULES = ["forward", "reverse", "random:1", "random:2", "random:3"]
SEEDS = [f"random:{seed}" for seed in range(20)]


class Found(NamedTuple):
    """How a bug shows: in a plain run by schedule, and in each sanitizer's own report when threads run forward."""

    forward: str = "ok"
    reverse: str = "ok"
    random: str = "ok"  # for each of 20 seeds
    address: str | None = None
    undefined: str | None = None
    thread: bool | None = False  # None: may or may not


WRONG = Found("wrong", "wrong", "wrong")
ERROR = Found("error", "error", "error")
BUGS = {
    "reduction_barrier": WRONG._replace(thread=True),
    "tree_barrier": WRONG._replace(reverse="ok", thread=True),
    "tile_second_barrier": WRONG._replace(thread=True),
    "copy_barrier_after_wait": WRONG._replace(address="use-after-poison", thread=True),
    "copy_barrier_before_refill": WRONG._replace(address="use-after-poison", thread=True),
    "copy_wait": ERROR._replace(address="use-after-poison"),
    "syncwarp": WRONG._replace(thread=True),
    "shared_count": Found(thread=True),
    "sum_of_blocks": Found(thread=True),
    "threadfence": Found(thread=True),
    "unwritten_shared": WRONG,
    "half_warp_shuffle": ERROR,
    "two_barriers": ERROR,
    "early_return": ERROR,
    "past_static": Found(address="heap-buffer-overflow", undefined="out of bounds"),
    "past_dynamic": Found(address="heap-buffer-overflow", thread=None),
    "past_raw": Found(undefined="out of bounds"),
    "misaligned": Found(undefined="misaligned"),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    common = ["-x", "c++", "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    common += ["-Icsrc", "-Itests/cuda"]

    def compile_program(job):
        (program, source), (build, flags) = job
        output = folder / f"{program}.{build}"
        command = [os.environ.get("CXX", "g++"), *common, *flags, source, "-o", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (program, build), output

    jobs = [
        (program, build)
        for build in reversed(BUILDS.items())
        for program in PROGRAMS.items()
        if program[0] in EMULATION or build[0] != "ucontext"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_program, jobs))


@pytest.fixture(scope="module")
def fixed_addresses():
    """ThreadSanitizer cannot cope with much address-space randomisation, which not every container lets us turn off."""
    command = ["setarch", platform.machine(), "-R"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return command if allowed else []


@pytest.fixture(scope="module")
def run(programs, fixed_addresses):
    def run(program, build, *arguments, **environment):
        environment = {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
            "UBSAN_OPTIONS": "print_stacktrace=0",
            "TSAN_OPTIONS": "halt_on_error=1",
            **environment,
        }
        inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        command = [*(fixed_addresses if build == "thread" else []), programs[program, build], *arguments]
        return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=300)

    return run


def outcomes(text):
    """{(name, schedule): ok | wrong | error}"""
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    return {(name, schedule): outcome.split(":")[0] for name, schedule, outcome in lines}


# By program and build, the orders of threads that it must be right in. The sanitizers are slow, and ThreadSanitizer
# sees a race in whatever order the threads run.
ORDERS = {
    (program, build): {"address": ["forward", "random:1"], "thread": ["random:1"]}.get(build, SCHEDULES)
    for build in BUILDS
    for program in ("compat_test", "emulation_test", "fragments_test", *KERNELS)
    if build != "ucontext" or program in EMULATION
}


@pytest.fixture(scope="module")
def finished(run):
    """The runs of all of these, one process a core, as an emulated program has but one thread.

    {(program, build): list of (schedule, the finished process)}
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            (program, build): [(s, pool.submit(run, program, build, TINYRES_SCHEDULE=s)) for s in schedules]
            for (program, build), schedules in ORDERS.items()
        }
        return {key: [(schedule, done.result()) for schedule, done in each] for key, each in runs.items()}


@pytest.mark.parametrize("program, build", ORDERS)
def test_program(finished, program, build):
    for schedule, done in finished[program, build]:
        assert done.returncode == 0, f"{schedule}: {done.stdout}{done.stderr}"
        assert "runtime error" not in done.stderr, done.stderr


@pytest.mark.parametrize("build", BUILDS)
def test_kernels_without_bugs_are_clean(run, build):
    done = run("planted_bugs", build, "correct", "all", *SCHEDULES)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert outcomes(done.stdout) == {(name, schedule): "ok" for name in BUGS for schedule in SCHEDULES}


@pytest.mark.skipif(SANITIZE, reason="only without sanitizers")
@pytest.mark.parametrize("build", ["plain", "ucontext"])
def test_bugs_in_a_plain_run(run, build):
    done = run("planted_bugs", build, "bug", "all", "forward", "reverse", *SEEDS)
    expected = {}
    for name, found in BUGS.items():
        expected[name, "forward"] = found.forward
        expected[name, "reverse"] = found.reverse
        expected.update({(name, seed): found.random for seed in SEEDS})
    assert outcomes(done.stdout) == expected


if SANITIZE:

    @pytest.mark.parametrize("bug", BUGS)
    def test_bug_under_address_and_undefined(run, bug):
        report = run("planted_bugs", "address", "bug", bug, "forward").stderr
        address = re.search(r"ERROR: AddressSanitizer: (\S+)", report)
        assert (address and address[1]) == BUGS[bug].address, report
        undefined = re.findall(r"runtime error: (.*)", report)
        if BUGS[bug].undefined is None:
            assert not undefined, report
        else:
            assert any(BUGS[bug].undefined in line for line in undefined), report

    @pytest.mark.parametrize("bug", [bug for bug in BUGS if BUGS[bug].thread is not None])
    def test_bug_under_thread(run, bug):
        report = run("planted_bugs", "thread", "bug", bug, "forward").stderr
        assert ("ThreadSanitizer: data race" in report) == BUGS[bug].thread, report

    def test_reports_name_the_line_of_the_kernel(run):
        """Also where the access is the emulation's own: a copy belongs to the kernel that asked for it."""
        for build, bug in (("address", "copy_wait"), ("thread", "copy_barrier_before_refill"), ("thread", "syncwarp")):
            report = run("planted_bugs", build, "bug", bug, "forward").stderr
            kernel = "swap_neighbours" if bug == "syncwarp" else "pipeline"
            assert re.search(rf"{kernel}.* \S*planted_bugs\.cu:\d+", report), report


def gdb_works():
    """Not every container lets a debugger trace."""
    if not shutil.which("gdb"):
        return False
    done = subprocess.run(["gdb", "-q", "-batch", "-ex", "run", "true"], capture_output=True, text=True, timeout=60)
    return "exited normally" in done.stdout


if not SANITIZE and gdb_works():

    def test_the_debugger_session_of_the_readme(tmp_path):
        """The commands that csrc/README.md shows stop in the thread that they name."""
        lines = [line.strip() for line in (ROOT / "csrc/README.md").read_text().splitlines()]
        build = next(line for line in lines if line.startswith("g++") and " -g " in line).split()
        subprocess.run([*build[:-1], tmp_path / build[-1]], cwd=ROOT, check=True)
        commands = [line.removeprefix("(gdb) ") for line in lines if line.startswith("(gdb) ")]
        arguments = [word for command in commands for word in ("-ex", command)]
        session = ["gdb", "-q", "-batch", *arguments, tmp_path / build[-1]]
        done = subprocess.run(session, capture_output=True, text=True, timeout=120)
        assert "naive_forward<float>" in done.stdout and "{x = 3, y = 0, z = 0}" in done.stdout, done.stdout
