"""Every kernel of the table by itself, at the shapes of ResNet-20 and ResNet-50, beside PyTorch.

    python benchmarks/kernels.py [KERNEL ...] [--device cpu|cuda] [--against torch|none] [--json FILE]

KERNEL is a kernel's name or the first words of some (conv2d, batch_norm, add); without any, all are measured, in about
four minutes on two cores. Batches: 128 images of ResNet-20; 16 of ResNet-50, on a GPU 64.

Our kernels are called through the device's kernel table, allocation of the output included, as an op calls them;
beside them the PyTorch operation that does the same, in a process of its own, asked in turn. Inputs rotate through
copies that are larger than any cache together. On a GPU the calls are put in a queue behind other work, so that the
time between two of its events is that of the kernels and not of Python, whoever's they are; a figure where the host
did not get ahead is marked `host`.

GB/s and GFLOP/s count as kernel_cases.py says. The share is of what the machine's limits, measured in the same run,
allow: the least time that either the operations or the bytes need, over the time taken. It may exceed 1 where the
CPU's cache keeps outputs from call to call.

After the timing each kernel computes fresh inputs, and its outputs are compared with PyTorch's, or with the NumPy
reference where PyTorch has no such operation: the sums and 256 elements, which may differ by TOLERANCE of the largest.

Device `emulated` goes the same way with one image and ResNet-20's shapes alone: its times mean nothing.
"""

import argparse
import statistics

import numpy as np

import harness
import limits
from kernel_cases import all_cases, check_complete

TURN = 0.03  # seconds that a competitor is given at a time
ROTATED = 256 << 20  # bytes of inputs, at least: several times a large cache
MOST_SETS = 64  # of inputs, however small
SAMPLE = 256  # elements of each output that are compared
TOLERANCE = 1e-4  # of the sum of magnitudes, and of the largest magnitude in the sample
IMAGES = {"cpu": (128, 16), "emulated": (1, 0), "cuda": (128, 64)}  # of ResNet-20, of ResNet-50


# the two sides ------------------------------------------------------------------------------------------------------


class Ours:
    """Calls of a tinyres device's kernels, on its arrays."""

    def __init__(self, device, threads, conv):
        import tinyres
        from tinyres import _cpu

        tinyres.options(threads=threads, conv=conv)
        self.device = tinyres.backend.get(device)
        self.isa = None if device == "cuda" else _cpu.isa()
        self.clock = harness.CupyClock() if device == "cuda" else harness.HostClock()

    def buffer_filler(self, size):
        buffer = self.device.xp.empty(size, np.uint8)
        return lambda: buffer.data.memset_async(0, size)

    def arrays(self, case, drawn):
        return [self.device.asarray(array) for array in drawn]

    def copies(self, arrays):
        return [array.copy() for array in arrays]

    def call(self, case, arrays):
        return case.ours(self.device.kernels, *arrays)

    def outputs(self, case, arrays):
        """NumPy arrays of one call, in tinyres's layout."""
        return [self.device.numpy(array) for array in as_tuple(self.call(case, arrays))]


class Torch:
    """Calls of PyTorch's operations, float32 in full and in its fastest layout."""

    def __init__(self, device, threads, conv):
        import torch

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        self.torch, self.device = torch, "cuda" if device == "cuda" else "cpu"
        self.isa = None if device == "cuda" else torch.backends.cpu.get_cpu_capability().lower()
        self.clock = harness.TorchClock() if device == "cuda" else harness.HostClock()

    def buffer_filler(self, size):
        return self.torch.empty(size, dtype=self.torch.uint8, device=self.device).zero_

    def arrays(self, case, drawn):
        tensors = []
        for (kind, _), array in zip(case.inputs, drawn, strict=True):
            tensor = self.torch.from_numpy(array)
            if kind == "image":
                tensor = tensor.permute(0, 3, 1, 2)
            elif kind == "weights":
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=self.torch.channels_last)
            tensors.append(tensor.to(self.device))
        return tensors

    def copies(self, tensors):
        return [tensor.clone() for tensor in tensors]  # keeps the layout

    def call(self, case, tensors):
        return case.theirs(self.torch, *tensors)

    def outputs(self, case, tensors):
        arrays = []
        for tensor in as_tuple(self.call(case, tensors)):
            if tensor.ndim == 4 and case.gives:
                tensor = tensor.permute((0, 2, 3, 1) if case.gives == "image" else (2, 3, 1, 0))
            arrays.append(tensor.detach().cpu().numpy())
        return arrays


SIDES = {"ours": Ours, "torch": Torch}


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


# times --------------------------------------------------------------------------------------------------------------


def seconds_a_call(call, clock, fill):
    """Seconds of one call of call(i), from about TURN of them; and whether it is the device's time alone.

    fill  for a GPU: queues some work for it that empties its cache
    """
    once = harness.timed(call, 1, clock=clock)[0]
    count = min(500, max(3, int(TURN / once)))
    if fill is None:
        return statistics.median(harness.timed(call, count, warm_up=0, clock=clock)), True
    return seconds_in_queue(call, min(count, 100), clock, fill)


def seconds_in_queue(call, count, clock, fill, most=512):
    """Seconds of one of `count` calls that a GPU finds in its queue, and whether it did find them there.

    The GPU is kept busy while the host queues the calls. If it reaches the first before the last is queued, it gets
    twice the work, up to `most` fills: a call that waits for the GPU itself can never be queued.
    """
    fills = 8
    while True:
        for _ in range(fills):
            fill()
        begin = clock.mark()
        for i in range(count):
            call(i)
        end = clock.mark()
        ahead = not clock.passed(begin)
        clock.wait()
        if ahead or 2 * fills > most:
            return clock.seconds(begin, end) / count, ahead
        fills *= 2


class Server:
    """One side, in its own process: measures or computes a case when asked."""

    def __call__(self, request):
        return getattr(self, request.pop("do"))(**request)

    def start(self, side, device, threads, conv, images):
        harness.bind(threads)
        self.side = SIDES[side](device, threads, conv)
        self.fill = self.side.buffer_filler(ROTATED) if device == "cuda" else None
        self.cases, self.ready = all_cases(*images), None
        return {"isa": self.side.isa}

    def time(self, number):
        case = self.cases[number]
        if self.ready != number:  # inputs of one case at a time are kept
            self.sets = []
            drawn = case.draw(seed=0)
            sets = min(MOST_SETS, max(2, -(-ROTATED // sum(array.nbytes for array in drawn)))) if drawn else 1
            first = self.side.arrays(case, drawn)
            self.sets, self.ready = [first, *(self.side.copies(first) for _ in range(sets - 1))], number

        def call(i):
            return self.side.call(case, self.sets[i % len(self.sets)])

        seconds, device_alone = seconds_a_call(call, self.side.clock, self.fill)
        return {"seconds": seconds, "device_alone": device_alone}

    def check(self, number, reference=False):
        """A digest of the outputs on fresh inputs; `reference` asks the NumPy reference for it."""
        self.sets, self.ready = [], None
        case, side = self.cases[number], self.side
        if reference:
            side = Ours("reference", None, "auto")
        return {"digests": [digest(y) for y in side.outputs(case, side.arrays(case, case.draw(seed=1)))]}


# checks -------------------------------------------------------------------------------------------------------------


def digest(array):
    """Enough of an array to notice that another one differs."""
    values = array.reshape(-1)
    places = np.random.default_rng(0).integers(0, values.size, SAMPLE)
    return {
        "shape": list(array.shape),
        "sum": float(values.sum(dtype=np.float64)),
        "magnitude": float(np.abs(values).sum(dtype=np.float64)),
        "sample": values[places].tolist(),
    }


def difference(got, want):
    """The largest relative difference between two digests, in sums and samples; inf if the shapes differ."""
    if got["shape"] != want["shape"]:
        return float("inf")
    sample, wanted = np.array(got["sample"]), np.array(want["sample"])
    of_sums = abs(got["sum"] - want["sum"]) / max(want["magnitude"], 1e-30)
    of_elements = np.abs(sample - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    return float(np.nan_to_num(max(of_sums, of_elements), nan=np.inf))


def largest_difference(got, want, name):
    """Over the outputs that both sides give. Ends the program above TOLERANCE: the times of a wrong kernel are void."""
    differences = [difference(*pair) for pair in zip(got["digests"], want["digests"], strict=False)]
    if not differences or max(differences) > TOLERANCE:
        raise SystemExit(f"kernels: {name}: the outputs differ by {differences}")
    return max(differences)


# rows ---------------------------------------------------------------------------------------------------------------


def rates(case, seconds, measured):
    """GB/s, GFLOP/s and the share of the limit that binds."""
    by_memory = case.moved / measured["copy_gbs"] / 1e9
    by_arithmetic = case.flops / measured["fma_gflops"] / 1e9
    return {
        "gbs": float(f"{case.moved / seconds / 1e9:.4g}"),
        "gflops": float(f"{case.flops / seconds / 1e9:.4g}"),
        "flops_per_byte": float(f"{case.flops / case.moved:.4g}"),
        "bound": "arithmetic" if by_arithmetic > by_memory else "memory",
        "share": round(max(by_memory, by_arithmetic) / seconds, 3),
    }


def measure(number, case, ours, theirs, rounds, measured):
    """The row of one case: `ours` and `theirs` are asked in turn; theirs may be None."""
    peer = theirs if theirs and case.theirs else None
    own_times, peer_times, alone = [], [], True
    for _ in range(rounds):
        for child, times in ((ours, own_times), (peer, peer_times)):
            if child:
                answer = child.ask(do="time", number=number)
                times.append(answer["seconds"])
                alone = alone and answer["device_alone"]
    by_reference = peer is None or case.random
    want = ours.ask(do="check", number=number, reference=True) if by_reference else peer.ask(do="check", number=number)
    checked = largest_difference(ours.ask(do="check", number=number), want, case.name)
    ratios = [p / o for p, o in zip(peer_times, own_times, strict=True)] if peer else None
    return {
        "kernel": case.kernel,
        "label": case.label,
        "ms": harness.milliseconds(own_times),
        **rates(case, statistics.median(own_times), measured),
        "torch_ms": harness.milliseconds(peer_times) if peer else None,
        "ratio": round(statistics.median(ratios), 3) if peer else None,
        "device_alone": alone,
        "checked_by": "reference" if by_reference else "torch",
        "difference": float(f"{checked:.2g}"),
    }


def print_row(row):
    ms = row["ms"]
    beside = f"{row['torch_ms']['median']:9.3f} {row['ratio']:5.2f}x" if row["torch_ms"] else ""
    note = "" if row["device_alone"] else " host"
    name = f"{row['kernel']} {row['label']}"
    spread = f"{ms['median']:9.3f} {ms['p20']:9.3f} {ms['p80']:9.3f}"
    print(f"{name:66} {spread} {row['gbs']:7.1f} {row['gflops']:8.1f} {row['share']:6.0%} {beside}{note}", flush=True)


def chosen(names, cases):
    """Numbers of the cases whose kernel is one of `names` or begins with one and an underscore; all without names."""

    def fits(kernel, name):
        return kernel == name or kernel.startswith(f"{name}_")

    for name in names:
        if not any(fits(case.kernel, name) for case in cases):
            raise SystemExit(f"kernels: no kernel is called {name}")
    return [i for i, case in enumerate(cases) if not names or any(fits(case.kernel, name) for name in names)]


def start(side, args, images):
    """The process of one side, and the instruction set that it uses."""
    if side == "ours":
        environment = {"TINYRES_CPU_ISA": args.isa} if args.isa else {}
    else:
        environment = {**harness.torch_environment(args.isa), "OMP_NUM_THREADS": str(args.threads)}
    child = harness.Child([__file__, "--serve"], environment)
    try:
        answer = child.ask(
            do="start", side=side, device=args.device, threads=args.threads, conv=args.conv, images=images
        )
    except harness.ChildError as error:
        hint = "; without PyTorch: --against none" if side == "torch" else ""
        raise SystemExit(f"kernels: {error}{hint}") from None
    return child, answer["isa"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="default: all")
    parser.add_argument("--device", choices=list(IMAGES), default="cpu")
    parser.add_argument("--against", choices=["torch", "none"], default="torch")
    parser.add_argument("--conv", default="auto", help="the option conv: auto, naive, direct; tiled, mma (cuda)")
    parser.add_argument("--threads", type=int, default=None, help="default: every CPU of this process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=list(limits.ISA_FLAGS))
    parser.add_argument("--json", metavar="FILE", help="written anew after every row")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        harness.serve(Server())
        return
    harness.require(args.device)
    args.threads = len(harness.bind(args.threads or 1 << 16))
    images = IMAGES[args.device]
    cases = all_cases(*images)
    check_complete(cases)
    numbers = chosen(args.kernels, cases)

    measured = limits.measure(args.device, args.threads, args.isa)
    ours, isa = start("ours", args, images)
    theirs = start("torch", args, images)[0] if args.against == "torch" else None
    where = f"{args.device}, {args.threads} threads" + (f", {isa}" if isa else "")
    print(f"{where}; limits: {measured['fma_gflops']} GFLOP/s, copy {measured['copy_gbs']} GB/s\n")
    print(f"{'':66} {'ms':>9} {'20 %':>9} {'80 %':>9} {'GB/s':>7} {'GFLOP/s':>8} {'limit':>6} {'PyTorch':>9} ratio")

    head = harness.result("kernels", args.threads, isa, args.device, conv=args.conv)
    result = {**head, "limits": measured, "tolerance": TOLERANCE, "rows": []}
    for number in numbers:
        row = measure(number, cases[number], ours, theirs, args.rounds, measured)
        result["rows"].append(row)
        print_row(row)
        if args.json:
            harness.write_json(args.json, result)
    for child in (ours, theirs):
        if child:
            child.close()


if __name__ == "__main__":
    main()
