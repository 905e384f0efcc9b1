"""Weights in and out of PyTorch: names, layouts, files, and what is refused. With PyTorch also the networks themselves,
against a ResNet written here with torchvision's names.
"""

import importlib.util
import os
import re

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from test_models import IMAGENET, unfilled  # noqa: F401  # a fixture
from tinyres import models
from tinyres.errors import ArgumentError, CheckpointError
from tinyres.nn import BatchNorm2d, Conv2d, Linear, Sequential
from tinyres.torch_weights import export_torch, from_torch, import_torch, to_torch

# Arrays in the state_dict of torchvision's models.
COUNTS = {18: 122, 34: 218, 50: 320, 101: 626, 152: 932}


def network(depth=18, dtype=np.float32, device=None, seed=0, **arguments):
    """A small network of `depth` layers in which every number is drawn, those of batch norm too."""
    tinyres.manual_seed(seed)
    model = models.imagenet_resnet(depth, **{"filters": 4, "num_classes": 5, **arguments}).to(device, dtype)
    rng = np.random.default_rng(seed)
    state = model.state_dict()
    # Negative shifts: where max pooling leaves nothing for a ReLU to clip, a shift has no effect, and no gradient.
    lowest = {name: -1.0 if name.endswith(("beta", "mean", "bias")) else 0.5 for name in state}
    vectors = {n: rng.uniform(lowest[n], lowest[n] + 1, array.shape) for n, array in state.items() if array.ndim == 1}
    model.load_state_dict({**state, **vectors})
    return model


def assert_equal(state, other):
    assert list(state) == list(other)
    for name, array in state.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], name)


def test_names_and_layouts_of_one_unit():
    """Where each array of a unit comes from, written out; 11 begins the third stage of 34 layers."""
    model = network(34)
    own, state = model.state_dict(), to_torch(model)
    for k, (conv, norm) in enumerate([(0, 1), (3, 4)], 1):
        np.testing.assert_array_equal(
            state[f"layer3.0.conv{k}.weight"], np.einsum("rsck->kcrs", own[f"11.branch.{conv}.weight"])
        )
        for theirs, ours in (("weight", "gamma"), ("bias", "beta"), ("running_mean",) * 2, ("running_var",) * 2):
            np.testing.assert_array_equal(state[f"layer3.0.bn{k}.{theirs}"], own[f"11.branch.{norm}.{ours}"])
    assert state["layer3.0.downsample.0.weight"].shape == (16, 8, 1, 1)
    np.testing.assert_array_equal(state["layer3.0.downsample.1.running_var"], own["11.shortcut.1.running_var"])
    np.testing.assert_array_equal(state["fc.weight"], own["21.weight"].T)
    assert state["bn1.num_batches_tracked"] == 0 and state["bn1.num_batches_tracked"].dtype == np.int64
    assert all(array.flags.c_contiguous for array in state.values())


@pytest.mark.parametrize("depth", COUNTS)
def test_nothing_is_left_out(depth, unfilled):  # noqa: F811
    model = getattr(models, f"resnet{depth}")()
    state = to_torch(model)
    assert len(state) == COUNTS[depth]
    sizes = {name: array.size for name, array in state.items() if not re.search("running|tracked", name)}
    assert sum(sizes.values()) == IMAGENET[depth][0]
    assert sum(array.size for array in state.values()) == sum(a.size for a in model.state_dict().values()) + sum(
        name.endswith("tracked") for name in state
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("depth", [18, 50])
def test_round_trip(depth, dtype, device, tmp_path):
    """Through a dict and through a file, into a model of other weights, and from one into its fused twin."""
    model, path = network(depth, dtype, device), tmp_path / "w.safetensors"
    export_torch(tinyres.fuse(model), path)
    assert_equal(to_torch(tinyres.fuse(model)), to_torch(model))
    for load in (lambda other: from_torch(other, to_torch(model)), lambda other: import_torch(other, path)):
        other = network(depth, dtype, device, seed=1, stride_in="3x3")
        assert not np.array_equal(other.state_dict()["0.weight"], model.state_dict()["0.weight"])
        load(tinyres.fuse(other))
        assert_equal(other.state_dict(), model.state_dict())
        assert all(p.device.name == device and p.device.owns(p.data) for p in other.parameters())


def test_what_is_loaded_is_cast_and_copied():
    model, state = network(), to_torch(network(seed=1, dtype=np.float64))
    older = {name: array.astype(np.float16).tolist() for name, array in state.items() if "tracked" not in name}
    from_torch(model, older)
    np.testing.assert_array_equal(model[0].weight.numpy(), state["conv1.weight"].transpose(2, 3, 1, 0).astype("f2"))
    assert {array.dtype for array in model.state_dict().values()} == {np.dtype("float32")}
    state = to_torch(network(seed=1))
    from_torch(model, state)
    before = model.state_dict()
    for array in state.values():
        array[...] = 0
    assert_equal(model.state_dict(), before)


def test_a_state_that_does_not_fit_changes_nothing():
    model = network()
    before, state = model.state_dict(), to_torch(network(seed=1))
    for name in ("conv1.weight", "layer4.1.bn2.running_var"):
        del state[name]
    state["fc.weight"] = state["fc.weight"].T
    state["fc.bias"] = np.array(["a"] * 5)
    state["bn1.weight"], state["bn1.bias"] = None, [[1.0], [2.0, 3.0]]
    state |= {"layer5.0.conv1.weight": np.ones(3), 7: np.ones(3)}
    with pytest.raises(CheckpointError) as caught:
        from_torch(model, state)
    for problem in (
        "[from_torch] the state must fit the model: missing conv1.weight; missing layer4.1.bn2.running_var; ",
        "unexpected layer5.0.conv1.weight; unexpected 7; ",
        "fc.weight has shape (32, 5), the model's is (5, 32)",
        "fc.bias is no array of numbers",
        "bn1.weight is no array of numbers",
        "bn1.bias is no array of numbers",
    ):
        assert problem in str(caught.value)
    assert str(caught.value).count(";") == 7
    assert_equal(model.state_dict(), before)
    with pytest.raises(CheckpointError, match="needs a mapping of names to arrays; got state list"):
        from_torch(model, [1])


def changed(path, layer):
    """A network in which the layer at the dotted `path` is another one."""
    model = at = network()
    *parents, name = path.split(".")
    for parent in parents:
        at = getattr(at, parent)
    setattr(at, name, layer)
    return model


IMPOSSIBLE = {
    "A": (lambda: network(shortcut="A"), "layer 6, (Fused)?Residual"),
    "A of bottlenecks": (lambda: network(50, shortcut="A"), "layer 4, (Fused)?Residual"),
    "C": (lambda: network(shortcut="C"), "stages 8"),
    **{
        unit: (lambda unit=unit: network(unit=unit), "layer 4, (Fused)?Residual")
        for unit in models.UNITS
        if unit != "original"
    },
    **{
        skip: (lambda skip=skip: network(skip=skip), "stages 8" if skip == "conv1x1" else "layer 4, (Fused)?Residual")
        for skip in models.SKIPS
        if skip != "identity"
    },
    "plain": (lambda: network(plain=True), "layer 4, Conv2d"),
    "folded": (lambda: tinyres.fold_batch_norm(network()), "model Sequential"),
    "CIFAR": (lambda: models.cifar_resnet(8), "model Sequential"),
    "VGG": (lambda: models.vgg(16, filters=2, image_size=32), "model Sequential"),
    "a bias in the stem": (lambda: changed("0", Conv2d(3, 4, 7, 2, 3, bias=True)), "model Sequential"),
    "a bias in a unit": (lambda: changed("7.branch.3", Conv2d(8, 8, 3, 1, 1, bias=True)), "layer 7, (Fused)?Residual"),
    "half a projection": (lambda: changed("6.shortcut", Sequential(Conv2d(4, 8, 1, 2))), "layer 6, (Fused)?Residual"),
    "one convolution": (
        lambda: changed("5.branch", Sequential(Conv2d(4, 4, 1), BatchNorm2d(4))),
        "layer 5, (Fused)?Res",
    ),
    "no bias at the end": (lambda: changed("13", Linear(32, 5, bias=False)), "model Sequential"),
    "no network": (lambda: Linear(2, 3), "model Linear"),
    "no model": (lambda: None, "model NoneType"),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_models_without_names_in_pytorch(kind, fused, tmp_path):
    make, got = IMPOSSIBLE[kind]
    model = make()
    if fused and model is not None:
        model = tinyres.fuse(model)
    for op, call in (("to", lambda: export_torch(model, tmp_path / "w")), ("from", lambda: from_torch(model, {}))):
        with pytest.raises(
            ArgumentError, match=rf"\[{op}_torch\] only .* imagenet_resnet with shortcut B.*; got {got}"
        ):
            call()
    assert not os.listdir(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    model, path = network(), tmp_path / "w.safetensors"
    before = model.state_dict()
    with pytest.raises(CheckpointError, match=r"\[import_torch\] there is no file here; got path .*w.safetensors"):
        import_torch(model, path)
    for pickle in (b"PK\x03\x04archive/data.pkl", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        path.write_bytes(pickle)
        with pytest.raises(CheckpointError, match=r"not a pickle; to convert it: safetensors.torch.save_file\(torch"):
            import_torch(model, path)
    export_torch(network(seed=1), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:1000], whole[:-1], b"{}" + whole):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no readable safetensors file"):
            import_torch(model, path)
    header = b'{"conv1.weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    # NumPy knows bfloat16 once ml_dtypes is imported, but not as numbers.
    with pytest.raises(CheckpointError, match="conv1.weight is (of a type .* that NumPy lacks|no array of num)"):
        import_torch(model, path)
    tinyres.save(path, model=model)
    with pytest.raises(CheckpointError, match="missing conv1.weight; .*unexpected model/0.weight"):
        import_torch(model, path)
    assert_equal(model.state_dict(), before)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """The first bytes of a safetensors file are that length."""
    model, path = network(), tmp_path / "w"
    export_torch(network(seed=1), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = (0x80 - length) % 256
    path.write_bytes(
        (length + padding).to_bytes(8, "little") + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    )
    assert path.read_bytes()[0] == 0x80
    import_torch(model, path)
    assert_equal(model.state_dict(), network(seed=1).state_dict())


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    export_torch(network(), path)
    content = path.read_bytes()

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tinyres.checkpoint.os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        export_torch(network(seed=1), path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["w"]
    with pytest.raises(OSError):
        export_torch(network(), tmp_path / "absent" / "w")


if importlib.util.find_spec("torch") is not None:
    import safetensors.torch
    import torch
    from torch import nn
    from torch.nn import functional as F

    from test_torch import assert_same, few_threads  # noqa: F401  # a fixture for all tests

    UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

    class Unit(nn.Module):
        """A basic unit, or a bottleneck whose convolution `strided` (1 or 2) halves the image."""

        def __init__(self, channels, filters, stride, deep, strided):
            super().__init__()
            inner = filters // 4
            windows = [(channels, inner, 1), (inner, inner, 3), (inner, filters, 1)]
            self.depth = len(windows) if deep else 2
            for k, (c, f, window) in enumerate(windows if deep else [(channels, filters, 3), (filters, filters, 3)], 1):
                at = stride if k == strided else 1
                self.add_module(f"conv{k}", nn.Conv2d(c, f, window, at, window // 2, bias=False))
                self.add_module(f"bn{k}", nn.BatchNorm2d(f))
            if stride > 1 or channels != filters:
                projection = nn.Conv2d(channels, filters, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(filters))

        def forward(self, x):
            y = x
            for k in range(1, self.depth + 1):
                y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
                y = F.relu(y) if k < self.depth else y
            return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(nn.Module):
        def __init__(self, depth, strided, filters=64, num_classes=1000):
            super().__init__()
            self.conv1 = nn.Conv2d(3, filters, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(filters)
            channels, deep = filters, depth >= 50
            for stage, count in enumerate(UNITS[depth]):
                width, units = filters * 2**stage * (4 if deep else 1), []
                for i in range(count):
                    units.append(Unit(channels, width, 2 if stage and i == 0 else 1, deep, strided))
                    channels = width
                self.add_module(f"layer{stage + 1}", nn.Sequential(*units))
            self.fc = nn.Linear(channels, num_classes)

        def forward(self, images):
            """Logits of (N, H, W, C) images."""
            x = F.relu(self.bn1(self.conv1(images.permute(0, 3, 1, 2))))
            x = F.max_pool2d(x, 3, 2, 1)
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = stage(x)
            return self.fc(x.mean((2, 3)))

    def peer_network(depth, stride_in, dtype=torch.float64, seed=0):
        """A small one, in which every number is drawn."""
        torch.manual_seed(seed)
        peer = ResNet(depth, 2 if depth >= 50 and stride_in == "3x3" else 1, 4, 5).to(dtype)
        for name, array in peer.state_dict().items():
            if array.ndim == 1:
                lowest = -1.0 if name.endswith(("bias", "mean")) else 0.5  # as in network()
                array.uniform_(lowest, lowest + 1)
            elif array.ndim == 4:
                nn.init.kaiming_normal_(array, nonlinearity="relu")
            elif name.endswith("tracked"):
                array.fill_(17)
        return peer

    @pytest.mark.parametrize("depth", UNITS)
    def test_names_shapes_and_order_are_those_of_pytorch(depth, unfilled):  # noqa: F811
        with torch.device("meta"):
            theirs = ResNet(depth, 2).state_dict()
        ours = to_torch(getattr(models, f"resnet{depth}")())
        assert [(name, a.shape) for name, a in ours.items()] == [(name, tuple(a.shape)) for name, a in theirs.items()]

    @pytest.mark.parametrize("depth,stride_in", [(18, "1x1"), (34, "1x1"), (50, "1x1"), (50, "3x3")])
    @pytest.mark.parametrize("direction", ["from", "to"])
    def test_the_same_network_in_pytorch(rng, depth, stride_in, direction):
        """Logits in evaluation; logits, gradients and running statistics in training."""
        peer = peer_network(depth, stride_in)
        model = network(depth, np.float64, stride_in=stride_in)
        if direction == "from":
            from_torch(model, peer.state_dict())
        else:
            peer.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(model).items()})
        x, dy = rng.standard_normal((8, 64, 64, 3)), rng.standard_normal((8, 5))
        y = model.eval()(tinyres.tensor(x))
        assert y.numpy().std(0).min() > 0.01, "the images must have some effect"
        assert_same(y, peer.eval()(torch.tensor(x)), "logits in evaluation")
        y, y_peer = model.train()(tinyres.tensor(x)), peer.train()(torch.tensor(x))
        assert_same(y, y_peer, "logits in training")
        y.backward(dy)
        y_peer.backward(torch.from_numpy(dy))
        # The gradients are laid out as the weights are, and so come back in their place.
        gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
        twin = network(depth, np.float64, seed=1)
        from_torch(twin, {**peer.state_dict(), **gradients})
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_same(ours.grad, theirs, f"gradient of {name}")
        for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert_same(ours, theirs, name)

    def test_stride_in_matters(rng):
        """The shapes cannot tell where a bottleneck has its stride; the logits do."""
        peer, model = peer_network(50, "3x3").eval(), network(50, np.float64, stride_in="1x1").eval()
        from_torch(model, peer.state_dict())
        x = rng.standard_normal((1, 64, 64, 3))
        assert np.abs(model(tinyres.tensor(x)).numpy() - peer(torch.tensor(x)).detach().numpy()).max() > 1e-3

    def test_files_between_the_two(tmp_path):
        """Each reads what the other has written, with its own tools."""
        path, peer, model = tmp_path / "w.safetensors", peer_network(50, "3x3", torch.float32), network(50)
        safetensors.torch.save_file(peer.state_dict(), path)
        import_torch(model, path)
        wanted = {name: array.numpy() for name, array in peer.state_dict().items()}
        assert_equal({**to_torch(model), **{n: a for n, a in wanted.items() if n.endswith("tracked")}}, wanted)
        export_torch(model, path)
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        other = peer_network(50, "3x3", torch.float32, seed=1)
        other.load_state_dict(safetensors.torch.load_file(path))
        assert_equal({name: a.numpy() for name, a in other.state_dict().items()}, to_torch(model))

    def test_tensors_that_numpy_takes_and_those_it_does_not():
        peer, model = peer_network(18, "1x1", torch.float32), network()
        state = {**peer.state_dict(), **dict(peer.named_parameters())}  # parameters, which want gradients
        from_torch(model, state)
        np.testing.assert_array_equal(to_torch(model)["fc.weight"], peer.fc.weight.detach().numpy())
        state["fc.weight"], state["fc.bias"] = peer.fc.weight.bfloat16(), peer.fc.bias.to("meta")
        with pytest.raises(CheckpointError, match="fc.weight is no array .*; fc.bias is no array"):
            from_torch(model, state)

    @pytest.mark.parametrize("archive", [True, False])
    def test_what_torch_save_writes(archive, tmp_path):
        """Refused; and the advice that the refusal gives works."""
        path, peer, model = tmp_path / "model.pth", peer_network(18, "1x1", torch.float32), network()
        torch.save(peer.state_dict(), path, _use_new_zipfile_serialization=archive)
        with pytest.raises(CheckpointError, match="not a pickle; to convert it: (.*); got path") as caught:
            import_torch(model, path)
        advice = re.search("to convert it: (.*); got path", str(caught.value))[1]
        converted = tmp_path / "model.safetensors"
        exec(
            advice.replace('"model.safetensors"', "converted"), locals() | {"torch": torch, "safetensors": safetensors}
        )
        import_torch(model, converted)
        np.testing.assert_array_equal(to_torch(model)["fc.weight"], peer.fc.weight.detach().numpy())
