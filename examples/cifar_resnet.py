"""Train a ResNet of the papers on CIFAR: the whole run in one file, every setting in sight.

    python examples/cifar_resnet.py                              ResNet-20, quick recipe on a CPU
    python examples/cifar_resnet.py --depth 56 --recipe paper2015    as in "Deep Residual Learning" (2015), section 4.2
    python examples/cifar_resnet.py --depth 110 --unit full_preactivation --skip exclusive_gate --gate-bias -6
    python examples/cifar_resnet.py --out runs/mine --resume     go on where the run in runs/mine stopped
    python examples/cifar_resnet.py --device emulated --depth 8 --iterations 5    through the CUDA kernels, on a CPU

Into the folder --out it writes config.json, metrics.jsonl (a line an epoch), checkpoint.safetensors (every epoch, and
when stopped; the one before stays as checkpoint.backup.safetensors) and curves.png. Ctrl-C or SIGTERM stops it after
the step it is in, with a checkpoint; --resume goes on to the same bits as a run that was never stopped. A disk that is
full does not stop it, unless it still is at the end.

Exit status: 0 when the run is complete, 1 on an error (no data, NaN loss, nothing saved ...), 128 + signal number when
stopped, so 130 after Ctrl-C, as shells have it: a script can tell a stopped run from a complete one. A second signal
stops it at once (130), without a checkpoint of its own.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np

import tinyres
from tinyres import backend, data, models, nn, ops, optim
from tinyres.errors import ArgumentError, TinyresError, expect
from tinyres.graph import Evaluation, Training
from tinyres.options import CONV, PRECISION
from tinyres.recipes import RECIPES
from tinyres.train import (
    Interrupt,
    Progress,
    Run,
    Running,
    Stopwatch,
    check_finite,
    choose_device,
    environment,
    evaluate,
    going_on,
    recompute_batch_norm,
)

VALIDATION = 5_000  # training images held out by --validation (2015, section 4.2: a 45k/5k split)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=20, help="layers: 20, 32, 44, 56, 110, 1202; 164, 1001 of bottlenecks (20)")
    add(
        "--dataset",
        choices=("auto", "cifar10", "cifar100", "shapes10"),
        default="auto",
        help="auto: CIFAR-10 where it is found, else the built-in shapes10",
    )
    add("--data-dir", type=Path, help="where CIFAR lies; else $TINYRES_DATA, else the user's cache folder")
    add("--download", action="store_true", help="fetch CIFAR if it is not there")
    add(
        "--recipe",
        choices=("auto", *RECIPES),
        default="auto",
        help="see tinyres/recipes.py; auto: quick on a CPU, paper2015 on a GPU",
    )
    add("--epochs", type=int, help="another length: the recipe's schedule of rates is shrunk or stretched to it")
    add("--iterations", type=int, help="stop after so many steps of the schedule")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, help="highest learning rate (the recipe's)")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "emulated", "cuda"), default="auto", help="auto: cuda if it can be had")
    add(
        "--shortcut",
        choices=("A", "B", "C"),
        help="how dimensions are matched, 2015, section 3.3 (A; B in bottlenecks)",
    )
    add("--plain", action="store_true", help="without shortcuts: the papers' plain nets")
    add("--block", choices=tuple(models.BLOCKS), help="the residual function, of 1, 2 or 3 convolutions")
    add("--unit", choices=models.UNITS, default="original", help="order of activations, 2016, Table 2")
    add("--skip", choices=models.SKIPS, default="identity", help="what the skip connection does, 2016, Table 1")
    add("--scales", type=float, nargs=2, metavar=("SHORTCUT", "BRANCH"), help="of --skip constant (0.5 0.5)")
    add("--gate-bias", type=float, help="where the biases of gates start (-6)")
    add("--dropout", type=float, help="share dropped by --skip dropout (0.5)")
    add("--out", type=Path, help="folder of the run (runs/<its name>)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out; afresh if there is none yet")
    add("--threads", type=int, help="CPU threads (all)")
    add("--conv", choices=CONV, default="auto", help="how convolutions are computed (tinyres.options)")
    add("--precision", choices=PRECISION, default="float32", help="what activations are kept in (tinyres.options)")
    add("--no-augment", action="store_true", help="no random crops and flips")
    add("--validation", action="store_true", help=f"train without the last {VALIDATION:,} images and test on them")
    add("--no-norm-decay", action="store_true", help="decay the weights alone, not biases nor batch norm's parameters")
    add("--bn-group", type=int, help="batch norm over groups of so many images; 64 as on the papers' two GPUs")
    add("--recompute-bn", action="store_true", help="at the end, batch norm's statistics over the whole training set")
    add(
        "--graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="whole steps as graphs: cuda and emulated; auto: on a GPU, unless something needs Python in each step",
    )
    add("--detect-anomaly", action="store_true", help="name the first op whose result or gradient is not finite; slow")
    return parser.parse_args()


def name_of_model(args):
    """Such as resnet110-exclusive_gate--6; what is the default is not said."""
    names = [f"{'plain' if args.plain else 'resnet'}{args.depth}"]
    names += [args.shortcut, args.block, args.unit if args.unit != "original" else None]
    names += [args.skip if args.skip != "identity" else None, args.scales and "-".join(map(str, args.scales))]
    names += [f"{value:g}" for value in (args.gate_bias, args.dropout) if value is not None]
    return "-".join(name for name in names if name)


def main():
    args = parse_arguments()

    # Device, recipe
    device = choose_device(args.device)
    backend.use(device)
    tinyres.options(conv=args.conv, precision=args.precision, threads=args.threads)
    tinyres.manual_seed(args.seed)
    recipe_name = args.recipe if args.recipe != "auto" else "paper2015" if device == "cuda" else "quick"
    recipe = RECIPES[recipe_name]
    lr = args.lr if args.lr is not None else recipe.lr

    # Data: bytes in memory, normalised and augmented batch by batch
    dataset = data.load(args.dataset, args.data_dir, args.download)
    if args.validation:
        dataset = data.held_out(dataset, VALIDATION)
    print(dataset.note or f"{dataset.name}: {dataset.source}")
    mean, scale = recipe.normalise(dataset.train_images)
    train_loader = data.Loader(
        dataset.train_images,
        dataset.train_labels,
        args.batch_size,
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

    # Length: that of the schedule, and where the run stops in it
    steps_per_epoch = train_loader.steps_per_epoch
    total, length = recipe.limits(steps_per_epoch, args.epochs, args.iterations)
    got = {"epochs": args.epochs, "iterations": args.iterations}
    expect(total > 0, "length", "the run must have at least one step", ArgumentError, **got)

    # Model, optimizer, schedule
    fits = args.bn_group is None or args.bn_group > 0
    expect(fits, "bn_group", "a group must have at least one image", ArgumentError, bn_group=args.bn_group)
    choices = {name: getattr(args, name) for name in ("block", "unit", "skip", "scales", "gate_bias", "dropout")}
    model = models.cifar_resnet(args.depth, args.shortcut, args.plain, len(dataset.classes), **choices)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.group = args.bn_group
    # Chains of kernels for whole blocks on CUDA, else BN, ReLU and additions in one each; same parameters, same names
    level = "layer" if device == "cpu" else "block"
    model = tinyres.fuse(model, level)
    parameters = optim.without_norm_decay(model) if args.no_norm_decay else model.parameters()
    optimizer = optim.SGD(parameters, lr, recipe.momentum, recipe.weight_decay, recipe.nesterov)
    schedule = recipe.schedule(length, lr)
    warm_up = recipe.warm_up if recipe.warm_up and args.depth >= recipe.warm_up.from_depth else None
    warming = warm_up is not None
    needs_python = args.skip == "dropout" or args.detect_anomaly
    graph = args.graph == "on" or (args.graph == "auto" and device == "cuda" and not needs_python)
    training = Training(model, optimizer, train_loader) if graph else None
    testing = Evaluation(model, test_loader) if graph else None
    recent_error = 100.0  # training error over about the last hundred batches

    # The run's folder. `settings` is what decides the run's bits, so a resumed run must have the same
    model_name = name_of_model(args)
    out = args.out or Path("runs") / f"{model_name}-{dataset.name}-{recipe_name}-seed{args.seed}"
    settings = {
        "model": model_name,
        "dataset": dataset.name,
        "train_images": len(dataset.train_images),
        "recipe": recipe_name,
        "lr": lr,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
        "norm_decay": not args.no_norm_decay,
        "bn_group": args.bn_group,
        "batch_size": args.batch_size,
        "augment": not args.no_augment,
        "precision": args.precision,
        "seed": args.seed,
        "schedule_steps": length,
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
    isa, conv = config["environment"]["isa"], config["options"]["conv"]
    kernels = {"device": device, "isa": isa, "conv": conv, "fused": level, "graph": graph}

    # Go on from the checkpoint, or start afresh
    running = Running()
    run = Run(out, settings, kernels, args.resume)
    run.write_config(config)
    run.restore(model=model, optimizer=optimizer, running=running)
    if run.saved:
        warming, recent_error = run.saved["warming"], run.saved["recent_error"]

    def save_checkpoint():
        parts = {"model": model, "optimizer": optimizer, "running": running}
        run.save(**parts, warming=warming, recent_error=recent_error)

    def last_batch():
        return train_loader.batch(run.step - 1)[0]

    def collect():
        """What the steps of a graph have summed up goes to `running`; returns how many images were wrong."""
        if not training:
            return 0
        sums = training.take()
        running.add_sums(*sums)
        return sums.wrong

    print(f"{model_name}, {config['parameters']:,} parameters; {recipe_name}, {total:,} steps on {device}; {out}/")
    model.train()
    observed = tinyres.detect_anomaly() if args.detect_anomaly else contextlib.nullcontext()
    with Interrupt() as interrupt, Progress(total, run.step) as progress, observed:
        saved_step, watch = run.step, Stopwatch()
        # To read a loss is to wait for the GPU, so there it is read once an epoch: one that is not finite has made the
        # weights and all later losses so. In the host's memory it is checked and shown at every step.
        on_host = backend.get(device).xp is np
        while run.step < total and not interrupt.signal:
            optimizer.lr = lr / warm_up.divisor if warming else schedule(run.step)
            if training:
                training.step(run.step, optimizer.lr)
            else:
                x, labels = train_loader.batch(run.step)
                logits = model(tinyres.tensor(x))
                loss = ops.cross_entropy(logits, labels)
                if on_host:
                    check_finite(loss.item(), model, x, run.step)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            elapsed = watch.lap()
            run.step, run.seconds = run.step + 1, run.seconds + elapsed
            if training:
                wrong, running.seconds = None, running.seconds + elapsed
            else:
                wrong = running.add(loss, logits, labels, elapsed)
            if warming and warm_up.until_error is None:
                warming = run.step < warm_up.iterations
            elif warming:  # the one thing that hangs on each batch's error: on a GPU these steps do wait
                wrong = collect() if wrong is None else int(wrong)
                recent_error += 0.01 * (100.0 * wrong / args.batch_size - recent_error)
                warming = recent_error >= warm_up.until_error
            progress.update(running if on_host and not training else None)

            if run.step % steps_per_epoch == 0 or run.step == total:
                collect()
                train_loss, train_error = running.loss, running.error  # waits for the epoch's last steps
                check_finite(train_loss, model, last_batch, run.step)
                elapsed = watch.lap()
                running.seconds += elapsed
                if run.step == total and args.recompute_bn:
                    recompute_batch_norm(model, train_loader)
                if testing:
                    test_loss, test_error = testing().averages()
                    check_finite(test_loss, model, lambda: next(test_loader.epoch())[0], run.step, "test loss")
                else:
                    test_loss, test_error = evaluate(model, test_loader, run.step)
                run.seconds += elapsed + watch.lap()
                with going_on(progress.line):
                    run.metrics.write(
                        step=run.step,
                        epoch=run.step / steps_per_epoch,
                        lr=optimizer.lr,
                        train_loss=train_loss,
                        train_error=train_error,
                        test_loss=test_loss,
                        test_error=test_error,
                        images_per_second=round(running.images_per_second, 1),
                        seconds=round(run.seconds, 2),
                    )
                progress.line(
                    f"epoch {run.step / steps_per_epoch:.4g}: train loss {train_loss:.4f}, error {train_error:.2f} %, "
                    f"test error {test_error:.2f} %, {running.images_per_second:.0f} images/s"
                )
                if run.step % steps_per_epoch == 0:
                    running.reset()
                with going_on(progress.line):
                    save_checkpoint()
                    saved_step = run.step
                watch.lap()
        if saved_step != run.step:
            collect()
            check_finite(running.loss, model, last_batch, run.step)  # before a good checkpoint is replaced
            save_checkpoint()

    if interrupt.signal and run.step < total:
        print(f"stopped at step {run.step} of {total}; the same command with --resume goes on from there")
    run.finish(config)
    return 128 + interrupt.signal if interrupt.signal and run.step < total else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TinyresError, OSError) as error:  # OSError: a folder or disk that does not take the run's files
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # outside the loop, or a second signal in it
        print("stopped at once", file=sys.stderr)
        sys.exit(130)
