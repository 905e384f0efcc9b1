"""What hostile.py calls, by name: the valid arguments of a call, and how it is made: (arguments, draw) -> arrays to be
compared. A new op, layer, optimizer or binding has its line here.
"""

import importlib
import itertools
import math

import numpy as np

import tinyres
from hostile_draw import BF16, SIZES, overlapping, plant, repeated, strided
from tinyres import Tensor, data, nn, ops, optim
from tinyres.backend import reference
from tinyres.backend.random import philox
from tinyres.dtypes import wide


def _upstream(y, d):
    """A gradient for y, in one layout or another."""
    if y.size > 1 << 16:
        return np.broadcast_to(y.dtype.type(0.5), y.shape)
    dy = d.array(*y.shape, dtype=y.dtype)
    return d.pick((strided, repeated, overlapping, plant(np.nan, np.inf)))(dy, d) if d.chance(0.3) else dy


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def results(y, arguments, d, *more):
    """y, and the gradients of all Tensors among the arguments and more."""
    if not isinstance(y, Tensor):
        return []  # of an Identity
    arrays = [y.data]
    leaves = [x for x in {id(x): x for x in (*_tensors([*arguments.values()]), *more)}.values() if x.requires_grad]
    if y.requires_grad and y._node is not None:
        y.backward(_upstream(y, d))
        arrays += [x.grad for x in leaves if x.grad is not None]
    return arrays


def op_call(name):
    def run(arguments, d):
        y = getattr(ops, name)(**arguments)
        running = [arguments.get("running_mean"), arguments.get("running_var")]
        return results(y, arguments, d) + [a for a in running if isinstance(a, np.ndarray)]

    return run


def _same(*names):
    def arguments(d):
        shape = d.shape(d.integer(0, 4), empty=True)
        return {name: d.tensor(*shape) for name in names}

    return arguments


def _broadcast(d):
    shape = d.shape(d.integer(0, 4), empty=True)
    less = [tuple(1 if d.chance(0.2) else n for n in shape) for _ in range(2)]
    a, b = (s[d.integer(0, len(s)) if d.chance(0.2) else 0 :] for s in less)
    return {"a": d.tensor(*a), "b": d.tensor(*b)}


def _reduction(d):
    x = d.tensor(*d.shape(d.integer(0, 4), empty=True))
    axes = d.random.sample(range(x.ndim), d.integer(0, x.ndim))
    return {"x": x, "axis": d.pick((None, tuple(axes), *axes)), "keepdims": d.chance(0.5)}


def _reshape(d):
    x = d.tensor(*d.shape(d.integer(0, 4), empty=True))
    return {"x": x, "shape": d.pick((x.shape[::-1], (x.size,), (1, *x.shape), (-1,) if x.size else (0,)))}


def _getitem(d):
    x = d.tensor(*d.shape(d.integer(1, 4)))
    if d.chance(0.5):
        return {"x": x, "index": d.pick((0, -1))}
    choices = (0, -1, slice(None), slice(None, None, -1), slice(1, None, 2), slice(5, 2), slice(-2, None))
    index = [d.pick(choices) for _ in range(d.integer(0, x.ndim))]
    index.insert(d.integer(0, len(index)), d.pick((None, ..., slice(None, 1) if len(index) < x.ndim else None)))
    return {"x": x, "index": tuple(index)}


def _concatenate(d):
    shape = list(d.shape(d.integer(1, 4)))
    axis, tensors = d.random.randrange(len(shape)), []
    for _ in range(d.integer(1, 3)):
        shape[axis] = d.pick((0, *SIZES))
        tensors.append(d.tensor(*shape))
    return {"tensors": tensors, "axis": axis}


def _matmul(d):
    M, K, N = d.pick(SIZES), d.pick((0, *SIZES)), d.pick(SIZES)
    lead = d.pick(((), (), (2,), (2, 3)))
    a, b = d.pick(((lead, ()), ((), lead), (lead, lead)))
    return {"a": d.tensor(*a, M, K), "b": d.tensor(*b, K, N)}


def _side(d, pool):
    """(size, window, stride, padding) of one side of an image."""
    window, stride = d.pick((1, 1, 2, 3, 3, 3, 4)), d.pick((1, 1, 2, 3))
    padding = d.integer(0, window // 2 if pool else 2)
    return max(1, window - 2 * padding) + d.integer(0, 6), window, stride, padding


def _window(d, pool):
    """N, H, W, C, then window, stride and padding as pairs (or as one number)."""
    (H, *h), (W, *w) = _side(d, pool), _side(d, pool)
    pairs = [a if a == b and d.chance(0.5) else (a, b) for a, b in zip(h, w, strict=True)]
    return (d.integer(1, 3), H, W, d.pick((1, 2, 3, 16, 17))), *pairs


def _pair(value):
    return value if isinstance(value, tuple) else (value, value)


def _output(shape, window, stride, padding):
    return reference.output_size(shape, _pair(window), _pair(stride), _pair(padding))


def _conv2d(residual=False, bias=False):
    def arguments(d):
        shape, window, stride, padding = _window(d, pool=False)
        K = d.pick((1, 2, 4, 16, 17))
        b = {"b": d.parameter(K)} if bias or d.chance(0.5) else {}
        y = {"residual": d.tensor(shape[0], *_output(shape, window, stride, padding), K)} if residual else {}
        w = d.parameter(*_pair(window), shape[3], K)
        return {"x": d.tensor(*shape), **y, "w": w, **b, "stride": stride, "padding": padding}

    return arguments


def _pool(d):
    shape, window, stride, padding = _window(d, pool=True)
    return {"x": d.tensor(*shape), "window": window, "stride": stride, "padding": padding}


def _batch_norm(residual=False):
    def arguments(d):
        shape = (*d.shape(d.integer(1, 3)), d.pick((1, 3, 16, 17)))
        shape = (max(2, shape[0]), *shape[1:])
        C = shape[-1:]
        training = d.chance(0.6)
        running = {name: d.out(*C, dtype=wide(d.dtype)) for name in ("running_mean", "running_var")}
        np.abs(running["running_var"], out=running["running_var"])
        if training and d.chance(0.3):
            running = dict.fromkeys(running)
        y = {"residual": d.tensor(*shape)} if residual else {}
        settings = {"training": training, "momentum": d.pick((0.1, 0, 1)), "eps": d.pick((1e-5, 0.1))}
        return {"x": d.tensor(*shape), **y, "gamma": d.parameter(*C), "beta": d.parameter(*C), **running, **settings}

    return arguments


def _linear(d):
    b = {"b": d.parameter(5)} if d.chance(0.5) else {}
    return {"x": d.tensor(2, 3), "w": d.parameter(3, 5), **b}


def _cast(d):
    d.dtype = BF16 if d.dtype == BF16 else np.dtype(np.float32)
    return {"x": d.tensor(*d.shape(d.integer(0, 4), empty=True)), "dtype": d.pick(("float32", "bfloat16"))}


def _cross_entropy(d):
    N, K = d.pick(SIZES), d.pick(SIZES)
    labels = d.array(N, dtype=d.pick((np.int64, np.int64, np.int32, np.uint8)), low=0, high=K)
    return {"logits": d.tensor(N, K), "labels": labels, "label_smoothing": d.pick((0.0, 0.1, 1.0))}


def _classifier_loss(d):
    N, H, W, C, K = (d.integer(1, 5) for _ in range(5))
    arguments = {"x": d.tensor(N, H, W, C), "w": d.parameter(C, K), "b": d.parameter(K)}
    labels = d.array(N, dtype=np.int64, low=0, high=K)
    metrics = _metrics(d) if d.chance(0.5) else None
    return {**arguments, "labels": labels, "label_smoothing": d.pick((0.0, 0.1, 1.0)), "metrics": metrics}


def _metrics(d):
    metrics = d.out(4, dtype=np.float64)
    metrics[3] = 0
    return metrics


def either(arguments):
    """The arguments of an op, in bfloat16 now and then."""

    def drawn(d):
        d.dtype = BF16 if d.chance(0.25) else d.dtype
        return arguments(d)

    return drawn


OPS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "maximum"), _broadcast),
    **dict.fromkeys(("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu"), _same("x")),
    **dict.fromkeys(("sum", "mean", "max"), _reduction),
    "add_relu": _same("a", "b"),
    "dropout": lambda d: {**_same("x")(d), "p": d.pick((0, 0.1, 0.5)), "training": d.chance(0.8)},
    "reshape": _reshape,
    "flatten": lambda d: {"x": d.tensor(*d.shape(4, empty=True)), "start": d.integer(0, 3)},
    "transpose": lambda d: {"x": d.tensor(*d.shape(3, empty=True)), "axes": d.pick((None, (2, 0, 1), [-1, 1, 0]))},
    "getitem": _getitem,
    "pad": lambda d: {"x": d.tensor(*d.shape(2)), "widths": ((d.integer(0, 2), 1), [0, d.integer(0, 3)]), "value": 0.5},
    "concatenate": _concatenate,
    "matmul": _matmul,
    "linear": _linear,
    "cast": _cast,
    "conv2d": _conv2d(),
    "conv2d_relu": _conv2d(bias=True),
    "conv2d_add_relu": _conv2d(residual=True, bias=True),
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "global_avg_pool2d": lambda d: {"x": d.tensor(*d.shape(4))},
    "batch_norm": _batch_norm(),
    "batch_norm_relu": _batch_norm(),
    "batch_norm_add_relu": _batch_norm(residual=True),
    "cross_entropy": _cross_entropy,
    "classifier_loss": _classifier_loss,
}  # fmt: skip


def _layer(name, arguments, inputs=("x",)):
    """The constructor's arguments and the inputs, in one; `parts` are positional."""

    def run(arguments, d):
        settings = {key: value for key, value in arguments.items() if key not in inputs}
        parts = settings.pop("parts", ())
        module = getattr(nn, name)(*(parts if isinstance(parts, (tuple, list)) else [parts]), **settings)
        y = module.train(d.chance(0.5))(*[arguments[key] for key in inputs])
        return results(y, arguments, d, *module.parameters()) + [*module.buffers()]

    return arguments, run


def _function(name, arguments):
    """A function that makes a module, called on x."""

    def run(arguments, d):
        made = getattr(nn, name)(**{key: value for key, value in arguments.items() if key != "x"})
        y = arguments["x"] if made is None else made(arguments["x"])
        return results(y, arguments, d, *(made.parameters() if made is not None else ()))

    return arguments, run


def _image(d, C=None):
    """Activations in float32, as the parameters of layers are."""
    d.dtype = np.dtype(np.float32)
    return d.tensor(d.integer(2, 4), d.integer(3, 6), d.integer(3, 6), C or d.pick((1, 3, 16)))


def _norm(d, *inputs):
    x = _image(d)
    settings = {"channels": x.shape[3], "momentum": 0.1, "eps": 1e-5, "group": d.pick((None, None, 1, 2))}
    return {**settings, "x": x, **{name: d.tensor(*x.shape) for name in inputs}}


def _conv(d, bias=None, residual=False):
    x, K = _image(d), d.pick((1, 4, 16))
    settings = {"in_channels": x.shape[3], "out_channels": K, "window": 3, "stride": 1, "padding": 1}
    settings["bias"] = d.chance(0.5) if bias is None else bias
    return {**settings, "x": x, **({"residual": d.tensor(*x.shape[:3], K)} if residual else {})}


def _parts(d):
    return [nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]


def _residual(d):
    pre, shortcut = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.shortcut("C", 3, 3, 1)
    paths = {"shortcut": d.pick((None, shortcut)), "activation": d.pick((None, nn.ReLU())), "pre": d.pick((None, pre))}
    return {"parts": _parts(d), **paths, "join": d.pick((None, nn.ConstantScale(0.5, 0.5))), "x": _image(d, 3)}


def _gate(d):
    branch = _image(d, 3)
    return {"channels": 3, "bias": -6.0, "exclusive": True, "branch": branch, "shortcut": d.tensor(*branch.shape)}


def _scale(d):
    branch = _image(d)
    scales = {"shortcut_scale": 0.5, "branch_scale": 2}
    return {**scales, "branch": branch, "shortcut": d.tensor(*branch.shape)}


def _pooling(d):
    return {"window": 2, "stride": d.pick((None, 1, (2, 1))), "padding": d.pick((0, (1, 0))), "x": _image(d)}


def _model(d):
    return {"model": nn.Sequential(nn.Residual(*_parts(d)), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU()),
            "x": _image(d, 3)}  # fmt: skip


def _fused(d):
    return {**_model(d), "level": d.pick(("layer", "block"))}


def _parameter(d):
    return {"array": d.array(*d.shape(2)), "device": d.device.name}


LAYERS = {
    "Conv2d": _layer("Conv2d", _conv),
    "Conv2dReLU": _layer("Conv2dReLU", lambda d: _conv(d, bias=True)),
    "Conv2dAddReLU": _layer("Conv2dAddReLU", lambda d: _conv(d, True, residual=True), ("x", "residual")),
    "BatchNorm2d": _layer("BatchNorm2d", _norm),
    "BatchNormReLU2d": _layer("BatchNormReLU2d", _norm),
    "BatchNormAddReLU2d": _layer("BatchNormAddReLU2d", lambda d: _norm(d, "residual"), ("x", "residual")),
    "Linear": _layer("Linear", lambda d: {"in_features": 3, "out_features": 5, "bias": d.chance(0.5),
                                          "x": _image(d, 3).reshape(-1, 3).detach()}),
    "MaxPool2d": _layer("MaxPool2d", _pooling),
    "AvgPool2d": _layer("AvgPool2d", _pooling),
    **{name: _layer(name, lambda d: {"x": _image(d)}) for name in ("GlobalAvgPool2d", "Flatten", "ReLU", "Identity")},
    "Dropout": _layer("Dropout", lambda d: {"p": 0.5, "x": _image(d)}),
    "FusedSequential": _layer("FusedSequential", lambda d: {"parts": [tinyres.fuse(nn.Residual(*_parts(d))),
                                                                      nn.ReLU()], "x": _image(d, 3)}),
    "Sequential": _layer("Sequential", lambda d: {"parts": _parts(d), "x": _image(d, 3)}),
    "Residual": _layer("Residual", _residual),
    "FusedResidual": _layer("FusedResidual", lambda d: {**_residual(d), "activation": None, "join": None}),
    "Gate": _layer("Gate", _gate, ("branch", "shortcut")),
    "ConstantScale": _layer("ConstantScale", _scale, ("branch", "shortcut")),
    "ZeroPadShortcut": _layer("ZeroPadShortcut", lambda d: {"in_channels": 3, "out_channels": 5, "stride": 2,
                                                            "x": _image(d, 3)}),
    "shortcut": _function("shortcut", lambda d: {"option": d.pick("ABC"), "in_channels": 3, "out_channels": 4,
                                                 "stride": 2, "norm": d.chance(0.5), "x": _image(d, 3)}),
    "fuse": _function("fuse", _fused),
    "fold_batch_norm": _function("fold_batch_norm", _model),
    "Parameter": (_parameter, lambda arguments, d: [nn.Parameter(**arguments).data]),
}  # fmt: skip


def _sgd(d):
    shapes = [d.shape(d.integer(0, 3)) for _ in range(d.integer(1, 3))]
    params = [Tensor(d.out(*shape), True, d.device) for shape in shapes]
    settings = {"lr": 0.1, "momentum": d.pick((0, 0.9)), "weight_decay": d.pick((0, 0.01)), "nesterov": False}
    return {"params": params, "gradients": [d.array(*shape) for shape in shapes], **settings}


def _run_sgd(arguments, d):
    settings = dict(arguments)
    gradients = settings.pop("gradients")
    optimizer = optim.SGD(**settings)
    for i, p in enumerate(optimizer.params):
        p.grad = gradients[i] if isinstance(gradients, (list, tuple)) and i < len(gradients) else gradients
    optimizer.step()
    optimizer.step()
    return [p.data for p in optimizer.params]


def _schedule(name):
    def run(arguments, d):
        schedule = getattr(optim.schedules, name)(**arguments)
        return [np.array([schedule(step) for step in range(9)])]

    return run


OPTIM = {
    "SGD": (_sgd, _run_sgd),
    "without_norm_decay": (lambda d: {"model": nn.Sequential(*_parts(d))},
                           lambda arguments, d: [p.data for group in optim.without_norm_decay(**arguments)
                                                 for p in group["params"]]),
    "schedules.step_decay": (lambda d: {"lr": 0.1, "milestones": [2, 4], "factor": 0.1},
                             _schedule("step_decay")),
    "schedules.one_cycle": (lambda d: {"lr": 0.1, "steps": 7, "warmup": 0.3},
                            _schedule("one_cycle")),
}  # fmt: skip


def _loader(d):
    L, H, W, C = shape = d.integer(3, 9), d.integer(1, 9), d.integer(1, 9), d.pick((1, 3))
    images, labels = d.array(*shape, dtype=np.uint8, low=0, high=256), d.array(L, dtype=np.int64, low=0, high=10)
    mean, scale = d.pick((0.0, d.array(C), d.array(H, W, C))), d.pick((1 / 64, d.array(C)))
    flags = {"augment": d.chance(0.5), "shuffle": d.chance(0.5)}
    return {"images": images, "labels": labels, "batch_size": d.integer(1, 3), "seed": d.integer(0, 9), "mean": mean,
            "scale": scale, **flags, "device": d.device.name, "step": d.integer(0, 20)}  # fmt: skip


def _run_loader(arguments, d):
    settings = dict(arguments)
    step = settings.pop("step")
    loader = data.Loader(**settings)
    return [*loader.batch(step), *itertools.chain(*loader.epoch())]


def _run_held_out(arguments, d):
    images, labels = np.zeros((9, 2, 2, 1), np.uint8), np.arange(9)
    dataset = data.Dataset("shapes10", images, labels, images, labels, [], "")
    return [*data.held_out(dataset, **arguments)[1:5]]


DATA = {
    "Loader": (_loader, _run_loader),
    "statistics": (lambda d: {"images": d.array(*d.shape(4), dtype=np.uint8, low=0, high=256)},
                   lambda arguments, d: [*data.statistics(**arguments)]),
    "held_out": (lambda d: {"count": d.integer(1, 8)}, _run_held_out),
}  # fmt: skip


def tensor_arguments(d):
    array = d.array(*d.shape(2, empty=True), dtype=d.pick(("f4", "f8", "i8", "?")))
    gradient = array.dtype.kind == "f" and d.chance(0.5)
    return {"array": array, "requires_grad": gradient, "dtype": d.pick((None, np.float32)), "device": d.device.name}


# Raw bindings -----------------------------------------------------------------------------------------------------
# By name: the arguments; which of them are written; and what the reference has in their place.

R = tinyres.backend.get("reference").kernels
try:  # says how large some arguments of others must be
    FUSED = importlib.import_module("tinyres._emulated")
except ImportError:
    FUSED = None


def _raw(outputs, arguments, want):
    return outputs.split(), arguments, want


def _raw_window(d, pool=False):
    shape, *pairs = _window(d, pool)
    window, stride, padding = map(_pair, pairs)
    K = shape[3] if pool else d.pick((1, 4, 17))
    y = shape[0], *_output(shape, window, stride, padding), K
    return shape, (*window, shape[3], K), y, {"stride": stride, "padding": padding}


def _raw_conv(d):
    x, w, y, geometry = _raw_window(d)
    return {"y": d.out(*y), "x": d.array(*x), "w": d.array(*w), **geometry, "algorithm": _algorithm(d)}


def _raw_conv_bias(d):
    x, w, y, geometry = _raw_window(d)
    residual = d.array(*y) if d.chance(0.5) else None
    arrays = {"y": d.out(*y), "x": d.array(*x), "w": d.array(*w), "b": d.array(w[3]), "residual": residual}
    return {**arrays, "relu": d.chance(0.5), **geometry, "algorithm": _algorithm(d)}


def _raw_conv_input(d):
    x, w, y, geometry = _raw_window(d)
    arrays = {"dx": d.out(*x), "dy": d.array(*y), "w": d.array(*w)}
    return {**arrays, **geometry, "algorithm": _algorithm(d), "add": d.chance(0.5)}


def _raw_fused(*names):
    """Arguments of the 3x3 convolutions fused with batch norm. float32 they round to tf32: nothing to compare with."""

    def arguments(d):
        N, H, W, C, K = d.integer(1, 3), d.integer(1, 5), d.integer(1, 9), *(d.pick((16, 32)) for _ in "CK")
        stride = d.pick((1, 2))
        d.dtype = d.pick((np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float64)))
        d.comparable = d.dtype == np.float64
        shapes = {"x": (N, H, W, C), "y": (N, *_output((N, H, W, C), 3, stride, 1), K)}

        def counted(kind, numbers):
            return d.out(FUSED.conv3x3_rows(d.dtype, shapes["x"], K, stride, kind) * numbers) if FUSED else None

        makers = {
            "x": lambda: d.array(*shapes["x"]), "w": lambda: d.array(3, 3, C, K), "dz": lambda: d.array(*shapes["y"]),
            "y": lambda: d.out(*shapes["y"]), "dx": lambda: d.out(*shapes["x"]), "dw": lambda: d.out(3, 3, C, K),
            "output": lambda: d.pick((None, d.array(*shapes["x"]))),
            "norm": lambda: d.pick((None, _raw_statistics(d, C))),
            "gradient": lambda: d.pick((None, _raw_gradient(d, shapes["y"]))),
            "shortcut": lambda: d.pick((None, (d.array(*shapes["x"]), 1, 0))),
            "before": lambda: (d.array(*shapes["x"]), *(d.array(C) for _ in range(3)), _positive(d, C)),
            "rows": lambda: counted("dx" in names, 2 * C if "dx" in names else 2 * K + 1),
            "slabs": lambda: None, "stride": lambda: stride,
        }  # fmt: skip
        return {name: makers[name]() for name in names}

    return arguments


def _raw_statistics(d, C):
    """A BatchNorm: gamma, beta, rows, mean, inv_std, running_mean, running_var, momentum, eps."""
    return (d.array(C), d.array(C), None, d.array(C), _positive(d, C), None, None, 0.1, 1e-5)


def _raw_gradient(d, y):
    """A BatchNormGradient: y, gamma, mean, inv_std, rows, dgamma, dbeta; from rows, or with both known."""
    C = y[3]
    statistics = d.array(*y), d.array(C), d.array(C), _positive(d, C)
    if d.chance(0.5):
        return (*statistics, None, d.array(C), d.array(C))
    return (*statistics, _positive(d, d.integer(1, 9) * 2 * C), d.out(C), d.out(C))


def _affine(x, gamma, beta, mean, inv_std):
    """Batch norm as the fused kernels factor it, so that an infinity becomes a NaN where theirs does."""
    scale = gamma * inv_std
    return x * scale + (beta - mean * scale)


def _applied(x, norm):
    gamma, beta, _, mean, inv_std, *_ = norm
    return _affine(x, gamma, beta, mean, inv_std)


def _want_normed(x, norm):
    return x if norm is None else R.relu(_applied(x, norm))


def _want_by_y(dz, gradient):
    """The gradient by the batch norm's input."""
    if gradient is None:
        return dz
    y, gamma, mean, inv_std, rows, dgamma, dbeta = gradient
    if rows is not None:
        sums = rows.reshape(-1, 2, len(gamma)).sum(0)
        dbeta, dgamma = sums[0], sums[1] * inv_std
    count = dz.size // dz.shape[3]
    return gamma * inv_std * (dz - dbeta / count - (y - mean) * inv_std * dgamma / count)


def _want_fused_input(dx, rows, dz, w, gradient, shortcut, output, before, stride):
    dx = R.conv2d_backward_input(_want_by_y(dz, gradient), w, dx.shape, (int(stride),) * 2, (1, 1))
    dx = dx if shortcut is None else dx + shortcut[0]
    if output is None and before is not None:
        output = _affine(*before)
    return [dx if output is None else R.relu_backward(dx, output)]


def _want_fused_weight(dw, slabs, dz, x, gradient, norm, stride):
    x, dy = _want_normed(x, norm), _want_by_y(dz, gradient)
    return [R.conv2d_backward_weight(dy, x, dw.shape, (int(stride),) * 2, (1, 1))]


def _raw_block(d):
    shape = (*(d.integer(1, 5) for _ in range(3)), d.pick((16, 32, 64)))
    stride = d.pick((1, 2))
    around = shape[0], *((n - 1) * stride + 1 for n in shape[1:3]), shape[3]
    shortcut = d.pick((None, (d.array(*around), stride, 0)))
    return {"y": d.out(*shape), "x": d.array(*shape), "norm": _raw_statistics(d, shape[3]), "shortcut": shortcut,
            "shortcut_norm": None if shortcut is None or d.chance(0.5) else _raw_statistics(d, shape[3])}  # fmt: skip


def _want_block(y, x, norm, shortcut, shortcut_norm):
    y = _applied(x, norm)
    if shortcut is not None:
        x, stride, before = shortcut[0], int(shortcut[1]), int(shortcut[2])
        x = x[:, ::stride, ::stride]
        x = x if shortcut_norm is None else _applied(x, shortcut_norm)
        for c in range(x.shape[3]):
            if c + before < y.shape[3]:
                y[..., c + before] += x[..., c]
    return [R.relu(y)]


def _raw_block_backward(d):
    shape = (*(d.integer(1, 5) for _ in range(3)), d.pick((16, 32, 64)))
    arrays = {name: d.array(*shape) for name in ("dy", "output", "y")}
    M, C = math.prod(shape[:3]), shape[3]
    rows = d.out(FUSED.block_output_rows(d.dtype, M, C) * 2 * C) if FUSED else None
    return {"dz": d.out(*shape), "rows": rows, **arrays, "mean": d.array(C)}


def _raw_conv_weight(d):
    x, w, y, geometry = _raw_window(d)
    arrays = {"dw": d.out(*w), "dy": d.array(*y), "x": d.array(*x)}
    return {**arrays, **geometry, "algorithm": _algorithm(d)}


def _algorithm(d):
    """On CUDA mma rounds operands of float32 to tf32, and so does direct."""
    algorithm = d.pick(("auto", "naive", "direct", "tiled", "winograd", "mma"))
    d.tf32 = d.device.name == "emulated" and algorithm in ("mma", "direct")
    return algorithm


def _pools(forward, argmax):
    def arguments(d):
        x, w, y, geometry = _raw_window(d, pool=True)
        window = {"window": w[:2], **geometry}
        if forward:
            places = {"argmax": d.out(*y, dtype=np.int32)} if argmax else {}
            return {"y": d.out(*y), **places, "x": d.array(*x), **window}
        chosen = R.max_pool2d_forward(d.array(*x), *window.values())[1]
        return {"dx": d.out(*x), "dy": d.array(*y), **({"argmax": d.keep(chosen)} if argmax else {}), **window}

    return arguments


def _normed(d):
    return (*d.shape(d.integer(1, 2)), d.pick((1, 3, 16, 17)))


def _positive(d, *shape):
    array = d.array(*shape)
    return np.abs(array, out=array)


def _raw_norm(d):
    x = _normed(d)
    x = (max(2, x[0]), *x[1:])
    C = x[-1]
    running = [d.out(C), d.out(C)] if d.chance(0.7) else [None, None]
    return {
        "y": d.out(*x), "mean": d.out(C), "inv_std": d.out(C), "running_mean": running[0], "running_var": running[1],
        "x": d.array(*x), "gamma": d.array(C), "beta": d.array(C), "residual": d.pick((None, d.array(*x))),
        "relu": d.chance(0.5), "momentum": 0.1, "eps": 1e-5,
    }  # fmt: skip


def _joined(y, residual, relu):
    y = y if residual is None else R.add(y, residual)
    return R.relu(y) if relu else y


def _want_norm(y, mean, inv_std, running_mean, running_var, x, gamma, beta, residual, relu, momentum, eps):
    y, *statistics = R.batch_norm_forward(x, gamma, beta, running_mean, running_var, float(momentum), float(eps))
    return [_joined(y, residual, relu), *statistics, running_mean, running_var]


def _raw_norm_backward(d):
    x = _normed(d)
    C, mask = x[-1], d.pick(("none", "y", "beta"))
    return {
        "dx": d.out(*x), "dresidual": d.out(*x) if mask == "y" else None, "dgamma": d.out(C), "dbeta": d.out(C),
        "dy": d.array(*x), "x": d.array(*x), "y": d.array(*x) if mask == "y" else None, "gamma": d.array(C),
        "beta": d.array(C) if mask == "beta" else None, "mean": d.array(C), "inv_std": _positive(d, C),
    }  # fmt: skip


def _want_norm_backward(dx, dresidual, dgamma, dbeta, dy, x, y, gamma, beta, mean, inv_std):
    if beta is not None:
        dx, dgamma, dbeta = R.batch_norm_relu_backward(dy, x, gamma, beta, mean, inv_std)
        return [dx, None, dgamma, dbeta]
    dz = dy if y is None else R.relu_backward(dy, y)
    dx, dgamma, dbeta = R.batch_norm_backward(dz, x, gamma, mean, inv_std)
    return [dx, None if dresidual is None else dz, dgamma, dbeta]


def _raw_inference(d):
    x = _normed(d)
    parameters = {name: d.array(x[-1]) for name in ("gamma", "beta", "mean")}
    residual = d.array(*x) if d.chance(0.5) else None
    return {"y": d.out(*x), "x": d.array(*x), **parameters, "var": _positive(d, x[-1]), "residual": residual,
            "relu": d.chance(0.5), "eps": 1e-5}  # fmt: skip


def _raw_inference_backward(d):
    x = _normed(d)
    outputs = {"dx": d.out(*x), "dgamma": d.out(x[-1]), "dbeta": d.out(x[-1])}
    arrays = {"dy": d.array(*x), "x": d.array(*x), "gamma": d.array(x[-1]), "mean": d.array(x[-1])}
    return {**outputs, **arrays, "var": _positive(d, x[-1]), "eps": 1e-5}


def _raw_matmul(d):
    M, K, N = d.pick(SIZES), d.pick((0, *SIZES)), d.pick(SIZES)
    lead = d.pick(((), (3,)))
    return {"y": d.out(*lead, M, N), "a": d.array(*lead, M, K), "b": d.array(*lead, K, N)}


def _raw_loss(d):
    N, K = d.pick(SIZES), d.pick(SIZES)
    arrays = {"loss": d.out(), "dlogits": d.out(N, K), "logits": d.array(N, K)}
    return {**arrays, "labels": d.array(N, dtype=np.int64, low=0, high=K), "smoothing": d.pick((0.0, 0.1, 1))}


def _raw_sgd(d):
    shapes = [d.shape(d.integer(0, 2), empty=True) for _ in range(d.integer(1, 3))]
    momentum = d.pick((0, 0.9))
    velocities = [d.out(*shape) for shape in shapes] if momentum else None
    weights = [d.out(*shape) for shape in shapes]
    gradients = [d.array(*d.pick(((), (1,), (3,))), *shape) for shape in shapes]
    lr = 0.1 if d.chance(0.5) else np.full((), 0.1)
    copies = [d.out(*shape, dtype=BF16) for shape in shapes] if d.dtype == np.float32 and d.chance(0.5) else None
    return {"weights": weights, "velocities": velocities, "gradients": gradients, "decays": [0.01] * len(shapes),
            "lr": lr, "momentum": momentum, "nesterov": d.chance(0.5), "copies": copies}  # fmt: skip


def _want_sgd(weights, velocities, gradients, decays, lr, momentum, nesterov, copies):
    decays = [float(decay) for decay in decays]
    R.sgd(weights, velocities, gradients, decays, float(lr), float(momentum), nesterov, copies)
    return [weights, velocities, copies]


def _raw_classifier(d):
    N, H, W, C, K = (d.integer(1, 5) for _ in range(5))
    shapes = {"dx": (N, H, W, C), "dw": (C, K), "db": (K,)}
    whole = d.chance(0.8)
    gradients = {name: d.out(*shape) if whole else None for name, shape in shapes.items()}
    arrays = {"x": d.array(N, H, W, C), "w": d.array(C, K), "b": d.array(K)}
    labels = d.array(N, dtype=np.int64, low=0, high=K)
    return {"loss": d.out(), **gradients, "metrics": _metrics(d), **arrays, "labels": labels,
            "smoothing": d.pick((0.0, 0.1, 1))}  # fmt: skip


def _want_classifier(loss, dx, dw, db, metrics, x, w, b, labels, smoothing):
    gradients = tinyres.backend.get("reference").kernels.classifier(x, w, b, labels, float(smoothing), metrics)
    return [*gradients[: 1 if dx is None else 4], metrics]


def _raw_augment_step(d):
    n, L, H, W, C = (d.integer(1, 4) for _ in range(5))
    d.dtype = np.dtype(np.float32)
    steps, step = d.integer(1, 3), d.pick((0, 1, 5, 2**40))
    labels, order = (d.array(count, dtype=np.int64, low=0, high=L) for count in (L, steps * n))
    images = d.array(L, H, W, C, dtype=np.uint8, low=0, high=256)
    counter = d.out(2, dtype=np.int64)
    counter[:] = step, 0
    return {
        "x": d.out(n, H, W, C), "batch_labels": d.out(n, dtype=np.int64),
        "images": images, "labels": labels, "order": order, "counter": counter,
        "mean": d.array(H, W, C), "scale": d.array(C), "key": d.pick((0, 2**64 - 1)), "batch_size": n,
        "steps_per_epoch": steps, "padding": d.pick((None, 0, 4)),
    }  # fmt: skip


def _want_augment_step(x, batch_labels, images, labels, order, counter, mean, scale, key, batch_size, steps, padding):
    settings = int(key), int(batch_size), int(steps), len(x), x.dtype, None if padding is None else int(padding)
    return [*R.augment_step(images, labels, order, counter, mean, scale, *settings), counter]


def _raw_augment(d):
    N, L, H, W, C = (d.integer(1, 4) for _ in range(5))
    d.dtype = np.dtype(np.float32)
    moves = {name: d.array(N, dtype=np.int32, low=-4, high=5) for name in ("top", "left")}
    return {
        "x": d.out(N, H, W, C), "images": d.array(L, H, W, C, dtype=np.uint8, low=0, high=256),
        "index": d.array(N, dtype=np.int64, low=0, high=L), **moves, "flip": d.array(N, dtype=np.uint8, low=0, high=2),
        "mean": d.array(H, W, C), "scale": d.array(C),
    }  # fmt: skip


def _named(names, *arrays):
    """y, and arrays of its shape, after the name of an operation."""

    def arguments(d):
        shape = d.shape(d.integer(0, 3), empty=True)
        first = {"name": d.pick(names)} if names else {}
        outputs = {name: d.out(*shape) for name in arrays[0].split()}
        return {**first, **outputs, **{name: d.array(*shape) for name in arrays[1].split()}}

    return arguments


def _rows(*order):
    """A reduction of the middle axis: each argument is a whole array "x", or what is left of one."""

    def arguments(d):
        x = d.shape(3)
        shapes = {"y": (x[0], x[2]), "x": x, "dx": x, "dy": (x[0], x[2])}
        return {name: (d.out if i == 0 else d.array)(*shapes[name]) for i, name in enumerate(order)}

    return arguments


def _raw_cast(d):
    shape = d.shape(d.integer(0, 3), empty=True)
    dtypes = [BF16, np.dtype(np.float32)]
    d.random.shuffle(dtypes)
    return {"y": d.out(*shape, dtype=dtypes[0]), "x": d.array(*shape, dtype=dtypes[1])}


_BINARY = ("add", "sub", "mul", "div", "pow", "maximum")
_UNARY = ("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu")
_MASK = ("sqrt", "sigmoid", "tanh", "relu")


def _pixels(d, *names):
    x = d.shape(4)
    shapes = {"x": x, "y": (x[0], x[3]), "dx": x, "dy": (x[0], x[3])}
    return {name: (d.out if i == 0 else d.array)(*shapes[name]) for i, name in enumerate(names)}


def _ints(pair):
    return tuple(int(n) for n in pair)


RAW = {
    "binary": _raw(
        "y", _named(_BINARY, "y", "a b"), lambda name, y, a, b: [R.broadcast_to(getattr(R, name)(a, b), y.shape)]
    ),
    "unary": _raw("y", _named(_UNARY, "y", "x"), lambda name, y, x: [getattr(R, name)(x)]),
    "unary_backward": _raw(
        "dx", _named(_MASK, "dx", "dy y"), lambda name, dx, dy, y: [getattr(R, f"{name}_backward")(dy, y)]
    ),
    "add_relu": _raw("y", _named((), "y", "a b"), lambda y, a, b: [R.add_relu(a, b)]),
    "maximum_backward": _raw(
        "da db", _named((), "da db", "dy a b"), lambda da, db, dy, a, b: [*R.maximum_backward(dy, a, b)]
    ),
    "pow_backward": _raw(
        "da db", _named((), "da db", "dy a b y"), lambda da, db, dy, a, b, y: [*R.pow_backward(dy, a, b, y)]
    ),
    "dropout": _raw(
        "y",
        lambda d: {**_named((), "y", "x")(d), "p": d.pick((0, 0.5)), "key": d.pick((0, 2**64 - 1)), "draw": 3},
        lambda y, x, p, key, draw: [R.dropout(x, float(p), (int(key), int(draw)))],
    ),
    "copy": _raw("y", _named((), "y", "a"), lambda y, a: [R.broadcast_to(a, y.shape)]),
    "fill": _raw(
        "y",
        lambda d: {**_named((), "y", "")(d), "value": 0.5},
        lambda y, value: [np.full(y.shape, float(value), y.dtype)],
    ),
    "cast": _raw("y", _raw_cast, lambda y, x: [R.cast(x, y.dtype)]),
    "sum": _raw("y", _rows("y", "x"), lambda y, x: [R.sum(x, (1,), False)]),
    "max": _raw("y", _rows("y", "x"), lambda y, x: [R.max(x, (1,), False)]),
    "max_backward": _raw(
        "dx",
        _rows("dx", "dy", "x", "y"),
        lambda dx, dy, x, y: [R.max_backward(dy[:, None], x, y[:, None], (1,))],
    ),
    "matmul": _raw("y", _raw_matmul, lambda y, a, b: [R.matmul(a, b)]),
    "conv2d_forward": _raw(
        "y", _raw_conv, lambda y, x, w, s, p, algorithm: [R.conv2d_forward(x, w, _ints(s), _ints(p))]
    ),
    "conv2d_bias_forward": _raw(
        "y",
        _raw_conv_bias,
        lambda y, x, w, b, residual, relu, s, p, algorithm: [
            R.conv2d_bias_forward(x, w, b, residual, bool(relu), _ints(s), _ints(p))
        ],
    ),
    "conv2d_backward_input": _raw(
        "dx",
        _raw_conv_input,
        lambda dx, dy, w, s, p, algorithm, add: [
            R.conv2d_backward_input(dy, w, dx.shape, _ints(s), _ints(p), dx if add else None)
        ],
    ),
    "conv2d_backward_weight": _raw(
        "dw",
        _raw_conv_weight,
        lambda dw, dy, x, s, p, algorithm: [R.conv2d_backward_weight(dy, x, dw.shape, _ints(s), _ints(p))],
    ),
    "conv3x3_rows": _raw(
        "",
        lambda d: {
            "dtype": d.pick(("f4", "f8")),
            "x": (2, 5, 5, 16),
            "filters": d.pick((16, 17)),
            "stride": 1,
            "backward": d.chance(0.5),
        },
        lambda *_: [],
    ),
    "conv3x3_slabs": _raw("", lambda d: {"dtype": "f4", "x": (2, 5, 5, 16), "filters": 16, "stride": 2}, lambda *_: []),
    "block_output_rows": _raw("", lambda d: {"dtype": "f4", "M": d.integer(1, 99), "C": 16}, lambda *_: []),
    "conv3x3_forward": _raw(
        "y",
        _raw_fused("y", "rows", "x", "w", "norm", "stride"),
        lambda y, rows, x, w, norm, stride: [R.conv2d_forward(_want_normed(x, norm), w, (int(stride),) * 2, (1, 1))],
    ),
    "conv3x3_backward_input": _raw(
        "dx",
        _raw_fused("dx", "rows", "dz", "w", "gradient", "shortcut", "output", "before", "stride"),
        _want_fused_input,
    ),
    "conv3x3_backward_weight": _raw(
        "dw", _raw_fused("dw", "slabs", "dz", "x", "gradient", "norm", "stride"), _want_fused_weight
    ),
    "block_output": _raw("y", _raw_block, _want_block),
    "block_output_backward": _raw(
        "dz", _raw_block_backward, lambda dz, rows, dy, output, y, mean: [R.relu_backward(dy, output)]
    ),
    "batch_norm_forward": _raw("y mean inv_std running_mean running_var", _raw_norm, _want_norm),
    "batch_norm_backward": _raw("dx dresidual dgamma dbeta", _raw_norm_backward, _want_norm_backward),
    "batch_norm_inference": _raw(
        "y",
        _raw_inference,
        lambda y, x, gamma, beta, mean, var, residual, relu, eps: [
            _joined(R.batch_norm_inference(x, gamma, beta, mean, var, float(eps)), residual, relu)
        ],
    ),
    "batch_norm_inference_backward": _raw(
        "dx dgamma dbeta",
        _raw_inference_backward,
        lambda dx, dgamma, dbeta, dy, x, gamma, mean, var, eps: [
            *R.batch_norm_inference_backward(dy, x, gamma, mean, var, float(eps))
        ],
    ),
    "max_pool2d_forward": _raw(
        "y argmax",
        _pools(forward=True, argmax=True),
        lambda y, argmax, x, *window: [*R.max_pool2d_forward(x, *map(_ints, window))],
    ),
    "max_pool2d_backward": _raw(
        "dx",
        _pools(forward=False, argmax=True),
        lambda dx, dy, argmax, *window: [R.max_pool2d_backward(dy, argmax, dx.shape, *map(_ints, window))],
    ),
    "avg_pool2d_forward": _raw(
        "y",
        _pools(forward=True, argmax=False),
        lambda y, x, *window: [R.avg_pool2d_forward(x, *map(_ints, window))],
    ),
    "avg_pool2d_backward": _raw(
        "dx",
        _pools(forward=False, argmax=False),
        lambda dx, dy, *window: [R.avg_pool2d_backward(dy, dx.shape, *map(_ints, window))],
    ),
    "global_avg_pool2d_forward": _raw(
        "y", lambda d: _pixels(d, "y", "x"), lambda y, x: [R.global_avg_pool2d_forward(x)]
    ),
    "global_avg_pool2d_backward": _raw(
        "dx", lambda d: _pixels(d, "dx", "dy"), lambda dx, dy: [R.global_avg_pool2d_backward(dy, dx.shape)]
    ),
    "cross_entropy": _raw(
        "loss dlogits",
        _raw_loss,
        lambda loss, dlogits, logits, labels, smoothing: [*R.cross_entropy(logits, labels, float(smoothing))],
    ),
    "sgd": _raw("weights velocities copies", _raw_sgd, _want_sgd),
    "augment_step": _raw("x batch_labels counter", _raw_augment_step, _want_augment_step),
    "augment": _raw("x", _raw_augment, lambda x, *arguments: [R.augment(*arguments).astype(x.dtype)]),
    # of CUDA alone
    "classifier": _raw("loss dx dw db metrics", _raw_classifier, _want_classifier),
    "classifier_parts": _raw("", lambda d: {"N": d.integer(1, 99), "C": 64, "K": 10}, lambda *_: []),
    # of the CPU alone
    "philox": _raw(
        "out",
        lambda d: {"out": d.out(d.integer(0, 9), dtype=np.uint32), "key": 2**64 - 1, "draw": 7},
        lambda out, key, draw: [np.resize(philox(int(key), int(draw), -(-out.size // 4)), out.shape)],
    ),
    "empty": _raw("", lambda d: {"shape": d.shape(d.integer(0, 3), empty=True), "dtype": "f4"}, lambda *_: []),
    "set_threads": _raw("", lambda d: {"count": d.integer(0, 4)}, lambda *_: []),
    **dict.fromkeys(
        ("isa", "isas", "threads", "default_threads", "memory_stats", "memory_reset_peak", "memory_release"),
        _raw("", lambda d: {}, lambda: []),
    ),
}


def binding(extension, name):
    outputs, arguments, want = RAW[name]

    def run(arguments, d):
        if name != "cast" and _some_bfloat16(v for key, v in arguments.items() if key != "copies"):
            d.comparable = False  # put in the place of one array: the CPU's bindings take it among float32 ones
        if d.device.name == "reference":
            return _flat(want(*map(_plain, arguments.values())))
        getattr(extension, name)(*arguments.values())
        return _flat(arguments[key] for key in outputs)

    return arguments, run


def _plain(value):
    """An array without a mask or other extras; also inside of tuples, which stand for structs."""
    if type(value) is tuple:
        return tuple(map(_plain, value))
    return np.asarray(value) if isinstance(value, np.ndarray) else value


def _some_bfloat16(values):
    lists = (list, tuple)
    return any(_some_bfloat16(v) if isinstance(v, lists) else getattr(v, "dtype", None) == BF16 for v in values)


def _flat(arrays):
    """The arrays among values that may be lists or None."""
    for value in arrays:
        if isinstance(value, np.ndarray):
            yield value
        elif value is not None:
            yield from _flat(value)
