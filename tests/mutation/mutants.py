"""The mutants: mistakes that somebody could make in the engine, one place each, and the tests that must notice.

A mutant replaces `old`, which stands exactly once in the file of its part, by `new` (tests/test_mutants.py holds the
table to that). `tests` of its part, or its own, are asked first; where they pass, `wider`. Both are arguments of
pytest. `survives` is the reason why none can notice, for a mutant that is known to live.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    tests: str = ""
    survives: str = ""


class Part(NamedTuple):
    name: str
    file: str
    tests: str
    wider: str
    mutants: list[Mutant]


OPS_CPU = (
    "tests/test_determinism.py tests/test_nn.py tests/test_models.py -k 'seed or fused_equals or golden or threads'"
)

PARTS = [
    Part(
        "autograd",
        "tinyres/autograd.py",
        "tests/test_autograd.py",
        "tests/test_gradcheck.py tests/ops/test_conv2d.py tests/test_nn.py -k 'not emulated'",
        [
            Mutant("oldest node first", "_orders = itertools.count(0, -1)", "_orders = itertools.count()"),
            Mutant(
                "a sum in place in a borrowed array",
                "(kernels.accumulate if owned or fresh else kernels.add)(total, gradient)",
                "kernels.accumulate(total, gradient)",
            ),
            Mutant(
                "a leaf's gradient is somebody else's array",
                "return gradient if owned else kernels.broadcast_to(gradient, gradient.shape)",
                "return gradient",
            ),
            Mutant(
                "grad added to in place",
                "return kernels.add(leaf.grad, gradient)",
                "return kernels.accumulate(leaf.grad, gradient)",
            ),
            Mutant("saved arrays kept after the sweep", "node.saved, node.swept = None, True", "node.swept = True"),
            Mutant("a graph can be swept twice", "node.saved, node.swept = None, True", "node.saved = None"),
            Mutant(
                "an array that a hook has kept counts as ours",
                "owned = False  # the hook may have kept what it saw",
                "pass",
            ),
            Mutant("the hook's gradient takes nobody's place", "            gradient = changed\n", ""),
            Mutant("no_grad ends for the outer block too", "depth - 1, observers", "0, observers"),
            Mutant(
                "the seed of a sweep is the caller's array",
                "    return y.device.kernels.broadcast_to(y.device.asarray(gradient, y.dtype), y.shape)\n",
                "    gradient = y.device.asarray(gradient, y.dtype)\n"
                "    return gradient if gradient.shape else y.device.kernels.broadcast_to(gradient, y.shape)\n",
            ),
            Mutant(
                "an x named twice gets one array",
                "found.append(g.copy() if place in places[:i] else g)",
                "found.append(g)",
            ),
            Mutant(
                "a borrowed gradient given to overwrite",
                "dy, node.owns_gradient = arrived.pop((node, 0))",
                "dy, node.owns_gradient = arrived.pop((node, 0))[0], True",
                "tests/ops/test_batch_norm.py -k others_hold",
            ),
            Mutant(
                "a convolution adds to a borrowed total",
                "return total if owned and total.flags.c_contiguous else None",
                "return total if total is not None and total.flags.c_contiguous else None",
                "tests/ops/test_conv2d.py -k 'beside and cpu'",
            ),
            Mutant(
                "a grad of another dtype is added to",
                "fits = held == (gradient.shape, gradient.dtype) and leaf.device.owns(leaf.grad)",
                "fits = held[0] == gradient.shape and leaf.device.owns(leaf.grad)",
            ),
        ],
    ),
    Part(
        "gradcheck",
        "tinyres/gradcheck.py",
        "tests/test_gradcheck.py",
        "tests/ops/test_faults.py",
        [
            Mutant(
                "a NaN gradient is right",
                "wrong = ~(error <= self.atol + self.rtol * np.abs(n))",
                "wrong = error > self.atol + self.rtol * np.abs(n)",
            ),
            Mutant(
                "every deviation is a kink",
                "if (unlike > 0.1 * np.abs(bend) + part * part * rounding)[suspect].any():",
                "if suspect.any():",
            ),
        ],
    ),
    Part(
        "ops: elementwise",
        "tinyres/ops/elementwise.py",
        "tests/ops/test_elementwise.py tests/ops/test_dropout.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant(
                "quotient rule without its square",
                "k.neg(k.mul(da, k.div(a, b)))",
                "k.neg(k.mul(da, a))",
            ),
            Mutant(
                "dropout draws another mask backward", "self.saved = p, key\n", "self.saved = p, (key[0], key[1] + 1)\n"
            ),
        ],
    ),
    Part(
        "ops: reduce",
        "tinyres/ops/reduce.py",
        "tests/ops/test_reduce.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant(
                "the gradient of the mean is that of the sum",
                "self.kernels.div(dy, count).reshape(_kept(shape, axes))",
                "dy.reshape(_kept(shape, axes))",
            ),
        ],
    ),
    Part(
        "ops: shape",
        "tinyres/ops/shape.py",
        "tests/ops/test_shape.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant(
                "a permutation for its inverse",
                "dy.transpose(sorted(range(len(axes)), key=axes.__getitem__))",
                "dy.transpose(axes)",
            ),
            Mutant("the third of joined gradients begins at the second's size", "begin += size", "begin = size"),
            Mutant("padding cut off at the wrong end", "slice(before, before + n) for n", "slice(n) for n"),
        ],
    ),
    Part(
        "ops: conv2d",
        "tinyres/ops/conv2d.py",
        "tests/ops/test_conv2d.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant(
                "the residual's need taken for the weight's",
                "(self.needs[0], *self.needs[2:])",
                "self.needs",
            ),
            Mutant(
                "the bias gets the gradient behind the ReLU",
                "return self._gradients(self.kernels.relu_backward(dy, y), self.needs, *saved)",
                "dx, dw, _ = self._gradients(self.kernels.relu_backward(dy, y), self.needs, *saved)\n"
                "        return dx, dw, self.kernels.sum(dy, (0, 1, 2), False) if self.needs[2] else None",
            ),
        ],
    ),
    Part(
        "ops: batch norm",
        "tinyres/ops/batch_norm.py",
        "tests/ops/test_batch_norm.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant("no ReLU backward in evaluation", "dz = self.kernels.relu_backward(dy, y)", "dz = dy"),
            Mutant(
                "one value a channel is enough",
                "if training and x.size == shape[-1]:",
                "if training and x.size < shape[-1]:",
            ),
        ],
    ),
    Part(
        "ops: loss",
        "tinyres/ops/loss.py",
        "tests/ops/test_loss.py tests/ops/test_errors.py -k 'not emulated'",
        "tests/test_hostile.py -k cpu",
        [
            Mutant("a label one too large", "0 <= low and high < K", "0 <= low and high <= K"),
            Mutant("the upstream gradient forgotten", "k.mul(widened(k, self.saved), dy)", "widened(k, self.saved)"),
        ],
    ),
    Part(
        "ops: linear",
        "tinyres/ops/linear.py",
        "tests/ops/test_linear.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant(
                "a broadcast operand's gradient not summed",
                "k.sum_to(k.matmul(a, dy, transpose_a=True), b.shape)",
                "k.matmul(a, dy, transpose_a=True)",
            ),
        ],
    ),
    Part(
        "ops: checks",
        "tinyres/ops/checks.py",
        "tests/ops/test_errors.py tests/ops/test_conv2d.py -k 'not emulated'",
        "tests/test_hostile.py -k cpu",
        [
            Mutant("width held against height", "window[0] > H or window[1] > W", "window[0] > H or window[1] > H"),
            Mutant("a probability of one", "if not (0 <= number < 1 or", "if not (0 <= number <= 1 or"),
        ],
    ),
    Part(
        "ops: pool",
        "tinyres/ops/pool.py",
        "tests/ops/test_pool.py tests/ops/test_errors.py -k 'not emulated'",
        "tests/test_hostile.py -k cpu",
        [Mutant("padding over half of the window", "all(2 * p <= n for", "all(2 * p <= n + 1 for")],
    ),
    Part(
        "the adapter",
        "tinyres/backend/adapter.py",
        "tests/ops/test_batch_norm.py tests/ops/test_reduce.py -k 'not emulated'",
        OPS_CPU,
        [
            Mutant("overlapping vectors overwrite their input", "dy.shape[-1] % 16 == 0", "dy.shape[-1] % 8 == 0"),
            Mutant(
                "a permutation back by itself",
                "[order.index(i) for i in range(x.ndim)]",
                "[order[i] for i in range(x.ndim)]",
            ),
            Mutant(
                "columns first passes for dense",
                "        if x.flags.c_contiguous:\n            return x\n        y = self._like(x)",
                "        if x.flags.forc:\n            return x\n        y = self._like(x)",
                "tests/ops/test_shape.py -k 'not emulated'",
            ),
            Mutant(
                "an axis of two is not summed",
                "lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] != 1",
                "lead + i for i, n in enumerate(shape) if n == 1 and x.shape[lead + i] > 2",
                "tests/ops/test_elementwise.py tests/ops/test_linear.py -k 'not emulated'",
            ),
        ],
    ),
    Part(
        "random numbers",
        "tinyres/backend/random.py",
        "tests/test_random.py",
        "tests/test_determinism.py tests/test_data.py tests/ops/test_dropout.py",
        [
            Mutant(
                "one stream for everything",
                '_splitmix64(_splitmix64(_check_seed("random.Stream", seed)) + STREAMS.index(name))',
                '_splitmix64(_splitmix64(_check_seed("random.Stream", seed)))',
            ),
            Mutant(
                "a draw of one stream moves the others on",
                "_draws[name] = draw + 1",
                "_draws.update(dict.fromkeys(STREAMS, draw + 1))",
            ),
            Mutant("one can be drawn", "np.floor(low / 64)", "np.floor(low / 32)"),
            Mutant(
                "a new seed goes on with the old draws of dropout",
                "_draws.update(dict.fromkeys(STREAMS, 0))",
                '_draws["init"] = 0',
            ),
            Mutant("the draws of a state forgotten", '    _draws.update(saved["draws"])\n', ""),
        ],
    ),
    Part(
        "whole steps",
        "tinyres/graph.py",
        "tests/test_graph.py",
        "tests/test_cuda_device.py tests/test_train.py -k 'whole or graphs'",
        [
            Mutant(
                "buffers in use at once share memory",
                "others[(first[others] < last[i]) & (first[i] < last[others])]",
                "others[(first[others] < first[i]) & (first[i] < last[others])]",
            ),
            Mutant("a gap that is too small", "if place + size[i] <= offset[other]:", "if place <= offset[other]:"),
            Mutant(
                "captured although memory is used otherwise",
                'expect(memory.uses == uses, "Captured", rule, GraphError)',
                'expect(True, "Captured", rule, GraphError)',
            ),
            Mutant(
                "other threads take from the arena",
                "if threading.get_ident() != self.thread:",
                "if False:",
            ),
            Mutant(
                "the rate stays the first one",
                "self.rate[...] = lr",
                "self.rate[...] = lr if number == 0 else self.rate",
            ),
            Mutant("every epoch in the order of the first", "loader.shuffle and epoch != self.epoch", "self.epoch < 0"),
            Mutant("graphs of arrays that were replaced", "self.held, self.steps = arrays, {}", "self.held = arrays"),
            Mutant("metrics are never cleared", "self.metrics.fill(0)", "pass"),
        ],
    ),
    Part(
        "the optimizer",
        "tinyres/optim.py",
        "tests/test_optim.py",
        "tests/test_recipes.py tests/test_checkpoint.py tests/test_determinism.py -k 'not ledger'",
        [
            Mutant(
                "the first parameter's decay for all",
                "[self._decays[i] for i in indices]",
                "[self._decays[0] for i in indices]",
            ),
            Mutant(
                "velocity not restored",
                "self._decays, self._velocities = decays, velocities",
                "self._decays = decays",
            ),
            Mutant("a state that goes on changing", "np.array(backend.host(v)) for", "backend.host(v) for"),
            Mutant(
                "a restored state is the caller's array",
                "velocities[int(key)] = p.device.kernels.broadcast_to(p.device.asarray(v, p.dtype), v.shape)",
                "velocities[int(key)] = p.device.asarray(v, p.dtype)",
            ),
            Mutant(
                "a milestone one step late", "sum(step >= m for m in milestones)", "sum(step > m for m in milestones)"
            ),
            Mutant(
                "the cycle ends a step late",
                "(step - top) / max(1.0, steps - top)",
                "(step - 1 - top) / max(1.0, steps - top)",
            ),
            Mutant("warm-up one step ahead", "math.cos(math.pi * step / top)", "math.cos(math.pi * (step + 1) / top)"),
            Mutant(
                "batch norm is decayed after all",
                '{"params": others, "weight_decay": 0.0}',
                '{"params": others}',
                "tests/test_recipes.py",
            ),
        ],
    ),
    Part(
        "sgd, cpu",
        "csrc/cpu/sgd.cpp",
        "tests/test_optim.py -k 'not emulated'",
        "tests/test_models.py tests/test_determinism.py -k 'not emulated'",
        [
            Mutant(
                "momentum as the share of the old",
                "const Vec<T> v = momentum * load_first(velocity + i, lanes) + g;",
                "const Vec<T> v = momentum * load_first(velocity + i, lanes) + (T(1) - momentum) * g;",
            ),
            Mutant("Nesterov the other way round", "g + momentum * v : v", "v + momentum * g : v"),
            Mutant(
                "decay past the velocity",
                "const Vec<T> v = momentum * load_first(velocity + i, lanes) + g;\n",
                "const Vec<T> v = momentum * load_first(velocity + i, lanes) + g - decay * w_old;\n",
            ),
            Mutant(
                "a part goes on to the parameter's end",
                "stop = end < start[p + 1] ? end : start[p + 1];",
                "stop = start[p + 1];",
            ),
            Mutant(
                "the last part of a gradient left out",
                "for (i64 part = 1; part < p.parts; part++)",
                "for (i64 part = 1; part < p.parts - 1; part++)",
                "tests/ops/test_sgd.py -k cpu",
            ),
        ],
    ),
    Part(
        "sgd, cuda",
        "csrc/cuda/sgd.cu",
        "tests/test_optim.py -k 'not cpu and not reference'",
        "tests/test_cuda.py -k 'kernels and sgd'",
        [
            Mutant(
                "the first chunk of a parameter is the last of the one before",
                "table.entries[middle].first_chunk <= chunk",
                "table.entries[middle].first_chunk < chunk",
            ),
            Mutant(
                "Nesterov from the old velocity", "p.velocity[i] = narrow<T>(v);", "p.velocity[i] = narrow<T>(step);"
            ),
            Mutant(
                "every warp adds the same parts",
                "for (int part = lane; part < p.parts; part += lanes)",
                "for (int part = 0; part < p.parts; part += lanes)",
                "tests/ops/test_sgd.py -k emulated",
            ),
            Mutant(
                "the second launch's parameters are the first's",
                "for (std::size_t i = first;",
                "for (std::size_t i = 0;",
                "tests/test_cuda.py -k 'kernels and sgd'",
            ),
        ],
    ),
    Part(
        "conv2d, cpu",
        "csrc/cpu/conv2d.cpp",
        "tests/ops/test_conv2d.py -k 'cpu and (matches_reference or exact or large or total)'",
        "tests/ops/test_conv2d.py tests/test_determinism.py tests/test_models.py -k 'cpu or ledger or threads'",
        [
            Mutant("a row under the image is read", "row >= 0 && row < image.rows", "row >= 0 && row <= image.rows"),
            Mutant("a pixel beside the image is read", "at >= 0 && at < elements ?", "at >= 0 && at <= elements ?"),
            Mutant("a tile too wide", "pixels + (tile < larger)", "pixels + (tile <= larger)"),
            Mutant(
                "the last pixel of a class left out",
                "ceil_div(size + pad - a, stride)}",
                "(size + pad - a) / stride}",
            ),
            Mutant("the stride of the other axis", "first_w = s.pad_w / s.stride_w", "first_w = s.pad_w / s.stride_h"),
            Mutant(
                "weight sums overwritten by the next unit",
                "store(at, first ? sum[t][c][v] : load(at) + sum[t][c][v]);",
                "store(at, sum[t][c][v]);",
            ),
            Mutant(
                "parts by the number of threads",
                "for (i64 doubling = 1; doubling <= TASKS; doubling *= 2) {",
                "for (i64 doubling = 1; doubling <= i64(threads()); doubling *= 2) {",
            ),
            Mutant("naive forgets what it is to add to", "    if (!add)\n", "    if (!add || s.stride_w > 1)\n"),
            Mutant(
                "the outputs that a tap meets, one too many",
                "least(outputs, ceil_div(size + pad - tap, stride))",
                "least(outputs, (size + pad - tap) / stride + 1)",
            ),
            Mutant(
                "the total of a neighbour in a strided row",
                "load(epilogue.residual + place + i * o.y_column + v * LANES<T>)",
                "load(epilogue.residual + place + i * o.K + v * LANES<T>)",
            ),
        ],
    ),
    Part(
        "winograd, cpu",
        "csrc/cpu/winograd.cpp",
        "tests/test_winograd.py -k 'not fault'",
        "tests/ops/test_conv2d.py tests/test_models.py -k 'cpu'",
        [
            Mutant("the textbook's points, of twice the error", "a = 0.75f, b = 1.5f", "a = 1.0f, b = 2.0f"),
            Mutant("a strided row goes this way too", " || s.stride_w != 1) return false;", ") return false;"),
            Mutant(
                "a pixel beside the image is read", "right = least(SIZE, s.W - w);", "right = least(SIZE, s.W - w + 1);"
            ),
            Mutant("a row under the image is read", "h + SIZE <= s.H &&", "h + SIZE <= s.H + 1 &&"),
            Mutant("the padding of the other axis", "2 - s.pad_h, 2 - s.pad_w}", "2 - s.pad_h, 2 - s.pad_h}"),
            Mutant("a part adds to what it finds", "count, begin == first);", "count, begin == 0);"),
            Mutant("each phase forgets the one before", "count, first == 0);", "count, true);"),
            Mutant(
                "each phase reads the first tiles",
                "transform_tiles<InputTransform>(v, begin, x, grid, first + begin, first + end);",
                "transform_tiles<InputTransform>(v, begin, x, grid, begin, end);",
            ),
            Mutant(
                "parts by the number of threads",
                "parts = most(1, least(TASKS, tiles / 64))",
                "parts = most(1, least(i64(threads()), tiles / 64))",
            ),
            Mutant(
                "the total that dx is added to is lost",
                "{nullptr, add ? dx : nullptr, false}",
                "{nullptr, nullptr, false}",
                "tests/ops/test_conv2d.py -k 'cpu and total'",
            ),
            Mutant(
                "the bias of the filters before",
                "store(bias, load_first(e.bias + k, filters));",
                "store(bias, load_first(e.bias, filters));",
                "tests/ops/test_conv2d.py -k 'cpu and what_follows'",
            ),
        ],
    ),
    Part(
        "what convolutions share, cuda",
        "csrc/cuda/correlation.h",
        "tests/ops/test_conv2d.py -k 'emulated and (matches_reference or total)'",
        "tests/test_cuda.py -k 'kernels and conv2d'",
        [
            Mutant(
                "the last pixel of a class left out",
                "return {h < H ? pieces(H - h, stride) : 0,",
                "return {h < H ? (H - h) / stride : 0,",
            ),
            Mutant(
                "a digit one too far", "if (low >= lows) low -= lows, mid++;", "if (low > lows) low -= lows, mid++;"
            ),
            Mutant(
                "the last lane's parts left out",
                "for (int other = 1; other < lanes; other++)",
                "for (int other = 1; other < lanes - 1; other++)",
                "tests/ops/test_conv2d.py -k 'emulated and layers'",
            ),
        ],
    ),
    Part(
        "conv2d, cuda",
        "csrc/cuda/conv2d.cu",
        "tests/ops/test_conv2d.py -k 'emulated and (matches_reference or total)'",
        "tests/test_cuda.py -k 'kernels and conv2d'",
        [
            Mutant(
                "the last row repeats the one before",
                "if (row + (i + 1) * STRIDE <= last)",
                "if (row + (i + 1) * STRIDE < last)",
            ),
            Mutant(
                "no barrier before the products",
                "    __syncthreads();\n    if (more) loader.fetch();",
                "    if (more) loader.fetch();",
            ),
            Mutant("the total that dx is added to is lost", "add ? wide(dx[i]) : Wide<T>(0)", "Wide<T>(0)"),
            Mutant("quads of a row that has none", "in_quads(x, C) && in_quads(y, K);", "in_quads(x, C);"),
        ],
    ),
    Part(
        "matmul, cpu",
        "csrc/cpu/matmul.cpp",
        "tests/ops/test_linear.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant(
                "the second block of K overwrites the first",
                "smaller(N - column, TILE_N<T>), k > 0);",
                "smaller(N - column, TILE_N<T>), k > BLOCK_K);",
            ),
            Mutant("the panels of the first matrix", "(b_batch ? item : 0) * packed_size", "0"),
            Mutant(
                "a block of rows ends in the next", "row = i % blocks * BLOCK_M;", "row = i % blocks * (BLOCK_M - 1);"
            ),
        ],
    ),
    Part(
        "matmul, cuda",
        "csrc/cuda/matmul.cu",
        "tests/ops/test_linear.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and matmul'",
        [
            Mutant("one element past the end of K", "k_ + i * k_hop() < ks;", "k_ + i * k_hop() <= ks;"),
            Mutant(
                "the last sharer's parts left out",
                "for (int other = 1; other < SHARERS; other++)",
                "for (int other = 1; other < SHARERS - 1; other++)",
            ),
        ],
    ),
    Part(
        "pool, cpu",
        "csrc/cpu/pool.cpp",
        "tests/ops/test_pool.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant("the last of equals wins", "(v > best) |", "(v >= best) |"),
            Mutant(
                "the mean of the pixels on the image",
                "store_first(y + pixel * s.C + c, sum / area, lanes);",
                "store_first(y + pixel * s.C + c, "
                "sum / T((rows.end - rows.begin) * (columns.end - columns.begin)) + 0 * area, lanes);",
            ),
            Mutant(
                "the later of two windows takes the gradient",
                "load_first(to, lanes) + (at == splat(T(r * s.S + t)) ? g : Vec<T>{})",
                "(at == splat(T(r * s.S + t)) ? g : load_first(to, lanes))",
            ),
            Mutant(
                "of nothing but -inf the padding wins",
                "at = splat(T(rows.begin * s.S + columns.begin))",
                "at = splat(T(0))",
            ),
            Mutant(
                "the rest of the pixels overwrite",
                "for (; i < HW; i++) sum[0] +=",
                "for (; i < HW; i++) sum[0] =",
            ),
        ],
    ),
    Part(
        "pool, cuda",
        "csrc/cuda/pool.cu",
        "tests/ops/test_pool.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and pool'",
        [
            Mutant("a window that ends before the pixel covers it", "begin < 0 ? 0 :", "begin <= 0 ? 0 :"),
            Mutant("the last of equals wins", "at < 0 || v > best ||", "at < 0 || v >= best ||"),
            Mutant(
                "no barrier in the tree",
                "    __syncthreads();\n    if (row < half)",
                "    if (row < half)",
            ),
        ],
    ),
    Part(
        "reduce, cpu",
        "csrc/cpu/reduce.cpp",
        "tests/ops/test_reduce.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant(
                "sums in the element type", "double lanes[16] = {}, rest = 0;", "T lanes[16] = {}; double rest = 0;"
            ),
            Mutant("ties take a whole gradient each", " / ties[i];", ";"),
            Mutant(
                "a NaN is not the largest", "from[i] > largest[i] || from[i] != from[i] ?", "from[i] > largest[i] ?"
            ),
            Mutant(
                "the last part left out",
                "for (i64 part = 1; part < parts; part++)",
                "for (i64 part = 1; part < parts - 1; part++)",
            ),
            Mutant(
                "a wide sum reads the first run again",
                "sum_rows(total, x + o * n * inner + first, n, inner, count);",
                "sum_rows(total, x + o * n * inner, n, inner, count);",
            ),
        ],
    ),
    Part(
        "reduce, cuda",
        "csrc/cuda/reduce.cu",
        "tests/ops/test_reduce.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and reduce'",
        [
            Mutant("a NaN is not the largest", "return a > b || a != a ? a : b;", "return a > b ? a : b;"),
            Mutant("ties take a whole gradient each", "== largest) / count);", "== largest));\n    (void)count;"),
            Mutant(
                "parts end a row early",
                "end = inside ? min(s.n, (part + 1) * s.rows) : 0;",
                "end = inside ? min(s.n, (part + 1) * s.rows - (s.parts > 1)) : 0;",
            ),
        ],
    ),
    Part(
        "batch norm, cpu",
        "csrc/cpu/batch_norm.cpp",
        "tests/ops/test_batch_norm.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant(
                "the biased variance kept",
                "M > 1 ? var * (double(M) / double(M - 1)) : var",
                "var",
            ),
            Mutant(
                "the shares of old and new exchanged",
                "T((1 - momentum) * double(running_mean[c]) + momentum * mean64[c])",
                "T(momentum * double(running_mean[c]) + (1 - momentum) * mean64[c])",
            ),
            Mutant(
                "parts merged with the wrong count",
                "apart * apart * double(begin) * share",
                "apart * apart * double(count) * share",
            ),
            Mutant("one factor of s missing", "T(s * s * sum_gx[c] / double(M))", "T(s * sum_gx[c] / double(M))"),
            Mutant("eps outside of the root", "1 / ::sqrt(var + eps);", "1 / (::sqrt(var) + eps);"),
            Mutant("the mean of g not divided", "mean_g[c] = T(sum_g[c] / double(M));", "mean_g[c] = T(sum_g[c]);"),
            Mutant("a gradient passes where the output is 0", "deviation) > T(0) ? g", "deviation) >= T(0) ? g"),
            Mutant("rows left over are forgotten", "for (; row < end; row++)", "for (; row + 1 < end; row++)"),
        ],
    ),
    Part(
        "what batch norm joins, cuda",
        "csrc/cuda/moments.h",
        "tests/ops/test_batch_norm.py -k 'emulated and (matches_reference or running)'",
        "tests/test_cuda.py -k 'kernels and batch_norm'",
        [
            Mutant("merged with the wrong count", "apart * apart * n * weight", "apart * apart * b.n * weight"),
        ],
    ),
    Part(
        "batch norm, cuda",
        "csrc/cuda/batch_norm.cu",
        "tests/ops/test_batch_norm.py -k 'emulated and (matches_reference or running)'",
        "tests/test_cuda.py -k 'kernels and batch_norm'",
        [
            Mutant("the gradient's slope not divided", "inv_std[c] / W(s.M)", "inv_std[c]"),
            Mutant(
                "the biased variance kept",
                "M > 1 ? var * (double(M) / double(M - 1)) : var",
                "var",
            ),
            Mutant(
                "the join's gradient past the ReLU",
                "if (dresidual) dresidual[at] = g;",
                "if (dresidual) dresidual[at] = dy[at];",
            ),
        ],
    ),
    Part(
        "loss, cpu",
        "csrc/cpu/loss.cpp",
        "tests/ops/test_loss.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant(
                "the gradient of the sum of rows",
                "(double(dx[j]) / sum - target) / double(N)",
                "(double(dx[j]) / sum - target)",
            ),
            Mutant(
                "smoothing takes from the label twice",
                "1 - smoothing + everywhere : everywhere",
                "1 - smoothing : everywhere",
            ),
            Mutant(
                "0 * inf at full smoothing",
                "smoothing < 1 ? (1 - smoothing) * (log_sum - double(x[label] - largest)) : 0;",
                "(1 - smoothing) * (log_sum - double(x[label] - largest));",
            ),
        ],
    ),
    Part(
        "loss, cuda",
        "csrc/cuda/loss.cu",
        "tests/ops/test_loss.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and loss'",
        [
            Mutant("the loss adds the rows up", "*loss = W(sum / double(N));", "*loss = W(sum);"),
        ],
    ),
    Part(
        "head, cuda",
        "csrc/cuda/head.cu",
        "tests/ops/test_head.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and head'",
        [
            Mutant("the mean of a block's first image alone", "first ? W(0) : dw[i]", "true ? W(0) : dw[i]"),
            Mutant("the last of equal logits", "a.index < b.index ? a : b", "a.index > b.index ? a : b"),
            Mutant("the gradient of a pixel is that of the mean", "f[c] = sum / W(HW);\n    }", "f[c] = sum;\n    }"),
            Mutant("the block before the last adds up", "double(gridDim.x - 1)", "double(gridDim.x - 2)"),
            Mutant("the ticket is left as it is", "atomicAdd(&metrics[3], -double(gridDim.x));", ""),
        ],
    ),
    Part(
        "cross-entropy of a row, cuda",
        "csrc/cuda/cross_entropy.h",
        "tests/ops/test_loss.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and loss'",
        [Mutant("the gradient of the sum of rows", "inverse - target) / double(N)", "inverse - target)")],
    ),
    Part(
        "elementwise, cpu",
        "csrc/cpu/elementwise.cpp",
        "tests/ops/test_elementwise.py tests/ops/test_dropout.py -k 'cpu'",
        OPS_CPU,
        [
            Mutant(
                "parts begin at the first row of the second operand",
                "      q += index[axis] * q_stride[axis];\n",
                "      if (axis == last) q += index[axis] * q_stride[axis];\n",
            ),
            Mutant("the ReLU passes a gradient at 0", "return v > T(0) ? g : V{};", "return v >= T(0) ? g : V{};"),
            Mutant("a tie gives both a whole gradient", "g * T(0.5)", "g"),
            Mutant("0 * inf in the power rule", "v == 0 ? T(0) : g * v *", "g * v *"),
            Mutant("dropped where the number equals p", ">> 8 >= threshold ?", ">> 8 > threshold ?"),
            Mutant("what dropout keeps is not scaled", "const T scale = T(1 / (1 - p));", "const T scale = T(1);"),
        ],
    ),
    Part(
        "elementwise, cuda",
        "csrc/cuda/elementwise.cu",
        "tests/ops/test_elementwise.py tests/ops/test_dropout.py -k 'emulated'",
        "tests/test_cuda.py -k 'kernels and elementwise'",
        [
            Mutant("the rest draws the first word", "bits.word[N == 4 ? j : i % 4]", "bits.word[j]"),
            Mutant("a tie gives both a whole gradient", "mine == other ? dy / 2", "mine == other ? dy"),
            Mutant(
                "the rest of a strided array left out",
                "i < n; i += threads) strided_pack<1>(y, a, b, s, int(i), f);",
                "i < n - 1; i += threads) strided_pack<1>(y, a, b, s, int(i), f);",
            ),
        ],
    ),
    Part(
        "augment, cpu",
        "csrc/cpu/augment.cpp",
        "tests/test_data.py -k function_of",
        "tests/test_data.py tests/test_cuda_device.py tests/test_hostile.py -k 'not emulated'",
        [
            Mutant("the mean is not flipped with the image", "T(mean[source + c])", "T(mean[w * C + c])"),
            Mutant("the row under the image is the next image's", "source >= H", "source > H"),
            Mutant("flipped first, then moved the other way", "(W - 1 - (w + left)) * C", "(W - 1 - (w - left)) * C"),
            Mutant(
                "left is drawn as top is",
                "plan.augment ? shift(N + n) : 0",
                "plan.augment ? shift(n) : 0",
                "tests/ops/test_augment_step.py -k cpu",
            ),
        ],
    ),
    Part(
        "augment, cuda",
        "csrc/cuda/augment.cu",
        "tests/test_data.py -k function_of",
        "tests/test_cuda.py -k 'kernels and augment'",
        [
            Mutant(
                "the mean is not flipped with the image",
                "Wide<T>(mean[from])",
                "Wide<T>(mean[(row * W + column) * C + c])",
            ),
            Mutant(
                "images drawn one by one",
                "thread * plan.N + n",
                "n * 3 + thread",
                "tests/ops/test_augment_step.py -k emulated",
            ),
            Mutant(
                "the step stays",
                "counter[0] = i64(u64(step) + 1)",
                "counter[0] = step",
                "tests/ops/test_augment_step.py",
            ),
        ],
    ),
    Part(
        "instruction sets",
        "csrc/dispatch.cpp",
        "tests/test_build.py -k 'instruction'",
        "tests/test_build.py",
        [
            Mutant(
                "the narrowest is the default",
                "    if (forced && *forced && std::string(forced) != candidate.name) continue;",
                "    if (fill_tables || (forced && *forced && std::string(forced) != candidate.name)) continue;",
            ),
            Mutant(
                "the name of one, the kernels of another",
                "    fill_tables = candidate.fill_tables;\n",
                "    if (!fill_tables) fill_tables = candidate.fill_tables;\n",
            ),
        ],
    ),
    Part(
        "threads",
        "csrc/parallel.cpp",
        "tests/test_build.py -k 'fork or threads or affinity or omp'",
        "tests/test_build.py tests/test_determinism.py",
        [
            Mutant(
                "a forked child keeps a pool without workers",
                "      current_pool = new Pool;\n      known_default = 0;",
                "      known_default = 0;",
            ),
            Mutant(
                "a share one chunk short",
                "chunks * (share + 1) / (helpers + 1); }",
                "chunks * (share + 1) / (helpers + 1) - (share == helpers); }",
            ),
            Mutant("OMP_NUM_THREADS of the parent of a fork", "      known_default = 0;\n", ""),
        ],
    ),
    Part(
        "memory",
        "csrc/memory.cpp",
        "tests/test_build.py -k 'block or steady or round or peak or empty'",
        "tests/test_build.py tests/test_autograd.py",
        [
            Mutant(
                "of the waiting blocks only the last is found",
                "    header->next = waiting_[header->size.index];\n",
                "    header->next = nullptr;\n",
            ),
            Mutant(
                "the peak is not the largest",
                "stats_.peak_bytes_in_use = std::max(stats_.peak_bytes_in_use, stats_.bytes_in_use);",
                "stats_.peak_bytes_in_use = stats_.bytes_in_use;",
            ),
            Mutant("blocks a quarter too large", "step = base / 8;", "step = base / 4;"),
        ],
    ),
    Part(
        "bindings",
        "csrc/bindings.h",
        "tests/test_build.py -k 'malformed'",
        "tests/test_build.py tests/test_hostile.py",
        [
            Mutant(
                "a position one past the window",
                "argmax[c] >= 0 && argmax[c] < s.R * s.S;",
                "argmax[c] >= 0 && argmax[c] <= s.R * s.S;",
            ),
            Mutant(
                "a read-only array is written",
                'shape);\n    expect_array(array.writeable(), name, "must be writable");\n    return '
                "const_cast<T*>(elements<T>(array, Use::write));",
                "shape);\n    return const_cast<T*>(elements<T>(array, Use::write));",
            ),
            Mutant(
                "axes merged though b repeats",
                " && s.b[last] == size * sb) {",
                ") {",
                "tests/ops/test_elementwise.py -k 'cpu'",
            ),
        ],
    ),
    Part(
        "batches",
        "tinyres/data/augment.py",
        "tests/test_data.py -k 'batch or epoch or evaluation or augmentation or statistics or loader'",
        "tests/test_data.py tests/test_determinism.py",
        [
            Mutant(
                "evaluation drops the last partial batch",
                "range(0, len(self.images), self.batch_size)",
                "range(0, len(self.images) - self.batch_size + 1, self.batch_size)",
            ),
            Mutant(
                "an epoch without its last batch",
                "len(images) // batch_size if shuffle else -(-len(images) // batch_size)",
                "len(images) // batch_size",
            ),
            Mutant("the same crops in every epoch", "uniform(step, 3 * moves)", "uniform(position, 3 * moves)"),
            Mutant(
                "order and crops from one stream", 'Stream(seed, "order"), random', 'Stream(seed, "augment"), random'
            ),
            Mutant(
                "going back keeps the later order", "if self._order_of[0] != epoch:", "if self._order_of[0] < epoch:"
            ),
            Mutant(
                "the variance unbiased", "squares.sum(axis=(0, 1)) / count", "squares.sum(axis=(0, 1)) / (count - 1)"
            ),
            Mutant(
                "crops one pixel short",
                "moves, places = len(index), 2 * PADDING + 1",
                "moves, places = len(index), 2 * PADDING",
            ),
        ],
    ),
    Part(
        "data sets",
        "tinyres/data/__init__.py",
        "tests/test_recipes.py -k 'held'",
        "tests/test_data.py",
        [
            Mutant(
                "tested on what it was trained on",
                "parts = images[:-count], labels[:-count], images[-count:], labels[-count:]",
                "parts = images, labels, images[-count:], labels[-count:]",
            ),
        ],
    ),
    Part(
        "CIFAR",
        "tinyres/data/cifar.py",
        "tests/test_data.py -k 'form or hash or damaged or pickle'",
        "tests/test_data.py",
        [
            Mutant("the coarse label of CIFAR-100", "records[:, form.label_bytes - 1]", "records[:, 0]"),
            Mutant(
                "images lie on their side", "part_images.transpose(0, 2, 3, 1)", "part_images.transpose(0, 3, 2, 1)"
            ),
            Mutant("a stamp for whatever has the size", "if stamp.read_text() == verified:", "if stamp.read_text():"),
            Mutant(
                "a label one too large",
                "(labels < 0) | (labels >= num_classes)",
                "(labels < 0) | (labels > num_classes)",
            ),
        ],
    ),
    Part(
        "photographs",
        "tinyres/data/folder.py",
        "tests/test_imagenet.py -k 'training_batch or workers_changes or ones_own'",
        "tests/test_imagenet.py -k 'not example and not run and not ensemble'",
        [
            Mutant(
                "the draws of the place in the epoch",
                "place, first = number, number * self.batch_size\n        if kind",
                "place, first = number, number % self.steps_per_epoch * self.batch_size\n        if kind",
            ),
            Mutant("a flip for the wrong half", "if flip < 0.5 else view", "if flip >= 0.5 else view"),
        ],
    ),
    Part(
        "crops",
        "tinyres/data/transforms.py",
        "tests/test_imagenet.py -k 'crop or centre or colour'",
        "tests/test_imagenet.py -k 'not example and not run and not ensemble'",
        [
            Mutant("the last place is never drawn", "int(right * (room + 1)))", "int(right * room))"),
            Mutant("the largest side is never drawn", "(sides[1] - sides[0] + 1))", "(sides[1] - sides[0]))"),
        ],
    ),
    Part(
        "checkpoints",
        "tinyres/checkpoint.py",
        "tests/test_checkpoint.py",
        "tests/test_train.py -k 'resume or metrics'",
        [
            Mutant("the last array has no checksum", "for name in sorted(arrays):", "for name in sorted(arrays)[:-1]:"),
            Mutant("shapes have no checksum", "{name} {array.dtype} {array.shape}", "{name} {array.dtype}"),
            Mutant("moved into place before it is on disk", "            os.fsync(file.fileno())\n", ""),
            Mutant("a newer version is read", "expect(version == VERSION,", "expect(version >= VERSION,"),
            Mutant(
                "escapes in the wrong order",
                'key.replace("~", "~0").replace("/", "~1")',
                'key.replace("/", "~1").replace("~", "~0")',
            ),
        ],
    ),
    Part(
        "training",
        "tinyres/train.py",
        "tests/test_train.py -k 'metrics or evaluate or check_finite or random'",
        "tests/test_train.py tests/test_cuda_device.py",
        [
            Mutant(
                "evaluated in training mode", "    model.eval()\n    running = Running()\n", "    running = Running()\n"
            ),
            Mutant(
                "the average of statistics counts zeros",
                "1 / (batch + 1)",
                "1 / (batch + 2)",
                "tests/test_recipes.py",
            ),
            Mutant("the line of the checkpoint's step lost", 'line["step"] <= step]', 'line["step"] < step]'),
            Mutant("a resumed run draws anew", '{**loaders, "random": random.set_state}', "loaders"),
            Mutant(
                "looking for the NaN moves the statistics", "            buffer[...] = before\n", "            pass\n"
            ),
        ],
    ),
    Part(
        "recipes",
        "tinyres/recipes.py",
        "tests/test_recipes.py",
        "tests/test_train.py -k 'recipe or warm'",
        [
            Mutant("more iterations than epochs", "else min(length, iterations)", "else iterations"),
            Mutant("milestones rounded down", "[round(share * total) for", "[int(share * total) for"),
            Mutant(
                "one cycle of the whole recipe",
                "return total, total if self.milestones is None else length",
                "return total, length",
            ),
        ],
    ),
    Part(
        "layers",
        "tinyres/nn/layers.py",
        "tests/test_nn.py",
        "tests/test_models.py tests/test_recipes.py -k 'not emulated'",
        [
            Mutant(
                "fan-out for fan-in", "fan_in=shape[0] * shape[1] * shape[2])", "fan_in=shape[0] * shape[1] * shape[3])"
            ),
            Mutant("dropout in evaluation", "ops.dropout(x, self.p, self.training)", "ops.dropout(x, self.p, True)"),
            Mutant(
                "a last smaller group takes no part",
                "range(0, images, group)]",
                "range(0, images - group + 1, group)]",
                "tests/test_recipes.py",
            ),
        ],
    ),
    Part(
        "initialisation",
        "tinyres/nn/init.py",
        "tests/test_nn.py -k 'he_init'",
        "tests/test_nn.py tests/test_models.py -k 'not emulated'",
        [Mutant("Glorot's variance for He's", "math.sqrt(2 / fan_in)", "math.sqrt(1 / fan_in)")],
    ),
    Part(
        "modules",
        "tinyres/nn/module.py",
        "tests/test_nn.py -k 'not emulated'",
        "tests/test_checkpoint.py tests/test_models.py -k 'model or golden or threads'",
        [
            Mutant(
                "loaded weights are the caller's arrays",
                "parameter.data = parameter.device.kernels.broadcast_to(loaded, loaded.shape)",
                "parameter.data = loaded",
            ),
            Mutant("a state that training goes on changing", "parameter.numpy().copy() for", "parameter.numpy() for"),
            Mutant(
                "a shared parameter is listed twice",
                "                if id(parameter) not in seen:\n",
                "                if True:\n",
            ),
        ],
    ),
    Part(
        "residual chains",
        "tinyres/ops/residual_chain.py",
        "tests/ops/test_residual_chain.py -k 'equals or frozen or fits'",
        "tests/ops/test_residual_chain.py tests/test_fuse_blocks.py",
        [
            Mutant(
                "a first block whose x is given is not asked for its gradient",
                "needed, around = self.needs[0] or not first,",
                "needed, around = not first,",
            ),
            Mutant(
                "a projection's gradient is masked as that of the residual function is",
                "tensor = activation(kernels, u)",
                "tensor = u",
            ),
            Mutant("sums that nobody has added", "if gradient.dgamma is None:", "if False:"),
            Mutant(
                "a float32 shortcut beside convolutions in bfloat16",
                'return x.dtype != np.float32 or options().precision != "bfloat16"',
                "return True",
            ),
        ],
    ),
    Part(
        "fusion",
        "tinyres/nn/fuse.py",
        "tests/test_nn.py -k 'fold or fuse or fusion'",
        "tests/test_nn.py tests/test_models.py -k 'not emulated'",
        [
            Mutant(
                "eps left out of a folded batch norm",
                "(wide(norm.running_var) + norm.eps) ** 0.5",
                "wide(norm.running_var) ** 0.5",
            ),
            Mutant(
                "a hook on the second of two is not seen",
                "_plain(first, BatchNorm2d) and _plain(second, ReLU)",
                "_plain(first, BatchNorm2d) and type(second) is ReLU",
            ),
        ],
    ),
    Part(
        "units",
        "tinyres/models/blocks.py",
        "tests/test_models.py -k 'sizes or sees'",
        "tests/test_models.py tests/test_nn.py -k 'not emulated'",
        [
            Mutant(
                "the stride in the other convolution",
                'first, second = (stride, 1) if stride_in == "1x1" else (1, stride)',
                "first, second = 1, stride",
            ),
            Mutant(
                "no activation behind the last unit",
                "return layers + _pre_activation(d.unit, channels)",
                "return layers",
            ),
            Mutant(
                "shortcut A's unit activates both paths",
                'if d.option != "A" and skip is not None:',
                "if skip is not None:",
            ),
        ],
    ),
    Part(
        "shortcuts",
        "tinyres/nn/residual.py",
        "tests/test_nn.py -k 'not emulated'",
        "tests/test_models.py -k 'not emulated'",
        [
            Mutant("new channels all behind the old", "before = self.new_channels // 2", "before = 0"),
            Mutant(
                "the gate of the other path", "(1 - g) * shortcut + (g * branch", "g * shortcut + ((1 - g) * branch"
            ),
        ],
    ),
    Part(
        "weights from PyTorch",
        "tinyres/torch_weights.py",
        "tests/test_torch_weights.py",
        "tests/test_torch.py",
        [Mutant("windows lie on their side", "(3, 2, 0, 1))]", "(3, 2, 1, 0))]")],
    ),
]

MUTANTS = [(part, mutant) for part in PARTS for mutant in part.mutants]
