"""The reusable pieces of a training loop. The loop itself stands in the program that runs it: examples/*.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from tinyres import _cpu, backend, ops
from tinyres.autograd import Tensor, no_grad, tensor
from tinyres.backend import Array, random
from tinyres.checkpoint import load, naming, serialize, write_atomic
from tinyres.dtypes import wide
from tinyres.errors import CheckpointError, DeviceError, NonFiniteError, TinyresError, expect
from tinyres.nn import BatchNorm2d, Module
from tinyres.nn.module import home_of
from tinyres.version import __version__

if TYPE_CHECKING:
    from tinyres.data import Loader


class Running:
    """Sums over the batches of an epoch, in double precision: what a checkpoint in mid-epoch has to keep.

    Loss and errors are summed where the logits lie, so that `add` waits for no GPU. To read `loss`, `error` or
    `state_dict()` is to wait.
    """

    images: int
    seconds: float
    _wrong: Any  # an int or float, or an array () of the device once a batch of it was added
    _loss_sum: Any

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.images, self._wrong, self._loss_sum, self.seconds = 0, 0, 0.0, 0.0

    def add(self, loss: Tensor | float, logits: Tensor, labels: Array, seconds: float = 0.0) -> Any:
        """Add one batch: its mean loss, logits (N, K) and labels (N,), and the seconds that it took.

        Returns how many of its images were wrong, as `int()` reads it: on a GPU that waits.
        """
        scores = logits.device.kernels.cast(logits.data, wide(logits.dtype))
        wrong = (scores.argmax(axis=1) != logits.device.asarray(labels)).sum()
        mean_loss = loss.data.astype(np.float64) if isinstance(loss, Tensor) else loss
        self.images += len(labels)
        self._wrong = self._wrong + wrong
        self._loss_sum = self._loss_sum + mean_loss * len(labels)
        self.seconds += seconds
        return wrong

    def add_sums(self, loss: float, wrong: int, images: int, seconds: float = 0.0) -> None:
        """Add several batches: the sum of their images' losses, and how many of those were wrong."""
        self._loss_sum, self._wrong = self._loss_sum + loss, self._wrong + wrong
        self.images += images
        self.seconds += seconds

    @property
    def wrong(self) -> int:
        """Images whose largest logit is not their label's."""
        return int(self._wrong)

    @property
    def loss_sum(self) -> float:
        return float(self._loss_sum)

    @property
    def loss(self) -> float:
        """Mean loss per image."""
        return self.loss_sum / max(self.images, 1)

    @property
    def error(self) -> float:
        """`wrong` in percent."""
        return 100.0 * self.wrong / max(self.images, 1)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "wrong": self.wrong, "loss_sum": self.loss_sum, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. Raises CheckpointError for anything else."""
        numbers = isinstance(state, dict) and all(isinstance(value, (int, float)) for value in state.values())
        rule = f"needs numbers by the names {sorted(self.state_dict())}"
        expect(numbers and state.keys() == self.state_dict().keys(), "Running", rule, CheckpointError, state=state)
        self.images, self._wrong = state["images"], state["wrong"]
        self._loss_sum, self.seconds = state["loss_sum"], state["seconds"]


def evaluate(model: Module, loader: Loader, step: int = 0) -> tuple[float, float]:
    """Mean loss and error in percent of `model`, in evaluation mode, over one pass of `loader.epoch()`.

    Every module is left in the mode in which it was. Raises NonFiniteError as `check_finite` does, with the number
    `step` of the steps trained so far, at the first batch whose loss is not finite.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    running = Running()
    try:
        with no_grad():
            for x, labels in loader.epoch():
                logits = model(tensor(x, device=home_of(model)))
                loss = ops.cross_entropy(logits, labels)
                check_finite(loss.item(), model, x, step, "test loss")
                running.add(loss, logits, labels)
    finally:
        for module, training in modes:
            module.training = training
    return running.loss, running.error


def recompute_batch_norm(model: Module, loader: Loader) -> None:
    """Make the running statistics of batch norm the averages over one pass of `loader.epoch()` with today's weights.

    The papers' released models have such statistics rather than moving averages. Other layers run as in evaluation;
    every module is left in the mode in which it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, BatchNorm2d)]
    model.eval()
    try:
        with no_grad():
            for batch, (x, _) in enumerate(loader.epoch()):
                for norm, _ in norms:
                    norm.training, norm.momentum = True, 1 / (batch + 1)  # the mean of all batches so far
                model(tensor(x, device=home_of(model)))
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def check_finite(
    loss: float, model: Module, x: Tensor | Array | Callable[[], Array], step: int, name: str = "loss"
) -> None:
    """Return quietly if `loss` (float) is finite; else raise NonFiniteError, which names the step and the culprit.

    The forward pass of the batch `x`, or of what it returns if it is a function, is run again, and the first layer
    whose output is not finite is named, by its dotted name and type, with its parameters that are not finite either.
    BN's running statistics and the state of the random numbers are afterwards what they were.
    """
    if math.isfinite(loss):
        return
    x = x() if callable(x) else x
    x = x if isinstance(x, Tensor) else tensor(x, device=home_of(model))
    if _finite(x):
        culprit = _first_non_finite(model, x)
    else:
        culprit = "the input batch itself is not finite"
    raise NonFiniteError(f"[train] the {name} must be finite; got {loss} at step {step}: {culprit}")


def _first_non_finite(model, x):
    buffers = [(buffer, buffer.copy()) for _, buffer in model.named_buffers()]
    draws = random.state()
    found, handles = [], []
    for name, module in model.named_modules():

        def note(module, inputs, output, name=name):
            if not found and not _finite(output):
                found.append((name, module))

        handles.append(module.register_forward_hook(note))
    try:
        with no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer[...] = before
        random.set_state(draws)
    if not found:
        return "every layer's output is finite, the loss function overflowed"
    name, module = found[0]
    text = f"the first layer whose output was not finite is {name or 'the model'} ({type(module).__name__})"
    broken = [parameter for parameter, value in module.named_parameters() if not _finite(value)]
    if broken:
        text += f"; its {', '.join(broken)} was not finite before, so that an earlier update overflowed"
    return text


def _finite(value):
    return bool(np.isfinite(value.numpy()).all())


class Stopwatch:
    """`lap()` gives the seconds since the lap before, the first since the start."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def lap(self) -> float:
        before, self._began = self._began, time.perf_counter()
        return self._began - before


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended and on disk before `write` returns.

    Lines of steps past `step` are dropped on opening: the run goes on from a checkpoint at that step and will write
    them again. `step=0` starts the file afresh. `lines` holds all of them, as dicts, also one that could not be
    written: the next `write`, or `complete`, makes the file whole again.
    Raises CheckpointError as `read_metrics` does, OSError, naming the file, where it cannot be written; `write` raises
    NonFiniteError for a NaN or an infinity, for which JSON has no words.
    """

    path: Path
    lines: list[dict[str, Any]]

    def __init__(self, path: str | os.PathLike[str], step: int = 0) -> None:
        self.path = Path(path)
        self.lines = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        self._size = sum(len(text) for text in map(_json_line, self.lines))  # of the file, once it holds all lines
        self._write_anew()

    def write(self, **line: Any) -> None:
        try:
            text = _json_line(line)
        except ValueError as error:
            raise NonFiniteError(f"[metrics] a line must hold finite numbers; got {line}") from error
        self.lines.append(line)
        self._size += len(text)
        if self._missing() != len(text):  # an earlier line too, or a part of it is there
            self._write_anew()
            return
        with naming(self.path), open(self.path, "ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def complete(self) -> None:
        """Write what could not be written before, if there is any."""
        if self._missing():
            self._write_anew()

    def _missing(self):
        """How many bytes the file lacks."""
        return self._size - (self.path.stat().st_size if self.path.exists() else 0)

    def _write_anew(self):
        write_atomic(self.path, b"".join(map(_json_line, self.lines)))


def _json_line(line):
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file as a list of dicts; [] if there is none. A torn last line is left out.

    Raises CheckpointError, naming file and line, for any other line that is no JSON object with a step.
    """
    if not os.path.exists(path):
        return []
    lines = []
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text.decode())  # or `loads` would guess at UTF-16
            _json_line(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, NaN; nested too deep
            line = None
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            raise CheckpointError(f"[metrics] {path}, line {number}: must be a JSON object with a step")
        lines.append(line)
    return lines


def choose_device(name: str) -> str:
    """`name`, or where that is "auto", "cuda" if it can be had and else "cpu"."""
    if name != "auto":
        return name
    try:
        return backend.get("cuda").name
    except DeviceError:
        return "cpu"


@contextlib.contextmanager
def going_on(say: Callable[[str], object]) -> Iterator[None]:
    """Let the run outlive a file that cannot be written now: an OSError from within becomes a line for `say`.

    A full disk, a folder that is read-only or gone may be well again before the run ends, and hours of training hang
    on it. So only the last attempt, at the run's end, is made without this.
    """
    try:
        yield
    except OSError as error:
        say(f"not written: {error}; the run goes on and will try again")


class Run:
    """The folder of a training run: what it goes on from, and what it leaves behind.

    out         the folder, made where it is missing: config.json, metrics.jsonl, checkpoint.safetensors, curves.png
    settings    what decides the run's bits, JSON values by name: a resumed run must have the same
    kernels     what computes them: a resumed run is told where these are others
    resume      go on from the checkpoint in `out`, if there is one; otherwise one that is there is moved aside
    saved       the checkpoint that it goes on from, or None
    step, seconds   where it stands; the loop counts them up
    metrics     a MetricsLog, cut back to `step`

    The checkpoint before the last is kept as checkpoint.backup.safetensors: to replace a file in one step guards
    against crashes, not against a disk that damages what it was given. A checkpoint that cannot be read is moved aside
    and the run goes on from the backup, to the same bits.

    Raises CheckpointError where neither can be read, or for one of other settings; OSError for a folder that cannot be
    written.
    """

    saved: dict[str, Any] | None
    step: int
    seconds: float
    metrics: MetricsLog

    def __init__(self, out: Path, settings: dict[str, Any], kernels: dict[str, Any], resume: bool) -> None:
        self.out, self.settings, self.kernels = out, settings, kernels
        self.checkpoint, self.backup = out / "checkpoint.safetensors", out / "checkpoint.backup.safetensors"
        self.step, self.seconds, self.saved = 0, 0.0, None
        out.mkdir(parents=True, exist_ok=True)
        there = self.checkpoint.exists() or self.backup.exists()
        if resume and there:
            self._resume()
        elif there:  # of another run: must not outlive that run's metrics, nor be lost
            for path in (self.checkpoint, self.backup, out / "metrics.jsonl"):
                if path.exists():
                    os.replace(path, path.with_stem(path.stem + ".previous"))
            print(f"starting afresh without --resume: the old checkpoint is now {out}/checkpoint.previous.safetensors")
        self.metrics = MetricsLog(out / "metrics.jsonl", self.step)

    def _resume(self):
        self._source = self.checkpoint
        try:
            saved = load(self.checkpoint)
        except CheckpointError as error:
            try:
                self._source, saved = self.backup, load(self.backup)
            except CheckpointError:
                raise error from None
            print(f"{error}; going on from {self.backup}")
        step, seconds, before = (saved.get(name) for name in ("step", "seconds", "settings"))
        known = type(step) is int and step >= 0 and isinstance(seconds, (int, float)) and isinstance(before, dict)
        rule = f"{self._source} must be the checkpoint of a run"
        expect(known and "kernels" in saved and "random" in saved, "resume", rule, CheckpointError)
        for name, now in self.settings.items():
            was = before.get(name)
            rule = f"{name} must be that of the run in {self.out}"
            expect(_same(was, now), "resume", rule, CheckpointError, checkpoint=was, now=now)
        if self._source == self.backup and self.checkpoint.exists():  # or the next `save` would make it the backup
            os.replace(self.checkpoint, self.out / "checkpoint.unreadable.safetensors")
        self.saved, self.step, self.seconds = saved, step, seconds
        print(f"resuming at step {step}")
        if not _same(saved["kernels"], self.kernels):
            print(f"other kernels than before ({saved['kernels']}): the last bits of the sums will differ")

    def restore(self, **parts: Any) -> None:
        """Load what `save` saved under these names; then the random numbers, which making the parts has drawn.

        Raises CheckpointError, naming file and part, where one does not fit.
        """
        if self.saved:
            loaders = {name: part.load_state_dict for name, part in parts.items()}
            for name, load_state in {**loaders, "random": random.set_state}.items():
                try:
                    load_state(self.saved.get(name))
                except TinyresError as error:
                    raise CheckpointError(f"[resume] {self._source}: {name} does not fit: {error}") from error

    def save(self, **items: Any) -> None:
        """Write the checkpoint: where the run stands, and `items`, as `tinyres.save` takes them and with its errors."""
        state = {"step": self.step, "seconds": self.seconds, "random": random.state()}
        content = serialize({"settings": self.settings, "kernels": self.kernels, **state, **items})
        write_atomic(self.checkpoint, content, self.backup)

    def write_config(self, config: dict[str, Any]) -> None:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        write_atomic(self.out / "config.json", text.encode())

    def finish(self, config: dict[str, Any]) -> None:
        """Complete the metrics, draw the curves and print the summary."""
        self.metrics.complete()
        note = plot_curves(self.out / "metrics.jsonl", self.out / "curves.png")
        if note:
            print(note)
        print(run_summary(config, self.metrics.lines, self.out))


def _same(a, b):
    """Whether two JSON values are equal. An array, which a strange checkpoint can have in the place of one, is no one's
    equal, and `==` would make an array of it."""
    return json.dumps(a, sort_keys=True, default=repr) == json.dumps(b, sort_keys=True)


class Progress:
    """Where a loop of `total` steps stands: a bar in a terminal, a plain line `every` few seconds elsewhere.

    The bar is tqdm's, its figures a second old at most; without tqdm there are plain lines in a terminal too. Use as
    a context manager.
    """

    def __init__(self, total: int, step: int = 0, every: float = 5.0, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.total, self.step, self.every = total, step, every
        self.first_step, self.began = step, time.perf_counter()
        self.shown = self.began
        self.bar: Any = None
        if self.stream.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self.every = min(every, 1.0)
            self.bar = tqdm(total=total, initial=step, file=self.stream, dynamic_ncols=True, bar_format=layout)

    def update(self, running: Running | None) -> None:
        """One step is done. `running` is the epoch's Running; None where to read its figures would be to wait."""
        self.step += 1
        now = time.perf_counter()
        if now - self.shown >= self.every or (self.bar is not None and self.step == self.total):
            self.shown = now
            state = ""
            if running is not None:
                state = (
                    f"loss {running.loss:.3f}  error {running.error:.1f} %  {running.images_per_second:.0f} images/s  "
                )
            if self.bar is not None:
                self.bar.set_postfix_str(state.rstrip(), refresh=False)
            else:
                left = (now - self.began) / (self.step - self.first_step) * (self.total - self.step)
                self.line(f"step {self.step}/{self.total}  {state}{duration(left)} left")
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


class Interrupt:
    """While in force, the first Ctrl-C or SIGTERM sets `.signal`, its number; a second raises KeyboardInterrupt.

        with Interrupt() as interrupt:
            while step < total and not interrupt.signal:
                ...

    so that the loop ends between two steps and can write a checkpoint. For the main thread only, as all of Python's
    signal handling.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    signal: int | None

    def __init__(self) -> None:
        self.signal = None

    def __enter__(self) -> Interrupt:
        self.before = [signal.signal(number, self._handle) for number in self.SIGNALS]
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in zip(self.SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print() is not safe in a handler


def plot_curves(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> str | None:
    """Draw error and loss over the steps of a metrics file. Returns None, or one line that says why it did not."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no curves.png: it needs Matplotlib (pip install matplotlib)"
    lines = read_metrics(metrics_path)
    if not lines:
        return "no curves.png: no epoch is done yet"
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(10, 4), layout="constrained")
    error, loss = figure.subplots(1, 2)
    error.plot(steps, [line["test_error"] for line in lines], label="test", color="tab:blue", marker=".")
    error.plot(steps, [line["train_error"] for line in lines], label="training", color="tab:blue", linestyle="--")
    error.set(xlabel="step", ylabel="error (%)", ylim=(0, None), title=f"test error {lines[-1]['test_error']:.2f} %")
    error.legend()
    loss.plot(steps, [line["train_loss"] for line in lines], label="training loss", color="tab:red")
    loss.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    rate = loss.twinx()
    rate.plot(steps, [line["lr"] for line in lines], color="tab:gray", linestyle=":")
    rate.set(ylabel="learning rate (dotted)", ylim=(0, None))
    for axes in (error, loss):
        axes.grid(alpha=0.3)
    try:
        FigureCanvasAgg(figure).print_png(png_path)
    except OSError as error:
        return f"no curves.png: {error}"
    return None


def run_summary(config: dict[str, Any], lines: list[dict[str, Any]], out: str | os.PathLike[str]) -> str:
    """The end of a run on one screen, as text: `config` and metrics `lines` as written to the folder `out`."""
    rows = [
        ("model", f"{config['model']}, {config['parameters']:,} parameters"),
        ("data", f"{config['dataset']}, {config['train_images']:,} training images"),
        ("recipe", f"{config['recipe']}, {config['total_steps']:,} steps of {config['batch_size']} images"),
        ("device", f"{config['device']} ({config['environment']['isa']}), {config['environment']['threads']} threads"),
    ]
    if lines:
        last, best = lines[-1], min(lines, key=lambda line: line["test_error"])
        rows += [
            ("done", f"{last['step']:,} steps, {last['epoch']:.1f} epochs, {duration(last['seconds'])}"),
            ("training", f"loss {last['train_loss']:.4f}, error {last['train_error']:.2f} %"),
            ("test", f"error {last['test_error']:.2f} % (best {best['test_error']:.2f} % at step {best['step']:,})"),
            ("speed", f"{last['images_per_second']:,.0f} images/s in the last epoch"),
        ]
    rows += [("memory", f"{peak_memory() / 2**20:,.0f} MiB at most"), ("files", f"{out}/")]
    return "\n".join(f"  {name:<9} {value}" for name, value in rows)


def environment() -> dict[str, Any]:
    """What a run stood on, as a JSON-able dict: versions, platform, instruction set and threads."""
    return {
        "tinyres": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "isa": _cpu.isa(),
        "threads": _cpu.threads(),
    }


def commit() -> str | None:
    """The commit of the source that is running, with "+" where tracked files were changed; None outside of git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", __file__):  # a copy installed below somebody else's repository
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> int:
    """The most memory that this process has held resident so far, in bytes."""
    try:  # Linux lets a child inherit the peak of getrusage from the process that started it, but not this one
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
