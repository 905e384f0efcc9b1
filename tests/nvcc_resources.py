"""What nvcc makes of every CUDA kernel: registers, spills, shared memory. The committed table:

    python tests/nvcc_resources.py > tests/cuda/resources.txt

A row stands for all instances of a kernel template; registers and shared memory are those of the hungriest. Spills
are bytes of registers that went to memory, stack is memory of a thread's own: both should be 0.
"""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.stem != "table"]
ARCHITECTURES = ("sm_80", "sm_90a")
COLUMNS = "{:<7} {:<14} {:<36} {:>9} {:>9} {:>6} {:>6} {:>6}"


def release():
    """nvcc's version, on which every figure depends."""
    return re.search(
        r"release \S+ (V\S+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    )[1]


def kernel_name(signature):
    """`f` of `void tinyres::(anonymous namespace)::f<float, 3>(float*)`."""
    name = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.match(r"[\w:]+", name)[0].split("::")[-1]


def rows_of(source, arch):
    """Compiles with warnings as errors. Returns the table's rows of one file, as strings."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-Icsrc"]
        command += ["-cubin", str(source), "-o", f"{folder}/kernels.cubin"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        figures = (
            int(re.search(r"Used (\d+) registers", part)[1]),
            stores + loads,
            stack,
            int(shared[1]) if shared else 0,
        )
        found.setdefault(kernel_name(part), []).append(figures)
    return [
        COLUMNS.format(arch, source.name, name, len(instances), *map(max, zip(*instances, strict=True)))
        for name, instances in sorted(found.items())
    ]


def table():
    jobs = [(source, arch) for arch in ARCHITECTURES for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(lambda job: rows_of(*job), jobs) for row in rows]
    header = COLUMNS.format("arch", "file", "kernel", "instances", "registers", "spills", "stack", "shared")
    return [f"nvcc {release()}", header, *rows]


if __name__ == "__main__":
    print("\n".join(table()))
