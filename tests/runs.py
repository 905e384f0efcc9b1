"""What tests of whole training runs share: a tiny set to train on, and what a run has left in its folder."""

import json

import numpy as np

import tinyres

FILES = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "checkpoint.backup.safetensors", "curves.png"}


def write_tiny_cifar(folder, images=10):
    """The folder of a CIFAR-10 in binary form, `images` of noise in each training batch and 20 to test on."""
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in [(f"data_batch_{i}", images) for i in range(1, 6)] + [("test_batch", 20)]:
        records = rng.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, count)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def metrics(out, *, timing=False):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timing or k not in ("seconds", "images_per_second")} for line in lines]


def leaves(tree, path=()):
    """Every value of a checkpoint but the times, by path; arrays as dtype, shape and bytes."""
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in leaves(item, (*path, key)).items()}
    if isinstance(tree, list):
        return {k: v for i, item in enumerate(tree) for k, v in leaves(item, (*path, i)).items()}
    if isinstance(tree, np.ndarray):
        tree = (tree.dtype.str, tree.shape, tree.tobytes())
    return {} if "seconds" in path else {path: tree}


def state(out):
    return leaves(tinyres.load(out / "checkpoint.safetensors"))
