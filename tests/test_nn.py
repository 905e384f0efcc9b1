"""Modules, layers, Residual and its shortcuts, fusion, summary."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import backend, nn, ops
from tinyres.errors import ArgumentError, CheckpointError, DtypeError, ShapeError


def images(*shape, dtype=np.float32, seed=0):
    return tinyres.tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def unit(channels=4):
    return nn.Residual(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
    )


# Module -------------------------------------------------------------------------------------------------------


def test_names_follow_assignment_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(3, 2)
            self.first = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            self.scale = nn.Parameter(np.ones(1))

    names = [name for name, _ in Net().named_parameters()]
    assert names == ["scale", "second.weight", "second.bias", "first.0.gamma", "first.0.beta"]
    assert [name for name, _ in Net().named_buffers()] == ["first.0.running_mean", "first.0.running_var"]
    assert [name for name, _ in Net().named_modules()] == ["", "second", "first", "first.0", "first.1"]


def test_shared_parameters_are_listed_once():
    layer = nn.Linear(3, 3)
    assert len(list(nn.Sequential(layer, layer).parameters())) == 2


def test_mistakes_with_attributes_are_named():
    class Early(nn.Module):
        def __init__(self):
            self.layer = nn.ReLU()

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.ReLU()]

    with pytest.raises(ArgumentError, match="super"):
        Early()
    with pytest.raises(ArgumentError, match="Sequential"):
        Listed()
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        nn.Linear(1, 1).wieght  # noqa: B018
    with pytest.raises(DtypeError):
        nn.Sequential(nn.ReLU(), "relu")


def test_attributes_can_change_kind():
    module = nn.Linear(2, 2)
    module.bias = None
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    module.bias = nn.Parameter(np.ones(2, np.float32))
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


def test_train_and_eval_reach_everything():
    model = nn.Sequential(unit(), nn.Dropout(0.5))
    assert all(not m.training for m in model.eval().modules())
    assert all(m.training for m in model.train().modules())


def test_state_dict_round_trip_and_report():
    a, b = (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)) for _ in range(2))
    a(images(2, 5, 5, 2))
    b.load_state_dict(a.state_dict())
    for name, array in b.state_dict().items():
        assert np.array_equal(array, a.state_dict()[name]), name
    a.state_dict()["0.weight"][...] = 7  # a copy: the model does not change
    assert not (a[0].weight.numpy() == 7).any()

    state = a.state_dict()
    state["extra"] = state.pop("0.weight")
    state["1.gamma"] = np.ones(9)
    before = b.state_dict()
    with pytest.raises(CheckpointError) as error:
        b.load_state_dict(state)
    for text in ("missing 0.weight", "unexpected extra", "1.gamma has shape (9,)"):
        assert text in str(error.value)
    for name, array in b.state_dict().items():
        assert np.array_equal(array, before[name])


def test_to_dtype_and_device():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(dtype=np.float64)
    assert all(p.dtype == np.float64 for p in model.parameters()) and all(
        b.dtype == np.float64 for b in model.buffers()
    )
    assert model(images(2, 5, 5, 2, dtype=np.float64)).dtype == np.float64
    model.to("reference")
    x = tinyres.tensor(np.ones((2, 5, 5, 2)), device="reference")
    assert model(x).device.name == "reference"
    with pytest.raises(DtypeError):
        model.to(dtype=np.int32)
    with pytest.raises(DtypeError):
        model.to(dtype="nonsense")


def test_forward_hooks():
    model, seen = nn.Sequential(nn.ReLU(), nn.Flatten()), []
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    model(images(2, 3))
    handle.remove()
    model(images(2, 3))
    assert seen == [((2, 3), (2, 3))]


def test_sequential_slices_share_modules():
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.ReLU())
    assert len(model[1:]) == 2 and model[1:][0] is model[1] and model[-1] is model[2]
    with pytest.raises(ArgumentError):
        model[3]


def test_parameters_are_copies():
    array = np.ones(3, np.float32)
    p = nn.Parameter(array)
    p.data[0] = 5
    assert array[0] == 1


# layers -------------------------------------------------------------------------------------------------------


def test_layers_call_their_ops():
    x = images(2, 6, 6, 3)
    conv, linear, norm = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=True), nn.Linear(3, 2), nn.BatchNorm2d(3)
    assert np.array_equal(conv(x).numpy(), ops.conv2d(x, conv.weight, conv.bias, 2, 1).numpy())
    assert np.array_equal(nn.MaxPool2d(3, 2, 1)(x).numpy(), ops.max_pool2d(x, 3, 2, 1).numpy())
    assert np.array_equal(nn.AvgPool2d(2)(x).numpy(), ops.avg_pool2d(x, 2).numpy())
    assert nn.Flatten()(x).shape == (2, 108)
    assert linear(nn.GlobalAvgPool2d()(x)).shape == (2, 2)
    norm(x)
    mean = x.numpy().reshape(-1, 3).mean(0)
    assert np.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)
    assert norm.eval()(x).shape == x.shape
    dropout = nn.Dropout(0.5)
    assert (dropout(x).numpy() == 0).any() and dropout.eval()(x) is x


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(0, 1, 3),
        lambda: nn.Conv2d(1, 1.5, 3),
        lambda: nn.Conv2d(1, 1, 0),
        lambda: nn.Conv2d(1, 1, 3, stride=0),
        lambda: nn.Conv2d(1, 1, 3, padding=-1),
        lambda: nn.Conv2d(1, 1, (1, 2, 3)),
        lambda: nn.Linear(1, 0),
        lambda: nn.BatchNorm2d(0),
        lambda: nn.BatchNorm2d(3, momentum=2),
        lambda: nn.Dropout(1.0),
        lambda: nn.MaxPool2d("a"),
    ],
)
def test_layers_refuse(make):
    with pytest.raises((ArgumentError, DtypeError)):
        make()


def test_he_initialisation():
    w = nn.Conv2d(64, 128, 3).weight.numpy()
    assert abs(w.std() / np.sqrt(2 / (9 * 64)) - 1) < 0.01 and abs(w.mean()) < 1e-3


# Residual -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", "ABC")
@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 7), 2)])
def test_shortcuts(option, channels, stride):
    x = images(2, 6, 6, channels[0])
    module = nn.shortcut(option, *channels, stride)
    projected = option == "C" or (option == "B" and stride == 2)
    if not projected and stride == 1:
        assert module is None
        return
    y = module(x).numpy()
    assert y.shape == (2, 6 // stride, 6 // stride, channels[1])
    if not projected:
        assert np.array_equal(y[..., 1:5], x.numpy()[:, ::2, ::2]) and not y[..., [0, 5, 6]].any()
        assert not list(module.parameters())


def test_residual_of_2015():
    block, x = unit(), images(2, 5, 5, 4)
    want = ops.relu(block.branch(x) + x).numpy()
    assert np.array_equal(block(x).numpy(), want)


def test_pre_activation_unit_of_2016():
    branch = [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    block, x = nn.Residual(*branch, activation=None), images(2, 5, 5, 4)
    assert np.array_equal(block(x).numpy(), (block.branch(x) + x).numpy())

    pre = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    block = nn.Residual(nn.Conv2d(4, 4, 3, padding=1), pre=pre, activation=None)
    h = pre(x)
    assert np.array_equal(block(x).numpy(), (block.branch(h) + h).numpy())


def test_join_combines_both_paths():
    class Gate(nn.Module):
        def forward(self, branch, shortcut):
            return branch * 0.25 + shortcut * 0.75

    block, x = nn.Residual(nn.Conv2d(4, 4, 1), join=Gate(), activation=None), images(2, 3, 3, 4)
    want = block.branch(x).numpy() * np.float32(0.25) + x.numpy() * np.float32(0.75)
    assert np.allclose(block(x).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("exclusive", (False, True))
def test_gates(exclusive):
    branch, x = images(2, 3, 3, 4), images(2, 3, 3, 4)
    gate = nn.Gate(4, -0.5, exclusive)
    g = 1 / (1 + np.exp(-gate.conv(x).numpy()))
    want = (1 - g) * x.numpy() + (g if exclusive else 1) * branch.numpy()
    assert np.allclose(gate(branch, x).numpy(), want, atol=1e-6)


def test_residual_refuses():
    with pytest.raises(DtypeError):
        nn.Residual(nn.ReLU(), shortcut="A")
    with pytest.raises(ArgumentError):
        nn.Residual()
    with pytest.raises(ArgumentError):
        nn.shortcut("D", 4, 8, 2)
    with pytest.raises(ShapeError):
        nn.Residual(nn.Conv2d(4, 8, 1))(images(1, 3, 3, 4))


# fusion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("arguments", [{}, {"shortcut": "B"}, {"plain": True}], ids=str)
def test_fused_equals_plain(arguments, training, device):
    tinyres.backend.use(device)
    model = tinyres.models.cifar_resnet(8, **arguments).to(dtype=np.float64).train(training)
    fused = tinyres.fuse(model)
    x, results = images(3, 8, 8, 3, dtype=np.float64), []
    state = model.state_dict()
    for net in (model, fused):
        model.load_state_dict(state)
        net.zero_grad()
        y = net(x)
        y.backward(np.random.default_rng(1).standard_normal(y.shape))
        gradients = [tinyres.backend.host(p.grad) for p in net.parameters()]
        results.append([y.numpy(), *gradients, *net.state_dict().values()])
    for plain, other in zip(*results, strict=True):
        assert np.allclose(plain, other, rtol=1e-9, atol=1e-9)


def test_fusion_is_visible_and_keeps_names():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), unit(), nn.Residual(nn.ReLU()))
    fused = tinyres.fuse(model)
    text = repr(fused)
    assert "BatchNormReLU2d" in text and "BatchNormAddReLU2d" in text and text.count("FusedResidual") == 2
    assert "Fused" not in repr(model) and "BatchNormReLU2d" not in repr(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
    fused.to(dtype=np.float64)
    assert all(b.dtype == np.float64 for b in model.buffers())


def test_fusion_declines_where_a_hook_sits():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), unit(), unit())
    seen = []
    for module in (model[0], model[2].branch[4], model[3].activation):
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    fused = tinyres.fuse(model)
    assert type(fused[0]) is nn.BatchNorm2d and type(fused[2].branch[4]) is nn.BatchNorm2d
    assert type(fused[3]) is nn.Residual
    fused(images(2, 4, 4, 4))
    assert seen == ["BatchNorm2d", "BatchNorm2d", "ReLU"]

    plain = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    plain[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numpy().min() < 0))
    tinyres.fuse(plain)(images(2, 4, 4, 4))
    assert seen[3:] == [True], "it must see what the batch norm gives"


def test_fuse_leaves_joins_and_other_activations():
    block = nn.Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), activation=None)
    assert type(tinyres.fuse(block)) is nn.Residual
    with pytest.raises(DtypeError):
        tinyres.fuse("model")


def trained_a_little(model, *shape):
    """The model in float64, with running statistics, scales and shifts that are not those of the beginning."""
    model, rng = model.to(dtype=np.float64), np.random.default_rng(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.gamma.data, module.beta.data = rng.uniform(0.5, 2, (2, *module.gamma.shape))
    x = tinyres.tensor(rng.standard_normal(shape))
    for _ in range(3):
        model(x)
    return model.eval(), x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("arguments", [{}, {"shortcut": "B"}, {"shortcut": "C"}, {"plain": True}], ids=str)
def test_folded_equals_plain(arguments, fused, device):
    tinyres.backend.use(device)
    model, x = trained_a_little(tinyres.models.cifar_resnet(8, **arguments), 3, 8, 8, 3)
    folded = tinyres.fold_batch_norm(tinyres.fuse(model) if fused else model.train())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(module.training for module in folded.modules())
    assert fused or all(module.training for module in model.modules()), "the model itself stays as it was"
    want = model.eval()(x).numpy()
    for net in (folded, folded.train()):
        assert np.allclose(net(x).numpy(), want, rtol=0, atol=1e-12 * np.abs(want).max())


def test_folded_bottlenecks_and_pre_activation():
    conv, norm = nn.Conv2d(4, 4, 3, padding=1, bias=True), nn.BatchNorm2d(4)
    conv.bias.data = np.arange(4, dtype=np.float32)
    units = [
        nn.Residual(nn.BatchNorm2d(4), nn.ReLU(), conv, norm, nn.ReLU(), nn.Conv2d(4, 4, 1), activation=None),
        nn.Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), activation=None),
    ]
    model, x = trained_a_little(nn.Sequential(*units), 2, 5, 5, 4)
    folded = tinyres.fold_batch_norm(model)
    assert np.allclose(folded(x).numpy(), model(x).numpy(), rtol=0, atol=1e-12)
    kinds = [type(module).__name__ for module in folded[0].branch]
    assert kinds == ["BatchNormReLU2d", "Identity", "Identity", "Conv2dReLU", "Identity", "Conv2d"]
    assert "bias=True" in repr(folded[1].branch) and "Conv2dReLU" in repr(folded)


def test_folding_leaves_parameters_and_state_alone():
    model, _ = trained_a_little(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), 2, 3, 3, 3
    )
    before = model.state_dict()
    folded = tinyres.fold_batch_norm(model)
    assert folded[3].weight is model[3].weight and folded[1].weight is not model[0].weight
    folded[1].weight.data[...] = 0
    assert all(np.array_equal(model.state_dict()[name], array) for name, array in before.items())
    assert [name for name, _ in folded.named_parameters()] == ["1.weight", "1.bias", "3.weight"]


def test_folding_declines_where_a_hook_sits_or_no_convolution_stands_before():
    model = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    model, x = trained_a_little(model, 2, 3, 3, 4)
    seen = []
    for i in (1, 4):
        model[i].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    folded = tinyres.fold_batch_norm(model)
    assert [type(module).__name__ for module in folded] == [type(module).__name__ for module in model]
    assert np.array_equal(folded(x).numpy(), model(x).numpy())
    assert seen == ["Conv2d", "BatchNorm2d"] * 2
    with pytest.raises(DtypeError):
        tinyres.fold_batch_norm("model")


def test_folded_joins_broadcast_as_plain_ones():
    class Pooled(nn.Module):
        def forward(self, x):
            return ops.mean(x, (1, 2), keepdims=True)

    block, x = trained_a_little(nn.Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shortcut=Pooled()), 2, 3, 3, 4)
    assert np.allclose(tinyres.fold_batch_norm(block)(x).numpy(), block(x).numpy(), rtol=0, atol=1e-12)


# summary ------------------------------------------------------------------------------------------------------


def test_summary(capsys):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=True), nn.BatchNorm2d(4), nn.GlobalAvgPool2d(), nn.Linear(4, 2)
    )
    model = nn.Sequential(*model[:3], nn.Dropout(0.5), model[3])
    before, draws = model.state_dict(), backend.random.state()
    model[0].weight.grad = gradient = np.ones_like(model[0].weight.data)
    seen: list = []
    handle = model[1].register_forward_hook(lambda *_: seen.append("a batch"))
    model[0].weight.register_hook(lambda g: seen.append("a gradient"))
    result = tinyres.summary(model, (2, 8, 8, 3))
    handle.remove()
    assert result.parameters == 3 * 3 * 3 * 4 + 4 + 8 + 10
    assert result.multiply_adds == 2 * (16 * 4 * 27 + 8)
    printed = capsys.readouterr().out
    assert "Conv2d" in printed and f"{result.multiply_adds:,}" in printed
    with tinyres.no_grad():
        again = tinyres.summary(model, (2, 8, 8, 3), show=False)
        assert again.training.activations == result.training.activations
    assert f"training, batch 2: {result.training.total / 2**20:.1f} MiB (parameters " in printed
    assert model[0].weight.grad is gradient and model[4].weight.grad is None
    assert {p.device for p in model.parameters()} == {backend.get("cpu")} and not seen
    assert backend.random.state() == draws
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name])
    for bad in ("32", (1, 2.5), (0, 32, 32, 3)):
        with pytest.raises((ArgumentError, DtypeError)):
            tinyres.summary(model, bad)


@pytest.mark.parametrize("training", (True, False))
def test_parameters_in_another_dtype_take_batch_norm_along(training):
    for fused in (False, True):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), unit()).train(training)
        model = tinyres.fuse(model) if fused else model
        for p in model.parameters():
            p.data = p.data.astype(np.float64)
        y = model(images(2, 4, 4, 4, dtype=np.float64))
        y.backward(np.ones(y.shape))
        assert y.dtype == np.float64 and all(b.dtype == np.float64 for b in model.buffers())


def test_loading_does_not_write_into_assigned_arrays():
    layer, foreign = nn.Linear(2, 2), np.zeros((2, 2), np.float32)
    state = layer.state_dict()
    foreign.flags.writeable = False
    layer.weight.data = foreign
    layer.load_state_dict(state)
    assert np.array_equal(layer.weight.data, state["weight"]) and not foreign.any()
    state["weight"][...] = 7
    assert not (layer.weight.data == 7).any()


def test_fused_joins_broadcast_as_plain_ones():
    class Pooled(nn.Module):
        def forward(self, x):
            return ops.mean(x, (1, 2), keepdims=True)

    for branch in ([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)], [nn.Conv2d(4, 4, 1)]):
        block, x = nn.Residual(*branch, shortcut=Pooled()), images(2, 3, 3, 4)
        assert np.allclose(tinyres.fuse(block)(x).numpy(), block(x).numpy(), atol=1e-6)
    block.branch = nn.Conv2d(4, 4, 1)
    assert tinyres.fuse(block)(x).shape == x.shape
