"""The time of one training step of a ResNet, or of inference, beside PyTorch on the same CPU or GPU.

    python benchmarks/train_step.py --model resnet20 --batch-size 128 --against torch --json FILE [--device cuda]
    python benchmarks/train_step.py --model resnet50 --batch-size 16 --inference
    python benchmarks/train_step.py --profile --against none       # by kernel, as shares of the machine's limits
    python benchmarks/train_step.py --busy-core                    # and again with another process on one core

A step is what a user's loop does: forward, loss, backward, SGD with momentum and weight decay, through the public
Python API, with the fused model. On a CPU it is timed a second time without Winograd's algorithm, `ours_direct`, as
PyTorch's convolutions are direct ones. PyTorch runs eager and compiled, both channels_last, with its fused optimizer,
as many threads, bound to the same cores, and a C allocator told to keep its blocks. On a GPU the batches lie there
already, float32 is float32 on both sides (no TF32), and the time is that from step to step, by the GPU's events.
In inference nothing is recorded, and batch norm is folded into the convolutions on both sides; PyTorch's compiler
gets the weights as constants (freezing), which lets it choose their layout and fuse ReLU and addition as well.

Each competitor is a process of its own; they are asked in turn, in rotating order, for a few steps a round, on
batches that rotate. All start from the same weights, so the first losses must agree, and the first loss must come
out again after the timing. `ratio_*` is PyTorch's time over ours: the median over rounds of the ratio within a round.
"""

import argparse
import contextlib
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

import harness
import limits

BATCHES = 8  # rotated: their activations pass through the cache in between
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
# Relative, between the float32 losses of two engines over the first steps: each step multiplies the differences of
# the one before, in a deep network some hundred times. Gradients themselves are compared in tests/test_torch.py.
TOLERANCES = (1e-4, 2e-2, 5e-2)
CIFAR, IMAGENET = (20, 32, 44, 56, 110), (18, 34, 50, 101, 152)  # depths
BUSY_LIMIT = 2.5  # a step beside a busy core may take so many times the one without


def depth_of(model):
    return int(model.removeprefix("resnet"))


def our_model(model):
    import tinyres

    depth = depth_of(model)
    return tinyres.models.cifar_resnet(depth) if depth in CIFAR else tinyres.models.imagenet_resnet(depth)


# competitors: each gives step(i) -> loss (or logits) as an object, value(it) -> float, reset() to the first weights --


class Ours:
    def __init__(self, model, inputs, threads, device, inference, conv="auto"):
        import tinyres
        from tinyres import ops

        tinyres.options(threads=threads, conv=conv)
        tinyres.backend.use(device)
        self.device = tinyres.backend.get()
        self.clock = harness.CupyClock() if device == "cuda" else harness.HostClock()
        plain = our_model(model)
        images, labels = self.device.asarray(inputs["images"]), self.device.asarray(inputs["labels"])
        state = {name.removeprefix("state/"): inputs[name] for name in inputs if name.startswith("state/")}
        plain.load_state_dict(state)
        fused = tinyres.fold_batch_norm(plain) if inference else tinyres.fuse(plain)
        optimizer = tinyres.optim.SGD(plain.parameters(), LR, MOMENTUM, WEIGHT_DECAY)

        def train(i):
            x, t = tinyres.tensor(images[i % BATCHES]), labels[i % BATCHES]
            loss = ops.cross_entropy(fused(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        @tinyres.no_grad()
        def infer(i):
            return fused(tinyres.tensor(images[i % BATCHES]))

        self.step, self.value = (infer, mean_square) if inference else (train, lambda loss: loss.item())
        self.reset = lambda: plain.load_state_dict(state)

    def describe(self):
        from tinyres import _cpu

        return {"isa": None if self.device.name == "cuda" else _cpu.isa(), "threads": _cpu.threads()}

    def peak_device_bytes(self):
        return self.device.xp.get_default_memory_pool().total_bytes()

    def system_allocations(self):
        """Blocks that the engine's allocator has asked of the system so far."""
        from tinyres import _cpu

        return _cpu.memory_stats()["system_allocations"]

    def profile(self, steps):
        """Of a step: ms, calls, operations and bytes of every kernel, by wrapping the kernel table, and ms in all."""
        from tinyres.backend import spec

        kernels, clock = self.device.kernels, self.clock
        plain = {name: getattr(kernels, name) for name in (*spec.MANDATORY, *spec.FUSED)}
        marks, works, depth = {name: [] for name in plain}, {name: [] for name in plain}, 0

        def wrap(name, kernel, counting):
            def measured(*args, **kwargs):
                nonlocal depth
                begin, depth = clock.mark(), depth + 1
                result = kernel(*args, **kwargs)
                depth -= 1
                if depth == 0:  # a kernel that calls another one counts as a whole
                    if counting:
                        works[name].append(work(name, args, kwargs, result))
                    else:
                        marks[name].append((begin, clock.mark()))
                return result

            return measured

        def run_wrapped(count, counting):
            for name, kernel in plain.items():
                setattr(kernels, name, wrap(name, kernel, counting))
            times = harness.timed(self.step, count, clock=clock)
            for name, kernel in plain.items():
                setattr(kernels, name, kernel)
            return times

        whole = statistics.mean(run_wrapped(steps, counting=False))
        run_wrapped(1, counting=True)  # apart, because to count takes time; it runs twice, warm-up included
        table = {}
        for name, pairs in marks.items():
            if pairs:
                seconds = sum(clock.seconds(*pair) for pair in pairs)
                made = len(works[name])
                table[name] = {
                    "ms": 1e3 * seconds / (steps + 1),  # one of them is timed's warm-up
                    "calls": made / 2,
                    "flops": sum(flops for flops, _ in works[name]) / 2,
                    "moved": sum(moved for _, moved in works[name]) / 2,
                }
        return {"step_ms": 1e3 * whole, "kernels": table}


def work(name, args, kwargs, result):
    """Operations of one call that count (convolutions and matrix products), and the bytes of its operands."""
    flops = 0
    if name == "matmul":
        flops = 2 * result.size * args[0].shape[-2 if kwargs.get("transpose_a") else -1]
    elif name in ("conv2d_forward", "conv2d_bias_forward"):
        flops = 2 * result.size * math.prod(args[1].shape[:3])
    elif name == "conv2d_backward_input":
        flops = 2 * args[0].size * math.prod(args[1].shape[:3])
    elif name == "conv2d_backward":
        flops = 4 * args[0].size * math.prod(args[2].shape[:3])
    elif name == "conv2d_backward_weight":
        flops = 2 * args[0].size * math.prod(result.shape[:3])
    return flops, sum(array.nbytes for array in arrays_in((args, result)))


def arrays_in(value):
    """The arrays in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from arrays_in(part)
    elif hasattr(value, "nbytes"):
        yield value


def mean_square(logits):
    array = logits.numpy()
    return float((array.astype(np.float64) ** 2).mean())


class Torch:
    def __init__(self, model, inputs, threads, device, inference, compiled=False):
        import torch
        from torch.nn import functional as F

        from peers.torch_resnet import CifarResNet, ImageNetResNet, load_tinyres

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        device = "cuda" if device == "cuda" else "cpu"
        self.device, self.clock = device, harness.TorchClock() if device == "cuda" else harness.HostClock()
        depth = depth_of(model)
        net = CifarResNet(depth) if depth in CIFAR else ImageNetResNet(depth)
        images = [torch.from_numpy(x).to(device).permute(0, 3, 1, 2) for x in inputs["images"]]  # channels_last
        labels = [torch.from_numpy(t).to(device) for t in inputs["labels"]]
        state = {name.removeprefix("state/"): inputs[name] for name in inputs if name.startswith("state/")}
        load_tinyres(net, state)
        net = net.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

        def loss_of(x, t):
            return F.cross_entropy(net(x), t)

        forward = torch.compile(loss_of) if compiled else loss_of

        def train(i):
            loss = forward(images[i % BATCHES], labels[i % BATCHES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        if inference:
            from torch.fx.experimental.optimization import fuse

            folded = fuse(net.eval()).to(memory_format=torch.channels_last)
            folded = torch.compile(folded, options={"freezing": True}) if compiled else folded

        @torch.no_grad()
        def infer(i):
            return folded(images[i % BATCHES])

        self.step, self.value = (infer, mean_square) if inference else (train, lambda loss: loss.item())
        self.reset = lambda: load_tinyres(net, state)

    def describe(self):
        import torch

        isa = None if self.device == "cuda" else torch.backends.cpu.get_cpu_capability().lower()
        return {"isa": isa, "threads": torch.get_num_threads()}

    def peak_device_bytes(self):
        import torch

        return torch.cuda.max_memory_reserved()

    def system_allocations(self):
        return None  # PyTorch takes from the C allocator and does not count


def competitor(name, *arguments):
    if name in ("ours", "ours_direct"):
        return Ours(*arguments, conv="direct" if name == "ours_direct" else "auto")
    return Torch(*arguments, compiled=name == "torch_compile")


class Server:
    """Answers the parent's requests; the first is `start`, which binds the process before anything is imported."""

    def __init__(self):
        self.steps_done = 0

    def __call__(self, request):
        return getattr(self, request.pop("do"))(**request)

    def start(self, name, model, inputs, threads, device, inference):
        harness.bind(threads)
        with np.load(inputs) as file:
            inputs = dict(file)
        self.engine, self.device = competitor(name, model, inputs, threads, device, inference), device
        losses = [self.engine.value(self.engine.step(i)) for i in range(len(TOLERANCES))]
        return {"losses": losses, **self.engine.describe()}

    def run(self, count):
        """Seconds of `count` steps after an untimed one."""
        before = self.engine.system_allocations()
        first, self.steps_done = self.steps_done, self.steps_done + count
        times = harness.timed(lambda i: self.engine.step(first + i), count, clock=self.engine.clock)
        after = self.engine.system_allocations()
        return {"times": times, "allocations": None if before is None else after - before}

    def profile(self, count):
        return self.engine.profile(count)

    def finish(self):
        peak = {"peak_resident_mib": harness.peak_resident_bytes()}
        if self.device == "cuda":
            peak["peak_device_mib"] = self.engine.peak_device_bytes()
        last = self.engine.value(self.engine.step(self.steps_done))
        self.engine.reset()
        peak = {name: round(size / 2**20) for name, size in peak.items()}
        return {"peak": peak, "last": last, "again": self.engine.value(self.engine.step(0))}


# the measurement ----------------------------------------------------------------------------------------------------


def write_inputs(path, model, batch_size, inference):
    """The weights and batches that every competitor starts from."""
    import tinyres

    tinyres.manual_seed(0)
    net = our_model(model)
    side, classes = (32, 10) if depth_of(model) in CIFAR else (224, 1000)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCHES, batch_size, side, side, 3), np.float32)
    labels = rng.integers(0, classes, (BATCHES, batch_size))
    if inference:  # statistics that fit the weights, as after training: those of one batch
        norms = [module for module in net.modules() if isinstance(module, tinyres.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with tinyres.no_grad():
            net(tinyres.tensor(np.resize(images[0], (8, *images.shape[2:]))))
    np.savez(path, images=images, labels=labels, **{f"state/{name}": array for name, array in net.state_dict().items()})


def check(condition, text):
    if not condition:
        raise SystemExit(f"train_step: {text}")


def close(a, b, tolerance):
    return math.isfinite(a) and abs(a - b) <= tolerance * max(1.0, abs(b))


def measure(args, folder):
    inputs = str(pathlib.Path(folder) / "inputs.npz")
    write_inputs(inputs, args.model, args.batch_size, args.inference)
    names = ["ours"]
    if args.device == "cpu":
        names.append("ours_direct")  # as PyTorch computes them: the like-for-like comparison
    if args.against == "torch":
        names += ["torch_eager", "torch_compile"]
    children, started, failed = {}, {}, {}
    for name in names:
        if name in ("ours", "ours_direct"):
            environment = {"TINYRES_CPU_ISA": args.isa} if args.isa else {}
        else:
            environment = {**harness.torch_environment(args.isa), "OMP_NUM_THREADS": str(args.threads)}
            # A cache of this run alone: one that was filled under another instruction set gives wrong results
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(pathlib.Path(folder) / "compiled")
        children[name] = harness.Child([__file__, "--serve"], environment)
        try:
            started[name] = children[name].ask(
                do="start",
                name=name,
                model=args.model,
                inputs=inputs,
                threads=args.threads,
                device=args.device,
                inference=args.inference,
            )
        except harness.ChildError as error:
            check(name == "torch_compile", f"{name} failed: {error}")
            failed[name] = str(error)  # a compiler may be missing at run time: the rest still counts
            children.pop(name).close()
    for name, answer in started.items():
        for loss, own, tolerance in zip(answer["losses"], started["ours"]["losses"], TOLERANCES, strict=True):
            check(
                close(loss, own, tolerance),
                f"losses differ: {name} {answer['losses']}, ours {started['ours']['losses']}",
            )

    rounds, allocations = run_rounds(children, args)
    busy = {}
    if args.busy_core:
        with busy_core(max(os.sched_getaffinity(0))):
            busy, _ = run_rounds(children, args)

    competitors = {}
    for name, child in children.items():
        end = child.ask(do="finish")
        check(math.isfinite(end["last"]), f"{name}: the loss is {end['last']} after the timing")
        check(
            close(end["again"], started[name]["losses"][0], TOLERANCES[0]),
            f"{name}: the first loss did not come out again",
        )
        competitors[name] = {
            "ms": harness.milliseconds(rounds[name]),
            "images_per_second": round(args.batch_size / statistics.median(rounds[name])),
            **end["peak"],
            "first_loss": started[name]["losses"][0],
            "isa": started[name]["isa"],
        }
        if busy:
            slower = statistics.median(busy[name]) / statistics.median(rounds[name])
            competitors[name]["busy_core"] = {"ms": harness.milliseconds(busy[name]), "slower": round(slower, 2)}
    competitors["ours"]["system_allocations_while_timed"] = allocations
    profile = children["ours"].ask(do="profile", count=args.steps * 2) if args.profile else None
    for child in children.values():
        child.close()
    competitors.update({name: {"failed": reason} for name, reason in failed.items()})
    ratios = {
        f"ratio_{name.removeprefix('torch_')}": harness.spread(
            [peer / own for peer, own in zip(rounds[name], rounds["ours"], strict=True)]
        )
        for name in rounds
        if name != "ours"
    }
    return competitors, ratios, profile


def run_rounds(children, args):
    """By competitor, the median seconds of a step in each round, in turn; and blocks that ours asked of the system."""
    rounds, allocations = {name: [] for name in children}, 0
    for r in range(-1, args.rounds):  # round -1 warms every process up once more
        order = list(children)
        order = order[r % len(order) :] + order[: r % len(order)]
        for name in order:
            answer = children[name].ask(do="run", count=args.steps)
            if r >= 0:
                rounds[name].append(statistics.median(answer["times"]))
                allocations += answer["allocations"] or 0
    return rounds, allocations


@contextlib.contextmanager
def busy_core(cpu):
    """Another process spins on this CPU for as long as the block lasts."""
    spin = f"import os\nos.sched_setaffinity(0, [{cpu}])\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def print_profile(profile, limits):
    """Kernels by their time; each as a share of the limit that it should come up to: arithmetic or memory."""
    peak, copy = 1e9 * limits["fma_gflops"], 1e9 * limits["copy_gbs"]
    whole = profile["step_ms"]
    rows, calls = profile["kernels"], sum(row["calls"] for row in profile["kernels"].values())
    print(f"\nlimits: {limits['fma_gflops']:.0f} GFLOP/s, copy {limits['copy_gbs']:.0f} GB/s (more comes from caches)")
    print(f"{'kernel':34} {'ms':>8} {'calls':>6} {'share':>6} {'rate':>14} {'of limit':>9}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ms"]):
        seconds = row["ms"] / 1e3
        arithmetic = row["flops"] / peak > row["moved"] / copy
        rate = (
            f"{row['flops'] / seconds / 1e9:6.0f} GFLOP/s"
            if arithmetic
            else f"{row['moved'] / seconds / 1e9:6.0f} GB/s"
        )
        share = max(row["flops"] / peak, row["moved"] / copy) / seconds
        print(f"{name:34} {row['ms']:8.3f} {row['calls']:6.0f} {row['ms'] / whole:6.1%} {rate:>14} {share:9.0%}")
    rest = whole - sum(row["ms"] for row in rows.values())
    print(
        f"{'Python and everything else':34} {rest:8.3f} {calls:6.0f} {rest / whole:6.1%}   "
        f"{1e3 * rest / calls:.1f} us a call"
    )
    print(f"{'step':34} {whole:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=["cpu", "emulated", "cuda"], default="cpu", help="emulated: tiny sizes only"
    )
    parser.add_argument("--model", choices=[f"resnet{depth}" for depth in CIFAR + IMAGENET], default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--inference", action="store_true", help="forward alone, batch norm folded, nothing recorded")
    parser.add_argument("--against", choices=["torch", "none"], default="torch")
    parser.add_argument("--threads", type=int, default=None, help="default: every CPU of this process")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--isa", choices=list(limits.ISA_FLAGS), help="hold every competitor to this instruction set")
    parser.add_argument("--profile", action="store_true", help="split our step by kernel, beside the machine's limits")
    parser.add_argument(
        "--busy-core", action="store_true", help=f"again with one core taken: ours at most {BUSY_LIMIT} times slower"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        harness.serve(Server())
        return
    harness.require(args.device)
    args.threads = len(harness.bind(args.threads or 1 << 16))

    with tempfile.TemporaryDirectory() as folder:
        competitors, ratios, profile = measure(args, folder)
    for name, row in competitors.items():
        if "failed" in row:
            print(f"{name:14} failed: {row['failed']}")
            continue
        peak = row.get("peak_device_mib", row["peak_resident_mib"])
        ms, ratio = row["ms"], ratios.get(f"ratio_{name.removeprefix('torch_')}")
        beside = f"   {ratio['median']:.2f} times our time" if ratio else ""
        print(
            f"{name:14} {ms['median']:8.2f} ms ({ms['p20']:.2f} to {ms['p80']:.2f})   "
            f"{row['images_per_second']:6} images/s   {peak:5} MiB{beside}"
        )
        if "busy_core" in row:
            print(
                f"{'':14} {row['busy_core']['ms']['median']:8.2f} ms beside a busy core: {row['busy_core']['slower']}x"
            )
    isa = competitors["ours"]["isa"]
    measured = limits.measure(args.device, args.threads, isa) if profile or args.json else None
    if profile:
        print_profile(profile, measured)
    if args.json:
        fields = {"model": args.model, "inference": args.inference, "batch_size": args.batch_size}
        fields.update(rounds=args.rounds, steps=args.steps)
        fields.update({name: ratio["median"] for name, ratio in ratios.items()})
        spreads = {f"{name}_spread": ratio for name, ratio in ratios.items()}
        report = harness.result("train_step", args.threads, isa, args.device, **fields, **spreads, limits=measured)
        harness.write_json(args.json, {**report, "competitors": competitors, "profile": profile})
    if args.busy_core:
        slower = competitors["ours"]["busy_core"]["slower"]
        check(slower <= BUSY_LIMIT, f"a busy core makes our step {slower} times slower; allowed {BUSY_LIMIT}")


if __name__ == "__main__":
    main()
