"""The units of He et al. 2016 against PyTorch modules written from the paper's text: Fig. 2 and Table 1 (the skip
connections), Fig. 4 and Table 2 (the orders of activations), and the appendix (the ends of the network, projections).

Collected only where PyTorch is installed; tests/test_torch.py fails where it is required and absent.
"""

import importlib.util

import numpy as np
import pytest

import tinyres
from tinyres import models

if importlib.util.find_spec("torch") is not None:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from test_torch import few_threads, gradients_as_tinyres, load_tinyres  # noqa: F401  # a fixture

    # Fig. 4: what is repeated for every weight layer, and how many of the last components come after the addition.
    FIG4 = {
        "original": ("weight BN ReLU", 1),
        "bn_after_add": ("weight BN ReLU", 2),
        "relu_before_add": ("weight BN ReLU", 0),
        "relu_preactivation": ("ReLU weight BN", 0),
        "full_preactivation": ("BN ReLU weight", 0),
    }

    # Table 1: the factors on the shortcut and on F, of the gate's value g.
    TABLE1 = {
        "identity": (lambda g: 1, lambda g: 1),
        "constant 0, 1": (lambda g: 0, lambda g: 1),
        "constant 0.5, 1": (lambda g: 0.5, lambda g: 1),
        "constant 0.5, 0.5": (lambda g: 0.5, lambda g: 0.5),
        "exclusive_gate": (lambda g: 1 - g, lambda g: g),
        "shortcut_gate": (lambda g: 1 - g, lambda g: 1),
        "conv1x1": (lambda g: 1, lambda g: 1),
        "dropout": (lambda g: 1, lambda g: 1),
    }

    # The weight layers of F: windows, and widths as shares of the unit's.
    WEIGHTS = {"single": [(3, 1)], "basic": [(3, 1), (3, 1)], "bottleneck": [(1, 4), (3, 4), (1, 1)]}

    class Mask(nn.Module):
        """Dropout whose masks are given: what is kept is doubled."""

        def forward(self, x):
            return 2 * self.masks.pop(0) * x if self.training else x

    def sequence(components, channels):
        """Modules from names; a weight layer is (channels, filters, window, stride)."""
        modules = []
        for component in components:
            if isinstance(component, tuple):
                channels, filters, window, stride = component
                modules.append(nn.Conv2d(channels, filters, window, stride, window // 2, bias=False))
                channels = filters
            else:
                modules.append(nn.BatchNorm2d(channels) if component == "BN" else nn.ReLU())
        return nn.Sequential(*modules)

    class Unit(nn.Module):
        """x -> f(h(x) + F(x)); attributes in the order in which tinyres lists its parameters."""

        def __init__(self, unit, skip, option, block, channels, filters, stride, first):
            super().__init__()
            order, after = FIG4[unit]
            widths = [channels, *[filters // share for _, share in WEIGHTS[block]]]
            components = []
            for i, (window, _) in enumerate(WEIGHTS[block]):
                weight = (widths[i], widths[i + 1], window, stride if i == 0 else 1)
                components += [weight if part == "weight" else part for part in order.split()]
            before = order.split().index("weight")
            # "For the first Residual Unit we adopt the first activation right after conv1 and before splitting".
            self.activation = sequence([] if first else components[:before], channels)
            end = len(components) - after
            self.residual = sequence(components[before:end], channels)
            changes = stride > 1 or channels != filters
            self.projects = skip == "conv1x1" or (changes and option == "B")
            self.stride, self.new = stride, filters - channels
            if self.projects:
                # BN "right after the weight layers", unless this unit's comes before them. Fig. 4: "All these units
                # consist of the same components", so that of a projection stays where F's last one moves on.
                norm = ["BN"] if "weight BN" in order else []
                self.shortcut = sequence([(channels, filters, 1, stride), *norm], channels)
            self.dropout = Mask() if skip == "dropout" else nn.Identity()
            self.gate = nn.Conv2d(filters, filters, 1) if skip.endswith("gate") else None
            self.scales = TABLE1[skip]
            self.f = sequence(components[end:], filters)

        def forward(self, x):
            activated = self.activation(x)
            if self.projects:  # "these projection shortcuts are also with pre-activation"
                h = self.shortcut(activated)
            else:  # the identity; over new dimensions option A of 2015: subsampled, with zeros for the new channels
                before = self.new // 2
                h = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new - before))
            h = self.dropout(h)
            g = None if self.gate is None else torch.sigmoid(self.gate(h))
            on_shortcut, on_residual = self.scales
            return self.f(on_shortcut(g) * h + on_residual(g) * self.residual(activated))

    def peer_network(unit, skip, option, block, filters, count):
        """Three stages of `count` units."""
        width = 4 * filters if block == "bottleneck" else filters
        units, channels = [], filters
        for stage in range(3):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                units.append(Unit(unit, skip, option, block, channels, width << stage, stride, first=not units))
                channels = width << stage
        order = FIG4[unit][0].split()
        # "For the last Residual Unit, we adopt an extra activation right after its element-wise addition."
        last = sequence(order[: order.index("weight")], channels)
        stem = sequence([(3, filters, 3, 1), "BN", "ReLU"], 3)
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(stem, *units, *last, *pool, nn.Linear(channels, 5)).double()

    def networks(unit, skip, option, block, count=2):
        """The same network in both, with every number drawn."""
        skip_name, *scales = skip.replace(",", "").split()
        model = models.cifar_resnet(
            {"single": 3, "basic": 6, "bottleneck": 9}[block] * count + 2,
            option,
            num_classes=5,
            block=block,
            unit=unit,
            skip=skip_name,
            scales=tuple(map(float, scales)) or None,
            gate_bias=0.0 if skip_name.endswith("gate") else None,  # both factors near a half
            filters=4,
        ).to(dtype=np.float64)
        rng, state = np.random.default_rng(1), model.state_dict()
        for name, array in state.items():
            positive = name.endswith(("gamma", "running_var"))
            state[name] = rng.uniform(0.5, 1.5, array.shape) if positive else rng.normal(0, 0.5, array.shape)
        model.load_state_dict(state)
        return model, load_tinyres(peer_network(unit, skip, option, block, 4, count), state)

    def record_masks(model, peer):
        """Have the dropouts of `peer` repeat what those of `model` do."""
        pairs = zip(
            [m for m in model.modules() if isinstance(m, tinyres.nn.Dropout)],
            [m for m in peer.modules() if isinstance(m, Mask)],
            strict=True,
        )
        for ours, theirs in pairs:
            theirs.masks = []

            def record(module, inputs, output, masks=theirs.masks):
                if not module.training:
                    return
                x, y = (np.asarray(tensor) for tensor in (inputs[0], output))
                kept = np.divide(y, 2 * x, out=np.zeros_like(x), where=x != 0)  # at zeros it has no effect
                masks.append(torch.from_numpy(np.rint(kept).transpose(0, 3, 1, 2).copy()))

            ours.register_forward_hook(record)

    def assert_close(ours, theirs, what):
        """Up to 1e-9 of the largest value, or of 0.01: a shift that a later batch norm undoes has the gradient zero."""
        ours, theirs = np.asarray(ours), theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
        assert ours.shape == theirs.shape, what
        worst, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
        assert worst <= 1e-9 * max(scale, 0.01), f"{what}: differs by {worst:.3g}, largest value {scale:.3g}"

    @pytest.mark.parametrize("block", WEIGHTS)
    @pytest.mark.parametrize("skip", TABLE1)
    @pytest.mark.parametrize("unit", FIG4)
    def test_units(rng, unit, skip, block):
        """Logits, gradients by the images and all parameters, and running statistics; in evaluation and training."""
        for option in ("A", "B"):
            model, peer = networks(unit, skip, option, block)
            record_masks(model, peer)
            images, dy = rng.standard_normal((6, 8, 8, 3)), rng.standard_normal((6, 5))
            for training in (False, True):
                x = tinyres.tensor(images, requires_grad=True)
                x_peer = torch.tensor(images, requires_grad=True)
                y = tinyres.fuse(model).train(training)(x)
                y_peer = peer.train(training)(x_peer.permute(0, 3, 1, 2))
                what = f"option {option}, {'training' if training else 'evaluation'}"
                assert_close(y, y_peer, f"{what}: logits")
                model.zero_grad()
                peer.zero_grad()
                y.backward(dy)
                y_peer.backward(torch.from_numpy(dy))
                assert_close(x.grad, x_peer.grad, f"{what}: gradient of the images")
                for (name, p), gradient in zip(model.named_parameters(), gradients_as_tinyres(peer), strict=True):
                    assert_close(p.grad, gradient, f"{what}: gradient of {name}")
            theirs = [array for name, array in peer.named_buffers() if not name.endswith("tracked")]
            for (name, array), other in zip(model.named_buffers(), theirs, strict=True):
                assert_close(array, other, name)
