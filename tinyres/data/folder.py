"""Photographs in folders, ROOT/CLASS/*.jpeg: found by `ImageFolder`, decoded by worker processes into batches.

A batch is made in two places. Workers read files and write each image's crop, bytes, into a piece of shared memory;
this process makes numbers of them on the device. Which crop image n of step s gets hangs on (seed, s, n) alone, so
neither the number of workers nor their speed changes a bit of any batch.

Workers hold nothing that would be lost, and so they are ended by being killed: when the loader is closed, collected
or the program ends. They end by themselves when this process dies.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tinyres import backend
from tinyres.backend import Array, Device, random
from tinyres.data import transforms
from tinyres.data.augment import constant
from tinyres.errors import ArgumentError, DataError, DtypeError, expect, fail
from tinyres.ops import checks

SUFFIXES = (".jpeg", ".jpg", ".png")
AUGMENTATIONS = ("scale", "scale-aspect")
AHEAD = 3  # batches that workers have made or are making: the bound on memory

OP = "data.folder"


class ImageFolder:
    """The images ROOT/CLASS/*.jpeg, *.jpg and *.png, in either case of the suffix.

    root     the folder; names that begin with a dot are passed over
    classes  names of its subfolders, sorted; a class's label is its place in this list
    labels   (L,) int64; images are numbered class by class, by name within each
    Raises DataError for a folder that is missing or unreadable, has no classes, or has a class without images.
    """

    root: Path
    classes: list[str]
    labels: np.ndarray

    def __init__(self, root: str | os.PathLike[str]) -> None:
        expect(isinstance(root, (str, os.PathLike)), OP, "root must be a path", DtypeError, root=repr(root))
        self.root = Path(root)
        names, counts = [], []
        try:
            with os.scandir(root) as entries:
                self.classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            for name in self.classes:
                files = [file for file in os.listdir(self.root / name) if file.lower().endswith(SUFFIXES)]
                files = sorted(file for file in files if not file.startswith("."))
                rule = f"{self.root / name}: a class must have at least one image"
                expect(files, OP, rule, DataError, suffixes=" ".join(SUFFIXES))
                names += [f"{name}/{file}" for file in files]
                counts.append(len(files))
        except OSError as error:
            raise DataError(f"[{OP}] {error.filename}: cannot be read: {error.strerror or error}") from error
        expect(names, OP, f"{root}: must hold a folder for each class", DataError)
        self.labels = np.repeat(np.arange(len(counts)), counts)
        self.files = _Files(self.root, names)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8. Raises DataError, naming the file, if it cannot be decoded."""
        return transforms.decode(self.files[index])

    def part(self, indices: Sequence[int] | np.ndarray) -> ImageFolder:
        """The images of these numbers, in this order, as an ImageFolder with the same classes."""
        part = copy.copy(self)
        part.labels = self.labels[np.asarray(indices)]
        part.files = _Files(self.root, [os.path.relpath(self.files[i], self.files.root) for i in indices])
        return part


class _Files:
    """Paths by number, as one text in memory that worker processes share: a million names take no copy in each."""

    def __init__(self, root, names):
        encoded = [os.fsencode(name) for name in names]
        self.root = os.path.abspath(root)
        self._text = RawArray("c", b"".join(encoded))
        self._ends = RawArray("q", len(encoded))
        np.frombuffer(self._ends, np.int64)[:] = np.cumsum([len(name) for name in encoded])

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._text[start : self._ends[index]]))


class _Answer(NamedTuple):
    """What became of some of a batch's images, in their order.

    images   whole ones, where these were asked for
    used     the numbers of the images that were taken
    skipped  {number: why} of those passed over
    failed   (position, why) of the first one that cannot be had; nothing comes after it
    """

    images: list[np.ndarray]
    used: list[int]
    skipped: dict[int, str]
    failed: tuple[int, str] | None = None


class _Reader(NamedTuple):
    """All that a worker must know to make an image's view."""

    files: _Files
    size: int
    side: int
    sides: tuple[int, int]
    augmentation: str | None
    seed: int
    skip_corrupt: bool

    def read(self, index, skipped):
        """(image, its number), the next readable one's if corrupt files are skipped, which `skipped` then tells of."""
        if not self.skip_corrupt:
            return transforms.decode(self.files[index]), index
        for number in itertools.chain(range(index, len(self.files)), range(index)):
            try:
                return transforms.decode(self.files[number]), number
            except DataError as error:
                skipped[number] = str(error)
        fail(OP, "at least one image must be readable", DataError)

    def view(self, image, draw):
        """The crop (size, size, 3) of an image: augmented by draw number `draw`, or the centre where that is None."""
        (H, W), size = image.shape[:2], self.size
        if draw is None:
            return transforms.resample(image, transforms.center_crop(H, W, self.side, size), size, size)
        scale = self.augmentation == "scale"
        count = transforms.SCALE_DRAWS if scale else transforms.SCALE_ASPECT_DRAWS
        flip, *draws = random.Stream(self.seed, "augment").uniform(draw, 1 + count)
        if scale:
            box = transforms.scale_crop(H, W, draws, size, self.sides)
        else:
            box = transforms.scale_aspect_crop(H, W, draws)
        view = transforms.resample(image, box, size, size)
        return view[:, ::-1] if flip < 0.5 else view

    def fill(self, out, positions, indices, draws):
        """Write the views of the images `indices` to out[positions]; where `out` is None, answer with whole images."""
        answer = _Answer([], [], {})
        draws = draws or itertools.repeat(None, len(indices))
        for position, index, draw in zip(positions, indices, draws, strict=True):
            try:
                image, number = self.read(int(index), answer.skipped)
                if out is None:
                    answer.images.append(image)
                else:
                    out[position] = self.view(image, draw)
            except Exception as error:  # whatever it is, it must reach the one who asks for this batch
                known = isinstance(error, DataError)
                why = str(error) if known else f"[{OP}] {self.files[index]}: {type(error).__name__}: {error}"
                return answer._replace(failed=(position, why))
            answer.used.append(number)
        return answer


class _Job(NamedTuple):
    """A batch to be made."""

    kind: str  # "batch"; or of a pass over all images in order: "epoch", central crops, or "images", whole ones
    number: int
    indices: np.ndarray | range
    draws: range | None  # an image each, if they are augmented


class FolderLoader:
    """Batches of an ImageFolder, as data.Loader makes them of a set in memory.

    folder        an ImageFolder
    batch_size    images in a batch
    seed          of the order and the augmentation: 0 .. 2**64 - 1; None is that of `tinyres.manual_seed`, as it is
                  when the loader is made
    size          height and width of the crops, 224 in the papers
    augmentation  "scale" (`transforms.scale_crop`) or "scale-aspect" (`transforms.scale_aspect_crop`), then a flip half
                  of the time; None gives central crops of images resized to a shorter side of `side`
    sides         of "scale": the range of the shorter side; None is 256 .. 480 in proportion to size 224
    side          of central crops: None is 256 in the same proportion
    sigma         of the colour noise of training batches, 0.1 in the papers (`transforms.color_noise`); 0 for none
    mean, scale   x = (image + noise - mean) * scale on the 0-255 scale; mean (size, size, 3), (3,) or a number, scale
                  (3,) or a number
    shuffle       draw a new order every epoch; the last partial batch of the order is dropped
    device        where the batches are made
    workers       processes that decode; None for one a CPU that this process may use, 0 to decode in this process
    skip_corrupt  a file that cannot be decoded is passed over: the next readable image, in the order of the folder,
                  stands in with its own label and the draws of the absent one, so that a batch keeps its size. False
                  raises DataError, naming the file, when its batch is asked for

    `skipped` maps the paths of files passed over so far to what is wrong; each is warned of once.

    `batch(step)` depends on nothing but the arguments above, `workers` excepted, and `step`, so a resumed run sees what
    the first run would have seen. Workers start at the first batch and run up to three batches ahead. Use as a context
    manager, or `close()`, to stop them; a program that is not importable needs `if __name__ == "__main__":`, as with
    all of multiprocessing. Raises ShapeError, DtypeError or ArgumentError for arguments that do not fit, DataError
    without Pillow or when a worker has died.
    """

    folder: ImageFolder
    device: Device
    labels: np.ndarray
    batch_size: int
    size: int
    side: int
    mean: Array
    scale: Array
    shuffle: bool
    steps_per_epoch: int
    skipped: dict[str, str]

    def __init__(
        self,
        folder: ImageFolder,
        batch_size: int,
        seed: int | None = None,
        size: int = 224,
        augmentation: str | None = None,
        sides: tuple[int, int] | None = None,
        side: int | None = None,
        sigma: float = 0.0,
        mean: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        shuffle: bool = False,
        device: str | Device = "cpu",
        workers: int | None = None,
        skip_corrupt: bool = False,
    ) -> None:
        op = "data.FolderLoader"
        kind = type(folder).__name__
        expect(isinstance(folder, ImageFolder), op, "folder must be an ImageFolder", DtypeError, folder=kind)
        self.folder, self.device = folder, backend.get(device)
        self.batch_size = checks.integer(op, "batch_size", batch_size, 1)
        size = checks.integer(op, "size", size, 1, 2**15)
        side = max(size, round(size * 256 / 224)) if side is None else checks.integer(op, "side", side, 1, 2**15)
        wanted: Any = [max(size, round(size * n / 224)) for n in transforms.SIDES] if sides is None else sides
        pair = isinstance(wanted, (tuple, list)) and len(wanted) == 2
        expect(pair, op, "sides must be (lowest, highest)", ArgumentError, sides=sides)
        low, high = (checks.integer(op, "sides", n, 1, 2**15) for n in wanted)
        rule = "the crop must be at most as large as the shorter side, and sides in order"
        expect(size <= side and size <= low <= high, op, rule, ArgumentError, size=size, side=side, sides=(low, high))
        if augmentation is not None:
            checks.choice(op, "augmentation", augmentation, AUGMENTATIONS)
        self._sigma = checks.real(op, "sigma", sigma)
        expect(self._sigma >= 0, op, "sigma must not be negative", ArgumentError, sigma=sigma)
        self.shuffle = checks.flag(op, "shuffle", shuffle)
        rule = "batch_size must be at most the number of images, as partial batches are dropped when shuffling"
        fits = not shuffle or self.batch_size <= len(folder)
        expect(fits, op, rule, ArgumentError, batch_size=batch_size, images=len(folder))
        self.workers = _cpus() if workers is None else checks.integer(op, "workers", workers, 0, 1024)
        seed = random.seed() if seed is None else seed
        self._order_stream = random.Stream(seed, "order")
        self._order_of: tuple[int, Any] = -1, None  # (epoch, its order): a cache, a step's batch does not depend on it
        self.mean = constant(op, "mean", mean, (size, size, 3), [(), (3,), (size, size, 3)], self.device)
        self.scale = constant(op, "scale", scale, (3,), [(), (3,)], self.device)
        skip_corrupt = checks.flag(op, "skip_corrupt", skip_corrupt)
        transforms.pillow()

        self.labels, self.size, self.side = folder.labels, size, side
        self.steps_per_epoch = len(folder) // self.batch_size if shuffle else self._batches()
        self.skipped = {}
        self._reader = _Reader(folder.files, size, side, (low, high), augmentation, int(seed), skip_corrupt)
        self._pool = _Pool(self._reader, self.batch_size, self.workers)

    def batch(self, step: int) -> tuple[Array, Array]:
        """The batch of training step 0, 1, 2, ...: x (N, size, size, 3) float32 and labels (N,) int64."""
        step = checks.integer("data.FolderLoader", "step", step, 0)
        crops, labels = self._fetch("batch", step)
        x = self._normalised(crops)
        if self._sigma and self._reader.augmentation:
            N, H, W, C = x.shape
            draw = random.Stream(self._reader.seed, "augment").normal(2 * step, 3 * N).reshape(N, 3)
            noise = transforms.color_noise(draw, self._sigma).astype(np.float32) * self.device.numpy(self.scale)
            rows = x.reshape(N, H, W * C)  # whole rows, as NumPy is slow at adding three numbers at a time
            rows += self.device.asarray(np.tile(noise, (1, W)))[:, None]
        return x, labels

    def epoch(self) -> Iterator[tuple[Array, Array]]:
        """Every image once, in order, its central crop, as (x, labels) batches; the last one may be smaller."""
        for number in range(self._batches()):
            crops, labels = self._fetch("epoch", number)
            yield self._normalised(crops), labels

    def images(self) -> Iterator[tuple[list[np.ndarray], Array]]:
        """Every image once, in order, whole, as (list of (H, W, 3) uint8, labels) batches; see `classify.predict`."""
        for number in range(self._batches()):
            yield self._fetch("images", number)

    def close(self) -> None:
        """Stop the workers. The loader cannot be used any more; to close it twice is no error."""
        self._pool.close()

    def __enter__(self) -> FolderLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _batches(self):
        """Batches of a pass over all images."""
        return -(-len(self.folder) // self.batch_size)

    def _job(self, kind, number):
        """The job of this name; None where a pass over all images has no more batches."""
        order: Any = range(len(self.folder))
        place, first = number, number * self.batch_size
        if kind == "batch":
            epoch, place = divmod(number, self.steps_per_epoch)
            if self.shuffle:
                if self._order_of[0] != epoch:
                    self._order_of = epoch, self._order_stream.permutation(epoch, len(order))
                order = self._order_of[1]
        elif number >= self._batches():
            return None
        indices = order[place * self.batch_size : (place + 1) * self.batch_size]
        augmented = kind == "batch" and self._reader.augmentation
        # Odd draws; the even ones are the colour noise's.
        return _Job(kind, number, indices, range(2 * first + 1, 2 * (first + len(indices)), 2) if augmented else None)

    def _fetch(self, kind, number):
        """Crops (N, size, size, 3) uint8, to be used before the next call, or a list of whole images; and labels."""
        made, answer = self._pool.fetch(self._job, kind, number)
        if answer.failed:
            raise DataError(answer.failed[1])
        for skipped, why in sorted(answer.skipped.items()):
            path = self.folder.files[skipped]
            if path not in self.skipped:
                self.skipped[path] = why
                warnings.warn(f"{why}; skipped", stacklevel=3)
        return made, self.device.asarray(self.labels[np.array(answer.used)], np.int64)

    def _normalised(self, crops):
        N = len(crops)
        unmoved, unflipped = np.zeros(N, np.int32), np.zeros(N, np.uint8)
        choices = [self.device.asarray(choice) for choice in (np.arange(N), unmoved, unmoved, unflipped)]
        return self.device.kernels.augment(self.device.asarray(crops), *choices, self.mean, self.scale)


def mean_image(
    folder: ImageFolder, size: int = 224, images: int = 10_000, workers: int | None = None, skip_corrupt: bool = False
) -> np.ndarray:
    """The mean of central crops of `images` of a folder's images, evenly spaced, on the 0-255 scale.

    Returns (size, size, 3) float32: what "with the per-pixel mean subtracted" (He et al. 2015, section 3.4) subtracts.
    The sums are of integers in float64, and so exact. `skip_corrupt` and what is raised are FolderLoader's.
    """
    count = min(checks.integer("data.mean_image", "images", images, 1), len(folder))
    part = folder.part(np.arange(count) * len(folder) // count)
    total = np.zeros((size, size, 3))
    with FolderLoader(part, 64, size=size, workers=workers, skip_corrupt=skip_corrupt) as loader:
        for x, _ in loader.epoch():
            total += x.sum(axis=0, dtype=np.float64)
    return (total / count).astype(np.float32)


# Workers --------------------------------------------------------------------------------------------------------------


class _Pool:
    """Makes jobs, in processes that run ahead of the one who asks, or in this one where `workers` is 0.

    Worker w has images w, w + workers, ... of every batch, two pipes, and in common with all others the slots, memory
    for AHEAD batches. A pipe may be full of long questions or of long answers, never of both: whole images, the long
    answers, are asked for by ranges. So the two sides cannot wait for each other.
    """

    def __init__(self, reader, batch_size, workers):
        self.reader, self.shape, self.workers = reader, (batch_size, reader.size, reader.size, 3), workers
        self.flying: list[tuple[_Job, int, dict[int, _Answer]]] = []  # with the slot, and the answers by worker
        self.processes: list[Any] = []
        self.pipes: list[tuple[Connection, Connection]] = []  # (questions, answers) of each worker
        self.slots: Any = None
        self.closed = False
        self.stop = Finalize(self, _stop, (self.processes, self.pipes), exitpriority=1)

    def fetch(self, job_of, kind, number):
        """What a job makes, and its _Answer. `job_of(kind, number)` gives jobs: this one and those that will follow."""
        expect(not self.closed, OP, "the loader has been closed, or one of its workers has died", DataError)
        if not self.workers:
            job = job_of(kind, number)
            out = None if kind == "images" else np.empty((len(job.indices), *self.shape[1:]), np.uint8)
            answer = self.reader.fill(out, range(len(job.indices)), job.indices, job.draws)
            return answer.images if out is None else out, answer
        try:
            if not self.processes:
                self.start()
            while self.flying and self.flying[0][0][:2] != (kind, number):  # others were expected
                self.land()
            self.send(job_of, kind, number)
            job, slot, answers = self.land()
        except BaseException:  # not only errors: after a Ctrl-C a pipe may hold half a message
            self.close()
            raise
        answer = self.merge(job, answers)
        return answer.images if kind == "images" else self.slots[slot][: len(job.indices)], answer

    def start(self):
        context = multiprocessing.get_context("spawn")  # fork would copy threads and GPU contexts
        memory = RawArray("B", AHEAD * math.prod(self.shape))
        self.slots = np.frombuffer(memory, np.uint8).reshape(AHEAD, *self.shape)
        for _ in range(self.workers):
            (asked, questions), (answers, told) = context.Pipe(duplex=False), context.Pipe(duplex=False)
            self.pipes.append((questions, answers))
            process = context.Process(target=_work, args=(self.reader, memory, self.shape, asked, told), daemon=True)
            process.start()
            self.processes.append(process)
            asked.close()
            told.close()  # so that the worker's is the only one, and its death is the end of the answers

    def send(self, job_of, kind, first):
        """Let this job and those after it fly, as far as they do not yet and there are slots."""
        for number in range(first, first + AHEAD):
            flying = [(job.kind, job.number) for job, _, _ in self.flying]
            free = set(range(AHEAD)) - {slot for _, slot, _ in self.flying}
            if (kind, number) in flying or not free:
                continue
            job = job_of(kind, number)
            if job is None:
                return
            count, slot = len(job.indices), min(free)
            self.flying.append((job, slot, {}))
            for worker in range(min(self.workers, count)):
                share = slice(worker, None, self.workers)
                draws = None if job.draws is None else job.draws[share]
                question = None if kind == "images" else slot, range(count)[share], job.indices[share], draws
                try:
                    self.pipes[worker][0].send(question)
                except OSError:  # nobody reads
                    self.mourn(worker)

    def land(self):
        """Wait for the oldest flying job's answers: (job, slot, answers by worker)."""
        job, slot, answers = self.flying[0]
        while len(answers) < min(self.workers, len(job.indices)):
            for ready in wait([pipe for _, pipe in self.pipes]):
                worker = [pipe for _, pipe in self.pipes].index(ready)
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    self.mourn(worker)
                # A worker answers in the order in which it was asked.
                next(a for j, _, a in self.flying if worker < len(j.indices) and worker not in a)[worker] = answer
        return self.flying.pop(0)

    def mourn(self, worker):
        process = self.processes[worker]
        process.join(5)
        status = process.exitcode
        how = signal.Signals(-status).name if status is not None and status < 0 else f"status {status}"
        hint = "out of memory?" if how == "SIGKILL" else "what it printed stands above"
        fail(OP, f"a worker process ended unexpectedly by {how} ({hint})", DataError)

    def merge(self, job, answers):
        """The answers of all workers as one."""
        failures = [answer.failed for answer in answers.values() if answer.failed]
        if failures:  # the first in the batch, however many workers there are
            return _Answer([], [], {}, min(failures))
        images, used, skipped = [None] * len(job.indices), [0] * len(job.indices), {}
        for worker, answer in answers.items():
            used[worker :: self.workers] = answer.used
            skipped.update(answer.skipped)
            if job.kind == "images":
                images[worker :: self.workers] = answer.images
        return _Answer(images, used, skipped)

    def close(self):
        self.closed = True
        self.stop()


def _stop(processes, pipes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
    for pipe in itertools.chain(*pipes):
        pipe.close()
    processes.clear()
    pipes.clear()


def _work(reader, memory, shape, questions, answers):
    """A worker's life. Ctrl-C, and a SIGTERM to the whole group, are for the process that owns it to act on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    slots = np.frombuffer(memory, np.uint8).reshape(AHEAD, *shape)
    try:
        while True:
            slot, *question = questions.recv()
            answers.send(reader.fill(None if slot is None else slots[slot], *question))
    except (EOFError, OSError):  # the owner is gone
        pass


def _cpus():
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
