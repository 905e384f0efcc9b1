"""fuse(model, level="block"): residual blocks as one op, in whole networks."""

from collections import Counter

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import models, nn, ops
from tinyres.errors import ArgumentError, GraphError

NETWORKS = {
    "option A": {"depth": 8},
    "option B": {"depth": 8, "shortcut": "B"},
    "option C": {"depth": 8, "shortcut": "C"},
    "bottlenecks": {"depth": 11, "block": "bottleneck"},
    "one convolution": {"depth": 5, "block": "single"},
    "odd channels": {"depth": 8, "filters": 3},
    "pre-activation": {"depth": 8, "unit": "full_preactivation"},
    "pre-activation, option B": {"depth": 8, "unit": "full_preactivation", "shortcut": "B"},
    "pre-activation, bottlenecks": {"depth": 11, "unit": "full_preactivation", "block": "bottleneck"},
}
OTHERS = {
    "plain": {"depth": 8, "plain": True},
    "a skip of another kind": {"depth": 8, "skip": "constant"},
    "another join": {"depth": 8, "skip": "exclusive_gate"},
    "BN after the addition": {"depth": 8, "unit": "bn_after_add"},
    "ReLU before the addition": {"depth": 8, "unit": "relu_before_add"},
    "ReLU alone first": {"depth": 8, "unit": "relu_preactivation"},
}


def images(*shape, dtype=np.float64, seed=0):
    return tinyres.tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def step(net, state, x):
    """The logits, all gradients and the state after a step from `state`."""
    net.load_state_dict(state)
    net.zero_grad()
    y = net(x)
    y.backward(np.random.default_rng(1).standard_normal(y.shape))
    arrays = [y.data, *(p.grad for p in net.parameters()), *net.state_dict().values()]
    return [tinyres.backend.host(a) for a in arrays]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in NETWORKS), ("option A", False), ("pre-activation", False)]
)
def test_equals_plain(name, training, device):
    tinyres.backend.use(device)
    model = models.cifar_resnet(**NETWORKS[name]).to(dtype=np.float64).train(training)
    x, state = images(3, 8, 8, 3), model.state_dict()
    for plain, other in zip(step(model, state, x), step(tinyres.fuse(model, level="block"), state, x), strict=True):
        np.testing.assert_allclose(other, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ("float32", "tf32", "bfloat16"))
@pytest.mark.parametrize("unit", ("original", "full_preactivation"))
def test_precisions(unit, precision, device):
    """The step is that of the plain network, as far as the precision tells."""
    tinyres.backend.use(device)
    model = models.cifar_resnet(8, unit=unit)
    fused, x, state = tinyres.fuse(model, level="block"), images(4, 8, 8, 3, dtype=np.float32), model.state_dict()
    with tinyres.options(precision=precision):
        results = zip(step(model, state, x), step(fused, state, x), strict=True)
    bound = {"float32": 1e-5, "tf32": 3e-2, "bfloat16": 0.3}[precision]
    for plain, other in results:
        assert other.dtype == plain.dtype
        plain, other = plain.astype(np.float64), other.astype(np.float64)
        assert np.linalg.norm(other - plain) <= bound * np.linalg.norm(plain)


@pytest.mark.parametrize("unit", ("original", "full_preactivation"))
def test_on_the_cpu_the_bits_are_those_of_the_layers(unit):
    """There, its kernels are the same."""
    model = models.cifar_resnet(8, shortcut="B", unit=unit)
    x, state = images(4, 8, 8, 3, dtype=np.float32), model.state_dict()
    for layer, block in zip(
        *(step(tinyres.fuse(model, level=level), state, x) for level in ("layer", "block")), strict=True
    ):
        assert layer.tobytes() == block.tobytes()


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_what_it_finds(name):
    model = models.cifar_resnet(**(NETWORKS | OTHERS)[name])
    fused, layers = tinyres.fuse(model, level="block"), tinyres.fuse(model)
    assert type(layers) is nn.Sequential
    assert type(fused) is (nn.FusedSequential if name in NETWORKS else nn.Sequential)
    assert repr(fused).replace("FusedSequential", "Sequential") == repr(layers)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    again = tinyres.fuse(fused)
    assert type(again) is nn.Sequential and repr(again) == repr(layers)
    with pytest.raises(ArgumentError, match=r"\[fuse\] level must be one of layer, block; got level net"):
        tinyres.fuse(model, level="net")


class Counting:
    """An extension that counts its calls."""

    def __init__(self, extension):
        self.extension, self.calls = extension, Counter()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self.extension, name)


@pytest.fixture
def counted(monkeypatch):
    """The calls of the CUDA kernels, by name."""
    device = next((name for name in ("cuda", "emulated") if name in DEVICES), None)
    if device is None:
        pytest.skip("needs CUDA's kernels")
    tinyres.backend.use(device)
    kernels = tinyres.backend.get(device).kernels
    monkeypatch.setattr(kernels, "extension", Counting(kernels.extension))
    return kernels.extension.calls


FUSED = ("conv3x3_forward", "block_output", "block_output_backward", "conv3x3_backward_input",
         "conv3x3_backward_weight")  # fmt: skip


@pytest.mark.parametrize("precision", ("tf32", "bfloat16"))
def test_launches_of_resnet_20(counted, precision):
    """Its nine blocks take 18 + 9 launches forward and 1 + 18 + 18 backward, where slabs are added elsewhere; batch
    norms and convolutions of other kinds are those of the first layer."""
    model = tinyres.fuse(models.cifar_resnet(20), level="block")
    x = images(2, 4, 4, 3, dtype=np.float32)
    counted.clear()
    with tinyres.options(precision=precision):
        loss = ops.cross_entropy(model(x), [0, 1])
        forward = counted.copy()
        loss.backward()
    assert [forward[name] for name in FUSED] == [18, 9, 0, 0, 0]
    assert [counted[name] for name in FUSED] == [18, 9, 1, 18, 18]
    others = ("conv2d_forward", "conv2d_backward_input", "conv2d_backward_weight", "batch_norm_forward",
              "batch_norm_backward", "add_relu", "unary", "unary_backward", "binary")  # fmt: skip
    assert [counted[name] for name in others] == [1, 0, 1, 1, 1, 0, 0, 0, 2]  # binary: in the linear layer and the loss


@pytest.mark.parametrize(
    "chosen", ({}, {"precision": "tf32", "conv": "tiled"}, {"precision": "bfloat16", "conv": "mma"})
)
def test_other_choices_run_as_they_are(counted, chosen):
    """What rounds to tf32 is for those who allow it, and whoever names an algorithm gets it."""
    model = tinyres.fuse(models.cifar_resnet(8), level="block")
    counted.clear()
    with tinyres.options(**chosen):
        ops.cross_entropy(model(images(2, 4, 4, 3, dtype=np.float32)), [0, 1]).backward()
    assert not any(counted[name] for name in FUSED) and counted["conv2d_forward"] == 7


# where it declines --------------------------------------------------------------------------------------------


class Nodes(tinyres.autograd.observed):
    """The ops that run within."""

    def __init__(self):
        self.seen = Counter()

    def after_forward(self, node, inputs, attributes, out):
        self.seen[type(node).__name__] += 1


def chains(net, x, op="ResidualChain"):
    """How many residual chains a forward pass makes."""
    nodes = Nodes()
    with nodes:
        net(x)
    return nodes.seen[op]


def network(**arguments):
    return tinyres.fuse(models.cifar_resnet(14, filters=4, **arguments), level="block")


X = (2, 8, 8, 3)


def test_modules_that_are_no_units():
    x = images(2, 4, 4, 4, dtype=np.float32)
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    for module in (
        nn.Residual(nn.Identity()),
        nn.Residual(nn.Identity(), activation=None),
        nn.Residual(conv, activation=None),
        nn.Residual(norm, nn.ReLU(), activation=None),
        nn.Residual(norm, nn.ReLU(), conv, nn.BatchNorm2d(4), activation=None),
        nn.Residual(norm, conv, activation=None),
        nn.Residual(conv, norm, shortcut=nn.Conv2d(4, 4, 1)),
        nn.Residual(conv, norm, shortcut=nn.Sequential(nn.Conv2d(4, 4, 1, bias=True), nn.BatchNorm2d(4))),
        nn.Residual(conv, norm, activation=nn.Identity()),
        nn.Residual(conv, norm, pre=nn.Sequential(nn.ReLU())),
        nn.Residual(conv, nn.Conv2d(4, 4, 1), norm),
        nn.Residual(norm, nn.ReLU(), nn.Conv2d(4, 4, 1, bias=True), activation=None),
        nn.Residual(nn.BatchNorm2d(4, group=1), nn.ReLU(), conv, activation=None),
    ):
        fused = tinyres.fuse(nn.Sequential(module), level="block")
        assert type(fused) is nn.Sequential and np.isfinite(fused(x).numpy()).all(), module


def test_neighbours_are_one_op():
    x = images(*X, dtype=np.float32)
    assert chains(network(), x) == 1
    assert chains(network().eval(), x) == 0
    pre_activated = network(unit="full_preactivation")
    assert chains(pre_activated, x) == 0 and chains(pre_activated, x, "PreActivation") == 6
    assert chains(pre_activated.eval(), x, "PreActivation") == 0
    model = models.cifar_resnet(14, filters=4)
    parts = [*model]
    parts.insert(5, nn.Identity())
    assert chains(tinyres.fuse(nn.Sequential(*parts), level="block"), x) == 2
    nested = nn.Sequential(nn.Sequential(*parts[:4]), nn.Sequential(*parts[4:]))
    assert chains(tinyres.fuse(nested, level="block"), x) == 3


def test_blocks_that_run_by_themselves():
    x = images(*X, dtype=np.float32)
    hooked = network()
    seen = []
    handle = hooked[5].branch[1].register_forward_hook(lambda *call: seen.append(call[2].shape))
    assert chains(hooked, x) == 2 and seen == [(2, 4, 4, 8)], "blocks 3, 4 and 6, 7, 8, and 5 by its layers"
    handle.remove()
    assert chains(hooked, x) == 1
    frozen = network()
    frozen[8].branch[1].eval()
    assert chains(frozen, x) == 1
    grouped = models.cifar_resnet(14, filters=4)
    for module in [m for m in grouped[4].modules() if isinstance(m, nn.BatchNorm2d)]:
        module.group = 1
    assert chains(tinyres.fuse(grouped, level="block"), x) == 2
    biased = models.cifar_resnet(14, filters=4)
    biased[3].branch[0].bias = nn.Parameter(np.zeros(4, np.float32))
    assert chains(tinyres.fuse(biased, level="block"), x) == 1


def test_inputs_that_do_not_fit_are_the_modules_to_refuse():
    model = tinyres.fuse(nn.Sequential(*models.cifar_resnet(14, filters=4)[3:6]), level="block")
    with pytest.raises(tinyres.errors.ShapeError, match=r"\[conv2d\] input channels of x and w must agree"):
        model(images(2, 8, 8, 3, dtype=np.float32))
    with pytest.raises(tinyres.errors.DtypeError, match=r"\[conv2d\] x must be a Tensor"):
        model(np.zeros((2, 8, 8, 4)))
    x = images(2, 8, 8, 4, dtype=np.float32)
    with tinyres.options(precision="bfloat16"):
        assert chains(model, x) == 0 and model(x).dtype == np.float32
        assert chains(model, ops.cast(x, "bfloat16")) == 1


# what else is done with models --------------------------------------------------------------------------------


def test_checkpoints_summaries_and_folding(tmp_path):
    plain = models.cifar_resnet(8, shortcut="B")
    fused = tinyres.fuse(models.cifar_resnet(8, shortcut="B"), level="block")
    x = images(4, 8, 8, 3, dtype=np.float32)
    fused(x), fused(x)
    tinyres.save(tmp_path / "model.npz", model=fused)
    plain.load_state_dict(tinyres.load(tmp_path / "model.npz")["model"])
    want = plain.eval()(x).numpy()
    np.testing.assert_allclose(fused.eval()(x).numpy(), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tinyres.fold_batch_norm(fused)(x).numpy(), want, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in tinyres.fold_batch_norm(fused.train()).modules())
    fused, layers = (tinyres.summary(net, x.shape, show=False) for net in (fused, tinyres.fuse(plain)))
    assert fused.rows == layers.rows and fused.training.activations == layers.training.activations


@pytest.mark.parametrize("device", DEVICES)
def test_what_it_would_take_to_train(device):
    """summary runs the same Python, whatever the device fuses."""
    tinyres.backend.use(device)
    model = tinyres.fuse(models.cifar_resnet(8), level="block")
    with tinyres.options(precision="tf32"):
        footprint = tinyres.summary(model, (4, 8, 8, 3), show=False).training
    assert footprint.gradients == sum(p.data.nbytes for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_anomalies_are_found_inside(device):
    tinyres.backend.use(device)
    model, x = network(), images(*X, dtype=np.float32)
    with tinyres.detect_anomaly():
        model(x).backward(np.ones((2, 10), np.float32))
    with tinyres.detect_anomaly(), pytest.raises(GraphError, match=r"\[ResidualChain\] an array that forward saved"):
        y = model(x)
        model[6].branch[1].gamma.data[...] = 2
        y.backward(np.ones((2, 10), np.float32))


def test_a_graph_swept_twice():
    model, x = network(), images(*X, dtype=np.float32)
    y = model(x)
    y.backward(np.ones(y.shape, np.float32), retain_graph=True)
    once = [p.grad.copy() for p in model.parameters()]
    y.backward(np.ones(y.shape, np.float32))
    for p, g in zip(model.parameters(), once, strict=True):
        np.testing.assert_array_equal(p.grad, 2 * g)
