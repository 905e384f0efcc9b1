"""What every benchmark shares: clocks, medians, a description of the machine, child processes, JSON.

Competitors run in child processes of their own, asked in turn (`Child` here, `serve` there), so that memory allocators
and thread pools do not disturb each other and a slow minute of the machine hits all of them alike.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
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


# A clock has mark(), a moment of the device; seconds(mark, mark) between two; and wait(), until all work is done. Those
# of a GPU also have passed(mark): whether the GPU has got there.


class HostClock:
    def mark(self):
        return time.perf_counter()

    def seconds(self, begin, end):
        return end - begin

    def wait(self):
        pass


class CupyClock:
    def __init__(self):
        import cupy

        self.cuda = cupy.cuda

    def mark(self):
        event = self.cuda.Event()
        event.record()
        return event

    def seconds(self, begin, end):
        return 1e-3 * self.cuda.get_elapsed_time(begin, end)

    def wait(self):
        self.cuda.get_current_stream().synchronize()

    def passed(self, mark):
        return mark.done


class TorchClock:
    def __init__(self):
        import torch

        self.cuda = torch.cuda

    def mark(self):
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin, end):
        return 1e-3 * begin.elapsed_time(end)

    def wait(self):
        self.cuda.current_stream().synchronize()

    def passed(self, mark):
        return mark.query()


def timed(call, repeats, warm_up=1, clock=None):
    """Seconds of each of `repeats` calls call(i) one after the other, after `warm_up` untimed ones.

    On a GPU's clock: from the end of one call's work to the end of the next one's.
    """
    clock = clock or HostClock()
    for i in range(warm_up):
        call(i)
    clock.wait()
    marks = [clock.mark()]
    for i in range(repeats):
        call(i)
        marks.append(clock.mark())
    clock.wait()
    return [clock.seconds(begin, end) for begin, end in zip(marks, marks[1:], strict=False)]


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
    """The commit of the working tree, with `+` where tracked files have changes; `unknown` outside of git."""
    from tinyres import train  # only here: PyTorch's processes, whose memory is measured, do without tinyres

    return train.commit() or "unknown"


def command():
    """The command line of this run, absolute paths cut to their last part."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    words[0] = str(pathlib.Path(sys.argv[0]).resolve().relative_to(ROOT))
    return " ".join(["python", *words])


def machine(threads, isa=None, device="cpu"):
    """A description of the machine by its kind, not its name; with `gpu` in it where the device is one."""
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
        **({"gpu": gpu_description()} if device == "cuda" else {}),
    }


def require(device):
    """End the program in one line where tinyres has no such device here."""
    import tinyres
    from tinyres.errors import DeviceError

    try:
        tinyres.backend.get(device)
    except DeviceError as error:
        raise SystemExit(f"{pathlib.Path(sys.argv[0]).stem}: {error}") from None


def gpu_description():
    """The current GPU, as CuPy and its driver see it."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None

    def cuda_version(number):
        return f"{number // 1000}.{number % 1000 // 10}"

    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_gib": round(properties["totalGlobalMem"] / 2**30),
        "l2_mib": round(properties["l2CacheSize"] / 2**20),
        "driver": driver,
        "cuda_of_driver": cuda_version(runtime.driverGetVersion()),
        "cuda_of_cupy": cuda_version(cupy.cuda.get_local_runtime_version()),
        "cupy": cupy.__version__,
    }


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


def result(benchmark, threads, isa=None, device="cpu", **fields):
    """A result with everything needed to judge and repeat it."""
    return {
        "benchmark": benchmark,
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": device,
        "machine": machine(threads, isa, device),
        **fields,
    }


def write_json(path, data):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
