"""The papers' recipes: their rates by iteration, and what they ask of batch norm, weight decay and data."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import backend, data, models, nn, optim
from tinyres.errors import ArgumentError, DtypeError
from tinyres.recipes import IMAGENET, RECIPES
from tinyres.train import recompute_batch_norm

# By iteration, from the papers' and the reproductions' words.
RATES = {
    "paper2015": {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001},
    "paper2016": {0: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001},
    "fb": {81 * 390 - 1: 0.1, 81 * 390: 0.01, 122 * 390: 0.001},
    "akamaster": {100 * 390 - 1: 0.1, 100 * 390: 0.01, 150 * 390: 0.001},
}
LENGTHS = {"quick": 8 * 390, "paper2015": 64_000, "paper2016": 64_000, "fb": 164 * 390, "akamaster": 200 * 390}


@pytest.mark.parametrize("name", RATES)
def test_rates(name):
    recipe = RECIPES[name]
    schedule = recipe.schedule(recipe.iterations)
    for step, rate in RATES[name].items():
        assert schedule(step) == pytest.approx(rate, rel=1e-12), step


def test_lengths():
    assert {name: recipe.length(390) for name, recipe in RECIPES.items()} == LENGTHS


def test_limits():
    paper, quick = RECIPES["paper2015"], RECIPES["quick"]
    assert paper.limits(390, None, None) == (64_000, 64_000) and quick.limits(390, None, None) == (3_120, 3_120)
    assert paper.limits(390, None, 100) == (100, 64_000) and quick.limits(390, None, 100) == (100, 100)
    assert paper.limits(390, 10, None) == (3_900, 3_900) and quick.limits(390, 10, None) == (3_900, 3_900)
    assert paper.limits(390, 10, 100) == (100, 3_900) and quick.limits(390, 10, 5_000) == (3_900, 3_900)
    assert paper.limits(390, None, 70_000) == (70_000, 64_000)


def test_imagenet():
    lengths = {name: (recipe.length(10), recipe.batch_size) for name, recipe in IMAGENET.items()}
    assert lengths == {"paper2015": (1200, 256), "paper2016": (900, 256), "fb": (900, 256)}
    schedule = IMAGENET["paper2016"].schedule(900)
    assert [schedule(step) for step in (299, 300, 599, 600)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_a_shorter_run_has_its_milestones_at_the_same_shares():
    schedule = RECIPES["paper2015"].schedule(640, lr=0.2)
    assert [schedule(step) for step in (0, 319, 320, 479, 480, 639)] == pytest.approx(
        [0.2, 0.2, 0.02, 0.02, 2e-3, 2e-3]
    )
    schedule = RECIPES["fb"].schedule(1000)  # its first milestone is at 493.9
    assert [schedule(step) for step in (493, 494)] == pytest.approx([0.1, 0.01])
    with pytest.raises(ArgumentError, match="at least one iteration"):
        RECIPES["paper2015"].schedule(0)


def test_warm_ups():
    warm_ups = {name: recipe.warm_up for name, recipe in RECIPES.items()}
    assert warm_ups["quick"] is None and warm_ups["fb"] is None
    assert (warm_ups["paper2015"].until_error, warm_ups["paper2015"].from_depth) == (80.0, 110)
    assert (warm_ups["paper2016"].iterations, warm_ups["paper2016"].from_depth) == (400, 0)
    assert all(w.divisor == 10 for w in warm_ups.values() if w)


def test_normalisation():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    mean, scale = RECIPES["paper2015"].normalise(images)
    assert np.allclose(mean, images.mean(axis=0)) and np.allclose(scale, 1 / 255)
    mean, scale = RECIPES["fb"].normalise(images)
    assert np.allclose(mean, images.mean(axis=(0, 1, 2))) and np.allclose(1 / scale, images.std(axis=(0, 1, 2)))
    mean, scale = RECIPES["akamaster"].normalise(images)
    assert np.allclose(mean / 255, (0.485, 0.456, 0.406)) and np.allclose(1 / scale / 255, (0.229, 0.224, 0.225))


# Batch norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("images", (3, 4, 10))
def test_batch_norm_over_groups_of_images(images, device, rng):
    """As by itself on every group of 4, the last of which may be smaller; statistics follow group by group."""
    backend.use(device)
    x = rng.standard_normal((images, 3, 3, 2))
    whole, grouped = nn.BatchNorm2d(2).to(dtype=np.float64), nn.BatchNorm2d(2, group=4).to(dtype=np.float64)
    want = np.concatenate([whole(tinyres.tensor(x[i : i + 4])).numpy() for i in range(0, images, 4)])
    assert np.allclose(grouped(tinyres.tensor(x)).numpy(), want, rtol=1e-12)
    for name in ("running_mean", "running_var"):
        assert np.allclose(backend.host(getattr(grouped, name)), backend.host(getattr(whole, name)), rtol=1e-12)
    if images > 4:
        assert not np.allclose(nn.BatchNorm2d(2).to(dtype=np.float64)(tinyres.tensor(x)).numpy(), want)


def test_groups_in_evaluation_and_in_fused_layers(rng):
    x = tinyres.tensor(rng.standard_normal((6, 8, 8, 3)))
    model = models.cifar_resnet(8, filters=4).to(dtype=np.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.group = 2
    state, results = model.state_dict(), []
    for net in (model, tinyres.fuse(model)):
        net.load_state_dict(state)
        results.append((net(x).numpy(), net.eval()(x).numpy()))
        net.train()
    assert all(np.allclose(a, b, rtol=1e-10) for a, b in zip(*results, strict=True))
    with pytest.raises(ArgumentError):
        nn.BatchNorm2d(4, group=0)
    with pytest.raises(DtypeError):
        nn.BatchNorm2d(4, group=1.5)


@pytest.mark.parametrize("fused", (False, True))
def test_recomputed_statistics_are_averages_over_the_data(fused, rng):
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), np.zeros(24, np.int64)
    loader = data.Loader(images, labels, 8, scale=1 / 255)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    model = tinyres.fuse(model) if fused else model
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    model(tinyres.tensor(loader.batch(0)[0]))  # statistics of another kind, to be forgotten
    norm.eval()
    recompute_batch_norm(model, loader)
    responses = [model[0](tinyres.tensor(x)).numpy().reshape(-1, 4) for x, _ in loader.epoch()]
    assert np.allclose(norm.running_mean, np.mean([r.mean(axis=0) for r in responses], axis=0), atol=1e-5)
    assert np.allclose(norm.running_var, np.mean([r.var(axis=0, ddof=1) for r in responses], axis=0), rtol=1e-4)
    assert norm.momentum == 0.1 and not norm.training and model.training and model[3].training


# Weight decay, data ---------------------------------------------------------------------------------------------------


def test_decay_of_weights_alone():
    model = models.cifar_resnet(8)
    optimizer = optim.SGD(optim.without_norm_decay(model), 0.5, weight_decay=0.1)
    before = [p.data.copy() for p in model.parameters()]
    for p in model.parameters():
        p.grad = np.zeros_like(p.data)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert np.allclose(p.data, old * (0.95 if p.ndim > 1 else 1.0))


def test_held_out_images():
    rng = np.random.default_rng(0)
    arrays = [a for n in (10, 4) for a in (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n))]
    dataset = data.Dataset("cifar10", *arrays, classes=[""] * 10, source="here")
    part = data.held_out(dataset, 3)
    assert part.train_labels.tolist() == [*range(7)] and part.test_labels.tolist() == [7, 8, 9]
    assert np.array_equal(part.train_images, arrays[0][:7]) and np.array_equal(part.test_images, arrays[0][7:])
    assert "last 3 of 10" in part.note
    for count in (0, 10, 2.5):
        with pytest.raises(ArgumentError):
            data.held_out(dataset, count)
