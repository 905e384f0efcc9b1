"""Malformed input of every kind to every public call: it works, or it raises the project's own error, in the form
`[op] rule; got ...`. Anything else (another exception, a warning, a crash) fails."""

import re

import ml_dtypes
import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import nn, ops
from tinyres.errors import ArgumentError, DeviceError, DtypeError, ShapeError, TinyresError

FORM = re.compile(r"^\[[\w.]+\] \S")


def tensor(*shape, dtype=np.float64, requires_grad=True, device="cpu"):
    values = (np.arange(np.prod(shape)) % 5 - 2).reshape(shape).astype(dtype)
    return tinyres.tensor(values, requires_grad=requires_grad and dtype in (np.float32, np.float64), device=device)


def holding(array):
    """A Tensor of whatever array, past the checks of `tinyres.tensor`."""
    return tinyres.Tensor(array, False, tinyres.backend.get("cpu"))


# What to put in the place of a Tensor.
TENSORS = {
    "none": lambda x: None,
    "text": lambda x: "x",
    "bytes": lambda x: b"x",
    "a number": lambda x: 2.5,
    "a complex number": lambda x: 1j,
    "an array": lambda x: x.data,
    "a list": lambda x: x.data.tolist(),
    "a dict": lambda x: {},
    "an object": lambda x: object(),
    "a type": lambda x: np.ndarray,
    "integers": lambda x: tensor(*x.shape, dtype=np.int64),
    "bools": lambda x: tensor(*x.shape, dtype=np.bool_),
    "another dtype": lambda x: tensor(*x.shape, dtype=np.float32),
    "bfloat16": lambda x: holding(x.data.astype(ml_dtypes.bfloat16)),
    "float16": lambda x: holding(x.data.astype(np.float16)),
    "long double": lambda x: holding(x.data.astype(np.longdouble)),
    "complex": lambda x: holding(x.data.astype(np.complex128)),
    "objects": lambda x: holding(x.data.astype(object)),
    "strings": lambda x: holding(x.data.astype(str)),
    "dates": lambda x: holding(x.data.astype(np.int64).astype("datetime64[s]")),
    "records": lambda x: holding(np.zeros(x.shape, [("a", "f8")])),
    "the other byte order": lambda x: holding(x.data.astype(x.dtype.newbyteorder())),
    "another device": lambda x: tensor(*x.shape, device="reference"),
    "a scalar": lambda x: tensor(),
    "an axis more": lambda x: tensor(1, *x.shape),
    "an axis less": lambda x: tensor(*x.shape[1:]),
    "no elements": lambda x: tensor(0, *x.shape[1:]),
    "an empty last axis": lambda x: tensor(*x.shape[:-1], 0),
    "all axes empty": lambda x: tensor(*(0 for _ in x.shape)),
    "one more in front": lambda x: tensor(*(n + (i == 0) for i, n in enumerate(x.shape))),
    "one more at the end": lambda x: tensor(*(n + (i == x.ndim - 1) for i, n in enumerate(x.shape))),
    "sixteen axes": lambda x: tensor(*(1,) * 16),
    "seventeen axes": lambda x: holding(np.ones((1,) * 17)),
    "not a number": lambda x: tinyres.tensor(np.full(x.shape, np.nan), requires_grad=True),
    "an array subclass": lambda x: holding(np.ma.masked_array(x.data, x.data > 0)),
    "read-only and reversed": lambda x: holding(np.broadcast_to(x.data[..., ::-1], x.shape) if x.ndim else x.data),
}

# What to put in the place of a number, a pair, a sequence, a flag.
VALUES = {
    "none": None,
    "text": "2",
    "empty text": "",
    "bytes": b"\x01\x02",
    "zero": 0,
    "minus one": -1,
    "a half": 0.5,
    "one and a half": 1.5,
    "a whole float": 2.0,
    "huge": 2**70,
    "minus huge": -(2**70),
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a complex number": 1 + 1j,
    "true": True,
    "empty": (),
    "one": (1,),
    "three": (1, 1, 1),
    "negative pair": (-1, 1),
    "zero pair": (0, 1),
    "pair of floats": (1.5, 1),
    "pair of texts": ("1", "2"),
    "pair of none": (None, None),
    "nested": [[1, 2], [3, 4]],
    "ragged": [[1], [2, 3]],
    "a set": {1, 2},
    "a dict": {"a": 1},
    "an object": object(),
    "a function": len,
    "an array": np.array([1, 2]),
    "an array of floats": np.array([0.5, 1.5]),
    "an array of objects": np.array([None, "a"], dtype=object),
    "a scalar array": np.array(1),
    "a bool array": np.array([True, False]),
    "a NumPy integer": np.int32(1),
    "a NumPy float": np.float64(0.5),
    "a NumPy span of time": np.timedelta64(1),
    "an ellipsis": ...,
    "a slice": slice(None, None, -1),
    "a slice of texts": slice("a", "b"),
    "a slice of step zero": slice(None, None, 0),
    "a tensor": tinyres.tensor(np.ones(2)),
    "a tensor of integers": tinyres.tensor(np.array([1, 0])),
}

# What to put in the place of an array: labels and running statistics.
ARRAYS = {
    **VALUES,
    "of none": np.array([]),
    "of floats": np.array([0.0, 1.0, 2.0]),
    "of float32": np.array([0.0, 1.0, 2.0], np.float32),
    "of float16": np.array([0.0, 1.0, 2.0], np.float16),
    "of one axis more": np.array([[0, 1, 2]]),
    "too short": np.array([0, 1]),
    "too long": np.array([0, 1, 2, 3]),
    "out of range": np.array([0, 1, 99]),
    "negative": np.array([0, -1, 2]),
    "the largest unsigned": np.array([0, 1, 2**64 - 1], np.uint64),
    "of texts": np.array(["a", "b", "c"]),
    "of complex": np.array([1j, 0, 1]),
    "of objects": np.array([0, None, "a"], dtype=object),
    "read-only": np.broadcast_to(np.float64(1), (3,)),
    "unaligned": np.zeros(3, [("a", "f8"), ("b", "u1")])["a"],
    "strided": np.ones(6)[::2],
    "list with a hole": [0, None, 1],
    "list out of range": [0, 1, 2**80],
}


def _valid():
    """A valid call of each op, by argument name; made anew each time."""
    x, image, row = tensor(2, 3), tensor(2, 5, 4, 3), tensor(3)
    pools = {"x": image, "window": 2, "stride": (2, 1), "padding": (1, 0)}
    statistics = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    norm = {"gamma": row, "beta": tensor(3), **statistics, "training": True, "momentum": 0.1, "eps": 1e-5}
    return {
        **{name: {"a": x, "b": tensor(2, 3)} for name in ("add", "sub", "mul", "div", "pow", "maximum", "add_relu")},
        **{name: {"x": x} for name in ("neg", "exp", "log", "sqrt", "sigmoid", "tanh", "relu")},
        **{name: {"x": x, "axis": 1, "keepdims": False} for name in ("sum", "mean", "max")},
        "cast": {"x": tensor(2, 3, dtype=np.float32), "dtype": "bfloat16"},
        "dropout": {"x": x, "p": 0.5, "training": True},
        "reshape": {"x": x, "shape": (3, 2)},
        "flatten": {"x": x, "start": 1},
        "transpose": {"x": x, "axes": (1, 0)},
        "getitem": {"x": x, "index": (1, slice(None))},
        "pad": {"x": x, "widths": ((1, 1), (0, 2)), "value": 0.5},
        "concatenate": {"tensors": [x, tensor(4, 3)], "axis": 0},
        "matmul": {"a": x, "b": tensor(3, 4)},
        "linear": {"x": x, "w": tensor(3, 4), "b": tensor(4)},
        "conv2d": {"x": image, "w": tensor(3, 2, 3, 4), "b": tensor(4), "stride": (2, 1), "padding": (1, 0)},
        "conv2d_relu": {"x": image, "w": tensor(3, 2, 3, 4), "b": tensor(4), "stride": (2, 1), "padding": (1, 0)},
        "conv2d_add_relu": {
            "x": image,
            "residual": tensor(2, 3, 3, 4),
            "w": tensor(3, 2, 3, 4),
            "b": tensor(4),
            "stride": (2, 1),
            "padding": (1, 0),
        },
        "max_pool2d": pools,
        "avg_pool2d": pools,
        "global_avg_pool2d": {"x": image},
        "batch_norm": {"x": image, **norm},
        "batch_norm_relu": {"x": image, **norm},
        "batch_norm_add_relu": {"x": image, "residual": tensor(2, 5, 4, 3), **norm},
        "cross_entropy": {"logits": tensor(3, 4), "labels": np.array([0, 3, 1]), "label_smoothing": 0.1},
        "classifier_loss": {"x": image, "w": tensor(3, 4), "b": tensor(4), "labels": np.array([0, 3])},
    }


def _variants(arguments):
    """(what is malformed, arguments) with one argument replaced, for every argument and every replacement."""
    for name, value in arguments.items():
        if isinstance(value, tinyres.Tensor):
            choices = {how: make(value) for how, make in TENSORS.items()}
        elif isinstance(value, list) and len(value) == 2:
            choices = {f"second {how}": [value[0], make(value[1])] for how, make in TENSORS.items()} | VALUES
        else:
            choices = ARRAYS if isinstance(value, np.ndarray) else VALUES
        for how, choice in choices.items():
            yield f"{name}: {how}", {**arguments, name: choice}


def _try(call, arguments, what):
    """Whether the call raised the project's error; any other exception passes through and fails the test."""
    try:
        with np.errstate(all="ignore"):
            y = call(**arguments)
            if isinstance(y, tinyres.Tensor) and y.requires_grad:
                y.backward(np.ones(y.shape))
    except TinyresError as error:
        assert FORM.match(str(error)), f"{what}: {error}"
        return True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


def test_every_op_is_here():
    assert set(_valid()) == set(ops.__all__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(ops.__all__))
def test_ops(name, device):
    tinyres.backend.use(device)
    op = getattr(ops, name)
    assert not _try(op, _valid()[name], "the valid call")
    raised = sum(_try(op, arguments, f"{name}, {what}") for what, arguments in _variants(_valid()[name]))
    assert raised >= 10
    for arguments in ({}, {"nonsense": 1}):
        with pytest.raises(TypeError):  # Python's own, for a call that does not fit the signature
            op(**arguments)


def _calls():
    """Public calls other than ops, in the form of _valid."""
    x = tensor(2, 3)
    weights = [nn.Parameter(np.ones(3))]
    return {
        "tensor": (tinyres.tensor, {"array": np.ones(2), "requires_grad": True, "dtype": np.float32, "device": "cpu"}),
        "backward": (lambda **to: (x * 2).backward(**to), {"gradient": np.ones((2, 3)), "retain_graph": True}),
        "grad": (tinyres.grad, {"ys": x * 2, "xs": x, "gradients": [np.ones((2, 3))]}),
        "register_hook": (tensor(2).register_hook, {"hook": 1}),
        "manual_seed": (tinyres.manual_seed, {"seed": 1}),
        "backend.use": (tinyres.backend.use, {"name": "cpu"}),
        "options conv": (tinyres.options, {"conv": "auto"}),
        "options threads": (tinyres.options, {"threads": 1}),
        "fuse": (tinyres.fuse, {"model": 1}),
        "SGD": (tinyres.optim.SGD, {"params": weights, "lr": 1, "momentum": 0.9, "weight_decay": 0, "nesterov": True}),
        "cifar_resnet": (tinyres.models.cifar_resnet, {"depth": 8, "shortcut": "A", "plain": False, "num_classes": 3}),
        "summary": (lambda **kw: tinyres.summary(nn.Linear(3, 2), show=False, **kw), {"input_shape": (1, 3)}),
        "Conv2d": (
            nn.Conv2d,
            {"in_channels": 3, "out_channels": 4, "window": 3, "stride": 1, "padding": 1, "bias": False},
        ),
        "Linear": (nn.Linear, {"in_features": 3, "out_features": 4, "bias": True}),
        "BatchNorm2d": (nn.BatchNorm2d, {"channels": 3, "momentum": 0.1, "eps": 1e-5}),
        "MaxPool2d": (nn.MaxPool2d, {"window": 2, "stride": 2, "padding": 0}),
        "AvgPool2d": (nn.AvgPool2d, {"window": 2, "stride": 2, "padding": 0}),
        "Dropout": (nn.Dropout, {"p": 0.5}),
        "ZeroPadShortcut": (nn.ZeroPadShortcut, {"in_channels": 3, "out_channels": 4, "stride": 2}),
        "shortcut": (
            nn.shortcut,
            {"option": "B", "in_channels": 3, "out_channels": 3, "stride": 1, "norm": True},
        ),
        "Gate": (nn.Gate, {"channels": 3, "bias": -6, "exclusive": True}),
        "join": (nn.ConstantScale(0.5, 2).forward, {"branch": x, "shortcut": x}),
        "fused join": (nn.BatchNormAddReLU2d(3).forward, {"x": x, "residual": x}),
        "batch norm in groups": (nn.BatchNorm2d(3, group=1).forward, {"x": x}),
        "without_norm_decay": (tinyres.optim.without_norm_decay, {"model": 1}),
        "step_decay": (tinyres.optim.schedules.step_decay, {"lr": 0.1, "milestones": [1], "factor": 0.1}),
        "one_cycle": (tinyres.optim.schedules.one_cycle, {"lr": 0.1, "steps": 9, "warmup": 0.3}),
        "Parameter": (nn.Parameter, {"array": np.ones(2), "device": "cpu"}),
        "Residual": (nn.Residual, {"shortcut": None, "activation": None, "pre": None, "join": None}),
        "Sequential": (lambda part: nn.Sequential(part), {"part": 1}),
        "layer": (lambda x: nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())(x), {"x": tensor(1, 2, 2, 3)}),
        "load_state_dict": (lambda state: nn.Linear(3, 2).load_state_dict(state), {"state": 1}),
        "state entry": (lambda w: nn.Linear(1, 3, bias=False).load_state_dict({"weight": w}), {"w": np.ones((1, 3))}),
        "to": (nn.Linear(3, 2).to, {"device": "cpu", "dtype": np.float32}),
    }  # fmt: skip


@pytest.mark.parametrize("name", _calls())
def test_calls(name):
    call, arguments = _calls()[name]
    for what, variant in _variants(arguments):
        _try(call, variant, f"{name}, {what}")


RULES = {
    "[conv2d] input channels of x and w must agree; got x (2, 5, 4, 3), w (3, 3, 16, 16)": (
        ShapeError, lambda: ops.conv2d(tensor(2, 5, 4, 3), tensor(3, 3, 16, 16))),
    "[conv2d] the window must fit into the padded image; got x (1, 2, 2, 1), window (5, 1), padding (1, 0)": (
        ShapeError, lambda: ops.conv2d(tensor(1, 2, 2, 1), tensor(5, 1, 1, 1), padding=(1, 0))),
    "[conv2d] operands must be on one device; got x cpu, w reference": (
        DeviceError, lambda: ops.conv2d(tensor(1, 2, 2, 1), tensor(1, 1, 1, 1, device="reference"))),
    "[conv2d] stride must be an integer; got stride 1.5": (
        DtypeError, lambda: ops.conv2d(tensor(1, 2, 2, 1), tensor(1, 1, 1, 1), stride=1.5)),
    "[add] shapes must broadcast; got a (2, 3), b (2,)": (ShapeError, lambda: tensor(2, 3) + tensor(2)),
    "[add] operands must have one dtype; got a float64, b float32": (
        DtypeError, lambda: tensor(2) + tensor(2, dtype=np.float32)),
    "[exp] x must be float32, float64 or bfloat16; got dtype int64": (
        DtypeError, lambda: ops.exp(tensor(2, dtype=np.int64))),
    "[matmul] columns of a and rows of b must agree; got a (2, 3), b (2, 3)": (
        ShapeError, lambda: tensor(2, 3) @ tensor(2, 3)),
    "[cross_entropy] labels must be in 0 .. 3; got smallest -1, largest 4": (
        ArgumentError, lambda: ops.cross_entropy(tensor(2, 4), np.array([-1, 4]))),
    "[dropout] p must be in [0, 1); got p 1": (ArgumentError, lambda: ops.dropout(tensor(2), 1)),
    "[backend] the device must be one of reference, cpu, emulated, cuda; got device gpu": (
        ArgumentError, lambda: tinyres.backend.use("gpu")),
}  # fmt: skip


@pytest.mark.parametrize("message", RULES)
def test_messages(message):
    error, call = RULES[message]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.conv2d(x, x[:1, :1, :, :1].reshape(1, 2, 1, 1), stride=2**21),
        lambda x: ops.max_pool2d(x, 1, stride=2**21),
        lambda x: ops.avg_pool2d(x, 2**19, padding=2**18),
        lambda x: ops.max_pool2d(x, 2**19, padding=2**18),
        lambda x: ops.pad(x, ((0, 2**39),) * x.ndim),
        lambda x: ops.reshape(x, (2**39, 2**39, 0)),
        lambda x: ops.reshape(x, (1,) * 40 + x.shape),
        lambda x: ops.getitem(x, (None,) * 40),
        lambda x: nn.Linear(2**39, 2**39),
    ],
)
def test_absurd_sizes(call):
    with pytest.raises(TinyresError):
        call(tinyres.tensor(np.ones((1, 2, 2, 1))))


@pytest.mark.parametrize("eps", (0, -1e-5, 1e-320, 1e39))
def test_eps_is_positive_in_float32(eps):
    for call in (lambda: nn.BatchNorm2d(3, eps=eps), lambda: ops.batch_norm(tensor(2, 3), *[tensor(3)] * 2, eps=eps)):
        with pytest.raises(ArgumentError, match="eps must be positive, and so in float32"):
            call()


def test_half_precision_numbers_are_numbers():
    """float16 cannot hold the largest float64: compared with it, NumPy warns."""
    assert ops.dropout(tensor(3), np.float16(0), True).shape == (3,)
    nn.Gate(2, 1e39, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((1,), (2, 1, 1), (0, 3)))
def test_strides_of_axes_that_have_no_steps(shape, device):
    """NumPy calls a field of a record aligned where no step is ever made by its odd strides."""
    field = np.zeros((2, *shape), [("a", "f4"), ("b", "u1")])["a"][0]
    if field.ndim > 1 and field.shape[0] == 2:
        field = field[:1]
    assert field.flags.aligned
    x = tinyres.tensor(field, device=device)
    assert (x + 1).numpy().tolist() == (field + 1).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_that_were_swapped_twice(device):
    """NumPy then calls the machine's own order by its name, not `=`."""
    swapped = np.arange(3, dtype=np.float32).astype(">f4")
    back = swapped.astype(swapped.dtype.newbyteorder())
    assert ops.neg(tinyres.tensor(back, device=device)).numpy().tolist() == [0, -1, -2]
