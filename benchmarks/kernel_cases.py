"""The cases of kernels.py: every kernel of the table at shapes of ResNet-20 and ResNet-50, and some odd ones.

Counting: `moved` is the bytes of each operand once, however often a kernel reads it; `flops` counts a multiply-add as
two operations, and any other operation on an element, a root or an exponential too, as one.
"""

import math

import numpy as np

from tinyres.dtypes import bfloat16

PERIOD = 1_000_003  # a prime: repeated numbers are drawn quickly and fall in step with no shape


def normal(rng, shape):
    n = math.prod(shape)
    return np.resize(rng.standard_normal(min(n, PERIOD), np.float32), shape)


def positive(rng, shape):
    n = math.prod(shape)
    return np.resize(rng.random(min(n, PERIOD), np.float32) + np.float32(0.5), shape)


# How to draw an input. Labels suit ten classes and more; a window's argmax is its row 1, column 1, never in padding.
KINDS = {
    "array": normal,
    "image": normal,
    "weights": normal,
    "positive": positive,
    "zeros": lambda rng, shape: np.zeros(shape, np.float32),
    "labels": lambda rng, shape: rng.integers(0, 10, shape),
    "argmax of 3x3": lambda rng, shape: np.full(shape, 4, np.int32),
    "argmax of 2x2": lambda rng, shape: np.full(shape, 3, np.int32),
    "bytes": lambda rng, shape: rng.integers(0, 256, shape, np.uint8),
    "index": lambda rng, shape: rng.integers(0, 1024, shape),
    "shift": lambda rng, shape: rng.integers(-4, 5, shape, np.int32),
    "counter": lambda rng, shape: np.zeros(shape, np.int64),
    "flip": lambda rng, shape: rng.integers(0, 2, shape, np.uint8),
}


class Case:
    """kernel   name in the table
    label    its shape, for people
    inputs   list of (kind, shape); images are NHWC, weights RSCK
    ours     function (kernels, *arrays) -> array or a tuple of them
    theirs   function (torch, *tensors) -> the same first few of these, or None where PyTorch has no single operation
             for it. Images are NCHW views of NHWC memory, weights OIHW in channels_last
    flops    operations of one call
    moved    bytes of all operands
    gives    "image" or "weights": what theirs's outputs of four axes are
    random   whether PyTorch draws other numbers, so that the reference has to check ours
    """

    def __init__(self, kernel, label, inputs, ours, theirs=None, *, flops, moved, gives=None, random=False):
        self.kernel, self.label, self.inputs, self.ours, self.theirs = kernel, label, inputs, ours, theirs
        self.flops, self.moved, self.gives, self.random = flops, moved, gives, random

    @property
    def name(self):
        return f"{self.kernel} {self.label}"

    def draw(self, seed):
        rng = np.random.default_rng(seed)
        return [KINDS[kind](rng, shape) for kind, shape in self.inputs]


def text(shape):
    return "x".join(map(str, shape))


# fmt: off
def convolutions(n20, n50):
    # N, H, W, C, K, window, stride, padding
    shapes = [
        (n20, 32, 32, 3, 16, 3, 1, 1),
        (n20, 32, 32, 16, 16, 3, 1, 1),
        (n20, 32, 32, 16, 32, 3, 2, 1),
        (n20, 16, 16, 32, 32, 3, 1, 1),
        (n20, 16, 16, 32, 64, 3, 2, 1),
        (n20, 8, 8, 64, 64, 3, 1, 1),
        (n20, 32, 32, 16, 32, 1, 2, 0),
        (max(1, n20 // 4), 17, 15, 13, 29, 5, 1, 2),
    ]
    if n50:
        shapes += [
            (n50, 224, 224, 3, 64, 7, 2, 3),
            (n50, 56, 56, 64, 256, 1, 1, 0),
            (n50, 56, 56, 256, 64, 1, 1, 0),
            (n50, 56, 56, 64, 64, 3, 1, 1),
            (n50, 56, 56, 128, 128, 3, 2, 1),
            (n50, 28, 28, 512, 1024, 1, 2, 0),
            (n50, 14, 14, 256, 256, 3, 1, 1),
            (n50, 7, 7, 512, 512, 3, 1, 1),
        ]
    for n, h, w, c, k, r, s, p in shapes:
        x, dy = (n, h, w, c), (n, (h + 2 * p - r) // s + 1, (w + 2 * p - r) // s + 1, k)
        weights = (r, r, c, k)
        label = f"{r}x{r}/{s} {n}x{h}x{w}, {c} to {k}"
        counts = {
            "flops": 2 * math.prod(dy) * r * r * c,
            "moved": 4 * (math.prod(x) + math.prod(weights) + math.prod(dy)),
        }
        stride, pad = (s, s), (p, p)

        def backward(torch, dy, x, w, mask, stride=stride, pad=pad):
            return torch.ops.aten.convolution_backward(dy, x, w, None, stride, pad, (1, 1), False, (0, 0), 1, mask)

        yield Case("conv2d_forward", label, [("image", x), ("weights", weights)],
            lambda k, x, w, stride=stride, pad=pad: k.conv2d_forward(x, w, stride, pad),
            lambda torch, x, w, stride=stride, pad=pad: torch.conv2d(x, w, None, stride, pad),
            gives="image", **counts)
        bias, residual = ("array", dy[-1:]), ("image", dy)
        sizes = {**counts, "flops": counts["flops"] + 3 * math.prod(dy), "moved": counts["moved"] + 4 * math.prod(dy)}
        yield Case("conv2d_bias_forward", label, [("image", x), ("weights", weights), bias, residual],
            lambda k, x, w, b, r, stride=stride, pad=pad: k.conv2d_bias_forward(x, w, b, r, True, stride, pad),
            lambda torch, x, w, b, r, stride=stride, pad=pad: torch.conv2d(x, w, b, stride, pad).add_(r).relu_(),
            gives="image", **sizes)
        yield Case("conv2d_backward_input", label, [("image", dy), ("image", x), ("weights", weights)],
            lambda k, dy, x, w, stride=stride, pad=pad: k.conv2d_backward_input(dy, w, x.shape, stride, pad),
            lambda torch, dy, x, w, backward=backward: backward(torch, dy, x, w, [True, False, False])[0],
            gives="image", **counts)
        yield Case("conv2d_backward_weight", label, [("image", dy), ("image", x), ("weights", weights)],
            lambda k, dy, x, w, stride=stride, pad=pad: k.conv2d_backward_weight(dy, x, w.shape, stride, pad),
            lambda torch, dy, x, w, backward=backward: backward(torch, dy, x, w, [False, True, False])[1],
            gives="weights", **counts)
        yield Case("conv2d_backward", label, [("image", dy), ("image", x), ("weights", weights)],
            lambda k, dy, x, w, stride=stride, pad=pad: k.conv2d_backward(dy, x, w, stride, pad),
            lambda torch, dy, x, w, backward=backward: backward(torch, dy, x, w, [True, True, False])[:1],
            gives="image", flops=2 * counts["flops"], moved=2 * counts["moved"] - 4 * math.prod(dy))


def batch_norms(n20, n50):
    rest = (0.1, 1e-5)  # momentum, eps

    def normalise(torch, x, g, b, m, v, training=True):  # what PyTorch's own layer calls
        return torch.batch_norm(x, g, b, m, v, training, 0.1, 1e-5, torch.backends.cudnn.enabled)

    def infer(torch, x, g, b, m, v):
        return normalise(torch, x, g, b, m, v, training=False)

    def backward(torch, dy, x, g, b, m, v, training=True):
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(dy, x, g, m, v, m, v, training, 1e-5, mask)

    def masked(torch, dy, y):
        return torch.ops.aten.threshold_backward(dy, y, 0)

    def add_relu_backward(torch, dy, x, y, *channel):
        dy = masked(torch, dy, y)
        dx, dgamma, dbeta = backward(torch, dy, x, *channel)
        return dx, dy, dgamma, dbeta

    shapes = [(n20, 32, 32, 16), (n20, 16, 16, 32), (n20, 8, 8, 64), (33, 9, 7, 13)]
    if n50:
        shapes += [(n50, 112, 112, 64), (n50, 56, 56, 256), (n50, 7, 7, 2048)]
    for shape in shapes:
        n, label = math.prod(shape), text(shape)
        size = 4 * n
        channel = [("positive", shape[-1:])] * 4  # gamma, beta, and two of: running mean, variance; mean, inv_std
        image = ("image", shape)
        yield Case("batch_norm_forward", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_forward(x, *c, *rest), normalise,
            flops=5 * n, moved=2 * size, gives="image")
        yield Case("batch_norm_relu_forward", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_relu_forward(x, *c, *rest),
            lambda t, x, *c: normalise(t, x, *c).relu_(),
            flops=6 * n, moved=2 * size, gives="image")
        yield Case("batch_norm_add_relu_forward", label, [image, image, *channel],
            lambda k, x, r, *c: k.batch_norm_add_relu_forward(x, r, *c, *rest),
            lambda t, x, r, *c: normalise(t, x, *c).add_(r).relu_(),
            flops=7 * n, moved=3 * size, gives="image")
        yield Case("batch_norm_backward", label, [image, image, *channel],
            lambda k, dy, x, g, b, m, s: k.batch_norm_backward(dy, x, g, m, s), backward,
            flops=10 * n, moved=3 * size, gives="image")
        # Without mean and beta y has the sign of x, from which ours works it out.
        centred = [channel[0], ("zeros", shape[-1:]), ("zeros", shape[-1:]), channel[3]]
        yield Case("batch_norm_relu_backward", label, [image, image, *centred],
            lambda k, dy, x, *c: k.batch_norm_relu_backward(dy, x, *c),
            lambda t, dy, x, *c: backward(t, masked(t, dy, x), x, *c),
            flops=13 * n, moved=3 * size, gives="image")
        yield Case("batch_norm_add_relu_backward", label, [image, image, image, *channel],
            lambda k, dy, x, y, g, b, m, s: k.batch_norm_add_relu_backward(dy, x, y, g, m, s), add_relu_backward,
            flops=11 * n, moved=5 * size, gives="image")
        yield Case("batch_norm_inference", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_inference(x, *c, 1e-5), infer,
            flops=2 * n, moved=2 * size, gives="image")
        yield Case("batch_norm_relu_inference", label, [image, *channel],
            lambda k, x, *c: k.batch_norm_relu_inference(x, *c, 1e-5),
            lambda t, x, *c: infer(t, x, *c).relu_(),
            flops=3 * n, moved=2 * size, gives="image")
        yield Case("batch_norm_add_relu_inference", label, [image, image, *channel],
            lambda k, x, r, *c: k.batch_norm_add_relu_inference(x, r, *c, 1e-5),
            lambda t, x, r, *c: infer(t, x, *c).add_(r).relu_(),
            flops=4 * n, moved=3 * size, gives="image")
        yield Case("batch_norm_inference_backward", label, [image, image, *channel],
            lambda k, dy, x, g, b, m, v: k.batch_norm_inference_backward(dy, x, g, m, v, 1e-5),
            lambda t, *a: backward(t, *a, training=False),
            flops=6 * n, moved=3 * size, gives="image")


def residual_blocks(n20, n50):
    """Those that take a Norm (backend/norm.py), whose statistics are given or, without rows, worked out."""
    from tinyres.backend.norm import Norm

    def norm_of(x, gamma, beta, mean=None, inv_std=None, output=None):
        norm = Norm(x, None, gamma, beta, None, None, 0.1, 1e-5)
        norm.mean, norm.inv_std, norm.activation, norm.joined = mean, inv_std, output, output is not None
        return norm

    where = (1, 1), (1, 1)
    for height, channels in [(32, 16), (16, 32), (8, 64)]:
        shape, filters = (n20, height, height, channels), (3, 3, channels, channels)
        n, label = math.prod(shape), text(shape)
        image, w, channel = ("image", shape), ("weights", filters), [("positive", shape[3:])] * 4
        counts = {"flops": 18 * n * channels, "moved": 4 * (2 * n + math.prod(filters))}
        yield Case("normed_conv2d_forward", label, [image, w],
            lambda k, x, w: k.normed_conv2d_forward(x, w, *where)[0], gives="image", **counts)
        yield Case("normed_conv2d_backward_input", label, [image, w],
            lambda k, dy, w: k.normed_conv2d_backward_input(dy, w, dy, *where), gives="image", **counts)
        yield Case("normed_conv2d_backward_weight", label, [image, image],
            lambda k, dy, x, w=filters: k.normed_conv2d_backward_weight(dy, x, w, *where), gives="weights", **counts)
        yield Case("block_output", label, [image, image, *channel],
            lambda k, x, r, g, b, *_: k.block_output(norm_of(x, g, b), r), flops=7 * n, moved=12 * n, gives="image")
        yield Case("block_output_backward", label, [image, image, image, *channel],
            lambda k, dy, x, y, *c: k.block_output_backward(dy, norm_of(x, *c, y)).dx,
            flops=11 * n, moved=20 * n, gives="image")


def elementwise(n20, n50):
    shape = (n20 * 32 * 32, 16)
    n, label = math.prod(shape), f"{n20}x32x32x16"
    size = 4 * n
    one, two = [("positive", shape)], [("positive", shape)] * 2
    for name in ("add", "sub", "mul", "div", "pow", "maximum"):
        yield Case(name, label, two, lambda k, a, b, name=name: getattr(k, name)(a, b),
            lambda t, a, b, name=name: getattr(t, name)(a, b), flops=n, moved=3 * size)
    yield Case("add", f"{label} and 16", [("array", shape), ("array", (16,))], lambda k, a, b: k.add(a, b),
        lambda t, a, b: a + b, flops=n, moved=2 * size)
    for name in ("neg", "exp", "log", "sqrt", "sigmoid", "tanh"):
        yield Case(name, label, one, lambda k, x, name=name: getattr(k, name)(x),
            lambda t, x, name=name: getattr(t, name)(x), flops=n, moved=2 * size)
    backward = {
        "sqrt_backward": (2, None),
        "sigmoid_backward": (3, lambda t, dy, y: t.ops.aten.sigmoid_backward(dy, y)),
        "tanh_backward": (3, lambda t, dy, y: t.ops.aten.tanh_backward(dy, y)),
    }
    for name, (flops, peer) in backward.items():
        yield Case(name, label, two, lambda k, dy, y, name=name: getattr(k, name)(dy, y), peer,
            flops=flops * n, moved=3 * size)
    yield Case("pow_backward", label, two * 2, lambda k, *a: k.pow_backward(*a), flops=6 * n, moved=6 * size)
    yield Case("maximum_backward", label, two + one, lambda k, *a: k.maximum_backward(*a), flops=4 * n, moved=5 * size)
    yield Case("dropout", label, one, lambda k, x: k.dropout(x, 0.5, (1, 2)),
        lambda t, x: t.nn.functional.dropout(x, 0.5), flops=n, moved=2 * size, random=True)

    for images, height, channels in [(n20, 32, 16), (n50, 56, 256)]:  # what a training step does most
        shape = (images * height * height, channels)
        n, label = math.prod(shape), text((images, height, height, channels))
        if n == 0:
            continue
        size, one, two = 4 * n, [("array", shape)], [("array", shape)] * 2
        yield Case("relu", label, one, lambda k, x: k.relu(x), lambda t, x: t.relu(x), flops=n, moved=2 * size)
        yield Case("cast", f"{label} to bfloat16 and back", one,
            lambda k, x: k.cast(k.cast(x, bfloat16()), x.dtype), lambda t, x: x.bfloat16().float(), flops=2 * n,
            moved=3 * size)
        yield Case("relu_backward", label, two, lambda k, dy, y: k.relu_backward(dy, y),
            lambda t, dy, y: t.ops.aten.threshold_backward(dy, y, 0), flops=n, moved=3 * size)
        yield Case("add_relu", label, two, lambda k, a, b: k.add_relu(a, b), lambda t, a, b: (a + b).relu_(),
            flops=2 * n, moved=3 * size)
        yield Case("accumulate", label, two, lambda k, a, b: k.accumulate(a, b), lambda t, a, b: a.add_(b),
            flops=n, moved=3 * size)


def shapes_and_sums(n20, n50):
    x = (n20, 32, 32, 16)
    n, label = math.prod(x), text(x)
    size, array = 4 * n, [("array", x)]
    yield Case("contiguous", f"{label} transposed", array, lambda k, x: k.contiguous(x.transpose(0, 3, 1, 2)),
        lambda t, x: x.permute(0, 3, 1, 2).contiguous(), flops=0, moved=2 * size)
    yield Case("broadcast_to", f"16 to {label}", [("array", (16,))], lambda k, v: k.broadcast_to(v, x),
        lambda t, v: v.expand(x).contiguous(), flops=0, moved=size)
    yield Case("sum_to", f"{label} to 16", array, lambda k, x: k.sum_to(x, (16,)), lambda t, x: x.sum((0, 1, 2)),
        flops=n, moved=size)
    yield Case("pad", f"{label} by 4", array, lambda k, x: k.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), 0.0),
        lambda t, x: t.nn.functional.pad(x, (0, 0, 4, 4, 4, 4)), flops=0, moved=int(size * (1 + 1.25**2)))
    yield Case("concatenate", f"2 of {label}", array * 2, lambda k, *a: k.concatenate(a, 3),
        lambda t, *a: t.cat(a, 3), flops=0, moved=4 * size)
    every_other = (slice(None), slice(None, None, 2), slice(None, None, 2))
    yield Case("scatter", f"every other pixel of {label}", [("array", (n20, 16, 16, 16))],
        lambda k, dy: k.scatter(dy, x, every_other), flops=0, moved=int(1.25 * size))
    yield Case("sum", f"{label} over pixels", array, lambda k, x: k.sum(x, (1, 2), False), lambda t, x: x.sum((1, 2)),
        flops=n, moved=size)
    yield Case("max", f"{label} over pixels", array, lambda k, x: k.max(x, (1, 2), False),
        lambda t, x: x.amax((1, 2)), flops=n, moved=size)
    yield Case("max_backward", f"{label} over pixels", [("array", (n20, 1, 1, 16)), ("array", x)],
        lambda k, dy, x: k.max_backward(dy, x, x[:, :1, :1], (1, 2)), flops=3 * n, moved=2 * size)


def pools(n20, n50):
    for shape, window, stride, padding in [
        ((n20, 32, 32, 16), 3, 2, 1), ((n20, 32, 32, 16), 2, 2, 0), ((n50, 112, 112, 64), 3, 2, 1),
    ]:
        images, height, width, channels = shape
        if images == 0:
            continue
        a = (window, window), (stride, stride), (padding, padding)
        dy = (images, height // 2, width // 2, channels)
        label = f"{window}x{window}/{stride} {text(shape)}"
        counts = {"flops": math.prod(dy) * window**2, "moved": 4 * (math.prod(shape) + math.prod(dy))}
        with_index = {**counts, "moved": counts["moved"] + 4 * math.prod(dy)}
        yield Case("max_pool2d_forward", label, [("image", shape)], lambda k, x, a=a: k.max_pool2d_forward(x, *a),
            lambda t, x, a=a: t.nn.functional.max_pool2d(x, *a), gives="image", **with_index)
        yield Case("max_pool2d_backward", label, [("image", dy), (f"argmax of {window}x{window}", dy)],
            lambda k, dy, argmax, x=shape, a=a: k.max_pool2d_backward(dy, argmax, x, *a), **with_index)
        yield Case("avg_pool2d_forward", label, [("image", shape)], lambda k, x, a=a: k.avg_pool2d_forward(x, *a),
            lambda t, x, a=a: t.nn.functional.avg_pool2d(x, *a), gives="image", **counts)
        yield Case("avg_pool2d_backward", label, [("image", dy), ("image", shape)],
            lambda k, dy, x, a=a: k.avg_pool2d_backward(dy, x.shape, *a),
            lambda t, dy, x, a=a: t.ops.aten.avg_pool2d_backward(dy, x, *a, False, True, None),
            gives="image", **counts)
    for shape in [(n20, 8, 8, 64), (n50, 7, 7, 2048)]:
        if shape[0] == 0:
            continue
        counts = {"flops": math.prod(shape), "moved": 4 * math.prod(shape)}
        yield Case("global_avg_pool2d_forward", text(shape), [("image", shape)],
            lambda k, x: k.global_avg_pool2d_forward(x), lambda t, x: x.mean((2, 3)), **counts)
        yield Case("global_avg_pool2d_backward", text(shape), [("array", (shape[0], shape[3]))],
            lambda k, dy, x=shape: k.global_avg_pool2d_backward(dy, x), **counts)


def products(n20, n50):
    layers = [(n20, 64, 10), (n50, 2048, 1000)]  # batch, features, classes: forward, then the two gradients
    for n, features, classes in [layer for layer in layers if layer[0]]:
        x, w, dy = ("array", (n, features)), ("array", (features, classes)), ("array", (n, classes))
        counts = {
            "flops": 2 * n * features * classes, "moved": 4 * (n * features + features * classes + n * classes),
        }
        xs, ws, ys = f"{n}x{features}", f"{features}x{classes}", f"{n}x{classes}"
        yield Case("matmul", f"{xs} by {ws}", [x, w], lambda k, x, w: k.matmul(x, w),
            lambda t, x, w: x @ w, **counts)
        yield Case("matmul", f"{xs} transposed by {ys}", [x, dy],
            lambda k, x, dy: k.matmul(x, dy, transpose_a=True), lambda t, x, dy: x.T @ dy, **counts)
        yield Case("matmul", f"{ys} by {ws} transposed", [dy, w],
            lambda k, dy, w: k.matmul(dy, w, transpose_b=True), lambda t, dy, w: dy @ w.T, **counts)
    for m, k, n in [(4 * n20, 4 * n20, 4 * n20), (127, 131, 61)]:
        yield Case("matmul", f"{m}x{k} by {k}x{n}", [("array", (m, k)), ("array", (k, n))],
            lambda t, a, b: t.matmul(a, b), lambda t, a, b: a @ b,
            flops=2 * m * k * n, moved=4 * (m * k + k * n + m * n))


def resnet20_parameters():
    widths = [16] * 7 + [32] * 6 + [64] * 6
    inputs = [3, *widths[:-1]]
    shapes = [shape for c, k in zip(inputs, widths, strict=True) for shape in ((3, 3, c, k), (k,), (k,))]
    return [*shapes, (64, 10), (10,)]


def resnet50_parameters():
    shapes, c = [(7, 7, 3, 64), (64,), (64,)], 64
    for blocks, k in [(3, 64), (4, 128), (6, 256), (3, 512)]:
        for i in range(blocks):
            convolutions = [(1, c, k), (3, k, k), (1, k, 4 * k)] + ([(1, c, 4 * k)] if i == 0 else [])
            shapes += [shape for r, c, k in convolutions for shape in ((r, r, c, k), (k,), (k,))]
            c = 4 * k
    return [*shapes, (2048, 1000), (1000,)]


def training(n20, n50):
    def loss_and_gradient(torch, logits, labels):
        logits = logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        return loss, logits.grad

    for n, classes in [(n20, 10), (n20, 1000), (n50, 1000)]:
        if n:
            yield Case("cross_entropy", f"{n}x{classes}", [("array", (n, classes)), ("labels", (n,))],
                lambda k, x, labels: k.cross_entropy(x, labels, 0.0), loss_and_gradient,
                flops=5 * n * classes, moved=8 * n * classes)

    networks = {"ResNet-20": resnet20_parameters(), "ResNet-50": resnet50_parameters() if n50 else []}
    for network, shapes in networks.items():
        if not shapes:
            continue

        def thirds(arrays):
            n = len(arrays) // 3
            return list(arrays[:n]), list(arrays[n : 2 * n]), list(arrays[2 * n :])

        def ours(kernels, *arrays):
            w, v, dw = thirds(arrays)
            kernels.sgd(w, v, dw, [1e-4] * len(w), 0.01, 0.9, False)
            return (*w, *v)

        def theirs(torch, *tensors):
            w, v, dw = thirds(tensors)
            torch._fused_sgd_(
                w, dw, v, weight_decay=1e-4, momentum=0.9, lr=0.01, dampening=0.0, nesterov=False,
                maximize=False, is_first_step=False, grad_scale=None, found_inf=None,
            )
            return (*w, *v)

        n = sum(math.prod(shape) for shape in shapes)
        yield Case("sgd", network, [("array", shape) for shape in shapes * 3], ours, theirs,
            flops=6 * n, moved=20 * n)

    n = n20 * 32 * 32 * 3
    yield Case("augment", f"{n20}x32x32x3",
        [("bytes", (1024, 32, 32, 3)), ("index", (n20,)), ("shift", (n20,)), ("shift", (n20,)), ("flip", (n20,)),
         ("array", (32, 32, 3)), ("array", (3,))],
        lambda k, *a: k.augment(*a), flops=2 * n, moved=5 * n)
    yield Case("augment_step", f"{n20}x32x32x3",
        [("bytes", (1024, 32, 32, 3)), ("labels", (1024,)), ("index", (1024,)), ("counter", (2,)),
         ("array", (32, 32, 3)), ("array", (3,))],
        lambda k, *a: k.augment_step(*a, 1, n20, max(1, 1024 // n20), min(n20, 1024), np.dtype(np.float32), 4),
        flops=2 * n, moved=5 * n)

    for n, size, channels, classes in [(n20, 8, 64, 10), (n50, 7, 2048, 1000)]:
        if n:
            pixels, products = n * size * size * channels, 2 * n * channels * classes
            inputs = [("array", (n, size, size, channels)), ("array", (channels, classes)), ("array", (classes,)),
                ("labels", (n,))]
            yield Case("classifier", f"{n}x{size}x{size}x{channels}, {classes} classes", inputs,
                lambda k, *a: k.classifier(*a, 0.0), flops=2 * pixels + 3 * products, moved=8 * pixels)
            yield Case("classifier_inference", f"{n}x{size}x{size}x{channels}, {classes} classes", inputs,
                lambda k, *a: k.classifier_inference(*a, 0.0), flops=pixels + products, moved=4 * pixels)
# fmt: on


def all_cases(n20, n50):
    """Every case in a fixed order, with `n20` images for ResNet-20's shapes and `n50` for ResNet-50's (0: without)."""
    groups = (convolutions, batch_norms, residual_blocks, elementwise, shapes_and_sums, pools, products, training)
    return [case for group in groups for case in group(n20, n50)]


def check_complete(cases):
    """Each kernel of the table has a case, and each case a kernel."""
    from tinyres.backend import spec

    table, named = {*spec.MANDATORY, *spec.FUSED}, {case.kernel for case in cases}
    if table != named:
        raise SystemExit(f"kernels: cases and kernel table differ in {', '.join(sorted(table ^ named))}")
