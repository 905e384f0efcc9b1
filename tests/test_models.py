"""The papers' networks: sizes, depth without recursion, golden losses."""

import re

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import models, nn, ops
from tinyres.errors import ArgumentError, DtypeError

# Parameters (batch norm's scale and shift counted, no convolution bias) and multiply-adds in millions.
SIZES = {
    20: (269_722, 40.55),
    32: (464_154, 68.86),
    44: (658_586, 97.17),
    56: (853_018, 125.5),
    110: (1_727_962, 252.9),
}


@pytest.mark.parametrize("depth", SIZES)
def test_sizes(depth):
    parameters, millions = SIZES[depth]
    result = tinyres.summary(models.cifar_resnet(depth), (1, 32, 32, 3), show=False)
    assert result.parameters == parameters
    assert result.multiply_adds / 1e6 == pytest.approx(millions, rel=5e-4)


def test_sizes_of_the_variants():
    def size(**arguments):
        return sum(p.size for p in models.cifar_resnet(20, **arguments).parameters())

    assert size(shortcut="B") == 269_722 + 2_752
    assert size(num_classes=100) == 269_722 + 5_850
    assert size(plain=True) == 269_722


@pytest.mark.parametrize("shortcut, activated", [("A", False), ("B", True)])
def test_what_a_shortcut_sees_of_a_pre_activation(shortcut, activated):
    """A projection gets the activated x, zero padding x itself; the first unit's input is activated already."""
    model = models.cifar_resnet(8, shortcut, unit="full_preactivation")
    units = [module for module in model if isinstance(module, nn.Residual)]
    assert [unit.pre is not None for unit in units] == [False, activated, activated]


# The ImageNet networks with option B and the stride in the first 1x1: parameters, multiply-adds in millions.
IMAGENET = {
    18: (11_689_512, 1_814.07),
    34: (21_797_672, 3_663.76),
    50: (25_557_032, 3_857.97),
    101: (44_549_160, 7_570.19),
    152: (60_192_808, 11_282.4),
}


@pytest.fixture
def unfilled(monkeypatch):
    """Weights of zeros: drawing those of ResNet-152 takes seconds."""
    monkeypatch.setattr(nn.init, "he_normal", lambda shape, fan_in: np.zeros(shape, np.float32))


@pytest.mark.parametrize("depth", IMAGENET)
def test_sizes_for_imagenet(depth, unfilled):
    parameters, millions = IMAGENET[depth]
    result = tinyres.summary(getattr(models, f"resnet{depth}")(), (1, 224, 224, 3), show=False)
    assert result.parameters == parameters
    assert result.multiply_adds / 1e6 == pytest.approx(millions, rel=1e-5)
    outputs = [row[2] for row in result.rows if row[1] in ("MaxPool2d", "GlobalAvgPool2d", "Linear")]
    assert outputs == [(1, 56, 56, 64), (1, 512 if depth < 50 else 2048), (1, 1000)]


def test_sizes_of_the_variants_for_imagenet(unfilled):
    def size(model):
        return sum(p.size for p in model.parameters())

    assert size(models.resnet34(shortcut="A")) == 21_623_848
    assert size(models.resnet34(shortcut="C")) == 22_716_840
    assert size(models.resnet18(num_classes=10)) == 11_689_512 - 990 * 513
    result = tinyres.summary(models.resnet50(stride_in="3x3"), (1, 224, 224, 3), show=False)
    assert result.parameters == 25_557_032
    assert result.multiply_adds / 1e6 == pytest.approx(4_089.18, rel=1e-5)


@pytest.mark.parametrize("arguments", [{"depth": 50, "shortcut": "A"}, {"depth": 18}, {"depth": 50}], ids=str)
def test_networks_for_imagenet_reach_every_parameter(arguments):
    """On smaller images and with fewer classes. tests/test_torch.py compares the gradients."""
    model = tinyres.fuse(models.imagenet_resnet(num_classes=5, **arguments))
    x = tinyres.tensor(np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32))
    ops.cross_entropy(model(x), [0, 1]).backward()
    assert all(np.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [{"depth": 20}, {"depth": 50, "shortcut": "D"}, {"depth": 50, "stride_in": "7x7"}, {"depth": 18, "num_classes": 0}],
)
def test_impossible_networks_for_imagenet(arguments):
    with pytest.raises(ArgumentError):
        models.imagenet_resnet(**arguments)
    with pytest.raises(DtypeError):
        models.imagenet_resnet(18.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"depth": 21}, "depth must be 6n + 2: 8, 14, 20, 26, ...; got depth 21"),
        ({"depth": 2}, "6n"),
        ({"depth": -4}, "at least 1"),
        ({"depth": 110, "block": "triple"}, "one of single, basic, bottleneck"),
        ({"depth": 165, "block": "bottleneck"}, "9n + 2: 11, 20, 29, 38"),
        ({"depth": 9, "block": "single"}, "3n + 2: 5, 8, 11, 14"),
        ({"depth": 20, "shortcut": "D"}, "shortcut must be one of A, B, C"),
        ({"depth": 20, "num_classes": 0}, "num_classes"),
        ({"depth": 20, "filters": 0}, "filters"),
        ({"depth": 20, "unit": "preactivation"}, "unit must be one of original, bn_after_add, relu_before_add"),
        ({"depth": 20, "skip": "highway"}, "skip must be one of identity, constant, exclusive_gate"),
        ({"depth": 20, "gate_bias": -6}, "gate_bias is for skip exclusive_gate or shortcut_gate; got skip identity"),
        ({"depth": 20, "skip": "dropout", "scales": (1, 1)}, "scales is for skip constant; got skip dropout"),
        ({"depth": 20, "skip": "constant", "scales": (1,)}, "scales are"),
        ({"depth": 20, "skip": "constant", "scales": (1, np.inf)}, "finite"),
        ({"depth": 20, "skip": "dropout", "dropout": 1.0}, "dropout must be in"),
        ({"depth": 20, "plain": True, "unit": "bn_after_add"}, "a plain network has the unit original"),
        ({"depth": 20, "plain": True, "skip": "dropout"}, "a plain network has the unit original"),
    ],
)
def test_impossible_networks(arguments, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        models.cifar_resnet(**arguments)


def test_arguments_of_other_types_are_refused():
    for arguments in ({"depth": 20.5}, {"depth": 20, "plain": 1}, {"depth": 20, "filters": 16.0}):
        with pytest.raises(DtypeError):
            models.cifar_resnet(**arguments)
    for build, arguments in ((models.vgg, {"depth": 17}), (models.vgg, {"depth": 16, "image_size": 33})):
        with pytest.raises(ArgumentError):
            build(**arguments)


# The catalogue -------------------------------------------------------------------------------------------------------

CATALOGUE = {entry.name: entry for entry in models.catalogue()}

# Counted apart from this code: parameters, multiply-adds in millions.
COUNTED = {
    "resnet20": (269_722, 40.55),
    "resnet32": (464_154, 68.86),
    "resnet44": (658_586, 97.17),
    "resnet56": (853_018, 125.5),
    "resnet110": (1_727_962, 252.9),
    "resnet1202": (19_421_274, 2829),
    "resnet164-full-preactivation": (1_703_258, 244.5),
    "resnet1001-full-preactivation": (10_327_706, 1488),
    "resnet34-A": (21_623_848, 3640),
    "resnet34-B": (21_797_672, 3664),
    "resnet50": (25_557_032, 3858),
    "resnet101": (44_549_160, 7570),
    "resnet152": (60_192_808, 11_280),
    "resnet200-original": (64_673_832, 14_780),
    "vgg16": (138_357_544, 15_470),
    "vgg19": (143_667_240, 19_630),
}


def test_the_catalogue_says_what_was_counted():
    for name, (parameters, millions) in COUNTED.items():
        assert CATALOGUE[name].parameters == parameters, name
        assert CATALOGUE[name].multiply_adds / 1e6 == pytest.approx(millions, rel=1.5e-3), name
    assert len(CATALOGUE) == len(models.catalogue()), "names must differ"


@pytest.mark.parametrize("name", CATALOGUE)
def test_sizes_in_the_catalogue(name, unfilled):
    entry = CATALOGUE[name]
    size = 224 if entry.dataset == "ImageNet" else 32
    result = tinyres.summary(entry.build(), (1, size, size, 3), show=False)
    assert (result.parameters, result.multiply_adds) == (entry.parameters, entry.multiply_adds)


def reduced(entry):
    """A network of the entry's kind that is small enough to be differentiated: its arguments."""
    if entry.make is models.vgg:
        return {"depth": entry.arguments["depth"], "filters": 2, "image_size": 32, "num_classes": 5}
    small = {**entry.arguments, "filters": 4, "num_classes": 5}
    if entry.make is models.imagenet_resnet:
        return {**small, "depth": min(entry.arguments["depth"], 50)}
    block = entry.arguments.get("block") or ("bottleneck" if entry.arguments["depth"] in (164, 1001) else "basic")
    return {**small, "block": block, "depth": {"single": 8, "basic": 14, "bottleneck": 20}[block]}


KINDS = {str(reduced(entry)): entry for entry in CATALOGUE.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_has_the_right_gradients(kind):
    """Of all its parameters and its input along one direction, fused and plain, in training."""
    entry, rng = KINDS[kind], np.random.default_rng(0)
    tinyres.manual_seed(0)
    model = entry.make(**reduced(entry)).to(dtype=np.float64)
    side = 8 if entry.dataset != "ImageNet" else 32 if entry.make is models.vgg else 64
    images = tinyres.tensor(rng.standard_normal((4, side, side, 3)), requires_grad=True)
    labels = [0, 1, 2, 3]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.gamma.data, module.beta.data = rng.uniform(0.5, 1.5, (2, *module.gamma.shape))
    leaves = [images, *model.parameters()]
    state, draws = model.state_dict(), tinyres.backend.random.state()

    def loss(net):
        net.load_state_dict(state)
        tinyres.backend.random.set_state(draws)  # the same dropout every time
        return ops.cross_entropy(net(images), labels)

    results = []
    for net in (model, tinyres.fuse(model)):
        for leaf in leaves:
            leaf.grad = None
        value = loss(net)
        value.backward()
        results.append([value.item(), *(leaf.grad for leaf in leaves)])
    for plain, fused in zip(*results, strict=True):
        assert np.allclose(plain, fused, rtol=1e-7, atol=1e-9)
    assert all(g.any() for g in results[0][1:])

    directions = [rng.standard_normal(leaf.shape) * (leaf.data.std() + 0.1) for leaf in leaves]
    wanted = sum((g * d).sum() for g, d in zip(results[0][1:], directions, strict=True))
    starts, values = [leaf.data.copy() for leaf in leaves], []
    for step in (1e-7, -1e-7):  # so small that no ReLU is likely to change sides
        for leaf, start, direction in zip(leaves, starts, directions, strict=True):
            leaf.data = start + step * direction
        state = model.state_dict()
        values.append(loss(model).item())
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("fused", (False, True))
def test_1202_layers_run(fused):
    model = models.cifar_resnet(1202)
    assert sum(p.size for p in model.parameters()) == 19_421_274
    model = tinyres.fuse(model) if fused else model
    x = tinyres.tensor(np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32))
    ops.cross_entropy(model(x), [3]).backward()
    assert all(p.grad is not None for p in model.parameters())


def golden_losses(device, steps=10):
    """Losses of the first steps of ResNet-20 in float64 on batches drawn here."""
    tinyres.backend.use(device)
    tinyres.manual_seed(0)
    model = tinyres.fuse(models.cifar_resnet(20)).to(dtype=np.float64)
    optimizer = tinyres.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        x, labels = rng.standard_normal((8, 16, 16, 3)), rng.integers(0, 10, 8)
        loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Written down from the reference device; every device must come to them.
GOLDEN = [
    3.6126822674637, 3.6917076830495, 3.2254841501305, 3.5630116638778, 3.3507877912980,
    4.0390913765735, 5.4845486325649, 5.0481188106762, 3.8457381828530, 3.4316968455889,
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_golden_losses(device):
    assert golden_losses(device) == pytest.approx(GOLDEN, rel=1e-9)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_training_gives_the_same_bits_for_any_number_of_threads(dtype):
    results = set()
    for threads in (1, 2, 3, 4):
        tinyres.manual_seed(1)
        model = tinyres.fuse(models.cifar_resnet(20)).to(dtype=dtype)
        optimizer = tinyres.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
        rng = np.random.default_rng(2)
        with tinyres.options(threads=threads):
            for _ in range(2):
                x, labels = rng.standard_normal((9, 32, 32, 3)).astype(dtype), rng.integers(0, 10, 9)
                loss = ops.cross_entropy(model(tinyres.tensor(x)), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        results.add(b"".join(array.tobytes() for array in model.state_dict().values()))
    assert len(results) == 1
