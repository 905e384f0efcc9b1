"""detect_anomaly: which op, which array, which line; every op that can give an infinity, and no false alarm."""

import contextlib
import inspect
import re
import threading

import numpy as np
import pytest

import fake_cupy
import tinyres
from op_case import DEVICES
from test_cuda_device import gpu  # noqa: F401  a fixture
from test_determinism import cases
from tinyres import Function, autograd, detect_anomaly, nn, ops
from tinyres.errors import GraphError, NonFiniteError

HUGE, LARGEST = 1e200, 1.7e308  # of float64
OUTLIER = [[4.0], [-1.0], [-1.0], [-1.0], [-1.0]]  # two deviations from the mean


def leaf(*values, device="cpu"):
    return tinyres.tensor(np.array(values, np.float64), requires_grad=True, device=device)


def lines(function, start):
    """The line numbers of `function` whose text begins with `start`."""
    text, first = inspect.getsourcelines(function)
    return [first + i for i, line in enumerate(text) if line.strip().startswith(start)]


def line_named(caught):
    """File and line that an error tells."""
    file, line = re.search(r'File "(.+)", line (\d+)', str(caught.value)).groups()
    return file, int(line)


# Numbers --------------------------------------------------------------------------------------------------------------

FORWARD = {  # op: (inputs, call)
    "Log": ([[1.0, 0.0]], ops.log),
    "Sqrt": ([[4.0, -1.0]], ops.sqrt),
    "Exp": ([[1.0, 1000.0]], ops.exp),
    "Div": ([[1.0, 2.0], [1.0, 0.0]], ops.div),
    "Pow": ([[2.0, -1.0], [1.0, 0.5]], ops.pow),
    "Mul": ([[1.0, HUGE], [1.0, HUGE]], ops.mul),
    "Add": ([[1.0, LARGEST], [1.0, LARGEST]], ops.add),
    "Sub": ([[1.0, LARGEST], [1.0, -LARGEST]], ops.sub),
    "AddReLU": ([[1.0, LARGEST], [1.0, LARGEST]], ops.add_relu),
    "Sum": ([[LARGEST, LARGEST]], ops.sum),
    "Mean": ([[LARGEST, LARGEST]], ops.mean),
    "Dropout": ([[LARGEST] * 64], lambda x: ops.dropout(x, 0.5)),
    "MatMul": ([[[HUGE]], [[HUGE]]], ops.matmul),
    "Linear": ([[[HUGE]], [[HUGE]]], ops.linear),
    "Conv2d": ([[[[[HUGE]]]], [[[[HUGE]]]]], ops.conv2d),
    "Conv2dReLU": ([[[[[HUGE]]]], [[[[HUGE]]]], [0.0]], ops.conv2d_relu),
    "Conv2dAddReLU": ([[[[[HUGE]]]], [[[[0.0]]]], [[[[HUGE]]]], [0.0]], ops.conv2d_add_relu),
    "AvgPool2d": ([[[[[LARGEST], [LARGEST]]]]], lambda x: ops.avg_pool2d(x, (1, 2))),
    "GlobalAvgPool2d": ([[[[[LARGEST], [LARGEST]]]]], ops.global_avg_pool2d),
    "BatchNorm": ([OUTLIER, [LARGEST], [0.0]], ops.batch_norm),
    "BatchNormReLU": ([OUTLIER, [LARGEST], [0.0]], ops.batch_norm_relu),
    "BatchNormAddReLU": ([OUTLIER, [[0.0]] * 5, [LARGEST], [0.0]], ops.batch_norm_add_relu),
    "CrossEntropy": ([[[LARGEST, -LARGEST]]], lambda x: ops.cross_entropy(x, [1])),
}

# Forward is finite, and backward of the upstream gradient is not.
BACKWARD = {  # op: (inputs, call, upstream, the input whose gradient it is)
    "Log": ([[1.0, 1e-310]], ops.log, 1.0, 0),
    "Sqrt": ([[4.0, 0.0]], ops.sqrt, 1.0, 0),
    "Exp": ([[500.0]], ops.exp, HUGE, 0),
    "Div": ([[1.0], [1e-200]], ops.div, 1.0, 1),
    "Pow": ([[0.0], [0.5]], ops.pow, 1.0, 0),
    "Mul": ([[1e-10], [HUGE]], ops.mul, HUGE, 0),
    "MatMul": ([[[1e-10]], [[HUGE]]], ops.matmul, HUGE, 0),
    "Linear": ([[[HUGE]], [[1e-10]]], ops.linear, HUGE, 1),
    "Conv2d": ([[[[[1e-10]]]], [[[[HUGE]]]]], ops.conv2d, HUGE, 0),
    "Conv2dReLU": ([[[[[HUGE]]]], [[[[1e-10]]]], [0.0]], ops.conv2d_relu, HUGE, 1),
    "Conv2dAddReLU": ([[[[[1e-10]]]], [[[[0.0]]]], [[[[HUGE]]]], [0.0]], ops.conv2d_add_relu, HUGE, 0),
    "BatchNorm": ([OUTLIER, [HUGE], [0.0]], ops.batch_norm, HUGE, 0),
    "BatchNormReLU": ([OUTLIER, [HUGE], [0.0]], ops.batch_norm_relu, HUGE, 0),
    "BatchNormAddReLU": ([OUTLIER, [[0.0]] * 5, [HUGE], [0.0]], ops.batch_norm_add_relu, HUGE, 0),
}


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device):
    """Which NumPy does not count among the floating-point types."""
    x = tinyres.tensor(np.full((2, 3), 3e38, np.float32), device=device)
    w = tinyres.tensor(np.ones((3, 2), np.float32), requires_grad=True, device=device)
    with detect_anomaly(), tinyres.options(precision="bfloat16"):
        with pytest.raises(NonFiniteError, match=r"\[MatMul\] the result of forward must be finite; got result inf at"):
            x @ w
        y = ops.cast(x, "bfloat16") * 0.5
        assert y.dtype.name == "bfloat16"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the reference
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", FORWARD)
def test_forward_that_is_not_finite(op, device):
    inputs, call = FORWARD[op]
    tensors = [leaf(*values, device=device) for values in inputs]
    for scope in (contextlib.nullcontext(), tinyres.no_grad()):
        with pytest.raises(NonFiniteError) as caught, detect_anomaly(), scope:
            call(*tensors)
        assert str(caught.value).startswith(f"[{op}] the result of forward must be finite; got result")
    call(*tensors)  # outside of the block nothing is looked at


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", BACKWARD)
def test_backward_that_is_not_finite(op, device):
    inputs, call, upstream, which = BACKWARD[op]
    tensors = [leaf(*values, device=device) for values in inputs]
    with detect_anomaly():
        y = call(*tensors)
        with pytest.raises(NonFiniteError) as caught:
            y.backward((upstream / np.arange(1, y.size + 1)).reshape(y.shape))
    assert str(caught.value).startswith(f"[{op}] the result of backward must be finite; got gradient of input[{which}]")
    assert line_named(caught) == (__file__, lines(test_backward_that_is_not_finite, "y = call")[0])
    assert all(x.grad is None for x in tensors)


def test_the_message():
    with pytest.raises(NonFiniteError) as caught, detect_anomaly():
        leaf([1.0, 0.0], [0.0, 1.0]).log()
    number = lines(test_the_message, "leaf")[0]
    assert str(caught.value) == (
        "[Log] the result of forward must be finite; got result -inf at (0, 1) and 1 more in (2, 2), called from "
        f'File "{__file__}", line {number}: leaf([1.0, 0.0], [0.0, 1.0]).log()'
    )


def test_the_first_op_is_named():
    """Not those that the infinity reaches afterwards; and an infinity that goes no further is none of its business."""
    x = leaf(1.0, 1000.0)
    with pytest.raises(NonFiniteError, match=r"^\[Exp\] the result of forward") as caught, detect_anomaly():
        y = x * 2
        y = y.exp()
        (y - y).sum()
    assert line_named(caught)[1] == lines(test_the_first_op_is_named, "y = y.exp()")[0]
    with detect_anomaly():
        assert ops.relu(leaf(-np.inf, 1.0)).numpy().tolist() == [0, 1]
        assert ops.maximum(leaf(-np.inf, 1.0), 0.5).numpy().tolist() == [0.5, 1]


def test_what_was_given_is_not_the_ops_fault():
    x = leaf(1.0, np.nan)
    with detect_anomaly():
        with pytest.raises(NonFiniteError, match=r"^\[Mul\] what the op is given.*input\[0\] nan at \(1,\).*\(leaf\)"):
            (x * 2.0).sum()
        with pytest.raises(NonFiniteError, match=r"input\[1\] inf at \(0,\) in \(1,\) \(leaf\)"):
            leaf(1.0) + leaf(np.inf)
    y = x * 2.0
    with pytest.raises(NonFiniteError, match=r"^\[Add\].*input\[0\] nan at \(1,\) in \(2,\), called"), detect_anomaly():
        y + 1.0  # made before the block, by an op that it has not seen


def test_gradients_that_arrive():
    """With the loss, from a hook, as a sum of finite ones, and added to what a leaf holds."""
    with detect_anomaly():
        x = leaf(1e-10, 2e-10)
        with pytest.raises(NonFiniteError, match=r"^\[Mul\] the gradient that arrives .* gradient nan at \(1,\)"):
            (x * 2).backward(np.array([1.0, np.nan]))
        y = x * 2
        y.register_hook(lambda g: g * np.inf)
        with pytest.raises(NonFiniteError, match=r"^\[Mul\] the gradient that arrives"):
            y.sum().backward()
        y = x * 1.0
        with pytest.raises(NonFiniteError, match=r"^\[Mul\] the gradient that arrives"):
            (y * LARGEST + y * LARGEST).sum().backward()
        assert x.grad is None
        with pytest.raises(NonFiniteError, match=r"^\[backward\] a leaf's whole gradient"):
            (x * LARGEST + x * LARGEST).sum().backward()
        assert x.grad is None
        x.grad = np.array([1.0, LARGEST])
        with pytest.raises(NonFiniteError, match=r"^\[backward\] a leaf's whole gradient .* inf at \(1,\)"):
            (x * LARGEST).sum().backward()
        assert x.grad.tolist() == [1.0, LARGEST]


def test_running_statistics():
    """An overflow that reaches only the running variance would else show at evaluation: as the same for all inputs."""
    mean, var = np.zeros(1), np.ones(1)
    rule = r"^\[BatchNorm\] what the op is given, or keeps a running average in, .* running\[1\] inf at \(0,\)"
    with pytest.raises(NonFiniteError, match=rule), detect_anomaly():
        ops.batch_norm(leaf([1e160], [-1e160]), leaf(1.0), leaf(0.0), mean, var)
    with pytest.raises(NonFiniteError, match=rule), detect_anomaly():
        ops.batch_norm(leaf([1.0], [2.0]), leaf(1.0), leaf(0.0), np.zeros(1), np.full(1, np.inf), training=False)


class Broken(Function):
    """Two results, of which the second is not finite; its gradient never is."""

    def forward(self, x, good=False):
        return x * 1, x * (1 if good else np.nan)

    def backward(self, dfirst, dsecond):
        return dfirst * np.nan


def test_functions_of_the_program():
    x = leaf(1.0, 2.0)
    with detect_anomaly():
        with pytest.raises(NonFiniteError, match=r"^\[Broken\] .* got result\[1\] nan at \(0,\) and 1 more"):
            Broken.apply(x)
        y, _ = Broken.apply(x, good=True)
        with pytest.raises(NonFiniteError, match=r"^\[Broken\] the result of backward") as caught:
            y.sum().backward()
    assert line_named(caught)[1] == lines(test_functions_of_the_program, "y, _ = Broken")[0]


class Both(Function):
    """Gives the second input a gradient that is not finite, wanted or not."""

    def forward(self, a, b):
        return a + b

    def backward(self, dy):
        return dy, dy * np.inf


class Attributes(Function):
    def forward(self, x, **attributes):
        return x * attributes["op"]


def test_attributes_of_any_name_and_kind():
    x = tinyres.tensor(np.ones(1))
    with detect_anomaly():
        Attributes.apply(x, op=2, called=np.array(["text"]), rule=np.array([None]), error=np.ones(1, np.int8))
        with pytest.raises(NonFiniteError, match=r"got op inf at \(0,\) in \(1,\), called from"):
            Attributes.apply(x, op=np.full(1, np.inf), called=np.ones(1))


def test_gradients_that_nobody_wants():
    """Those of constants are thrown away."""
    with detect_anomaly():
        Both.apply(leaf(1.0), tinyres.tensor(np.ones(1))).sum().backward()
        with pytest.raises(NonFiniteError, match=r"^\[Both\] .* gradient of input\[1\]"):
            Both.apply(leaf(1.0), leaf(1.0)).sum().backward()


# Where ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Linear(3, 4), nn.BatchNorm2d(4), nn.ReLU()
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        h = self.relu(self.norm(h))
        return self.last(h)


def test_the_line_is_in_the_programs_module():
    model, x = Net(), tinyres.tensor(np.ones((5, 3), np.float32))
    model.last.weight.data[0, 0] = np.inf
    with pytest.raises(NonFiniteError) as caught, detect_anomaly():
        model(x)
    assert str(caught.value).startswith("[Linear] what the op is given")
    assert "input[1] inf at (0, 0) in (4, 2) (leaf last.weight), called by last (Linear) from" in str(caught.value)
    assert line_named(caught) == (__file__, lines(Net.forward, "return self.last(h)")[0])


def test_the_layer_of_a_fused_model():
    """The line is that which called the model; the layer has its dotted name, in the sweep too."""
    model = tinyres.fuse(tinyres.models.cifar_resnet(8))
    x = tinyres.tensor(np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32))
    names = [name for name, layer in model.named_modules() if type(layer).__name__ == "BatchNormAddReLU2d"]
    layer = dict(model.named_modules())[names[1]]
    with detect_anomaly():
        y = model(x)
        layer.gamma.data[...] = 3e38
        with pytest.raises(
            GraphError, match=rf"changed input\[2\] \(32,\), called by {re.escape(names[1])} "
        ) as caught:
            y.sum().backward()
        assert line_named(caught) == (__file__, lines(test_the_layer_of_a_fused_model, "y = model(x)")[0])
        with pytest.raises(NonFiniteError, match=rf"^\[BatchNormAddReLU\].*called by {re.escape(names[1])} ") as caught:
            model(x)
    assert line_named(caught) == (__file__, lines(test_the_layer_of_a_fused_model, "model(x)")[0])


def test_recorded_outside_of_the_block():
    x = leaf(4.0, 0.0)
    y = x.sqrt()
    with pytest.raises(NonFiniteError, match=r"^\[Sqrt\].* called outside of detect_anomaly$"), detect_anomaly():
        y.sum().backward()


# Changed in place -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", cases(1), ids=str)
def test_changed_in_place(case, device):
    """Each op, each input changed between forward and backward: an error if and only if the op had saved it, and so
    whenever the gradients would be others. Unchanged, two sweeps raise nothing and give the same bits as outside."""
    want = case.run(case.tensors(device))
    with detect_anomaly():
        tensors = case.tensors(device)
        y = case.seeded(*tensors)
        dy = np.random.default_rng(7).standard_normal(y.shape)
        y.backward(dy, retain_graph=True)
        got = [y.numpy(), *(x.grad for x in tensors)]
        assert [a.tobytes() for a in got] == [a.tobytes() for a in want]
        y.backward(dy)
    for i in range(len(tensors)):
        outcomes = []
        for scope in (contextlib.nullcontext(), detect_anomaly()):
            tensors = case.tensors(device)
            with scope:
                y = case.seeded(*tensors)
                held = [a for _, a in tinyres.anomaly._arrays(y.device, "", y._node.saved)]
                saved = any(np.shares_memory(tensors[i].data, a) for a in held)
                tensors[i].data[...] = tensors[i].data[::-1] * 1.5
                try:
                    y.backward(dy)
                    outcomes.append([x.grad.tobytes() for x in tensors])
                except GraphError as error:
                    assert f"changed input[{i}] {tensors[i].shape}, called from" in str(error)
                    assert "case.seeded" in str(error) or "self.call" in str(error) or "lambda" in str(error)
                    outcomes.append("raised")
        assert (outcomes[1] == "raised") == saved
        assert saved or outcomes[0] == [a.tobytes() for a in want[1:]], "a change that would be missed"


def test_changed_result_and_statistics():
    with detect_anomaly():
        y = leaf(1.0, 2.0).exp()
        y.data += 1
        with pytest.raises(GraphError, match=r"^\[Exp\] an array that forward saved .* got changed result \(2,\)"):
            y.sum().backward()
        running = np.zeros(1), np.ones(1)
        x, gamma, beta = leaf([1.0], [2.0]), leaf(1.0), leaf(0.0)
        y = ops.batch_norm(x, gamma, beta, *running, training=False)
        ops.batch_norm(x, gamma, beta, *running)
        with pytest.raises(GraphError, match=r"changed running\[0\] \(1,\)"):
            y.sum().backward()


def test_an_update_before_backward():
    """The mistake as it is made: the loss of one batch is swept after the step of another."""
    model, x = Net(), tinyres.tensor(np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32))
    optimizer = tinyres.optim.SGD(model.parameters(), lr=0.1)
    with detect_anomaly():
        first, second = model(x).sum(), model(x).sum()
        first.backward()
        optimizer.step()
        with pytest.raises(GraphError, match=r"^\[Linear\] .* changed input\[1\] \(4, 2\), called by last \(Linear\)"):
            second.backward()


MODELS = {
    "basic": {"depth": 8},
    "bottleneck": {"depth": 11, "block": "bottleneck"},
    "preactivation": {"depth": 8, "unit": "full_preactivation"},
    "gate": {"depth": 8, "skip": "exclusive_gate", "gate_bias": -6},
    "dropout": {"depth": 8, "skip": "dropout"},
}


@pytest.mark.parametrize("name", MODELS)
def test_no_false_alarm(name):
    """Two steps of the papers' networks, fused and not, and an evaluation give the bits that they give outside.

    Gradients that are added to or written over in place, and shared arrays, must not look like mistakes.
    """
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((4, 16, 16, 3)).astype(np.float32), rng.integers(0, 10, 4)
    results = []
    for scope in (contextlib.nullcontext(), detect_anomaly()):
        tinyres.manual_seed(3)
        plain = tinyres.models.cifar_resnet(**MODELS[name])
        with scope:
            for model in (plain, tinyres.fuse(plain)):
                optimizer = tinyres.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
                model.train()
                ops.cross_entropy(model(tinyres.tensor(x)), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            y = tinyres.fold_batch_norm(plain)(tinyres.tensor(x))
        results.append([a.tobytes() for a in plain.state_dict().values()] + [y.numpy().tobytes()])
    assert results[0] == results[1]


def test_on_a_gpu(gpu):  # noqa: F811
    with detect_anomaly():
        x = leaf(4.0, 0.0, device="cuda")
        with pytest.raises(NonFiniteError, match=r"^\[Log\] .* got result -inf at \(1,\)"):
            x.log()
        y = ops.mean(x * x)
        y.backward(retain_graph=True)
        x.data += fake_cupy.asarray([1.0, 1.0])
        with pytest.raises(GraphError, match=r"^\[Mul\] .* changed input\[0\]"):
            y.backward()


# The block ------------------------------------------------------------------------------------------------------------


def test_blocks_nest_and_end():
    x = leaf(0.0)

    def log():
        return x.log()

    watched, block = detect_anomaly()(log), detect_anomaly()
    with pytest.raises(NonFiniteError):
        watched()
    with block, block, tinyres.no_grad(), block:
        with pytest.raises(NonFiniteError):
            log()
    with block:
        with detect_anomaly():
            pass
        with pytest.raises(NonFiniteError), tinyres.no_grad():
            log()
        with pytest.raises(NonFiniteError):
            watched()
        with pytest.raises(NonFiniteError):
            log()
    log()
    assert autograd._context.get() == (0, ())


def test_blocks_belong_to_their_thread():
    seen = []
    with detect_anomaly():
        thread = threading.Thread(target=lambda: seen.append(leaf(0.0).log().item()))
        thread.start()
        thread.join()
    assert seen == [-np.inf]


def test_nothing_is_kept():
    """What was saved for the comparison goes with what forward saved; without the block, nothing is made at all."""
    x = leaf(1.0, 2.0)
    y = x * x
    assert y._node.note is None and "note" not in vars(y._node)
    with detect_anomaly():
        y = x * x
        before = tinyres.backend.memory.stats()["bytes_in_use"]
        y.sum().backward()
        assert tinyres.backend.memory.stats()["bytes_in_use"] <= before + 2 * 64  # the gradient
    with pytest.raises(NonFiniteError), detect_anomaly():
        x.data[0] = 0
        x.log()


def test_off_it_costs_one_look(monkeypatch):
    """Without a block, neither an op nor a sweep calls anything of detect_anomaly's."""
    for name in ("after_forward", "before_backward", "after_backward", "after_sweep"):
        monkeypatch.setattr(detect_anomaly, name, lambda *args: pytest.fail("called outside of a block"))
    x = leaf(0.0)
    (x.log() * 2).sum().backward()
