"""What each kernel of a training step reads and writes of global memory, counted in the emulation.

    python benchmarks/traffic.py --depth 20 --batch 8 --precision bfloat16 --fuse layer --json traffic.json

Builds the emulated kernels anew, into build/traffic, so that they report every access
(csrc/cuda/compat/host/traffic.h), runs two steps of a ResNet for CIFAR and counts the second. No time is measured: the
figures are the same on any machine: what a GPU's memory would be asked for by the same kernels in the same grids.

    activations, others   by sectors of 32 bytes, each once for every launch that meets it: what is left with a cache
                          that keeps a whole launch. Activations are the arrays whose first axis is the batch, which
                          grow with it; others are weights, statistics, partial sums, the optimizer's arrays.
    asked                 every access of every thread, added up: what would move without caches, and without threads
                          whose accesses go together. Beside the former: how much a kernel leaves to caches.

What is no kernel's is not counted: copies to the device, NumPy's work between launches. Kernels are instrumented after
the C++ compiler has optimised them; nvcc may keep in registers what it does not, or the other way round.

Below the table: the least that a step can move, by level of fusion. With E bytes in a convolution's output and Ei in
its input, activations only:

                         (a) op by op            (b) batch norm, add, ReLU     (c) batch norm inside the
                                                     one kernel each way           convolutions around it
    convolution          Ei + E                  Ei + E                        Ei + E
    batch norm, ReLU     3E + 2E                 E + 2E
    end of a block       3E                      E (the shortcut)              3E; after the stem 2E
    backward: ReLU, bn   3E + 5E                 2E + 3E, +E at a block's end  dy from dz and y as they are loaded
    ... by the input     E + Ei                  E + Ei                        3E + 2Ei; a block's first: and 2Ei
    ... by the weights   E + Ei                  E + Ei                        E + Ei; of the stem 2E + Ei
    two gradients of x   3Ei a block             Ei a block

(a) reads x twice for batch norm's statistics; (c) reads dz and y and writes dy once for the weight gradient, and reads
what the ReLU and the batch norm before need. There is no gradient by the images. The optimizer's 20 bytes for each
parameter are apart: w, its gradient and velocity read, w and velocity written.
"""

import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import harness
import report

LEVELS = ("a", "b", "c")


def floors(depth, batch, size):
    """{level: bytes of activations} of a training step of cifar_resnet(depth), at `size` bytes an element."""
    total = dict.fromkeys(LEVELS, 0)

    def add(i, e, first=False, last=False, stem=False):
        forward, weights, inputs = i + e, e + i, 0 if stem else e + i
        total["a"] += forward + 5 * e + 3 * e * last + 8 * e + inputs + weights + 3 * i * first
        total["b"] += forward + 3 * e + e * last + 5 * e + e * last + inputs + weights + i * first
        total["c"] += forward + (2 if stem else 3 * last) * e
        total["c"] += 2 * e + i if stem else 3 * e + 2 * i + 2 * i * first + weights

    pixels = batch * size * 32 * 32
    add(3 * pixels, 16 * pixels, stem=True)
    for stage in range(3):
        e = 16 * pixels >> stage
        for block in range((depth - 2) // 6):
            add(2 * e if stage and not block else e, e, first=True)
            add(e, e, last=True)
    return total


# the build ------------------------------------------------------------------------------------------------------------


def build(folder):
    """tinyres._emulated with its counter, built into that folder if anything changed; returns its path."""
    command = ["cmake", "-S", harness.ROOT, "-B", folder, "-DTINYRES_TRAFFIC=ON", "-DTINYRES_CUDA=OFF"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}"]
    for step in (command, ["cmake", "--build", folder, "--target", "_emulated", "--parallel", str(os.cpu_count())]):
        done = subprocess.run(list(map(str, step)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"traffic: the build failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return next(Path(folder).glob("_emulated.*.so"))


def load(path):
    """That extension in the place of tinyres._emulated, which must not have been imported yet."""
    import tinyres

    assert "tinyres._emulated" not in sys.modules
    spec = importlib.util.spec_from_file_location("tinyres._emulated", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tinyres._emulated = module
    spec.loader.exec_module(module)
    return module


def kernel_names(path):
    """{offset: name without its template's arguments} of the library's functions."""
    lines = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    names = {}
    for line in lines.splitlines():
        offset, kind, signature = line.split(maxsplit=2)
        if kind in "tTwW":
            signature = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
            if name := re.match(r"[\w:]+", signature):
                names[int(offset, 16)] = name[0].split("::")[-1]
    return names


# the step -------------------------------------------------------------------------------------------------------------


def launches_of_a_step(extension, depth, batch, precision, fuse, conv):
    """What extension.take_launches() gives of the second training step, and the number of parameters."""
    import tinyres

    device = tinyres.backend.get("emulated")
    tinyres.backend.use(device)
    tinyres.manual_seed(0)
    kernels, empty = device.kernels, device.kernels.empty

    def mark(array):
        grows = array.ndim > 1 and array.shape[0] == batch
        extension.mark(array.ctypes.data, array.nbytes, grows)
        return array

    kernels.empty = lambda shape, dtype: mark(empty(shape, dtype))
    model = tinyres.models.cifar_resnet(depth)
    network = model if fuse == "none" else tinyres.fuse(model, level="layer" if fuse == "layer" else "block")
    optimizer = tinyres.optim.SGD(model.parameters(), 0.1, 0.9, 1e-4)
    rng = np.random.default_rng(0)
    images, labels = kernels.empty((batch, 32, 32, 3), np.float32), kernels.empty((batch,), np.int64)
    images[...], labels[...] = rng.standard_normal(images.shape), rng.integers(0, 10, batch)
    if fuse == "step":
        from tinyres import data, graph

        with tinyres.options(precision=precision, conv=conv):
            pixels = rng.integers(0, 256, (4 * batch, 32, 32, 3), np.uint8)
            loader = data.Loader(pixels, np.arange(4 * batch) % 10, batch, 0, 128.0, 1 / 64, True, True, device)
            training = graph.Training(network, optimizer, loader)
            for number in range(3):  # of an epoch; they run before anything is captured
                extension.take_launches()
                training.step(number, 0.1)
        assert training.launches is None
        return extension.take_launches(), sum(p.size for p in model.parameters())
    with tinyres.options(precision=precision, conv=conv):
        for _ in range(2):
            extension.take_launches()
            loss = tinyres.ops.cross_entropy(network(tinyres.tensor(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert np.isfinite(loss.item())
    return extension.take_launches(), sum(p.size for p in model.parameters())


def rows_of(launches, names):
    """One row for each kernel and op, in the order of their first launches, and one of all together."""
    found = collections.OrderedDict()
    for op, kernel, _, _, read, written in launches:
        for key in ((names[kernel], op), ("total", "")):
            row = found.setdefault(key, {"kernel": key[0], "op": key[1], "launches": 0, "read": {}, "written": {}})
            row["launches"] += 1
            for side, bytes_ in (("read", read), ("written", written)):
                for kind, count in zip(("asked", "activations", "others"), bytes_, strict=True):
                    row[side][kind] = row[side].get(kind, 0) + count
    found.move_to_end(("total", ""))
    return list(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, help="of cifar_resnet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--fuse",
        choices=("none", "layer", "block", "step"),
        default="layer",
        help="tinyres.fuse, and its level; step: block, and the whole step as tinyres.graph.Training makes it",
    )
    parser.add_argument("--conv", default="auto", help="the option conv: auto, naive, tiled, mma, direct")
    parser.add_argument("--each", action="store_true", help="print every launch too, in order, with grid and block")
    parser.add_argument("--json", help="write the result to this file")
    args = parser.parse_args()

    path = build(harness.ROOT / "build/traffic")
    names, extension = kernel_names(path), load(path)
    chosen = {name: getattr(args, name) for name in ("depth", "batch", "precision", "fuse", "conv")}
    launches, parameters = launches_of_a_step(extension, **chosen)
    result = harness.result(
        "traffic",
        1,
        device="emulated",
        **chosen,
        rows=rows_of(launches, names),
        floors=floors(args.depth, args.batch, 2 if args.precision == "bfloat16" else 4),
        optimizer=20 * parameters,
    )
    if args.each:
        for op, kernel, grid, block, read, written in launches:
            print(f"{names[kernel]:<34} {op:<26} {grid} {block} read {read} written {written}")
        print("(asked, activations, others)\n")
    print(report.traffic(result))
    if args.json:
        harness.write_json(args.json, result)


if __name__ == "__main__":
    main()
