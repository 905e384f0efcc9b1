"""Breaks the engine on purpose, one place at a time, and asks the tests whether they notice.

    make mutation                                         all mutants, into benchmarks/results/mutation.json
    python tests/mutation/run.py --list
    python tests/mutation/run.py --only "pool, cpu" "autograd: oldest node first"

Works in a copy of the tree, build/mutation, and never in the tree itself. A test selection counts only if it passes
there without a mutant. Then the mutant is put in, what hangs on its file is compiled anew, and its tests run up to the
first failure: the mutant is killed by that test, by a crash, or by a time-out. Where all pass, so do a wider selection
of its part's tests before it is said to have survived. Tests of speed are never asked. A mutant that does not compile
is a mistake in the table and ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "mutation"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from mutants import MUTANTS, Mutant, Part  # noqa: E402

import harness  # noqa: E402
import report  # noqa: E402
from tinyres import _cpu  # noqa: E402

UNTIMED = ["--ignore=tests/test_speed.py", "--deselect=tests/test_build.py::test_import_costs_at_most_twice_numpy"]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", *UNTIMED]
# No compiled files: Python takes one for current if size and second of the source are the same, as a mutant's may be.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(TREE),
    "PYTHONDONTWRITEBYTECODE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # CMake and Ninja of the environment
}
TARGETS = {"csrc/cpu/": ("_cpu",), "csrc/cuda/": ("_emulated",), "csrc/bindings.h": ("_cpu", "_emulated")}
LEAST_TIMEOUT, TIMES_SLOWER = 30, 5  # seconds, and how much longer than without a mutant: beyond both it hangs


class Outcome(NamedTuple):
    """Of a run of pytest: "passed", "killed", "crash" or "timeout"; the first test that failed; seconds."""

    kind: str
    by: str
    seconds: float


def key(part: Part, mutant: Mutant) -> str:
    return f"{part.name}: {mutant.name}"


def targets(file: str) -> tuple[str, ...]:
    """What has to be built again after a change of `file`."""
    if not file.startswith("csrc/"):
        return ()
    return next((names for start, names in TARGETS.items() if file.startswith(start)), ("_cpu",))


def copy_tree() -> None:
    """Bring the copy up to date. Files that are the same are left alone, so that little has to be built again."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, TREE / name
        if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            target.chmod(source.stat().st_mode)


def configure() -> None:
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={TREE / 'tinyres'}"]
    command = ["cmake", "-S", TREE, "-B", TREE / "build", "-G", "Ninja", "-DTINYRES_CUDA=OFF", *options]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)


def build(names: tuple[str, ...]) -> None:
    command = ["cmake", "--build", TREE / "build", "--target", *names]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"it does not compile:\n{done.stdout[-3000:]}{done.stderr}")


def run_tests(selection: str, timeout: float | None) -> Outcome:
    began = time.perf_counter()
    process = subprocess.Popen(
        [*PYTEST, *shlex.split(selection)],
        cwd=TREE,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the processes that the test has started
        output, _ = process.communicate()
        return Outcome("timeout", last_test(output), time.perf_counter() - began)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return outcome(process.returncode, output, time.perf_counter() - began)


def outcome(status: int, output: str, seconds: float) -> Outcome:
    if status == 0:
        return Outcome("passed", "", seconds)
    if status < 0:
        return Outcome("crash", last_test(output), seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", output, re.MULTILINE)
    return Outcome("killed", failed[1] if failed else "import", seconds)


def last_test(output: str) -> str:
    """The test that was running when the output of `pytest -v` ended."""
    begun = re.findall(r"^(tests/.*?::.*?)(?: (?:PASSED|FAILED|ERROR).*)?$", output, re.MULTILINE)
    return begun[-1].strip() if begun else ""


class Check:
    """The run: keeps which selections pass without a mutant and how long they take, and what is stale in the build."""

    def __init__(self) -> None:
        self.baselines: dict[str, float] = {}
        self.stale: set[str] = {"_cpu", "_emulated"}

    def bring_up_to_date(self) -> None:
        if self.stale:
            build(tuple(sorted(self.stale)))
            self.stale.clear()

    def baseline(self, selection: str) -> float:
        """Seconds that the selection takes without a mutant; the run ends if it does not pass."""
        if selection not in self.baselines:
            self.bring_up_to_date()
            found = run_tests(selection, None)
            if found.kind != "passed":
                raise SystemExit(f"{selection}: fails without a mutant, by {found.by}")
            self.baselines[selection] = found.seconds
        return self.baselines[selection]

    def judge(self, part: Part, mutant: Mutant) -> dict[str, object]:
        file = TREE / part.file
        source = file.read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(f"{key(part, mutant)}: stands {source.count(mutant.old)} times in {part.file}")
        spent = 0.0
        for selection in (mutant.tests or part.tests, part.wider):
            limit = max(LEAST_TIMEOUT, TIMES_SLOWER * self.baseline(selection))
            file.write_text(source.replace(mutant.old, mutant.new))
            self.stale.update(targets(part.file))
            try:
                self.bring_up_to_date()
                found = run_tests(selection, limit)
            finally:
                file.write_text(source)
                self.stale.update(targets(part.file))
            spent += found.seconds
            if found.kind != "passed":
                break
        lives = found.kind == "passed"
        return {
            "part": part.name,
            "name": mutant.name,
            "file": part.file,
            "outcome": "survived" if lives else found.kind,
            **({"reason": mutant.survives} if lives else {"by": found.by}),
            "seconds": round(spent, 1),
            "commit": harness.commit(),
        }


def totals(rows: list[dict[str, object]]) -> dict[str, object]:
    survived = sum(row["outcome"] == "survived" for row in rows)
    share = round(100 * (len(rows) - survived) / max(len(rows), 1), 1)
    return {"mutants": len(rows), "killed": len(rows) - survived, "survived": survived, "killed_percent": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help='parts, or mutants as "PART: NAME"')
    parser.add_argument("--list", action="store_true", help="show the mutants and end")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result to FILE, after every mutant")
    parser.add_argument(
        "--resume", action="store_true", help="keep what FILE has, and leave that out unless it is named"
    )
    args = parser.parse_args()
    if args.resume and not args.json:
        parser.error("--resume needs --json")
    known = {name for part, mutant in MUTANTS for name in (part.name, key(part, mutant))}
    if unknown := set(args.only or ()) - known:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    chosen = [
        (part, mutant)
        for part, mutant in MUTANTS
        if not args.only or part.name in args.only or key(part, mutant) in args.only
    ]
    if args.list:
        print("\n".join(f"{key(part, mutant):90} {part.file}" for part, mutant in chosen))
        return

    rows: dict[str, dict[str, object]] = {}
    if args.resume and args.json.exists():
        rows = {f"{row['part']}: {row['name']}": row for row in json.loads(args.json.read_text())["rows"]}
        if not args.only:
            chosen = [(part, mutant) for part, mutant in chosen if key(part, mutant) not in rows]
    began = time.perf_counter()
    copy_tree()
    configure()
    check = Check()
    for number, (part, mutant) in enumerate(chosen, 1):
        row = rows[key(part, mutant)] = check.judge(part, mutant)
        what = f"{row['outcome']} {row.get('by', '')}".strip()
        print(f"{number}/{len(chosen)} {key(part, mutant)}: {what}, {row['seconds']} s", flush=True)
        ordered = [rows[key(*each)] for each in MUTANTS if key(*each) in rows]
        result = harness.result("mutation", _cpu.threads(), _cpu.isa(), totals=totals(ordered), rows=ordered)
        if args.json:
            harness.write_json(args.json, result)
    print(f"{time.perf_counter() - began:.0f} s")
    if chosen:
        print(report.render([result]))


if __name__ == "__main__":
    main()
