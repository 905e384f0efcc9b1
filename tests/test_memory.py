"""What training needs of memory, and what happens where there is not enough."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import _cpu, backend, nn
from tinyres.errors import OutOfMemoryError, TinyresError
from tinyres.options import PRECISION
from tinyres.summary import Footprint

# Out of memory ----------------------------------------------------------------------------------------------------

# A process whose addresses are limited to what it has: nothing large can be had any more, while Python goes on.
PROGRAM = """
import json, resource
import numpy as np
import tinyres
from tinyres import backend, data, nn, ops

tinyres.options(threads=1)  # a thread would take addresses for its stack
model = tinyres.fuse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                   nn.Residual(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
                                   nn.GlobalAvgPool2d(), nn.Linear(8, 10)))
images, labels = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3)).astype(np.uint8), np.arange(2048) % 10
large = data.Loader(images, labels, 2048, scale=1 / 255)
ones = lambda *shape: tinyres.tensor(np.ones(shape, np.float32), requires_grad=True)
wide = ones(1, 8, 8, 512), ones(3, 3, 512, 512)
x, outcomes = large.batch(0)[0], {}

def loss(images):
    return ops.cross_entropy(model(tinyres.tensor(x[:images])), labels[:images])

def small_step():
    model.zero_grad()
    result = loss(4)
    result.backward()
    return [result.numpy().tobytes(), *(p.grad.tobytes() for p in model.parameters())]

want = small_step()
swept = loss(2048)

def limit(addresses):
    resource.setrlimit(resource.RLIMIT_AS, (addresses, resource.RLIM_INFINITY))

def addresses_in_use():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def starved(name, call):
    backend.memory.release()
    before = backend.memory.stats()
    limit(addresses_in_use() + (1 << 20))
    try:
        call()
        outcomes[name] = "worked"
    except tinyres.errors.OutOfMemoryError as error:
        outcomes[name] = str(error)
    left = backend.memory.stats()["bytes_in_use"] - before["bytes_in_use"]
    same = small_step() == want
    limit(resource.RLIM_INFINITY)
    if left > 0 or not same:
        outcomes[name] += f"; {left} bytes lost, the same bits afterwards: {same}"

starved("forward", lambda: loss(2048))
starved("backward", swept.backward)
del swept
starved("loader", lambda: large.batch(0))
with tinyres.options(conv="direct"):
    starved("scratch", lambda: ops.conv2d(*wide, padding=1))
wide[1].grad = wide[1].data
starved("optimizer", tinyres.optim.SGD(wide[1:], 0.1, momentum=0.9).step)
backend.use("emulated")
elsewhere = tinyres.tensor(x)
backend.use("cpu")
starved("emulated", lambda: ops.relu(elsewhere))

kept = [backend.memory.empty((16 << 20,), np.uint8) for _ in range(4)]
limit(addresses_in_use() + (1 << 20))
del kept
outcomes["waiting blocks"] = backend.memory.empty((60 << 20,), np.uint8).nbytes
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "place, doing, wanted",
    [
        ("forward", r"\[Conv2d\] out of memory in forward of \(2048, 32, 32, 3\), \(3, 3, 3, 8\), None",
         r"\[empty\] out of memory for \(2048, 32, 32, 8\) float32: 64.0"),
        ("backward", r"\[GlobalAvgPool2d\] out of memory in backward to \(2048, 32, 32, 8\)",
         r"\[empty\] out of memory for \(2048, 32, 32, 8\) float32: 64.0"),
        ("loader", r"\[data.Loader\] out of memory making a batch of 2048",
         r"\[empty\] out of memory for \(2048, 32, 32, 3\) float32: 24.0"),
        ("scratch", r"\[Conv2d\] out of memory in forward of \(1, 8, 8, 512\), \(3, 3, 512, 512\), None",
         r"\[conv2d_forward\] out of memory for scratch: 9.0"),
        ("optimizer", r"\[SGD\] out of memory making the velocity of a parameter \(3, 3, 512, 512\)",
         r"\[empty\] out of memory for \(3, 3, 512, 512\) float32: 9.0"),
        ("emulated", r"\[ReLU\] out of memory in forward of \(2048, 32, 32, 3\)",
         r"\[empty\] out of memory for \(2048, 32, 32, 3\) float32: 24.0"),
    ],
    ids=lambda text: text if text.isalpha() else "",
)  # fmt: skip
def test_out_of_memory_is_told_and_survived(outcomes, place, doing, wanted):
    """The error names what was done and the sizes, and a smaller step then gives the bits that it gave before."""
    form = rf"{doing}: {wanted} MiB asked of the system, \d+\.\d MiB in use by tinyres"
    assert re.fullmatch(form, outcomes[place]), outcomes[place]


def test_waiting_blocks_are_given_back_before_memory_runs_out(outcomes):
    assert outcomes["waiting blocks"] == 60 << 20


@pytest.mark.parametrize("shape", [(2**50,), (2**40, 2**40), (2**62,)])
def test_absurd_sizes(shape):
    before = _cpu.memory_stats()["bytes_in_use"]
    with pytest.raises(OutOfMemoryError, match=rf"^\[empty\] out of memory for \({shape[0]},.*\) uint8: ") as refusal:
        backend.memory.empty(shape, "uint8")
    assert isinstance(refusal.value, MemoryError) and isinstance(refusal.value, TinyresError)
    assert _cpu.memory_stats()["bytes_in_use"] == before


def test_the_reference_runs_out_of_memory_likewise():
    x = tinyres.tensor(np.broadcast_to(np.float32(1), (2**45,)), device="reference")
    with pytest.raises(OutOfMemoryError, match=r"^\[Exp\] out of memory in forward of \(35184372088832,\): Unable to"):
        tinyres.ops.exp(x)


# The footprint of training ----------------------------------------------------------------------------------------

# In a process of its own: what training holds, then `tinyres.summary` of the same.
TRAINING = """
import json, sys
import numpy as np
import tinyres
from tinyres import backend, models, nn, ops

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

shape = tuple(map(int, sys.argv[2:]))
images, labels = np.random.default_rng(0).standard_normal(shape).astype(np.float32), np.arange(shape[0]) % 10
few = tinyres.tensor(np.zeros((2, 32, 32, 3), np.float32))
ops.cross_entropy(models.cifar_resnet(8)(few), [0, 1]).backward()  # code and threads are there from now on
del few
backend.memory.release()
resident_before, before = resident(), backend.memory.stats()
model = eval(sys.argv[1])
optimizer = tinyres.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
for _ in range(3):
    x = backend.memory.empty(shape, np.float32)  # as a loader makes it
    x[...] = images
    loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = backend.memory.stats()
measured = {
    "peak": after["peak_bytes_in_use"] - before["bytes_in_use"],
    "held": after["bytes_held"] - before["bytes_held"],
    "resident": resident() - resident_before,
}
del x, loss, optimizer
model.zero_grad()
footprint = tinyres.summary(model, shape, show=False).training
print(json.dumps({"predicted": footprint._asdict(), "measured": measured}))
"""


def trained(network, *shape):
    """The Footprint that `summary` predicts, and the bytes measured: at the peak, held, resident."""
    command = [sys.executable, "-c", TRAINING, network, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return Footprint(**result["predicted"]), result["measured"]


@pytest.mark.parametrize(
    "network, shape",
    [
        ("models.cifar_resnet(20)", (16, 32, 32, 3)),
        ("tinyres.fuse(models.cifar_resnet(20))", (128, 32, 32, 3)),
        ("tinyres.fuse(models.cifar_resnet(20), 'block')", (128, 32, 32, 3)),
        ("tinyres.fuse(models.cifar_resnet(29, block='bottleneck'))", (16, 32, 32, 3)),
        ("tinyres.fuse(models.cifar_resnet(20, unit='full_preactivation'))", (64, 32, 32, 3)),
        ("nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.GlobalAvgPool2d(),"
         "nn.Linear(512, 10))", (2, 16, 16, 3)),  # nearly all of it parameters and scratch
        ("nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 10))", (2048, 512)),
    ],
    ids=["plain", "fused", "blocks", "bottleneck", "preactivation", "wide", "mlp"],
)  # fmt: skip
def test_summary_predicts_what_training_holds(network, shape):
    predicted, measured = trained(network, *shape)
    assert predicted.total - predicted.waiting == pytest.approx(measured["peak"], rel=0.1)
    assert predicted.total == pytest.approx(measured["held"], rel=0.1)
    assert predicted.total == pytest.approx(measured["resident"], rel=0.1, abs=4 << 20)


CHOSEN = {"cpu": "winograd", "emulated": "mma", "reference": "mma"}  # reference takes any


@pytest.mark.parametrize("device", [name for name in CHOSEN if name in DEVICES])
def test_summary_with_every_choice_of_convolution(device):
    """tf32, which has a convolution of its own where there are tensor cores, takes what float32 takes."""
    before = backend.get()
    backend.use(device)
    try:
        model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        found = {}
        for precision in PRECISION:
            for conv in ("auto", CHOSEN[device]):
                # One thread: more may hold more scratch at one moment than at another.
                with tinyres.options(precision=precision, conv=conv, threads=1):
                    found[precision, conv] = tinyres.summary(model, (64, 16, 16, 8), show=False).training
    finally:
        backend.use(before)
    for conv in ("auto", CHOSEN[device]):
        assert found["tf32", conv] == found["float32", conv]
        assert found["bfloat16", conv].activations < 0.75 * found["float32", conv].activations


def test_summary_takes_no_memory_and_leaves_everything():
    """Of a batch of 8 GiB and more, in a process that stays small."""
    program = """
import re, tinyres
model = tinyres.fuse(tinyres.models.cifar_resnet(20))
print(tinyres.summary(model, (8192, 32, 32, 3), show=False).training.total >> 30)
peak = re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())  # getrusage tells the parent's, if larger
print(int(peak[1]) >> 10, tinyres.backend.memory.stats()["bytes_in_use"] >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    gigabytes, resident, in_use = map(int, done.stdout.split())
    assert gigabytes >= 8 and resident < 400 and in_use < 4, done.stdout + done.stderr
