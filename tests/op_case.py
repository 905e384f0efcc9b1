"""The harness of the op tests: a Case says how to draw inputs and what to call, and each check of CHECKS runs it.

    CASES = [Case("rows", lambda x: ops.sum(x, axis=0), normal(17, 5), reduction=17)]
    test_cases = checks_of(CASES)

Every check runs on every device of this machine; an absent device is not collected (conftest.py prints their number).
"""

import zlib

import numpy as np
import pytest

import tinyres
from tinyres.errors import DeviceError


def _devices():
    present, absent = [], []
    for name in tinyres.backend.NAMES:
        try:
            present.append(tinyres.backend.get(name).name)
        except DeviceError:
            absent.append(name)
    return present, absent


DEVICES, ABSENT = _devices()

# The steps by which a result of n summands may differ between devices grow like the root of n.
ULPS = 16


class Case:
    """name       unique within its file
    call       Tensors -> Tensor
    draws      one function rng -> float64 array for each input; all inputs are differentiable there
    reduction  summands of the longest sum in the op or its gradients
    """

    def __init__(self, name, call, *draws, reduction=1):
        self.name, self.call, self.draws, self.reduction = name, call, draws, reduction

    def __str__(self):
        return self.name

    def arrays(self, dtype=np.float64):
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return [np.asarray(draw(rng), dtype) for draw in self.draws]

    def tensors(self, device, arrays=None):
        return [tinyres.tensor(a, requires_grad=True, device=device) for a in arrays or self.arrays()]

    def seeded(self, *tensors):
        """The call with the random streams at their start, so that dropout repeats itself."""
        tinyres.manual_seed(5)
        return self.call(*tensors)

    def run(self, tensors):
        """The output, then the gradient by each input through a random upstream gradient."""
        y = self.seeded(*tensors)
        dy = np.random.default_rng(7).standard_normal(y.shape).astype(y.dtype)
        y.backward(dy)
        return [y.numpy(), *(tinyres.tensor(x.grad).numpy() for x in tensors)]


# inputs -------------------------------------------------------------------------------------------------------


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


def positive(*shape):
    return lambda rng: rng.uniform(0.5, 2.0, shape)


def away_from_zero(*shape):
    """For ReLU: no element within a thousand steps of gradcheck from its kink."""
    return lambda rng: rng.uniform(0.1, 2.0, shape) * rng.choice((-1.0, 1.0), shape)


def distinct(*shape):
    """For maxima: all elements differ by at least 0.01, so that no window has a tie."""
    size = int(np.prod(shape))
    return lambda rng: (rng.permutation(size).reshape(shape) - size / 2 + 0.25) * 0.01


# checks -------------------------------------------------------------------------------------------------------


def assert_close(got, want, reduction, what):
    """Within rounding of got's dtype after `reduction` summands, measured by the largest element of want."""
    assert got.shape == want.shape, what
    scale = max(1.0, np.abs(want).max(initial=0.0))
    bound = ULPS * np.finfo(got.dtype).eps * np.sqrt(reduction) * scale
    error = np.abs(got.astype(np.float64) - want).max(initial=0.0)
    assert error <= bound, f"{what}: differs by {error:.3g}, allowed {bound:.3g}"


def matches_reference(case, device, monkeypatch):
    """Output and gradients, float64 and float32, against float64 NumPy on the same inputs."""
    for dtype in (np.float64, np.float32):
        arrays = case.arrays(dtype)
        want = case.run(case.tensors("reference", [a.astype(np.float64) for a in arrays]))
        got = case.run(case.tensors(device, arrays))
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert g.dtype == dtype
            assert_close(
                g, w, case.reduction, f"{'gradient of input ' + str(i - 1) if i else 'output'}, {dtype.__name__}"
            )


def matches_differences(case, device, monkeypatch):
    report = tinyres.gradcheck(case.seeded, case.tensors(device), max_full=64)
    assert report.checked > 0
    assert report.redraws == 0, "a case must draw its inputs away from kinks"


def writes_every_element(case, device, monkeypatch):
    """Buffers full of NaN change nothing: no kernel reads an output or leaves a part of it unwritten."""
    want = case.run(case.tensors(device))
    taken, xp = [], tinyres.backend.get(device).xp

    def poisoned(shape, dtype):
        buffer = xp.empty(shape, dtype)
        buffer.fill({"f": np.nan, "i": -(2**31), "u": 255}[buffer.dtype.kind])  # bytes of scratch: NaN too
        taken.append(shape)
        return buffer

    kernels = tinyres.backend.get(device).kernels
    monkeypatch.setattr(kernels, "empty", poisoned, raising=False)
    got = case.run(case.tensors(device))
    assert_same_bits(got, want, "poisoned buffers")
    assert taken or device == "reference", "the poison must reach the device"


def strided(x):
    """The values of a Tensor on every second element of a wider, reversed, transposed buffer, read-only on the host."""
    wide = x.device.asarray(np.full([2 * n for n in x.shape[::-1]], np.nan, x.dtype))
    view = wide.T[(*(slice(None, None, -2) for _ in x.shape), ...)]
    view[...] = x.data
    if isinstance(view, np.ndarray):  # CuPy has no such flag
        view.flags.writeable = False
    return view


def takes_any_layout(case, device, monkeypatch):
    """Strided read-only inputs give what dense ones give, and no input is written to."""
    want = case.run(case.tensors(device))
    tensors = case.tensors(device)
    for x in tensors:
        x.data = strided(x)
    for g, w in zip(case.run(tensors), want, strict=True):
        assert_close(g, w, case.reduction, "strided inputs")
    for x, a in zip(tensors, case.arrays(), strict=True):
        assert np.array_equal(x.numpy(), a), "an input was written to"


def repeats_exactly(case, device, monkeypatch):
    """The same bits twice, and for any number of threads."""
    for dtype in (np.float32, np.float64):
        want = case.run(case.tensors(device, case.arrays(dtype)))
        for threads in (1, 1, 2, 3, 4):
            with tinyres.options(threads=threads):
                got = case.run(case.tensors(device, case.arrays(dtype)))
            assert_same_bits(got, want, f"{threads} threads")


def assert_same_bits(got, want, what):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype, what
        assert g.tobytes() == w.tobytes(), f"{what}: result {i} differs"


CHECKS = (matches_reference, matches_differences, writes_every_element, takes_any_layout, repeats_exactly)


def checks_of(cases):
    """A test function that runs every check of every case on every device present."""
    assert len({str(case) for case in cases}) == len(cases), "case names must differ"

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    @pytest.mark.parametrize("case", cases, ids=str)
    def test(case, check, device, monkeypatch):
        check(case, device, monkeypatch)

    return test
