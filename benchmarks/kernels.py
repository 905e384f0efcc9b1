"""Every kernel of the table by itself, at the shapes of ResNet-20 (batch 128) and some odd ones.

    python benchmarks/kernels.py --json FILE [--only conv2d] [--threads T] [--isa ISA]

Our kernels are called through the device's kernel table, allocation of the output included, as an op calls them;
beside them the PyTorch operation that does the same, in a process of its own, asked in turn. Rates count each
operand once, and a multiply-add as two operations; the share is that of the peak measured in the same run: of the
multiply-add rate for convolutions and matrix products, of the bandwidth of a large copy for all else. The latter can
exceed 1 where the operands fit the cache. The sums of the outputs of both sides are compared after the timing.
"""

import argparse
import math
import statistics
import time

import numpy as np

import harness

SETS = 3  # sets of inputs, rotated
TURN = 0.03  # seconds that a competitor is given at a time


# cases --------------------------------------------------------------------------------------------------------------


class Case:
    """kernel   name in the table
    label    its shape, for people
    inputs   list of (kind, shape): image (NHWC), weights (RSCK), array, positive (array), labels
    ours     function (kernels, *arrays) -> arrays
    theirs   function (torch, *tensors) -> tensors, or None where PyTorch has no single counterpart; images are
             NCHW views of NHWC memory, weights OIHW in channels_last
    flops    operations of one call, where arithmetic is the limit
    moved    bytes of all operands, where memory is the limit
    exact    whether both sides must give the same sum
    """

    def __init__(self, kernel, label, inputs, ours, theirs=None, flops=None, moved=None, exact=True):
        self.kernel, self.label, self.inputs, self.ours, self.theirs = kernel, label, inputs, ours, theirs
        self.flops, self.moved, self.exact = flops, moved, exact

    @property
    def name(self):
        return f"{self.kernel} {self.label}"

    def draw(self, seed):
        rng = np.random.default_rng(seed)
        arrays = []
        for kind, shape in self.inputs:
            if kind == "labels":
                arrays.append(rng.integers(0, 10, shape))
            elif kind == "positive":
                arrays.append(rng.random(shape, np.float32) + np.float32(0.5))
            else:
                arrays.append(rng.standard_normal(shape, np.float32))
        return arrays

    def tensors(self, torch, seed):
        result = []
        for (kind, _), array in zip(self.inputs, self.draw(seed), strict=True):
            tensor = torch.from_numpy(array)
            if kind == "image":
                tensor = tensor.permute(0, 3, 1, 2)
            elif kind == "weights":
                tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
            result.append(tensor)
        return result


# fmt: off
def convolutions():
    # N, H, W, C, K, window, stride, padding
    shapes = [
        (128, 32, 32, 3, 16, 3, 1, 1),
        (128, 32, 32, 16, 16, 3, 1, 1),
        (128, 32, 32, 16, 32, 3, 2, 1),
        (128, 16, 16, 32, 32, 3, 1, 1),
        (128, 16, 16, 32, 64, 3, 2, 1),
        (128, 8, 8, 64, 64, 3, 1, 1),
        (128, 32, 32, 16, 32, 1, 2, 0),
        (32, 17, 15, 13, 29, 5, 1, 2),
        (8, 112, 112, 3, 64, 7, 2, 3),
        (16, 14, 14, 256, 256, 3, 1, 1),
    ]
    for n, h, w, c, k, r, s, p in shapes:
        x, dy = (n, h, w, c), (n, (h + 2 * p - r) // s + 1, (w + 2 * p - r) // s + 1, k)
        weights = (r, r, c, k)
        label = f"{r}x{r}/{s} {n}x{h}x{w}, {c} to {k}"
        flops = 2 * math.prod(dy) * r * r * c
        stride, pad = (s, s), (p, p)

        def backward(torch, dy, x, w, mask, stride=stride, pad=pad):
            return torch.ops.aten.convolution_backward(dy, x, w, None, stride, pad, (1, 1), False, (0, 0), 1, mask)

        yield Case(
            "conv2d_forward", label, [("image", x), ("weights", weights)],
            lambda k, x, w, stride=stride, pad=pad: k.conv2d_forward(x, w, stride, pad),
            lambda torch, x, w, stride=stride, pad=pad: torch.conv2d(x, w, None, stride, pad), flops,
        )
        yield Case(
            "conv2d_backward_input", label, [("image", dy), ("image", x), ("weights", weights)],
            lambda k, dy, x, w, stride=stride, pad=pad: k.conv2d_backward_input(dy, w, x.shape, stride, pad),
            lambda torch, dy, x, w, backward=backward: backward(torch, dy, x, w, [True, False, False])[0], flops,
        )
        yield Case(
            "conv2d_backward_weight", label, [("image", dy), ("image", x), ("weights", weights)],
            lambda k, dy, x, w, stride=stride, pad=pad: k.conv2d_backward_weight(dy, x, w.shape, stride, pad),
            lambda torch, dy, x, w, backward=backward: backward(torch, dy, x, w, [False, True, False])[1], flops,
        )


def batch_norms():
    rest = (0.1, 1e-5)  # momentum, eps

    def normalise(torch, x, g, b, m, v):
        return torch.ops.aten.native_batch_norm(x, g, b, m, v, True, 0.1, 1e-5)[0]

    def infer(torch, x, g, b, m, v):
        return torch.ops.aten.native_batch_norm(x, g, b, m, v, False, 0.1, 1e-5)[0]

    def backward(torch, dy, x, g, b, m, v, training=True):
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(dy, x, g, m, v, m, v, training, 1e-5, mask)[0]

    def masked(torch, dy, y):
        return torch.ops.aten.threshold_backward(dy, y, 0)

    for shape in [(128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (33, 9, 7, 13)]:
        size, label = 4 * math.prod(shape), "x".join(map(str, shape))
        channel = [("positive", shape[-1:])] * 4  # gamma, beta, and two of: running mean, variance; mean, inv_std
        image = ("image", shape)
        yield Case("batch_norm_forward", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_forward(x, *c, *rest), normalise, moved=2 * size)
        yield Case("batch_norm_relu_forward", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_relu_forward(x, *c, *rest),
            lambda t, x, *c: normalise(t, x, *c).relu_(), moved=2 * size)
        yield Case("batch_norm_add_relu_forward", label, [image, image, *channel],
            lambda k, x, r, *c: k.batch_norm_add_relu_forward(x, r, *c, *rest),
            lambda t, x, r, *c: normalise(t, x, *c).add_(r).relu_(), moved=3 * size)
        yield Case("batch_norm_backward", label, [image, image, *channel],
            lambda k, dy, x, g, b, m, s: k.batch_norm_backward(dy, x, g, m, s), backward, moved=3 * size)
        yield Case("batch_norm_relu_backward", label, [image, image, image, *channel],
            lambda k, dy, x, y, g, b, m, s: k.batch_norm_relu_backward(dy, x, y, g, m, s),
            lambda t, dy, x, y, *c: backward(t, masked(t, dy, y), x, *c), moved=4 * size)
        yield Case("batch_norm_add_relu_backward", label, [image, image, image, *channel],
            lambda k, dy, x, y, g, b, m, s: k.batch_norm_add_relu_backward(dy, x, y, g, m, s),
            lambda t, dy, x, y, *c: backward(t, masked(t, dy, y), x, *c), moved=5 * size)
        yield Case("batch_norm_inference", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_inference(x, *c, 1e-5), infer, moved=2 * size)
        yield Case("batch_norm_relu_inference", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_relu_inference(x, *c, 1e-5),
            lambda t, x, *c: infer(t, x, *c).relu_(), moved=2 * size)
        yield Case("batch_norm_add_relu_inference", label, [image, image, *channel],
            lambda k, x, r, *c: k.batch_norm_add_relu_inference(x, r, *c, 1e-5),
            lambda t, x, r, *c: infer(t, x, *c).add_(r).relu_(), moved=3 * size)
        yield Case("batch_norm_inference_backward", label, [image, image, *channel],
            lambda k, dy, x, g, b, m, v: k.batch_norm_inference_backward(dy, x, g, m, v, 1e-5),
            lambda t, *a: backward(t, *a, training=False), moved=3 * size)


def elementwise():
    shape = (128 * 32 * 32, 16)
    size, label = 4 * math.prod(shape), "128x32x32x16"
    one, two = [("positive", shape)], [("positive", shape)] * 2
    binary = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "pow": "pow", "maximum": "maximum"}
    for name, peer in binary.items():
        yield Case(name, label, two, lambda k, a, b, name=name: getattr(k, name)(a, b),
            lambda t, a, b, peer=peer: getattr(t, peer)(a, b), moved=3 * size)
    yield Case("add", f"{label} and 16", [("array", shape), ("array", (16,))], lambda k, a, b: k.add(a, b),
        lambda t, a, b: a + b, moved=2 * size)
    for name in ("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu"):
        yield Case(name, label, one, lambda k, x, name=name: getattr(k, name)(x),
            lambda t, x, name=name: getattr(t, name)(x), moved=2 * size)
    backward = {
        "sqrt_backward": None,
        "sigmoid_backward": lambda t, dy, y: t.ops.aten.sigmoid_backward(dy, y),
        "tanh_backward": lambda t, dy, y: t.ops.aten.tanh_backward(dy, y),
        "relu_backward": lambda t, dy, y: t.ops.aten.threshold_backward(dy, y, 0),
    }
    for name, peer in backward.items():
        yield Case(name, label, two, lambda k, dy, y, name=name: getattr(k, name)(dy, y), peer, moved=3 * size)
    yield Case("pow_backward", label, two * 2, lambda k, *a: k.pow_backward(*a), moved=6 * size)
    yield Case("maximum_backward", label, two + one, lambda k, *a: k.maximum_backward(*a), moved=5 * size)
    yield Case("add_relu", label, two, lambda k, a, b: k.add_relu(a, b), lambda t, a, b: (a + b).relu_(),
        moved=3 * size)
    yield Case("accumulate", label, two, lambda k, a, b: k.accumulate(a, b), lambda t, a, b: a.add_(b),
        moved=3 * size, exact=False)
    yield Case("dropout", label, one, lambda k, x: k.dropout(x, 0.5, (1, 2)),
        lambda t, x: t.nn.functional.dropout(x, 0.5), moved=2 * size, exact=False)


def shapes_and_sums():
    x, size, label = (128, 32, 32, 16), 4 * 128 * 32 * 32 * 16, "128x32x32x16"
    image, array = [("image", x)], [("array", x)]
    yield Case("contiguous", f"{label} transposed", array, lambda k, x: k.contiguous(x.transpose(0, 3, 1, 2)),
        lambda t, x: x.permute(0, 3, 1, 2).contiguous(), moved=2 * size)
    yield Case("broadcast_to", f"16 to {label}", [("array", (16,))], lambda k, v: k.broadcast_to(v, x),
        lambda t, v: v.expand(x).contiguous(), moved=size)
    yield Case("sum_to", f"{label} to 16", array, lambda k, x: k.sum_to(x, (16,)), lambda t, x: x.sum((0, 1, 2)),
        moved=size)
    yield Case("pad", f"{label} by 4", array, lambda k, x: k.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), 0.0),
        lambda t, x: t.nn.functional.pad(x, (0, 0, 4, 4, 4, 4)), moved=int(size * (1 + 1.25**2)))
    yield Case("concatenate", f"2 of {label}", array * 2, lambda k, *a: k.concatenate(a, 3),
        lambda t, *a: t.cat(a, 3), moved=4 * size)
    every_other = (slice(None), slice(None, None, 2), slice(None, None, 2))
    yield Case("scatter", f"every other pixel of {label}", [("array", (128, 16, 16, 16))],
        lambda k, dy: k.scatter(dy, x, every_other), moved=int(1.25 * size))
    yield Case("sum", f"{label} over pixels", array, lambda k, x: k.sum(x, (1, 2), False), lambda t, x: x.sum((1, 2)),
        moved=size)
    yield Case("max", f"{label} over pixels", array, lambda k, x: k.max(x, (1, 2), False),
        lambda t, x: x.amax((1, 2)), moved=size)
    yield Case("max_backward", f"{label} over pixels", [("array", (128, 1, 1, 16)), ("array", x)],
        lambda k, dy, x: k.max_backward(dy, x, x[:, :1, :1], (1, 2)), moved=2 * size)
    for window, stride, padding in [(3, 2, 1), (2, 2, 0)]:
        w, s, p = (window, window), (stride, stride), (padding, padding)
        dy = (128, 16, 16, 16)
        text = f"{window}x{window}/{stride} {label}"
        moved = int(1.25 * size)
        yield Case("max_pool2d_forward", text, image, lambda k, x, a=(w, s, p): k.max_pool2d_forward(x, *a)[0],
            lambda t, x, a=(w, s, p): t.nn.functional.max_pool2d(x, *a), moved=moved)
        yield Case("max_pool2d_backward", text, [("image", dy)],
            lambda k, dy, a=(w, s, p): k.max_pool2d_backward(dy, np.full(dy.shape, a[0][0] + 1, np.int32), x, *a),
            moved=moved)
        yield Case("avg_pool2d_forward", text, image, lambda k, x, a=(w, s, p): k.avg_pool2d_forward(x, *a),
            lambda t, x, a=(w, s, p): t.nn.functional.avg_pool2d(x, *a), moved=moved)
        yield Case("avg_pool2d_backward", text, [("image", dy), ("image", x)],
            lambda k, dy, x, a=(w, s, p): k.avg_pool2d_backward(dy, x.shape, *a),
            lambda t, dy, x, a=(w, s, p): t.ops.aten.avg_pool2d_backward(dy, x, *a, False, True, None),
            moved=moved)
    last = (128, 8, 8, 64)
    yield Case("global_avg_pool2d_forward", "128x8x8x64", [("image", last)],
        lambda k, x: k.global_avg_pool2d_forward(x), lambda t, x: x.mean((2, 3)),
        moved=4 * math.prod(last))
    yield Case("global_avg_pool2d_backward", "128x8x8x64", [("array", (128, 64))],
        lambda k, dy: k.global_avg_pool2d_backward(dy, last), moved=4 * math.prod(last))


def products_and_training():
    for m, k, n in [(128, 64, 10), (512, 512, 512), (127, 131, 61)]:
        flops, label = 2 * m * k * n, f"{m}x{k} by {k}x{n}"
        yield Case("matmul", label, [("array", (m, k)), ("array", (k, n))], lambda t, a, b: t.matmul(a, b),
            lambda t, a, b: a @ b, flops)
    yield Case("matmul", "64x128 transposed by 128x10", [("array", (128, 64)), ("array", (128, 10))],
        lambda t, a, b: t.matmul(a, b, transpose_a=True), lambda t, a, b: a.T @ b, 2 * 128 * 64 * 10)

    def loss_and_gradient(torch, logits, labels):
        logits = logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return loss

    for classes in (10, 1000):
        yield Case("cross_entropy", f"128x{classes}", [("array", (128, classes)), ("labels", (128,))],
            lambda k, x, labels: k.cross_entropy(x, labels, 0.0)[0], loss_and_gradient,
            moved=8 * 128 * classes)

    # ResNet-20's parameters: weights, velocities and gradients of each
    widths = [16] * 7 + [32] * 6 + [64] * 6
    inputs = [3, *widths[:-1]]
    shapes = [shape for c, k in zip(inputs, widths, strict=True) for shape in ((3, 3, c, k), (k,), (k,))]
    shapes += [(64, 10), (10,)]
    count, size = len(shapes), 4 * sum(math.prod(shape) for shape in shapes)

    def ours(kernels, *arrays):
        w, v, dw = arrays[:count], arrays[count : 2 * count], arrays[2 * count :]
        kernels.sgd(list(w), list(v), list(dw), [1e-4] * count, 0.01, 0.9, False)

    def theirs(torch, *tensors):
        w, v, dw = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        torch._fused_sgd_(
            list(w), list(dw), list(v), weight_decay=1e-4, momentum=0.9, lr=0.01, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, grad_scale=None, found_inf=None,
        )

    yield Case("sgd", "ResNet-20", [("array", shape) for shape in shapes * 3], ours, theirs,
        moved=5 * size, exact=False)

    images = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), np.uint8)
    index = np.arange(0, 1024, 8)
    shift, flip = (index % 9 - 4).astype(np.int32), (index // 8 % 2).astype(np.uint8)
    mean, scale = np.full((32, 32, 3), 120, np.float32), np.full(3, 1 / 255, np.float32)
    yield Case("augment", "128x32x32x3", [],
        lambda k: k.augment(images, index, shift, -shift, flip, mean, scale), moved=128 * 32 * 32 * 3 * 5)
# fmt: on


def all_cases():
    """Every case, in a fixed order, so that a number names it on both sides."""
    groups = (convolutions, batch_norms, elementwise, shapes_and_sums, products_and_training)
    return [case for group in groups for case in group()]


def check_complete(cases):
    """Each kernel of the table must have a case."""
    from tinyres.backend import spec

    missing = {*spec.MANDATORY, *spec.FUSED} - {case.kernel for case in cases}
    if missing:
        raise SystemExit(f"kernels: no case for {', '.join(sorted(missing))}")


# competitors --------------------------------------------------------------------------------------------------------


class Server:
    """One side, in its own process: times a case when asked."""

    def __call__(self, request):
        return getattr(self, request.pop("do"))(**request)

    def start(self, side, threads):
        harness.bind(threads)
        self.side, self.ready = side, None
        if side == "ours":
            import tinyres
            from tinyres import _cpu

            tinyres.options(threads=threads)
            self.engine = tinyres.backend.get("cpu").kernels
            isa = _cpu.isa()
        else:
            import torch

            torch.set_num_threads(threads)
            self.engine = torch
            isa = torch.backends.cpu.get_cpu_capability().lower()
        self.cases = all_cases()
        return {"isa": isa}

    def time(self, number):
        """Seconds of calls of case `number` for about TURN, and the sum of the first output's magnitudes."""
        case = self.cases[number]
        if self.ready != number:  # inputs of one case at a time are kept
            self.ready = number
            if self.side == "ours":
                self.inputs = [case.draw(seed) for seed in range(SETS)]
            else:
                self.inputs = [case.tensors(self.engine, seed) for seed in range(SETS)]
        function = case.ours if self.side == "ours" else case.theirs

        def call(i):
            return function(self.engine, *self.inputs[i % SETS])

        call(0)
        start = time.perf_counter()
        call(1)
        count = min(500, max(SETS, int(TURN / (time.perf_counter() - start))))
        times = harness.timed(call, count, warm_up=0)
        return {"seconds": statistics.median(times), "sum": self.magnitude(call(0)) if case.exact else None}

    def magnitude(self, outputs):
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        array = first if self.side == "ours" else first.detach().numpy()
        return float(np.abs(array, dtype=np.float64).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--against", choices=["torch", "none"], default="torch")
    parser.add_argument("--threads", type=int, default=None, help="default: every CPU of this process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=list(harness.ISA_FLAGS))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        harness.serve(Server())
        return
    args.threads = len(harness.bind(args.threads or 1 << 16))
    cases = all_cases()
    check_complete(cases)

    ours = harness.Child([__file__, "--serve"], {"TINYRES_CPU_ISA": args.isa} if args.isa else {})
    isa = ours.ask(do="start", side="ours", threads=args.threads)["isa"]
    theirs = None
    if args.against == "torch":
        environment = {**harness.torch_environment(args.isa), "OMP_NUM_THREADS": str(args.threads)}
        theirs = harness.Child([__file__, "--serve"], environment)
        theirs.ask(do="start", side="torch", threads=args.threads)
    limits = harness.limits(args.threads, isa)
    print(f"{isa}, {args.threads} threads; peaks: {limits['fma_gflops']} GFLOP/s, copy {limits['copy_gbs']} GB/s\n")
    print(f"{'':68} {'ms':>8} {'rate':>14} {'of peak':>7} {'PyTorch':>9} {'ratio':>6}")

    rows = []
    for number, case in enumerate(cases):
        if args.only not in case.kernel:
            continue
        own, peer = [], []
        for _ in range(args.rounds):
            a = ours.ask(do="time", number=number)
            own.append(a["seconds"])
            if theirs and case.theirs:
                b = theirs.ask(do="time", number=number)
                peer.append(b["seconds"])
                if case.exact and abs(a["sum"] - b["sum"]) > 1e-3 * abs(b["sum"]):
                    raise SystemExit(f"kernels: {case.name}: sums differ, ours {a['sum']}, PyTorch {b['sum']}")
        seconds = statistics.median(own)
        rate, unit, peak = (
            (case.flops / seconds / 1e9, "GFLOP/s", limits["fma_gflops"])
            if case.flops
            else (case.moved / seconds / 1e9, "GB/s", limits["copy_gbs"])
        )
        row = {
            "kernel": case.kernel, "label": case.label, "ms": harness.milliseconds(own),
            "rate": float(f"{rate:.4g}"), "unit": unit, "share_of_peak": round(rate / peak, 3),
            "torch_ms": harness.milliseconds(peer) if peer else None,
            "ratio": round(statistics.median(p / o for p, o in zip(peer, own, strict=True)), 3) if peer else None,
        }  # fmt: skip
        rows.append(row)
        beside = f"{row['torch_ms']['median']:9.3f} {row['ratio']:5.2f}x" if peer else ""
        print(f"{case.name:68} {1e3 * seconds:8.3f} {rate:7.1f} {unit:7} {rate / peak:6.0%} {beside}", flush=True)
    ours.close()
    if theirs:
        theirs.close()
    if args.json:
        harness.write_json(args.json, {**harness.result("kernels", args.threads, isa), "limits": limits, "rows": rows})


if __name__ == "__main__":
    main()
