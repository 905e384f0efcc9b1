"""The papers' networks: sizes, depth without recursion, golden losses."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import models, ops
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


@pytest.mark.parametrize(
    "arguments",
    [{"depth": 21}, {"depth": 2}, {"depth": -4}, {"depth": 20, "shortcut": "D"}, {"depth": 20, "num_classes": 0}],
)
def test_impossible_networks(arguments):
    with pytest.raises(ArgumentError):
        models.cifar_resnet(**arguments)
    with pytest.raises(DtypeError):
        models.cifar_resnet(20.5)


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
