"""Images per second of the input pipeline for photographs, beside a plain loop over Pillow in one process.

    python benchmarks/input_pipeline.py [--workers N ...] [--images N] [--rounds N] [--json FILE]

A folder of JPEGs is drawn first: 500x375 as most of ImageNet's, with the detail that gives them ImageNet's usual
100 KiB. The plain loop decodes, resizes to a shorter side of 256, crops the central 224x224 and normalises. "center" is
the same from `FolderLoader`, "scale" and "scale-aspect" are its augmented training batches. "plain loops" are as many
processes as workers, each with its share of the files and nothing to hand over: what the machine can do at most. All
take turns, and each begins with processes that are running and a queue that is full. `ratio` is to the plain loop: the
median over rounds.
"""

import argparse
import multiprocessing
import pathlib
import statistics
import tempfile
import time

import numpy as np

import harness

BATCH = 32
VIEWS = ("plain loops", "center", "scale", "scale-aspect")
HEIGHT, WIDTH = 375, 500
MEAN, STD = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)


def draw(folder, count):
    """Write `count` JPEGs of clouds with fine grain into one class; returns the mean of their sizes in bytes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    sizes = []
    for number in range(count):
        picture = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
        for cells in (2, 5, 12, 30, 75, 375):  # each scale about as strong as the others, as in photographs
            noise = rng.integers(0, 256, (cells, cells * 4 // 3, 3), np.uint8)
            layer = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            picture += 0.3 * (np.asarray(layer, np.float32) - 128)
        path = folder / "class" / f"{number:05}.jpeg"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def plain(paths):
    """Seconds an image."""
    from PIL import Image

    began = time.perf_counter()
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB").resize((256 * WIDTH // HEIGHT, 256), Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
        pixels = (pixels - MEAN) / STD
    return (time.perf_counter() - began) / len(paths)


def pipeline(folder, view, workers, count):
    """Seconds an image in about `count` of them."""
    from tinyres.data.folder import AHEAD, FolderLoader

    settings = {} if view == "center" else {"augmentation": view, "sigma": 0.1}
    scale, batches = 1 / STD, max(1, count // BATCH)
    with FolderLoader(folder, BATCH, mean=MEAN, scale=scale, shuffle=True, workers=workers, **settings) as loader:
        for step in range(1 + AHEAD):
            loader.batch(step)
        began = time.perf_counter()
        for step in range(batches):
            loader.batch(1 + AHEAD + step)
        return (time.perf_counter() - began) / (batches * BATCH)


def plain_loops(paths, processes):
    """Seconds an image of all the loops together."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(plain, [paths[:BATCH]] * processes, chunksize=1)
        began = time.perf_counter()
        pool.map(plain, [paths[i::processes] for i in range(processes)], chunksize=1)
        return (time.perf_counter() - began) / len(paths)


def main():
    from tinyres import _cpu
    from tinyres.data.folder import ImageFolder

    cpus = _cpu.threads()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, cpus], help=f"processes (0 {cpus})")
    parser.add_argument("--images", type=int, default=512, help="images of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        bytes_each = draw(pathlib.Path(root), 16 * BATCH)
        folder = ImageFolder(root)
        paths = [folder.files[i] for i in range(len(folder))]
        cases = [(view, workers) for workers in args.workers for view in VIEWS if workers or view != "plain loops"]
        times = {case: [] for case in [None, *cases]}
        plain(paths[:BATCH])
        for _ in range(args.rounds):
            times[None].append(plain(paths))
            for case in cases:
                view, workers = case
                alone = view == "plain loops"
                seconds = plain_loops(paths, workers) if alone else pipeline(folder, view, workers, args.images)
                times[case].append(seconds)

    def rate(case):
        return harness.spread([1 / seconds for seconds in times[case]])

    rows = []
    print(f"JPEGs of {WIDTH}x{HEIGHT}, {bytes_each / 1024:.0f} KiB each; images/s, median (20 to 80 %)")
    for case in times:
        pairs = zip(times[None], times[case], strict=True)
        ratio = round(statistics.median([theirs / ours for theirs, ours in pairs]), 2)
        view, workers = case or ("plain loop", 0)
        rows.append({"view": view, "workers": workers, "images_per_second": rate(case), "ratio": ratio})
        spread = "{median} ({p20} to {p80})".format(**rate(case))
        print(f"{view:12} {f'{workers} workers' if case else '':10} {spread:24} {ratio:.2f}x")
    if args.json:
        fields = {"batch_size": BATCH, "image_size": [WIDTH, HEIGHT], "image_bytes": round(bytes_each), "rows": rows}
        harness.write_json(args.json, harness.result("input_pipeline", cpus, _cpu.isa(), **fields))


if __name__ == "__main__":
    main()
