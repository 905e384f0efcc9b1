"""Hostile calls of everything public: drawn from a seed, run on a device and compared with the reference.

    python tests/hostile.py DEVICE FIRST COUNT    run calls FIRST .. FIRST + COUNT - 1; a report as JSON
    python tests/hostile.py DEVICE NUMBER         run one call; its arguments and its outcome

A call is a function of its number and nothing else. It starts from valid arguments, of which some are made hostile:
wrong ranks, dtypes, layouts, values, types. Then it either works, with the results of the device `reference`, or is
refused with the project's own error (a raw binding's ValueError or TypeError; a MemoryError where nothing else is
wrong than the size), and has changed no input. `tests/test_hostile.py` runs this as a process of its own, because
what it looks for includes crashes.
"""

import importlib
import json
import math
import os
import resource
import signal
import sys
import warnings

import numpy as np

import tinyres
from hostile_calls import DATA, LAYERS, OPS, OPTIM, RAW, binding, either, op_call, tensor_arguments
from hostile_draw import BF16, HUGE, Draw, hostile
from op_case import ULPS
from tinyres import Tensor, data, nn, ops, optim
from tinyres.errors import TinyresError
from tinyres.nn.module import Module

# No kernels: how the adapter introduces itself, and how it captures.
SETTINGS = {"connect", "Graph", "begin_capture", "end_capture", "launches"}
SECONDS = 20  # for one call, before it counts as a hang
MEMORY = 4 << 30  # of addresses: what is absurdly large fails at once instead of filling the machine


def public(device):
    """The names of everything that must have hostile calls, as the namespaces list them."""
    extension = importlib.import_module("tinyres._emulated" if device == "emulated" else "tinyres._cpu")
    names = [f"ops.{name}" for name in ops.__all__]
    names += [f"nn.{name}" for name in nn.__all__ if name not in ("Module", "init")]  # no op of its own; no arguments
    for name, value in vars(optim).items():
        if getattr(value, "__module__", None) == optim.__name__ and not name.startswith("_"):
            members = [f".{member}" for member in vars(value) if member[0] != "_"] if name == "schedules" else [""]
            names += [f"optim.{name}{member}" for member in members]
    # Those that read files, or draw too many images, have tests of their own.
    names += [f"data.{name}" for name in data.__all__ if name not in ("NAMES", "Dataset", "load", "shapes10")]
    raw = {name for name, value in vars(extension).items() if name[0] != "_" and callable(value)} - SETTINGS
    return names + ["tensor"] + [f"raw.{name}" for name in sorted(raw)]


def targets(device):
    """By name, (arguments, run, errors) of everything that has hostile calls."""
    extension = importlib.import_module("tinyres._emulated" if device == "emulated" else "tinyres._cpu")
    own = {f"ops.{name}": (either(arguments), op_call(name)) for name, arguments in OPS.items()}
    own |= {f"nn.{name}": layer for name, layer in LAYERS.items()}
    own |= {f"optim.{name}": target for name, target in OPTIM.items()}
    own |= {f"data.{name}": target for name, target in DATA.items()}
    own["tensor"] = tensor_arguments, lambda arguments, d: [tinyres.tensor(**arguments).data]
    raw = {f"raw.{name}": binding(extension, name) for name in RAW if hasattr(extension, name)}
    return {name: (*target, TinyresError) for name, target in own.items()} | {
        name: (*target, (ValueError, TypeError)) for name, target in raw.items()
    }


def drawn(number, device, target, arguments=None):
    """The Draw, and the arguments of call `number`, a few of them hostile; into `arguments` as far as one came."""
    d = Draw(number, device)
    arguments = {} if arguments is None else arguments
    arguments.update(target[0](d))
    for _ in range(d.random.choices((0, 1, 2), (2, 6, 2))[0]):
        name = d.pick([*arguments, "extra"] if not arguments else [*arguments])
        arguments[name] = hostile(arguments.get(name), arguments, d)
    return d, arguments


def attempt(number, device, target):
    """(results, None) or (None, the error) of a call, and what the call has broken, if anything."""
    tinyres.manual_seed(3)
    tinyres.backend.use(device)
    d, arguments = Draw(0, device), {}
    try:
        d, arguments = drawn(number, device, target)
        before = [[a.tobytes() for a in kept] for kept in (d.inputs, d.outputs)]
        kept = d.inputs[:], d.outputs[:]
        try:
            outcome, error = [np.asarray(a) for a in target[1](arguments, d)], None
        except (MemoryError, *np.atleast_1d(target[2])) as refusal:
            outcome, error = None, refusal
        kinds = range(1 if error is None else 2)  # the inputs; where it was refused the outputs too
        if any([a.tobytes() for a in kept[kind]] != before[kind] for kind in kinds):
            return d, outcome, error, "memory was written to that had to stay as it was"
    except (TinyresError, MemoryError) as refusal:  # of a hostile array, by tinyres.tensor or by NumPy
        return d, None, refusal, None
    return d, outcome, error, None


def compared(name, got, want, size, tf32=False):
    """What differs, or None: the suite's tolerance after `size` summands, and the same NaN and infinities.

    Batch norm may order its factors so that an infinity becomes a NaN. And a convolution may multiply by the zeros of
    its padding or leave them out, and Winograd's spreads a NaN over a tile (docs/winograd.md): what is finite counts.
    """
    if len(got) != len(want):
        return f"{len(got)} results, the reference has {len(want)}"
    convolves = any(
        part in name for part in ("onv", "Sequential", "Residual", "Gate", "shortcut", "fuse", "fold", "block")
    )
    # Of all results, since a gradient that cancels is as exact as those that it comes from; and what a batch norm of
    # equal numbers passes on is 1 / sqrt(eps) as large; of a few that are near each other, some of that.
    low = any(w.dtype == BF16 and w.size < HUGE for w in want)  # then the rest was computed from rounded numbers too
    if [w.dtype for w in want] == [g.dtype for g in got]:
        want, got = ([a.astype(np.float32) if a.dtype == BF16 and a.size < HUGE else a for a in b] for b in (want, got))
    floats = [w[np.isfinite(w)] for w in want if w.dtype.kind == "f" and w.size < HUGE]
    scale = max((np.abs(w).max(initial=1) for w in floats), default=1)
    scale *= 320 if name.startswith("nn.") and convolves else 30 if "orm" in name else 1
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if g.size != w.size or g.dtype != w.dtype:
            return f"result {i} is {g.dtype} {g.shape}, the reference's {w.dtype} {w.shape}"
        if g.size >= HUGE:
            continue  # a view of something huge
        g, w = g.ravel(), w.ravel()
        if g.dtype.kind != "f":
            if not np.array_equal(g, w, equal_nan=g.dtype.kind == "c"):
                return f"result {i} differs"
            continue
        g, w = g.astype(np.float64), w.astype(np.float64)
        finite = np.isfinite(g) & np.isfinite(w)
        both = finite | (~np.isfinite(g) & ~np.isfinite(w) if "orm" in name else (g == w) | (g != g) & (w != w))
        if not convolves and not both.all():
            at = np.argmin(both)
            return f"result {i}, element {at} of {g.size}: {g[at]}, the reference has {w[at]}"
        # The oracle may take float64 for more than it is: images, and the losses that raw.classifier adds up, are not.
        kept = np.float32 if name in ("raw.augment", "raw.augment_step", "raw.classifier") else got[i].dtype
        precision = 2.0**-8 if low else 2.0**-10 if tf32 and kept == np.float32 else np.finfo(kept).eps
        error = np.abs(g[finite] - w[finite]).max(initial=0.0)
        if error > ULPS * precision * math.sqrt(size) * scale:
            return f"result {i} differs by {error:.3g} of {scale:.3g}"
    return None


def check(number, device, table):
    """(name, whether the call worked, what is wrong or None)."""
    name = [*table][number % len(table)]
    target = table[name]
    try:
        d, got, error, broken = attempt(number, device, target)
    except Exception as unexpected:
        return name, False, f"{type(unexpected).__name__}: {unexpected}"
    if broken or isinstance(error, MemoryError) or (error is not None and name.startswith("raw.")):
        return name, error is None, broken
    with np.errstate(all="ignore"):
        try:
            _, want, refusal, broken = attempt(number, "reference", target)
        except Exception as unexpected:
            return name, error is None, f"the reference: {type(unexpected).__name__}: {unexpected}"
    if type(error) is not type(refusal):
        return name, error is None, f"{error or 'works'!r}, on the reference {refusal or 'works'!r}"
    if error is None and d.comparable:
        size = max((a.size for a in (*d.inputs, *d.outputs)), default=1)
        broken = broken or compared(name, got, want, max(1, size), d.tf32)
    return name, error is None, broken


def text(value):
    """An argument in a line."""
    if isinstance(value, Tensor):
        return f"Tensor({text(value.data)}, {value.requires_grad}, {value.device})"
    if isinstance(value, np.ndarray):
        few = f": {value.tolist()}" if value.size <= 6 else ""
        writeable = "" if value.flags.writeable else ", read-only"
        return f"{type(value).__name__} {value.dtype} {value.shape}, strides {value.strides}{writeable}{few}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return type(value).__name__ if isinstance(value, Module) else repr(value)


def described(number, device):
    """One call in words: its name, its arguments, the command that repeats it."""
    table = targets(device)
    name = [*table][number % len(table)]
    arguments = {}
    tinyres.manual_seed(3)
    tinyres.backend.use(device)
    try:
        drawn(number, device, table[name], arguments)
    except TinyresError:
        pass
    finally:
        tinyres.backend.use("cpu")
    listed = "".join(f"\n    {key} = {text(value)}" for key, value in arguments.items())
    return f"{name} on {device}: python tests/hostile.py {device} {number}{listed}"


def main(device, first, count=None, progress=None):
    """Run calls. Where each begins, its number goes into the file `progress`, for those who outlive this process."""
    if device == "emulated":
        tinyres.backend.get("emulated")
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's own, of names that it is given
    warnings.filterwarnings("ignore", module="tinyres.backend.reference")  # which is what a tensor elsewhere is on
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # which needs addresses for what it does
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    table = targets(device)
    if count is None:
        print(described(first, device))
        print(check(first, device, table))
        return
    file = os.open(progress or os.devnull, os.O_WRONLY | os.O_CREAT)
    counts, problems = {name: [0, 0] for name in table}, []
    for number in range(first, first + count):
        os.pwrite(file, number.to_bytes(8, "little"), 0)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody handles it: it ends the process, whatever that does
        name, worked, problem = check(number, device, table)
        counts[name][not worked] += 1
        if problem:
            problems.append([number, problem])
    signal.setitimer(signal.ITIMER_REAL, 0)
    json.dump({"counts": counts, "problems": problems}, sys.stdout)
    sys.exit(problems != [] and progress is None)  # with a file there is somebody to read the report


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
