"""A training small enough for tests of processes and threads, which run it in one and compare its bits."""

import hashlib

import numpy as np

import tinyres
from tinyres import ops


def make(seed, device="cpu"):
    """A network of random weights, which the process's random state decides: to be made in one thread."""
    tinyres.manual_seed(seed)
    return tinyres.fuse(tinyres.models.cifar_resnet(8)).to(device)


def train(model, seed, steps=3):
    """A digest of the weights after some steps on data of their own."""
    rng = np.random.default_rng(seed)
    optimizer = tinyres.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    device = next(model.parameters()).device
    for _ in range(steps):
        x = tinyres.tensor(rng.standard_normal((8, 16, 16, 3)).astype(np.float32), device=device)
        optimizer.zero_grad()
        ops.cross_entropy(model(x), rng.integers(0, 10, 8)).backward()
        optimizer.step()
    return hashlib.sha256(b"".join(array.tobytes() for array in model.state_dict().values())).hexdigest()


def trained(seed):
    """The digest of a whole training, on several threads even where there is one CPU."""
    with tinyres.options(threads=3):
        return train(make(seed), seed)
