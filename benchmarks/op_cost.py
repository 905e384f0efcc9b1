"""What an op costs where its arithmetic costs nothing: microseconds to record it and to sweep it, beside PyTorch.

    python benchmarks/op_cost.py [OP ...] [--against torch|none] [--json FILE] [--profile]

A chain of one op on tensors of a few elements, each link with parameters of its own, forward and then backward: the
time is that of Python, of the checks and of the way into a kernel. Both run eager on one thread of one core, in
processes of their own that are asked in turn. `ratio` is our time over PyTorch's: the median over rounds.
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import time

import harness

LINKS = 100
SHAPE = (1, 2, 2, 4)  # of the images; rows are (1, 4)
LIMIT = 1.5  # our time over PyTorch's, in the geometric mean of all ops


# Each side gives, by op, (first input's shape, shapes of a link's parameters, link(x, *parameters) -> next x). Images
# are NHWC here and NCHW there, weights RSCK and OIHW.


def our_links():
    from tinyres import ops

    return {
        "add": ((1, 4), [(1, 4)], lambda x, a: x + a),
        "mul": ((1, 4), [(1, 4)], lambda x, a: x * a),
        "relu": ((1, 4), [], ops.relu),
        "sum": ((1, 4), [], lambda x: ops.sum(x, 0, keepdims=True)),
        "reshape": ((1, 4), [], lambda x: x.reshape(1, 4)),
        "matmul": ((1, 4), [(4, 4)], lambda x, w: x @ w),
        "linear": ((1, 4), [(4, 4), (4,)], ops.linear),
        "conv2d": (SHAPE, [(1, 1, 4, 4)], ops.conv2d),
        "batch_norm": (SHAPE, [(4,), (4,)], ops.batch_norm),
    }


def their_links():
    import torch
    from torch.nn import functional as F

    image = (SHAPE[0], SHAPE[3], *SHAPE[1:3])
    return {
        "add": ((1, 4), [(1, 4)], lambda x, a: x + a),
        "mul": ((1, 4), [(1, 4)], lambda x, a: x * a),
        "relu": ((1, 4), [], torch.relu),
        "sum": ((1, 4), [], lambda x: torch.sum(x, 0, keepdim=True)),
        "reshape": ((1, 4), [], lambda x: x.reshape(1, 4)),
        "matmul": ((1, 4), [(4, 4)], lambda x, w: x @ w),
        "linear": ((1, 4), [(4, 4), (4,)], F.linear),
        "conv2d": (image, [(4, 4, 1, 1)], F.conv2d),
        "batch_norm": (image, [(4,), (4,)], lambda x, g, b: F.batch_norm(x, None, None, g, b, training=True)),
    }


class Server:
    def __call__(self, request):
        return getattr(self, request.pop("do"))(**request)

    def start(self, name):
        harness.bind(1)
        if name == "ours":
            import numpy as np

            import tinyres

            tinyres.options(threads=1)
            self.links = our_links()
            self.leaf = lambda shape: tinyres.tensor(np.full(shape, 0.5, np.float32), requires_grad=True)
            self.upstream = lambda y: np.ones(y.shape, np.float32)
        else:
            import torch

            torch.set_num_threads(1)
            self.links = their_links()
            self.leaf = lambda shape: torch.full(shape, 0.5, requires_grad=True)
            self.upstream = torch.ones_like
        return {"ops": list(self.links)}

    def chain(self, op):
        """A function that runs the chain once: seconds of its forward and of its backward."""
        shape, parameters, link = self.links[op]
        start = self.leaf(shape)
        each = [[self.leaf(s) for s in parameters] for _ in range(LINKS)]
        leaves = [start, *(p for group in each for p in group)]

        def once():
            begin, x = time.perf_counter(), start
            for group in each:
                x = link(x, *group)
            middle, dy = time.perf_counter(), self.upstream(x)
            resumed = time.perf_counter()
            x.backward(dy)
            end = time.perf_counter()
            for leaf in leaves:
                leaf.grad = None
            return middle - begin, end - resumed

        return once

    def run(self, op, repeats):
        """Microseconds a link: medians of the forward and of the backward."""
        once = self.chain(op)
        for _ in range(3):
            once()
        gc.collect()
        times = [once() for _ in range(repeats)]
        return [1e6 * statistics.median(t) / LINKS for t in zip(*times, strict=True)]


def profile(op):
    """Print where Python's time goes in our chain."""
    server = Server()
    server.start("ours")
    once = server.chain(op)
    once()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(50):
        once()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--against", choices=["torch", "none"], default="torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="where the time of our side goes, by Python function")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        harness.serve(Server())
        return
    known = list(our_links())
    chosen = args.ops or known
    if not set(chosen) <= set(known):
        parser.error(f"the ops are {', '.join(known)}")
    if args.profile:
        for op in chosen:
            profile(op)
        return

    names = ["ours"] + (["torch"] if args.against == "torch" else [])
    children = {name: harness.Child([__file__, "--serve"], harness.torch_environment()) for name in names}
    for name, child in children.items():
        child.ask(do="start", name=name)
    rows = []
    print(f"{'':12} {'record':>8} {'sweep':>8} {'PyTorch':>8} {'sweep':>8} {'ratio':>6}")
    for op in chosen:
        times = {name: [] for name in children}
        for r in range(args.rounds):
            for name in names[r % len(names) :] + names[: r % len(names)]:
                times[name].append(children[name].ask(do="run", op=op, repeats=args.repeats))
        row = {"op": op}
        for name, each in times.items():
            row[name] = [round(statistics.median(t), 2) for t in zip(*each, strict=True)]  # record, sweep
        if "torch" in times:
            pairs = zip(times["ours"], times["torch"], strict=True)
            row["ratio"] = round(statistics.median([sum(own) / sum(peer) for own, peer in pairs]), 3)
        rows.append(row)
        figures = " ".join(f"{value:8.2f}" for name in times for value in row[name])
        print(f"{op:12} {figures} {row.get('ratio', ''):>6}")
    for child in children.values():
        child.close()
    mean = statistics.geometric_mean([row["ratio"] for row in rows]) if "torch" in names else None
    if mean:
        print(f"our time over PyTorch's, geometric mean: {mean:.2f}")
    if args.json:
        fields = {"links": LINKS, "rows": rows, "ratio": mean and round(mean, 3), "limit": LIMIT}
        harness.write_json(args.json, harness.result("op_cost", 1, **fields))


if __name__ == "__main__":
    main()
