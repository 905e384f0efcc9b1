"""What every benchmark shares: medians, a description of the machine, its measured limits, child processes, JSON.

Competitors run in child processes of their own, asked in turn (`Child` here, `serve` there), so that memory allocators
and thread pools do not disturb each other and a slow minute of the machine hits all of them alike.
"""

import ctypes
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# PyTorch's best on a CPU: threads stay on their cores, and (glibc) blocks of up to 32 MiB, the largest threshold that
# glibc takes, stay in the heap instead of being mapped and faulted in anew for every tensor.
THREADS_BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
BLOCKS_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


# figures ------------------------------------------------------------------------------------------------------------


def percentile(values, share):
    """The value below which `share` (0 to 1) of the values lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values, digits=4):
    """Median and 20/80 percentiles of a list of figures, rounded to `digits` significant digits."""
    figures = {"median": statistics.median(values), "p20": percentile(values, 0.2), "p80": percentile(values, 0.8)}
    return {name: float(f"{value:.{digits}g}") for name, value in figures.items()}


def milliseconds(seconds):
    """`spread` of times given in seconds, in ms."""
    return spread([1e3 * s for s in seconds])


def timed(call, repeats, warm_up=1):
    """Seconds of each of `repeats` calls call(i), after `warm_up` untimed ones."""
    for i in range(warm_up):
        call(i)
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return times


def peak_resident_bytes():
    """The largest resident memory of this process so far.

    From VmHWM: `getrusage` would count the memory of the parent at the time of the fork as well.
    """
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


# the machine --------------------------------------------------------------------------------------------------------


def bind(threads):
    """Keep this process on the first `threads` of its CPUs; returns them."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    return cpus


def cpu_model():
    text = pathlib.Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit():
    """The commit of the working tree, with `+` where it has changes; `unknown` outside of git."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command():
    """The command line of this run, absolute paths cut to their last part."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    words[0] = str(pathlib.Path(sys.argv[0]).resolve().relative_to(ROOT))
    return " ".join(["python", *words])


def machine(threads, isa=None):
    """A description of the machine by its kind, not its name."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "isa": isa,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": installed("numpy"),
        "torch": installed("torch"),
    }


FMA_SOURCE = """
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
/* 12 independent chains: more than latency times ports of any CPU at hand, fewer than its registers. */
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
double operations(long rounds) { return 2.0 * 12 * (BYTES / 4) * rounds; }
float multiply_add(long rounds, float scale, float shift) {
  const vec a = scale - (vec){}, b = shift - (vec){};
#define DECLARE(i) vec s##i = b * (float)i;
#define STEP(i) s##i = s##i * a + b;
#define SUM(i) total += s##i;
  EACH(DECLARE)
  for (long r = 0; r < rounds; r++) { EACH(STEP) }
  vec total = {};
  EACH(SUM)
  return total[0];
}
"""
ISA_FLAGS = {"baseline": "-march=x86-64", "avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}


def fma_gflops(threads, isa=None):
    """Measured peak of float32 multiply-adds (2 operations each) in GFLOP/s, by a loop compiled for `isa`."""
    flags = [ISA_FLAGS.get(isa, "-march=native") if platform.machine() == "x86_64" else "-O3"]
    with tempfile.TemporaryDirectory() as folder:
        source, library = f"{folder}/peak.c", f"{folder}/peak.so"
        pathlib.Path(source).write_text(FMA_SOURCE)
        compiler = os.environ.get("CC", "cc")
        flags += ["-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        peak = ctypes.CDLL(library)
    peak.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    peak.multiply_add.restype = ctypes.c_float
    peak.operations.argtypes, peak.operations.restype = [ctypes.c_long], ctypes.c_double
    rounds = 5_000_000
    seconds = _together(threads, lambda _: peak.multiply_add(rounds, 0.999, 0.001), repeats=7)
    return threads * peak.operations(rounds) / seconds / 1e9


def copy_gbs(threads, mebibytes=256):
    """Measured bandwidth of copying large arrays, bytes read plus bytes written, in GB/s."""
    import numpy as np

    n = (mebibytes << 20) // 4 // threads
    pairs = [(np.ones(n, np.float32), np.zeros(n, np.float32)) for _ in range(threads)]
    seconds = _together(threads, lambda i: np.copyto(pairs[i][1], pairs[i][0]), repeats=7)
    return threads * 2 * 4 * n / seconds / 1e9


def _together(threads, work, repeats):
    """The least seconds that `threads` threads need to do work(i) each, the fastest of `repeats` goes."""
    best = float("inf")
    for _ in range(repeats):
        gate = threading.Barrier(threads + 1)

        def run(i, gate=gate):
            gate.wait()
            work(i)
            gate.wait()

        pool = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        for thread in pool:
            thread.start()
        gate.wait()
        start = time.perf_counter()
        gate.wait()
        best = min(best, time.perf_counter() - start)
        for thread in pool:
            thread.join()
    return best


def limits(threads, isa=None):
    """What the machine can do, measured now: the scale on which kernels are judged."""
    return {"fma_gflops": round(fma_gflops(threads, isa), 1), "copy_gbs": round(copy_gbs(threads), 1)}


# competitors in processes of their own ------------------------------------------------------------------------------


def serve(handle):
    """The child's side: answer each JSON line of stdin by handle(request), until stdin ends.

    What libraries print goes to stderr. An exception is the answer {"error": text}, and the end.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer:
            return


class ChildError(RuntimeError):
    """A competitor that failed; the message is its reason."""


class Child:
    """The parent's side of `serve`: a script run as a process, asked by JSON lines."""

    def __init__(self, arguments, environment=None):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, **request):
        """Send one request and wait for its answer; raises ChildError if the child failed."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ChildError("the process ended") from None
        line = self.process.stdout.readline()
        if not line:
            raise ChildError(f"the process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def torch_environment(isa=None):
    """THREADS_BOUND and BLOCKS_KEPT, and PyTorch and oneDNN held to the same instruction set if one is asked for."""
    held = {
        "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    }
    return {**THREADS_BOUND, **BLOCKS_KEPT, **held.get(isa, {})}


# results ------------------------------------------------------------------------------------------------------------


def result(benchmark, threads, isa=None, **fields):
    """A result with everything needed to judge and repeat it."""
    return {
        "benchmark": benchmark,
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine(threads, isa),
        **fields,
    }


def write_json(path, data):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
