"""Train and test the papers' ImageNet networks on photographs in folders: ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.

    python examples/imagenet_resnet.py --data-dir ROOT                       ResNet-50 as in 2016's appendix: 90 epochs
    python examples/imagenet_resnet.py --data-dir ROOT --recipe paper2015
        --model resnet34 --shortcut A --test 10-crop                         2015, Table 3
    python examples/imagenet_resnet.py --data-dir ROOT --model resnet200 --unit full_preactivation
        --augmentation scale-aspect --image-size 320                         2016, Table 5
    python examples/imagenet_resnet.py --data-dir ROOT --out runs/mine --resume      go on where that run stopped
    python examples/imagenet_resnet.py --data-dir ROOT --test multi-scale
        --evaluate runs/a/checkpoint.safetensors runs/b/checkpoint.safetensors    an ensemble's top-1 and top-5 errors

It needs Pillow: pip install tinyres[image]. Into the folder --out it writes config.json, metrics.jsonl (a line an
epoch), checkpoint.safetensors (every epoch, and when stopped; the one before stays as checkpoint.backup.safetensors)
and curves.png. Ctrl-C or SIGTERM stops it after the step it is in, with a checkpoint; --resume goes on to the same bits
as a run that was never stopped. A disk that is full does not stop it, unless it still is at the end.

Exit status: 0 when the run is complete, 1 on an error (no data, NaN loss, nothing saved ...), 128 + signal number when
stopped, so 130 after Ctrl-C, as shells have it: a script can tell a stopped run from a complete one. A second signal
stops it at once (130), without a checkpoint of its own.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

import tinyres
from tinyres import backend, classify, models, nn, ops, optim
from tinyres.data.folder import AUGMENTATIONS, FolderLoader, ImageFolder, mean_image
from tinyres.errors import ArgumentError, CheckpointError, DataError, TinyresError, expect
from tinyres.options import CONV, PRECISION
from tinyres.recipes import IMAGENET, IMAGENET_MEAN, IMAGENET_STD
from tinyres.train import (
    Interrupt,
    Progress,
    Run,
    Running,
    Stopwatch,
    check_finite,
    choose_device,
    environment,
    going_on,
    recompute_batch_norm,
)

VALIDATION = 25  # --validation holds out one training image of so many: 51,247 of ImageNet's
COLOR_NOISE = 0.1  # sigma of Krizhevsky et al. 2012, "the standard color augmentation"
MODELS = [f"resnet{n}" for n in (18, 34, 50, 101, 152, 200)] + ["plain18", "plain34", "vgg16", "vgg19"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="ROOT, with the folders train and val")
    add("--model", choices=MODELS, default="resnet50")
    add("--shortcut", choices=("A", "B", "C"), help="how dimensions are matched, 2015, section 3.3 (B)")
    add("--stride-in", choices=("1x1", "3x3"), help="the convolution of a bottleneck that halves the image (1x1)")
    add("--unit", choices=models.UNITS, help="order of activations, 2016, Table 2 (original)")
    add("--skip", choices=models.SKIPS, help="what the skip connection does, 2016, Table 1 (identity)")
    add("--scales", type=float, nargs=2, metavar=("SHORTCUT", "BRANCH"), help="of --skip constant (0.5 0.5)")
    add("--gate-bias", type=float, help="where the biases of gates start (-6)")
    add("--dropout", type=float, help="share dropped by --skip dropout (0.5)")
    add("--recipe", choices=tuple(IMAGENET), default="paper2016", help="see tinyres/recipes.py")
    crops = parser.add_mutually_exclusive_group()
    crops.add_argument("--augmentation", choices=AUGMENTATIONS, help="how training crops are drawn (the recipe's)")
    crops.add_argument("--no-augment", action="store_true", help="train on central crops, always the same")
    add(
        "--mean",
        choices=("channel", "pixel"),
        help="by ImageNet's mean and spread of each channel, or the training set's mean image (the recipe's)",
    )
    add("--crop", type=int, default=224, help="side of training crops; shorter sides are 256 to 480 in proportion")
    add("--image-size", type=int, help="side of test crops (--crop)")
    add("--test", choices=classify.TESTS, default="center", help="how images are tested, see tinyres.classify.predict")
    add("--evaluate", type=Path, nargs="+", metavar="CHECKPOINT", help="only test: one network, or an ensemble")
    add("--epochs", type=int, help="another length: the recipe's schedule of rates is shrunk or stretched to it")
    add("--iterations", type=int, help="stop after so many steps of the schedule")
    add("--batch-size", type=int, help="the recipe's: 256")
    add("--test-batch-size", type=int, default=32, help="crops that go through the network together when testing")
    add("--lr", type=float, help="highest learning rate (the recipe's)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="processes that decode images (one a CPU); 0: none")
    add("--skip-corrupt", action="store_true", help="let the next image stand in for one that cannot be decoded")
    add("--device", choices=("auto", "cpu", "emulated", "cuda"), default="auto", help="auto: cuda if it can be had")
    add("--out", type=Path, help="folder of the run (runs/<its name>)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out; afresh if there is none yet")
    add("--threads", type=int, help="CPU threads (all)")
    add("--conv", choices=CONV, default="auto", help="how convolutions are computed (tinyres.options)")
    add("--precision", choices=PRECISION, default="float32", help="what activations are kept in (tinyres.options)")
    add("--validation", action="store_true", help=f"train without one image in {VALIDATION} and test on those")
    add("--no-norm-decay", action="store_true", help="decay the weights alone, not biases nor batch norm's parameters")
    add("--bn-group", type=int, help="batch norm over groups of so many images; 32 as on the papers' eight GPUs")
    add("--recompute-bn", action="store_true", help="at the end, batch norm's statistics over the whole training set")
    return parser.parse_args()


# The network, its data, its test --------------------------------------------------------------------------------------


def network_of(args):
    """What `build` makes a network from, but the number of classes: its name, and the choices that were given."""
    names = ("shortcut", "stride_in", "unit", "skip", "scales", "gate_bias", "dropout")
    choices = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model.startswith("vgg"):
        expect(not choices, "model", "these options are for residual networks", ArgumentError, **choices)
        choices = {"image_size": args.crop}
    return {"model": args.model, "choices": choices}


def build(model, choices, classes):
    kind, depth = re.fullmatch(r"([a-z]+)(\d+)", model).groups()
    if kind == "vgg":
        return models.vgg(int(depth), classes, **choices)
    return models.imagenet_resnet(int(depth), num_classes=classes, plain=kind == "plain", **choices)


def name_of(model, choices):
    """Such as resnet152-full_preactivation; what is the default is not said."""
    values = [v for name, v in choices.items() if name != "image_size"]
    return "-".join([model, *("-".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in values)])


def test_loader_of(args, batch_size, folder, crop, mean, scale, device):
    """Images for testing: --image-size, or as large as the training crops."""
    size = crop if args.image_size is None else args.image_size
    if np.ndim(mean) == 3 and size != crop:
        mean = mean.mean(axis=(0, 1))
    side = max(size, round(crop * 256 / 224))
    return FolderLoader(folder, batch_size, size=size, side=side, mean=mean, scale=scale, device=device,
                        workers=args.workers, skip_corrupt=args.skip_corrupt)  # fmt: skip


def evaluate_checkpoints(args, batch_size, device):
    """Print the errors of the networks of --evaluate, averaged as an ensemble where there are several."""
    folder = ImageFolder(args.data_dir / "val")
    networks, first = [], None
    for path in args.evaluate:
        saved = tinyres.load(path)
        known = {"settings", "classes", "mean", "scale", "model"} <= saved.keys() and "choices" in saved["settings"]
        expect(known, "evaluate", f"{path} must be a checkpoint of this program", CheckpointError)
        fits = saved["classes"] == folder.classes
        expect(fits, "evaluate", f"{path} and {folder.root} must have the same classes", DataError)
        first = first or saved
        same = all(np.array_equal(saved[name], first[name]) for name in ("mean", "scale"))
        same = same and saved["settings"]["crop"] == first["settings"]["crop"]
        rule = f"{path} and {args.evaluate[0]} must have the same mean and crop"
        expect(same, "evaluate", rule, CheckpointError)
        model = build(saved["settings"]["model"], saved["settings"]["choices"], len(folder.classes))
        model.load_state_dict(saved["model"])
        networks.append(tinyres.fold_batch_norm(model))
        print(f"{path}: {name_of(saved['settings']['model'], saved['settings']['choices'])}, step {saved['step']:,}")
    with test_loader_of(
        args, batch_size, folder, first["settings"]["crop"], first["mean"], first["scale"], device
    ) as loader:
        errors = classify.evaluate(networks, loader, args.test, args.test_batch_size)
        print(f"{len(folder):,} images, {args.test}: top-1 error {errors.top1:.2f} %, top-5 error {errors.top5:.2f} %")
        note_skipped(loader)
    return 0


def note_skipped(*loaders):
    for loader in loaders:
        if loader.skipped:
            print(f"{loader.folder.root}: {len(loader.skipped):,} files could not be decoded and were skipped")


def main():
    args = parse_arguments()

    # Device
    device = choose_device(args.device)
    backend.use(device)
    tinyres.options(conv=args.conv, precision=args.precision, threads=args.threads)
    tinyres.manual_seed(args.seed)
    recipe = IMAGENET[args.recipe]
    lr = recipe.lr if args.lr is None else args.lr
    batch_size = recipe.batch_size if args.batch_size is None else args.batch_size
    augmentation = None if args.no_augment else args.augmentation or recipe.augmentation
    normalisation = args.mean or ("pixel" if recipe.normalisation == "pixel_mean" else "channel")
    if args.evaluate:
        return evaluate_checkpoints(args, batch_size, device)

    # Data: two folders with the same classes, or two parts of one
    train = ImageFolder(args.data_dir / "train")
    if args.validation:
        rule = f"--validation needs at least {VALIDATION} training images"
        expect(len(train) >= VALIDATION, "data", rule, DataError, images=len(train))
        held_out = np.arange(len(train)) % VALIDATION == VALIDATION - 1
        train, val = train.part(np.flatnonzero(~held_out)), train.part(np.flatnonzero(held_out))
    else:
        val = ImageFolder(args.data_dir / "val")
    same = train.classes == val.classes
    counts = {"train": len(train.classes), "val": len(val.classes)}
    expect(same, "data", f"{train.root} and {val.root} must hold the same classes", DataError, **counts)
    print(f"{len(train):,} training and {len(val):,} test images of {len(train.classes):,} classes")

    # Length: that of the schedule, and where the run stops in it
    rule = f"--batch-size must be in 1 .. {len(train)}"
    expect(1 <= batch_size <= len(train), "data", rule, ArgumentError, batch_size=batch_size)
    steps_per_epoch = len(train) // batch_size
    length = recipe.length(steps_per_epoch) if args.epochs is None else args.epochs * steps_per_epoch
    total = length if args.iterations is None else min(length, args.iterations)
    got = {"epochs": args.epochs, "iterations": args.iterations}
    expect(total > 0, "length", "the run must have at least one step", ArgumentError, **got)
    schedule = recipe.schedule(length, lr)

    # Model, optimizer
    network = network_of(args)
    model = build(**network, classes=len(train.classes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.group = args.bn_group
    model = tinyres.fuse(model)  # BN, ReLU and additions in one kernel each; same parameters, same names
    parameters = optim.without_norm_decay(model) if args.no_norm_decay else model.parameters()
    optimizer = optim.SGD(parameters, lr, recipe.momentum, recipe.weight_decay, recipe.nesterov)
    running = Running()

    # The run's folder: go on from its checkpoint, or start afresh
    model_name = name_of(**network)
    out = args.out or Path("runs") / f"{model_name}-{args.data_dir.absolute().name}-{args.recipe}-seed{args.seed}"
    settings = {
        **network,
        "train_images": len(train),
        "classes": len(train.classes),
        "recipe": args.recipe,
        "augmentation": augmentation,
        "crop": args.crop,
        "mean": normalisation,
        "skip_corrupt": args.skip_corrupt,
        "lr": lr,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
        "norm_decay": not args.no_norm_decay,
        "bn_group": args.bn_group,
        "batch_size": batch_size,
        "precision": args.precision,
        "seed": args.seed,
        "schedule_steps": length,
    }
    config = {
        **settings,
        "model": model_name,
        "dataset": args.data_dir.absolute().name,
        "total_steps": total,
        "steps_per_epoch": steps_per_epoch,
        "device": device,
        "parameters": sum(parameter.size for parameter in model.parameters()),
        "options": tinyres.options.current(),
        "environment": environment(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    kernels = {"device": device, "isa": config["environment"]["isa"], "conv": config["options"]["conv"]}
    run = Run(out, settings, kernels, args.resume)
    run.write_config(config)
    run.restore(model=model, optimizer=optimizer, running=running)

    # Batches
    if run.saved:
        mean, scale = run.saved["mean"], run.saved["scale"]
    elif normalisation == "pixel":
        mean = mean_image(train, args.crop, workers=args.workers, skip_corrupt=args.skip_corrupt)
        scale = np.full(3, 1 / 255, np.float32)
    else:
        mean, scale = IMAGENET_MEAN, 1 / IMAGENET_STD
    train_loader = FolderLoader(
        train,
        batch_size,
        size=args.crop,
        augmentation=augmentation,
        sigma=COLOR_NOISE,
        mean=mean,
        scale=scale,
        shuffle=True,
        device=device,
        workers=args.workers,
        skip_corrupt=args.skip_corrupt,
    )
    test_loader = test_loader_of(args, batch_size, val, args.crop, mean, scale, device)

    def save_checkpoint():
        parts = {"model": model, "optimizer": optimizer, "running": running}
        run.save(**parts, mean=mean, scale=scale, classes=train.classes)

    print(f"{model_name}, {config['parameters']:,} parameters; {total:,} steps on {device}; {out}/")
    model.train()
    # The loaders come first, so that their workers live until a stopped run has its checkpoint.
    with train_loader, test_loader, Interrupt() as interrupt, Progress(total, run.step) as progress:
        saved_step, watch = run.step, Stopwatch()
        # To read a loss is to wait for the GPU, so there it is read once an epoch: one that is not finite has made the
        # weights and all later losses so. In the host's memory it is checked and shown at every step.
        on_host = backend.get(device).xp is np
        while run.step < total and not interrupt.signal:
            optimizer.lr = schedule(run.step)
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
            running.add(loss, logits, labels, elapsed)
            progress.update(running if on_host else None)

            if run.step % steps_per_epoch == 0 or run.step == total:
                train_loss, train_error = running.loss, running.error  # waits for the epoch's last steps
                check_finite(train_loss, model, x, run.step)
                elapsed = watch.lap()
                running.seconds += elapsed
                if run.step == total and args.recompute_bn:
                    recompute_batch_norm(model, train_loader)
                test = classify.evaluate(model, test_loader, args.test, args.test_batch_size)
                run.seconds += elapsed + watch.lap()
                with going_on(progress.line):
                    run.metrics.write(
                        step=run.step,
                        epoch=run.step / steps_per_epoch,
                        lr=optimizer.lr,
                        train_loss=train_loss,
                        train_error=train_error,
                        test_loss=test.loss,
                        test_error=test.top1,
                        test_top5_error=test.top5,
                        images_per_second=round(running.images_per_second, 1),
                        seconds=round(run.seconds, 2),
                    )
                progress.line(
                    f"epoch {run.step / steps_per_epoch:.4g}: train loss {train_loss:.4f}, error {train_error:.2f} %, "
                    f"test error {test.top1:.2f} % (top-5 {test.top5:.2f} %), {running.images_per_second:.0f} images/s"
                )
                if run.step % steps_per_epoch == 0:
                    running.reset()
                with going_on(progress.line):
                    save_checkpoint()
                    saved_step = run.step
                watch.lap()
        if saved_step != run.step:
            check_finite(running.loss, model, x, run.step)  # before a good checkpoint is replaced
            save_checkpoint()

    note_skipped(train_loader, test_loader)
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
