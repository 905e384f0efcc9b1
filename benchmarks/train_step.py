"""The time of one training step of a CIFAR ResNet, beside PyTorch on the same CPU or GPU.

    python benchmarks/train_step.py --depth 20 --batch-size 128 --against torch --json FILE [--device cuda]

A step is what a user's loop does: forward, loss, backward, SGD with momentum and weight decay, through the public
Python API, with the fused model. PyTorch runs eager and compiled, both channels_last, with its fused optimizer, as
many threads, bound to the same cores, and a C allocator told to keep its blocks. On a GPU the batches lie there
already, float32 is float32 on both sides (no TF32), and the time is that from step to step, by the GPU's events.

Each competitor is a process of its own; they are asked in turn, in rotating order, for a few steps a round, on
batches that rotate. All start from the same weights, so the first losses must agree, and the first loss must come
out again after the timing. `ratio_*` is PyTorch's time over ours: the median over rounds of the ratio within a round.
"""

import argparse
import math
import pathlib
import statistics
import tempfile

import numpy as np

import harness
import limits

BATCHES = 8  # rotated: their activations pass through the cache in between
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
TOLERANCE = 1e-3  # relative, between the float32 losses of two engines over the first steps


# competitors: each gives step(i) -> loss as an object, value(loss) -> float, reset() to the first weights ------------


class Ours:
    def __init__(self, depth, inputs, threads, device):
        import tinyres
        from tinyres import ops

        tinyres.options(threads=threads)
        tinyres.backend.use(device)
        self.device = tinyres.backend.get()
        self.clock = harness.CupyClock() if device == "cuda" else harness.HostClock()
        model = tinyres.fuse(tinyres.models.cifar_resnet(depth))
        images, labels = self.device.asarray(inputs["images"]), self.device.asarray(inputs["labels"])
        state = {name.removeprefix("state/"): inputs[name] for name in inputs if name.startswith("state/")}
        optimizer = tinyres.optim.SGD(model.parameters(), LR, MOMENTUM, WEIGHT_DECAY)

        def step(i):
            x, t = tinyres.tensor(images[i % BATCHES]), labels[i % BATCHES]
            loss = ops.cross_entropy(model(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        self.step, self.value = step, lambda loss: loss.item()
        self.reset = lambda: model.load_state_dict(state)
        self.reset()

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
        """ms and calls per step of every kernel, by wrapping the kernel table, and ms of the whole step."""
        from tinyres.backend import spec

        kernels, clock = self.device.kernels, self.clock
        plain = {name: getattr(kernels, name) for name in (*spec.MANDATORY, *spec.FUSED)}
        marks, depth = {name: [] for name in plain}, 0

        def wrap(name, kernel):
            def measured(*args, **kwargs):
                nonlocal depth
                begin, depth = clock.mark(), depth + 1
                result = kernel(*args, **kwargs)
                depth -= 1
                if depth == 0:  # a kernel that calls another one counts as a whole
                    marks[name].append((begin, clock.mark()))
                return result

            return measured

        self.step(0)
        for name, kernel in plain.items():
            setattr(kernels, name, wrap(name, kernel))
        whole = sum(harness.timed(self.step, steps, warm_up=0, clock=clock))
        for name, kernel in plain.items():
            setattr(kernels, name, kernel)
        table = {
            name: {"ms": 1e3 * sum(clock.seconds(*pair) for pair in pairs) / steps, "calls": len(pairs) / steps}
            for name, pairs in marks.items()
            if pairs
        }
        return {"step_ms": 1e3 * whole / steps, "kernels": table}


class Torch:
    def __init__(self, depth, inputs, threads, device, compiled=False):
        import torch
        from torch.nn import functional as F

        from peers.torch_resnet import CifarResNet, load_tinyres

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        device = "cuda" if device == "cuda" else "cpu"
        self.device, self.clock = device, harness.TorchClock() if device == "cuda" else harness.HostClock()
        model = CifarResNet(depth).to(device, memory_format=torch.channels_last)
        images = [torch.from_numpy(x).to(device).permute(0, 3, 1, 2) for x in inputs["images"]]  # channels_last
        labels = [torch.from_numpy(t).to(device) for t in inputs["labels"]]
        state = {name.removeprefix("state/"): inputs[name] for name in inputs if name.startswith("state/")}
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)

        def forward(x, t):
            return F.cross_entropy(model(x), t)

        if compiled:
            forward = torch.compile(forward)

        def step(i):
            loss = forward(images[i % BATCHES], labels[i % BATCHES])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        self.step, self.value = step, lambda loss: loss.item()
        self.reset = lambda: load_tinyres(model, state)
        self.reset()

    def describe(self):
        import torch

        isa = None if self.device == "cuda" else torch.backends.cpu.get_cpu_capability().lower()
        return {"isa": isa, "threads": torch.get_num_threads()}

    def peak_device_bytes(self):
        import torch

        return torch.cuda.max_memory_reserved()

    def system_allocations(self):
        return None  # PyTorch takes from the C allocator and does not count


def competitor(name, depth, inputs, threads, device):
    if name == "ours":
        return Ours(depth, inputs, threads, device)
    return Torch(depth, inputs, threads, device, compiled=name == "torch_compile")


class Server:
    """Answers the parent's requests; the first is `start`, which binds the process before anything is imported."""

    def __init__(self):
        self.steps_done = 0

    def __call__(self, request):
        return getattr(self, request.pop("do"))(**request)

    def start(self, name, depth, inputs, threads, device):
        harness.bind(threads)
        with np.load(inputs) as file:
            inputs = dict(file)
        self.engine, self.device = competitor(name, depth, inputs, threads, device), device
        losses = [self.engine.value(self.engine.step(i)) for i in range(3)]
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


def write_inputs(path, depth, batch_size):
    """The weights and batches that every competitor starts from."""
    import tinyres

    tinyres.manual_seed(0)
    state = tinyres.models.cifar_resnet(depth).state_dict()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCHES, batch_size, 32, 32, 3), np.float32)
    labels = rng.integers(0, 10, (BATCHES, batch_size))
    np.savez(path, images=images, labels=labels, **{f"state/{name}": array for name, array in state.items()})


def check(condition, text):
    if not condition:
        raise SystemExit(f"train_step: {text}")


def close(a, b):
    return math.isfinite(a) and abs(a - b) <= TOLERANCE * max(1.0, abs(b))


def measure(args, folder):
    inputs = str(pathlib.Path(folder) / "inputs.npz")
    write_inputs(inputs, args.depth, args.batch_size)
    names = ["ours"] + (["torch_eager", "torch_compile"] if args.against == "torch" else [])
    children, started, failed = {}, {}, {}
    for name in names:
        if name == "ours":
            environment = {"TINYRES_CPU_ISA": args.isa} if args.isa else {}
        else:
            environment = {**harness.torch_environment(args.isa), "OMP_NUM_THREADS": str(args.threads)}
            # A cache of this run alone: one that was filled under another instruction set gives wrong results
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(pathlib.Path(folder) / "compiled")
        children[name] = harness.Child([__file__, "--serve"], environment)
        try:
            started[name] = children[name].ask(
                do="start", name=name, depth=args.depth, inputs=inputs, threads=args.threads, device=args.device
            )
        except harness.ChildError as error:
            check(name == "torch_compile", f"{name} failed: {error}")
            failed[name] = str(error)  # a compiler may be missing at run time: the rest still counts
            children.pop(name).close()
    for name, answer in started.items():
        for loss, own in zip(answer["losses"], started["ours"]["losses"], strict=True):
            check(close(loss, own), f"losses differ: {name} {answer['losses']}, ours {started['ours']['losses']}")

    rounds = {name: [] for name in children}
    allocations = 0
    for r in range(-1, args.rounds):  # round -1 warms every process up once more
        order = list(children)
        order = order[r % len(order) :] + order[: r % len(order)]
        for name in order:
            answer = children[name].ask(do="run", count=args.steps)
            if r >= 0:
                rounds[name].append(statistics.median(answer["times"]))
                allocations += answer["allocations"] or 0

    competitors = {}
    for name, child in children.items():
        end = child.ask(do="finish")
        check(math.isfinite(end["last"]), f"{name}: the loss is {end['last']} after the timing")
        check(close(end["again"], started[name]["losses"][0]), f"{name}: the first loss did not come out again")
        competitors[name] = {
            "ms": harness.milliseconds(rounds[name]),
            "images_per_second": round(args.batch_size / statistics.median(rounds[name])),
            **end["peak"],
            "first_loss": started[name]["losses"][0],
            "isa": started[name]["isa"],
        }
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


def print_profile(profile):
    whole, total = profile["step_ms"], 0.0
    print(f"\n{'kernel':34} {'ms':>8} {'calls':>6} {'share':>6}")
    for name, row in sorted(profile["kernels"].items(), key=lambda item: -item[1]["ms"]):
        total += row["ms"]
        print(f"{name:34} {row['ms']:8.3f} {row['calls']:6.0f} {row['ms'] / whole:6.1%}")
    print(f"{'Python and everything else':34} {whole - total:8.3f} {'':6} {(whole - total) / whole:6.1%}")
    print(f"{'step':34} {whole:8.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=["cpu", "emulated", "cuda"], default="cpu", help="emulated: tiny sizes only"
    )
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--against", choices=["torch", "none"], default="torch")
    parser.add_argument("--threads", type=int, default=None, help="default: every CPU of this process")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--isa", choices=list(limits.ISA_FLAGS), help="hold every competitor to this instruction set")
    parser.add_argument("--profile", action="store_true", help="split our step by kernel")
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
    if profile:
        print_profile(profile)
    if args.json:
        fields = {"depth": args.depth, "batch_size": args.batch_size, "rounds": args.rounds, "steps": args.steps}
        fields.update({name: ratio["median"] for name, ratio in ratios.items()})
        spreads = {f"{name}_spread": ratio for name, ratio in ratios.items()}
        isa = competitors["ours"]["isa"]
        measured = limits.measure(args.device, args.threads, isa)
        report = harness.result("train_step", args.threads, isa, args.device, **fields, **spreads, limits=measured)
        harness.write_json(args.json, {**report, "competitors": competitors, "profile": profile})


if __name__ == "__main__":
    main()
