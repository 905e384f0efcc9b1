"""The PyTorch twin of examples/cifar_resnet.py: same data, recipes, schedule and seeds; another engine.

    python benchmarks/peers/torch_cifar.py --data-dir DIR --epochs 8 --seed 0 --out runs/torch

From tinyres come only the files' bytes, the recipe (the rate of each step, the images' mean and scale) and the writing
of metrics.jsonl. The network, its training and the augmentation are PyTorch's, in the layout in which it is fastest
(channels_last). The last line of output is JSON: test_error in percent, seconds, peak_resident_mib.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch_resnet import CifarResNet

from tinyres import data
from tinyres.recipes import RECIPES
from tinyres.train import MetricsLog, peak_memory

SHIFT = 4


def normalise(images, mean, scale):
    """uint8 NHWC -> float32 NHWC."""
    return (images.float() - mean) * scale


def augment(x, generator):
    """Flip half of the images of x (N, H, W, C) left to right, then move each by up to SHIFT pixels; zeros outside."""
    n, height, width, _ = x.shape
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(2), x)
    x = F.pad(x, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def channels_last(x):
    """NHWC -> the NCHW view that PyTorch calls channels_last; no copy."""
    return x.permute(0, 3, 1, 2)


@torch.no_grad()
def evaluate(model, images, labels, mean, scale, batch_size):
    """Mean loss and error in percent."""
    model.eval()
    loss = wrong = 0.0
    for begin in range(0, len(images), batch_size):
        target = labels[begin : begin + batch_size]
        logits = model(channels_last(normalise(images[begin : begin + batch_size], mean, scale)))
        loss += F.cross_entropy(logits, target, reduction="sum").item()
        wrong += (logits.argmax(1) != target).sum().item()
    model.train()
    return loss / len(images), 100 * wrong / len(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--dataset", choices=["auto", "cifar10", "cifar100", "shapes10"], default="auto")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--recipe", choices=list(RECIPES), default="quick")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortcut", choices=["A", "B", "C"], default="A")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    recipe = RECIPES[args.recipe]

    dataset = data.load(args.dataset, args.data_dir)
    print(f"{dataset.name}: {dataset.source}")
    mean, scale = recipe.normalise(dataset.train_images)
    mean, scale = torch.as_tensor(mean), torch.as_tensor(scale)
    train_images, train_labels = torch.as_tensor(dataset.train_images), torch.as_tensor(dataset.train_labels)
    test_images, test_labels = torch.as_tensor(dataset.test_images), torch.as_tensor(dataset.test_labels)

    steps_per_epoch = len(train_images) // args.batch_size  # the last partial batch is dropped
    total, length = recipe.limits(steps_per_epoch, args.epochs, args.iterations)
    schedule = recipe.schedule(length)

    model = CifarResNet(args.depth, args.shortcut, args.plain, len(dataset.classes))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )
    forward = torch.compile(model) if args.compile else model

    args.out.mkdir(parents=True, exist_ok=True)
    metrics = MetricsLog(args.out / "metrics.jsonl")
    seconds = epoch_seconds = loss_sum = 0.0
    images = wrong = 0
    for step in range(total):
        began = time.perf_counter()
        place = step % steps_per_epoch
        if place == 0:
            order = torch.randperm(len(train_images), generator=generator)
        index = order[place * args.batch_size : (place + 1) * args.batch_size]
        x = channels_last(augment(normalise(train_images[index], mean, scale), generator))
        target = train_labels[index]
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        logits = forward(x)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        images += len(target)
        loss_sum += loss.item() * len(target)
        wrong += (logits.argmax(1) != target).sum().item()
        epoch_seconds += time.perf_counter() - began

        if (step + 1) % steps_per_epoch == 0 or step + 1 == total:
            began = time.perf_counter()
            test_loss, test_error = evaluate(model, test_images, test_labels, mean, scale, args.batch_size)
            seconds += epoch_seconds + time.perf_counter() - began
            metrics.write(
                step=step + 1,
                epoch=(step + 1) / steps_per_epoch,
                lr=schedule(step),
                train_loss=loss_sum / images,
                train_error=100 * wrong / images,
                test_loss=test_loss,
                test_error=test_error,
                images_per_second=round(images / epoch_seconds, 1),
                seconds=round(seconds, 2),
            )
            text = f"training loss {loss_sum / images:.4f}, test error {test_error:.2f} %"
            print(f"step {step + 1}/{total}: {text}", flush=True)
            epoch_seconds = loss_sum = 0.0
            images = wrong = 0

    last = metrics.lines[-1]
    peak = round(peak_memory() / 2**20)
    print(json.dumps({"test_error": last["test_error"], "seconds": last["seconds"], "peak_resident_mib": peak}))


if __name__ == "__main__":
    main()
