"""Training steps of ResNets as graphs (tinyres/graph.py): batch, augmentation, forward, backward and update.

    python benchmarks/whole_step.py --json FILE [--depths 20 56 110] [--batch-sizes 128] [--precisions bfloat16 tf32]
    python benchmarks/whole_step.py --depths 50 --batch-sizes 256 --precisions bfloat16     # of ImageNet, by its depth
    python benchmarks/whole_step.py --device emulated --depths 8 --batch-sizes 4 --rounds 1      # launches and memory

On a GPU a round is a run of steps between two events, about a fifth of a second of them, with the rate changed and the
metrics read once a round. `direct` is the same loop without graphs. benchmarks/peers/torch_gpu.py measures PyTorch at
its best on the same GPU; its steps get their batches ready made.
"""

import argparse

import numpy as np

import harness

IMAGENET = (18, 34, 50, 101, 152)  # depths
IMAGES = {32: 50_000, 224: 1024}  # by size: as many as CIFAR-10 has, and as much memory
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
TRIES = 10  # steps until one is captured


def measure(device, depth, batch_size, precision, rounds):
    import tinyres
    from tinyres import data, ops
    from tinyres.graph import Training

    tinyres.manual_seed(0)
    tinyres.options(precision=precision)
    imagenet = depth in IMAGENET
    size, network = (224, tinyres.models.imagenet_resnet) if imagenet else (32, tinyres.models.cifar_resnet)
    count, seconds = (IMAGES[size], 0.2) if device == "cuda" else (2 * batch_size, 0)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    model = tinyres.fuse(network(depth), level="block")
    optimizer = tinyres.optim.SGD(model.parameters(), LR, MOMENTUM, WEIGHT_DECAY)
    settings = {"mean": 128.0, "scale": 1 / 64, "augment": True, "shuffle": True, "device": device}
    loader = data.Loader(images, np.arange(len(images)) % 10, batch_size, **settings)
    clock = harness.CupyClock() if device == "cuda" else harness.HostClock()
    training, number = Training(model, optimizer, loader), 0

    def run(count):
        nonlocal number
        for _ in range(count):
            training.step(number, LR)
            number += 1

    def direct(count):
        for i in range(count):
            x, labels = loader.batch(i)
            loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def times(steps):
        """ms of a step, by round."""
        steps(1)
        [once] = harness.timed(lambda _: steps(1), 1, clock=clock)
        count = max(1, min(2000, int(seconds / once)))
        return harness.milliseconds([t / count for t in harness.timed(lambda _: steps(count), rounds, clock=clock)])

    while training.launches is None:
        if number == TRIES:
            raise SystemExit(f"whole_step: not captured after {TRIES} steps")
        run(1)
    training.take()
    graph = times(run)
    sums = training.take()
    if not np.isfinite(sums.loss):
        raise SystemExit(f"whole_step: the loss is {sums.loss}")
    return {
        "depth": depth,
        "batch_size": batch_size,
        "precision": precision,
        "ms": graph,
        "direct_ms": times(direct),
        "images_per_second": round(1e3 * batch_size / graph["median"]),
        "launches": training.launches,
        "arena_bytes": training.arena_bytes,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56, 110])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128])
    parser.add_argument(
        "--precisions", nargs="+", choices=("bfloat16", "tf32", "float32"), default=["bfloat16", "tf32"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    import tinyres

    if args.device == "cuda":
        harness.require("cuda")
    tinyres.backend.use(args.device)
    rows = []
    for depth in args.depths:
        for batch_size in args.batch_sizes:
            for precision in args.precisions:
                row = measure(args.device, depth, batch_size, precision, args.rounds)
                rows.append(row)
                print(row, flush=True)
                if args.json:  # after each, so that a time limit cuts the least
                    harness.write_json(args.json, harness.result("whole_step", 1, device=args.device, rows=rows))


if __name__ == "__main__":
    main()
