"""Train a ResNet of the papers on CIFAR: the whole run in one file, every setting in sight.

    python examples/cifar_resnet.py                              ResNet-20, quick recipe on a CPU
    python examples/cifar_resnet.py --depth 56 --recipe paper    as in "Deep Residual Learning" (2015), section 4.2
    python examples/cifar_resnet.py --out runs/mine --resume     go on where the run in runs/mine stopped
    python examples/cifar_resnet.py --device emulated --depth 8 --iterations 5    through the CUDA kernels, on a CPU

Into the folder --out it writes config.json, metrics.jsonl (a line an epoch), checkpoint.safetensors (every epoch, and
when stopped) and curves.png. Ctrl-C or SIGTERM stops it after the step it is in, with a checkpoint; --resume goes on
to the same bits as a run that was never stopped.

Exit status: 0 when the run is complete, 1 on an error (no data, NaN loss ...), 128 + signal number when stopped, so
130 after Ctrl-C, as shells have it: a script can tell a stopped run from a complete one. A second signal stops it at
once (130), without a checkpoint of its own.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

import tinyres
from tinyres import backend, data, models, ops, optim
from tinyres.backend import random
from tinyres.errors import ArgumentError, CheckpointError, DeviceError, TinyresError, expect
from tinyres.optim import schedules
from tinyres.options import CONV
from tinyres.train import (
    Interrupt,
    MetricsLog,
    Progress,
    Running,
    Stopwatch,
    check_finite,
    environment,
    evaluate,
    plot_curves,
    run_summary,
)

# All parameters are decayed, those of batch norm too: the reproductions that match the papers' figures do so.
RECIPES = {
    # 2015, section 4.2: rate divided by 10 at 32k and 48k of 64k iterations, per-pixel mean subtracted
    "paper": {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "iterations": 64_000},
    # one cycle over the whole run, up to a rate that only so short a run takes well
    "quick": {"lr": 0.4, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "epochs": 8},
}
MILESTONES = (32_000, 48_000)

# 2015, section 4.2: the deep nets start at a tenth of the rate until the training error is under 80 %
WARM_UP_DEPTH, WARM_UP_ERROR = 110, 80.0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=20, help="6n + 2 layers: 20, 32, 44, 56, 110, 1202 (20)")
    add(
        "--dataset",
        choices=("auto", "cifar10", "cifar100", "shapes10"),
        default="auto",
        help="auto: CIFAR-10 where it is found, else the built-in shapes10",
    )
    add("--data-dir", type=Path, help="where CIFAR lies; else $TINYRES_DATA, else the user's cache folder")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add("--recipe", choices=("auto", "quick", "paper"), default="auto", help="auto: quick on a CPU, paper on a GPU")
    add("--epochs", type=int, help="stop after so many epochs ...")
    add("--iterations", type=int, help="... or steps, whichever comes first (the recipe's length)")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, help="highest learning rate (the recipe's)")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "emulated", "cuda"), default="auto", help="auto: cuda if it can be had")
    add("--shortcut", choices=("A", "B", "C"), default="A", help="2015, section 4.1 (A: no parameters)")
    add("--plain", action="store_true", help="without shortcuts: the papers' plain nets")
    add("--out", type=Path, help="folder of the run (runs/<its name>)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out; afresh if there is none yet")
    add("--threads", type=int, help="CPU threads (all)")
    add("--conv", choices=CONV, default="auto", help="how convolutions are computed (tinyres.options)")
    add("--no-augment", action="store_true", help="no random crops and flips")
    return parser.parse_args()


def choose_device(name):
    if name != "auto":
        return name
    try:
        return backend.get("cuda").name
    except DeviceError:
        return "cpu"


def main():
    args = parse_arguments()

    # Device, recipe
    device = choose_device(args.device)
    backend.use(device)
    tinyres.options(conv=args.conv, threads=args.threads)
    tinyres.manual_seed(args.seed)
    recipe_name = args.recipe if args.recipe != "auto" else "paper" if device == "cuda" else "quick"
    recipe = RECIPES[recipe_name]
    lr = args.lr if args.lr is not None else recipe["lr"]

    # Data: bytes in memory, normalised and augmented batch by batch
    dataset = data.load(args.dataset, args.data_dir, args.download)
    print(dataset.note or f"{dataset.name}: {dataset.source}")
    pixel_mean, channel_mean, channel_std = data.statistics(dataset.train_images)
    if recipe_name == "paper":
        mean, scale = pixel_mean, np.full(3, 1 / 255, np.float32)
    else:
        mean, scale = channel_mean, 1 / channel_std
    train_loader = data.Loader(
        dataset.train_images,
        dataset.train_labels,
        args.batch_size,
        seed=args.seed,
        mean=mean,
        scale=scale,
        augment=not args.no_augment,
        shuffle=True,
        device=device,
    )
    test_loader = data.Loader(
        dataset.test_images,
        dataset.test_labels,
        args.batch_size,
        mean=mean,
        scale=scale,
        augment=False,
        shuffle=False,
        device=device,
    )

    # Length: whichever limit comes first; the recipe's own where none is given
    steps_per_epoch = train_loader.steps_per_epoch
    if args.epochs is None and args.iterations is None:
        epochs, iterations = recipe.get("epochs"), recipe.get("iterations")
    else:
        epochs, iterations = args.epochs, args.iterations
    total = min(limit for limit in (epochs and epochs * steps_per_epoch, iterations) if limit is not None)
    got = {"epochs": args.epochs, "iterations": args.iterations}
    expect(total > 0, "length", "the run must have at least one step", ArgumentError, **got)

    # Model, optimizer, schedule
    model = models.cifar_resnet(args.depth, args.shortcut, args.plain, len(dataset.classes))
    model = tinyres.fuse(model)  # BN, ReLU and additions in one kernel each; same parameters, same names
    optimizer = optim.SGD(
        model.parameters(),
        lr,
        recipe["momentum"],
        recipe["weight_decay"],
        recipe["nesterov"],
    )
    if recipe_name == "paper":
        schedule = schedules.step_decay(lr, MILESTONES, 0.1)
    else:
        schedule = schedules.one_cycle(lr, total)
    warm_up = recipe_name == "paper" and args.depth >= WARM_UP_DEPTH
    recent_error = 100.0  # training error over about the last hundred batches

    # The run's folder. `settings` is what decides the run's bits, so a resumed run must have the same
    model_name = f"{'plain' if args.plain else 'resnet'}{args.depth}" + (f"-{args.shortcut}" if not args.plain else "")
    out = args.out or Path("runs") / f"{model_name}-{dataset.name}-{recipe_name}-seed{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": model_name,
        "dataset": dataset.name,
        "train_images": len(dataset.train_images),
        "recipe": recipe_name,
        "lr": lr,
        "momentum": recipe["momentum"],
        "nesterov": recipe["nesterov"],
        "weight_decay": recipe["weight_decay"],
        "batch_size": args.batch_size,
        "augment": not args.no_augment,
        "seed": args.seed,
        "schedule_steps": total if recipe_name == "quick" else None,
    }
    config = {
        **settings,
        "total_steps": total,
        "steps_per_epoch": steps_per_epoch,
        "device": device,
        "parameters": sum(parameter.size for parameter in model.parameters()),
        "options": tinyres.options.current(),
        "environment": environment(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    kernels = {"device": device, "isa": config["environment"]["isa"], "conv": config["options"]["conv"]}

    # Go on from the checkpoint, or start afresh
    checkpoint = out / "checkpoint.safetensors"
    running = Running()
    step, seconds = 0, 0.0
    if args.resume and checkpoint.exists():
        saved = tinyres.load(checkpoint)
        for name, value in settings.items():
            before = saved.get("settings", {}).get(name)
            rule = f"{name} must be that of the run in {out}"
            expect(before == value, "resume", rule, CheckpointError, checkpoint=before, now=value)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        running.load_state_dict(saved["running"])
        random.set_state(saved["random"])
        step, seconds = saved["step"], saved["seconds"]
        warm_up, recent_error = saved["warm_up"], saved["recent_error"]
        print(f"resuming at step {step}")
        if saved["kernels"] != kernels:
            print(f"other kernels than before ({saved['kernels']}): the last bits of the sums will differ")
    elif checkpoint.exists():  # of another run: must not outlive that run's metrics, nor be lost
        for path in (checkpoint, out / "metrics.jsonl"):
            if path.exists():
                os.replace(path, path.with_stem(path.stem + ".previous"))
        print(f"starting afresh without --resume: the old checkpoint is now {out}/checkpoint.previous.safetensors")
    metrics = MetricsLog(out / "metrics.jsonl", step)
    (out / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")

    def save_checkpoint():
        tinyres.save(
            checkpoint,
            settings=settings,
            kernels=kernels,
            step=step,
            seconds=seconds,
            model=model,
            optimizer=optimizer,
            running=running,
            random=random.state(),
            warm_up=warm_up,
            recent_error=recent_error,
        )

    print(f"{model_name}, {config['parameters']:,} parameters; {recipe_name}, {total:,} steps on {device}; {out}/")
    model.train()
    with Interrupt() as interrupt, Progress(total, step) as progress:
        saved_step, watch = step, Stopwatch()
        # To read a loss is to wait for the GPU, so there it is read once an epoch: one that is not finite has made the
        # weights and all later losses so. In the host's memory it is checked and shown at every step.
        on_host = backend.get(device).xp is np
        while step < total and not interrupt.signal:
            optimizer.lr = lr / 10 if warm_up else schedule(step)
            x, labels = train_loader.batch(step)
            logits = model(tinyres.tensor(x))
            loss = ops.cross_entropy(logits, labels)
            if on_host:
                check_finite(loss.item(), model, x, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            elapsed = watch.lap()
            step, seconds = step + 1, seconds + elapsed
            wrong = running.add(loss, logits, labels, elapsed)
            if warm_up:  # the one thing that hangs on each batch's error: on a GPU these steps do wait
                recent_error += 0.01 * (100.0 * int(wrong) / len(labels) - recent_error)
                warm_up = recent_error >= WARM_UP_ERROR
            progress.update(running if on_host else None)

            if step % steps_per_epoch == 0 or step == total:
                train_loss, train_error = running.loss, running.error  # waits for the epoch's last steps
                check_finite(train_loss, model, x, step)
                elapsed = watch.lap()
                running.seconds += elapsed
                test_loss, test_error = evaluate(model, test_loader, step)
                seconds += elapsed + watch.lap()
                metrics.write(
                    step=step,
                    epoch=step / steps_per_epoch,
                    lr=optimizer.lr,
                    train_loss=train_loss,
                    train_error=train_error,
                    test_loss=test_loss,
                    test_error=test_error,
                    images_per_second=round(running.images_per_second, 1),
                    seconds=round(seconds, 2),
                )
                progress.line(
                    f"epoch {step / steps_per_epoch:.4g}: train loss {train_loss:.4f}, error {train_error:.2f} %, "
                    f"test error {test_error:.2f} %, {running.images_per_second:.0f} images/s"
                )
                if step % steps_per_epoch == 0:
                    running.reset()
                save_checkpoint()
                saved_step = step
                watch.lap()
        if saved_step != step:
            check_finite(running.loss, model, x, step)  # before a good checkpoint is replaced
            save_checkpoint()

    if interrupt.signal and step < total:
        print(f"stopped at step {step} of {total}; the same command with --resume goes on from there")
    note = plot_curves(out / "metrics.jsonl", out / "curves.png")
    if note:
        print(note)
    print(run_summary(config, metrics.lines, out))
    return 128 + interrupt.signal if interrupt.signal and step < total else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TinyresError, OSError) as error:  # OSError: a folder or disk that does not take the run's files
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # outside the loop, or a second signal in it
        print("stopped at once", file=sys.stderr)
        sys.exit(130)
