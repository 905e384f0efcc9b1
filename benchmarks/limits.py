"""What the machine itself can do, measured now: the scale on which kernels and steps are judged.

    python benchmarks/limits.py [--device cpu|cuda] [--threads T] [--json FILE]

On either device: float32 multiply-adds from registers (2 operations each), and the copying of arrays far larger than
any cache (bytes read plus bytes written). On a GPU also the copy by size, the L2 cache, and the cost of a launch:
the time that one kernel with next to no work adds, launched from Python into a stream and replayed from a CUDA graph.
"""

import argparse
import ctypes
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import threading
import time

import harness

# CPU ----------------------------------------------------------------------------------------------------------------

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
    """Measured peak of float32 multiply-adds in GFLOP/s, by a loop compiled for `isa`."""
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
    """Measured bandwidth of copying large arrays in GB/s."""
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


def cpu(threads, isa=None):
    return {"fma_gflops": round(fma_gflops(threads, isa), 1), "copy_gbs": round(copy_gbs(threads), 1)}


# GPU ----------------------------------------------------------------------------------------------------------------

GPU_SOURCE = """
extern "C" {

// 16 independent chains a thread, more than the latency of a multiply-add. The sum is stored so that it is computed.
__global__ void multiply_add(float* y, int rounds, float scale, float shift) {
  float s[16];
#pragma unroll
  for (int i = 0; i < 16; i++) s[i] = shift * (threadIdx.x + i);
  for (int r = 0; r < rounds; r++) {
#pragma unroll
    for (int i = 0; i < 16; i++) s[i] = s[i] * scale + shift;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) sum += s[i];
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Copies n elements (a power of two) `rounds` times, each time from another place; __ldcg reads past the L1, which
// would otherwise have some of them.
__global__ void copy(float4* __restrict__ y, const float4* __restrict__ x, long long n, int rounds) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (int r = 0; r < rounds; r++) {
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
      y[i] = __ldcg(&x[(i + r * 8224LL) & (n - 1)]);
    }
  }
}

__global__ void nothing() {}

}
"""
GPU_FMA_ROUNDS, GPU_LAUNCHES = 20_000, 1000


def gpu():
    """Limits of the current GPU, through CuPy."""
    import cupy

    module = cupy.RawModule(code=GPU_SOURCE)
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    blocks, threads = properties["multiProcessorCount"] * 8, 256

    def seconds(call):
        """Median of ten calls, after two."""
        clock = harness.CupyClock()
        return statistics.median(harness.timed(lambda _: call(), 10, warm_up=2, clock=clock))

    multiply_add, copy, nothing = map(module.get_function, ("multiply_add", "copy", "nothing"))
    y = cupy.empty(blocks * threads, cupy.float32)
    operands = (y, cupy.int32(GPU_FMA_ROUNDS), cupy.float32(0.999), cupy.float32(0.001))
    operations = 2 * 16 * GPU_FMA_ROUNDS * blocks * threads
    fma = operations / seconds(lambda o=operands: multiply_add((blocks,), (threads,), o))

    copies = {}  # by the MiB of one of the two arrays
    for mebibytes in (1, 2, 4, 8, 16, 32, 64, 256, 1024):
        n = mebibytes << 16
        x, y = cupy.ones((n, 4), cupy.float32), cupy.empty((n, 4), cupy.float32)
        rounds = max(1, 1024 // mebibytes)  # of small arrays many, so that the launch does not count
        operands = (y, x, cupy.int64(n), cupy.int32(rounds))
        once = seconds(lambda o=operands: copy((blocks,), (threads,), o)) / rounds
        copies[mebibytes] = 2 * (mebibytes << 20) / once / 1e9
    del x, y, operands
    cupy.get_default_memory_pool().free_all_blocks()  # for those that measure on this GPU next
    l2_mebibytes = properties["l2CacheSize"] / 2**20
    within_l2 = [rate for mebibytes, rate in copies.items() if 2 * mebibytes <= l2_mebibytes / 2]

    return {
        "fma_gflops": round(fma / 1e9, 1),
        "copy_gbs": round(copies[1024], 1),
        "l2_gbs": round(max(within_l2), 1) if within_l2 else None,
        "copy_gbs_by_mib": {str(mebibytes): round(rate, 1) for mebibytes, rate in copies.items()},
        "launch_us": launch_microseconds(lambda: nothing((1,), (1,), ()), seconds),
        "relu_us": launch_microseconds(relu_of_one(cupy), seconds),
    }


def relu_of_one(cupy):
    """tinyres's smallest call, through the kernel table and its allocator."""
    import tinyres

    kernels = tinyres.backend.get("cuda").kernels
    x = cupy.ones(1, cupy.float32)
    return lambda: kernels.relu(x)


def launch_microseconds(call, seconds):
    """What one call() takes of a thousand in a row: launched one by one, and captured in a graph."""
    import cupy

    def thousand():
        for _ in range(GPU_LAUNCHES):
            call()

    stream = cupy.cuda.Stream(non_blocking=True)  # capture is not possible on the default stream
    with stream:
        in_stream = seconds(thousand)
        stream.begin_capture()
        thousand()
        graph = stream.end_capture()
        in_graph = seconds(graph.launch)
    return {"stream": round(1e6 * in_stream / GPU_LAUNCHES, 2), "graph": round(1e6 * in_graph / GPU_LAUNCHES, 2)}


# either -------------------------------------------------------------------------------------------------------------


def measure(device, threads, isa=None):
    """The limits of `device` as a dict; in it at least fma_gflops and copy_gbs."""
    return gpu() if device == "cuda" else cpu(threads, isa)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="default: every CPU of this process")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    harness.require(args.device)
    args.threads = len(harness.bind(args.threads or 1 << 16))
    measured = measure(args.device, args.threads)
    for name, value in measured.items():
        print(f"{name:16} {value}")
    if args.json:
        harness.write_json(
            args.json, {**harness.result("limits", args.threads, device=args.device), "limits": measured}
        )


if __name__ == "__main__":
    main()
