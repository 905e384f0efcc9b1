"""The cross-check with PyTorch, in float64: an engine that shares no line with this one.

Collected only where PyTorch is installed. With TINYRES_REQUIRE_TORCH=1, as in continuous integration, its absence is
a failure.
"""

import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest

import tinyres
from tinyres import ops

HAVE_TORCH = importlib.util.find_spec("torch") is not None
EXACT = 1e-10  # largest difference, as a share of the largest value


def test_torch_is_here_when_required():
    assert HAVE_TORCH or os.environ.get("TINYRES_REQUIRE_TORCH", "0") != "1", "TINYRES_REQUIRE_TORCH=1, but no torch"


def assert_same(ours, theirs, what, tolerance=EXACT):
    """Arrays (or tinyres and torch tensors) equal up to `tolerance` times the largest value."""
    ours = np.asarray(getattr(ours, "data", ours) if not isinstance(ours, np.ndarray) else ours)
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    worst, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert worst <= tolerance * scale, f"{what}: differs by {worst:.3g}, largest value {scale:.3g}"


if HAVE_TORCH:
    import torch
    from torch.nn import functional as F

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "peers"))
    from torch_resnet import CifarResNet, ImageNetResNet, gradients_as_tinyres, load_tinyres

    @pytest.fixture(autouse=True)
    def few_threads():
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # its OpenMP threads wait for each other where a core is busy, up to tenfold
        with tinyres.options(threads=2):
            yield
        torch.set_num_threads(before)

    def ours(array):
        return tinyres.tensor(array, requires_grad=True)

    def theirs(array):
        return torch.tensor(array, requires_grad=True)

    def nchw(x):
        return x.permute(0, 3, 1, 2)

    def nhwc(x):
        return x.permute(0, 2, 3, 1)

    def check(rng, ours_y, theirs_y, pairs, what):
        """Outputs equal, and the gradients of all (name, ours, theirs) for one random upstream gradient."""
        assert_same(ours_y, theirs_y, f"{what}: y")
        dy = np.asarray(rng.standard_normal(ours_y.shape))
        ours_y.backward(dy)
        theirs_y.backward(torch.from_numpy(dy))
        for name, a, b in pairs:
            assert_same(a.grad, b.grad, f"{what}: d{name}")

    # N, H, W, C, K, R, S, stride, padding
    CONVOLUTIONS = [
        (2, 8, 8, 3, 16, 3, 3, (1, 1), (1, 1)),  # the stem
        (2, 8, 8, 16, 16, 3, 3, (1, 1), (1, 1)),  # a block
        (2, 8, 8, 16, 32, 3, 3, (2, 2), (1, 1)),  # the first block of a stage
        (2, 8, 8, 16, 32, 1, 1, (2, 2), (0, 0)),  # its projection
        (3, 9, 7, 5, 11, 3, 3, (1, 1), (1, 1)),  # nothing divides a vector
        (2, 15, 13, 3, 7, 7, 7, (2, 2), (3, 3)),  # the stem of ImageNet
        (1, 6, 11, 2, 3, 2, 5, (1, 3), (0, 2)),  # unequal sides throughout
        (2, 7, 7, 4, 4, 2, 2, (3, 3), (0, 0)),  # stride beyond the window: pixels never read
        (1, 5, 5, 1, 1, 5, 5, (1, 1), (0, 0)),  # one output pixel
        (2, 4, 4, 3, 2, 3, 3, (1, 1), (2, 2)),  # padding wider than the 3x3 needs
    ]

    @pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
    @pytest.mark.parametrize("algorithm", ["naive", "direct", "auto"])
    def test_conv2d(rng, case, algorithm):
        n, h, w, c, k, r, s, stride, padding = case
        x, weight, bias = rng.standard_normal((n, h, w, c)), rng.standard_normal((r, s, c, k)), rng.standard_normal(k)
        a, b = [ours(v) for v in (x, weight, bias)], [theirs(v) for v in (x, weight, bias)]
        with tinyres.options(conv=algorithm):
            y = ops.conv2d(*a, stride=stride, padding=padding)
            y_torch = nhwc(F.conv2d(nchw(b[0]), b[1].permute(3, 2, 0, 1), b[2], stride, padding))
            check(rng, y, y_torch, zip("xwb", a, b, strict=True), "conv2d")

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("fused", ["", "relu", "add_relu"])
    def test_batch_norm(rng, training, fused):
        x, residual = rng.standard_normal((2, 4, 5, 4, 7)) * 3 + 1
        gamma, beta, mean, var = rng.standard_normal((4, 7))
        var = np.abs(var) + 0.1
        a, b = [ours(v) for v in (x, gamma, beta, residual)], [theirs(v) for v in (x, gamma, beta, residual)]
        running, running_torch = (mean.copy(), var.copy()), (torch.tensor(mean), torch.tensor(var))
        y_torch = nhwc(F.batch_norm(nchw(b[0]), *running_torch, b[1], b[2], training, momentum=0.2, eps=1e-3))
        settings = {"training": training, "momentum": 0.2, "eps": 1e-3}
        pairs = list(zip(("x", "gamma", "beta"), a, b, strict=False))
        if fused == "add_relu":
            y = ops.batch_norm_add_relu(a[0], a[3], a[1], a[2], *running, **settings)
            y_torch = F.relu(y_torch + b[3])
            pairs.append(("residual", a[3], b[3]))
        elif fused == "relu":
            y, y_torch = ops.batch_norm_relu(*a[:3], *running, **settings), F.relu(y_torch)
        else:
            y = ops.batch_norm(*a[:3], *running, **settings)
        check(rng, y, y_torch, pairs, "batch_norm")
        for array, tensor, name in zip(running, running_torch, ("running_mean", "running_var"), strict=True):
            assert_same(array, tensor, name)

    @pytest.mark.parametrize("window,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), ((2, 3), (1, 2), (1, 0))])
    @pytest.mark.parametrize("kind", ["max", "avg"])
    def test_pools(rng, kind, window, stride, padding):
        x = rng.standard_normal((2, 9, 8, 5))
        a, b = ours(x), theirs(x)
        y = getattr(ops, f"{kind}_pool2d")(a, window, stride, padding)
        y_torch = nhwc(getattr(F, f"{kind}_pool2d")(nchw(b), window, stride, padding))
        check(rng, y, y_torch, [("x", a, b)], f"{kind}_pool2d")

    def test_global_avg_pool2d(rng):
        x = rng.standard_normal((3, 5, 7, 6))
        a, b = ours(x), theirs(x)
        check(rng, ops.global_avg_pool2d(a), b.mean((1, 2)), [("x", a, b)], "global_avg_pool2d")

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    def test_cross_entropy(rng, smoothing):
        x, labels = rng.standard_normal((13, 10)) * 5, rng.integers(0, 10, 13)
        a, b = ours(x), theirs(x)
        loss = ops.cross_entropy(a, labels, label_smoothing=smoothing)
        loss_torch = F.cross_entropy(b, torch.from_numpy(labels), label_smoothing=smoothing)
        check(rng, loss, loss_torch, [("logits", a, b)], "cross_entropy")

    def test_linear(rng):
        x, w, bias = rng.standard_normal((13, 7)), rng.standard_normal((7, 11)), rng.standard_normal(11)
        a, b = [ours(v) for v in (x, w, bias)], [theirs(v) for v in (x, w, bias)]
        check(rng, ops.linear(*a), F.linear(b[0], b[1].T, b[2]), zip("xwb", a, b, strict=True), "linear")

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_sgd(rng, nesterov):
        w, gradients = rng.standard_normal((5, 4)), rng.standard_normal((6, 5, 4))
        a, b = tinyres.nn.Parameter(w.copy()), torch.nn.Parameter(torch.tensor(w))
        mine = tinyres.optim.SGD([a], 0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        peer = torch.optim.SGD([b], 0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        for gradient in gradients:
            a.grad, b.grad = gradient.copy(), torch.tensor(gradient)
            mine.step()
            peer.step()
        assert_same(a, b, "weights after six steps")

    NETWORKS = [(20, "A", False), (8, "B", False), (8, "C", False), (8, "A", True)]

    def networks(depth, shortcut, plain):
        """The same network twice, in float64: fused here, PyTorch's there."""
        tinyres.manual_seed(depth)
        model = tinyres.models.cifar_resnet(depth, shortcut, plain).to(dtype=np.float64)
        peer = load_tinyres(CifarResNet(depth, shortcut, plain).double(), model.state_dict())
        return tinyres.fuse(model), peer

    @pytest.mark.parametrize("depth,shortcut,plain", NETWORKS)
    def test_network_gradients(rng, depth, shortcut, plain):
        model, peer = networks(depth, shortcut, plain)
        x, labels = rng.standard_normal((8, 32, 32, 3)), rng.integers(0, 10, 8)
        loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
        loss_torch = F.cross_entropy(peer(nchw(torch.tensor(x))), torch.from_numpy(labels))
        assert_same(loss, loss_torch, "loss")
        loss.backward()
        loss_torch.backward()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients_as_tinyres(peer), strict=True):
            assert_same(parameter.grad, gradient, f"gradient of {name}")

    def test_bfloat16_is_as_near_as_autocast(rng):
        """Gradients in mixed precision, here and there, against those in float64."""
        model, peer = networks(8, "B", False)
        x, labels = rng.standard_normal((8, 32, 32, 3)), rng.integers(0, 10, 8)

        def ours_in(dtype):
            model.to(dtype=dtype).zero_grad()
            ops.cross_entropy(model(tinyres.tensor(x.astype(dtype))), labels).backward()
            return np.concatenate([p.grad.ravel() for p in model.parameters()])

        exact = ours_in(np.float64)
        with tinyres.options(precision="bfloat16"):
            rounded = ours_in(np.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(peer.float()(nchw(torch.tensor(x, dtype=torch.float32))), torch.from_numpy(labels))
        loss.backward()
        autocast = np.concatenate([np.ravel(g) for g in gradients_as_tinyres(peer)])
        error, theirs = (np.linalg.norm(g - exact) / np.linalg.norm(exact) for g in (rounded, autocast))
        assert 0.01 < theirs < 0.2 and error < 1.2 * theirs, (error, theirs)

    @pytest.mark.parametrize("depth,shortcut", [(18, "B"), (18, "A"), (50, "B")])
    def test_networks_for_imagenet(rng, depth, shortcut):
        """Gradients in training, then folded inference, on smaller images."""
        tinyres.manual_seed(depth)
        model = tinyres.models.imagenet_resnet(depth, shortcut, num_classes=7).to(dtype=np.float64)
        peer = load_tinyres(ImageNetResNet(depth, shortcut, 7).double(), model.state_dict())
        assert sum(p.size for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
        x, labels = rng.standard_normal((3, 64, 64, 3)), rng.integers(0, 7, 3)
        loss = ops.cross_entropy(tinyres.fuse(model)(tinyres.tensor(x)), labels)
        loss_torch = F.cross_entropy(peer(nchw(torch.tensor(x))), torch.from_numpy(labels))
        assert_same(loss, loss_torch, "loss")
        loss.backward()
        loss_torch.backward()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients_as_tinyres(peer), strict=True):
            assert_same(parameter.grad, gradient, f"gradient of {name}", 1e-8)
        y = tinyres.fold_batch_norm(model)(tinyres.tensor(x))
        assert_same(y, peer.eval()(nchw(torch.tensor(x))), "folded inference")

    @pytest.mark.parametrize("depth,shortcut,plain", NETWORKS)
    def test_twenty_training_losses(rng, depth, shortcut, plain):
        model, peer = networks(depth, shortcut, plain)
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}
        optimizer = tinyres.optim.SGD(model.parameters(), **settings)
        peer_optimizer = torch.optim.SGD(peer.parameters(), **settings)
        for step in range(20):
            x, labels = rng.standard_normal((8, 32, 32, 3)), rng.integers(0, 10, 8)
            loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
            loss_torch = F.cross_entropy(peer(nchw(torch.tensor(x))), torch.from_numpy(labels))
            assert abs(loss.item() - loss_torch.item()) <= 1e-6, f"loss of step {step}"
            optimizer.zero_grad()
            peer_optimizer.zero_grad()
            loss.backward()
            loss_torch.backward()
            optimizer.step()
            peer_optimizer.step()
