"""SGD against its formula, its state, and the schedules."""

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import nn
from tinyres.errors import ArgumentError, CheckpointError, DtypeError, ShapeError
from tinyres.optim import SGD, schedules


def parameters(device, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [
        tinyres.tensor(rng.standard_normal(s).astype(dtype), requires_grad=True, device=device)
        for s in ((3, 5), (1,), (7, 1, 33), ())
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"), [(0, 0, False), (0, 0.1, False), (0.9, 0.1, False), (0.9, 0.1, True)]
)
def test_formula(device, dtype, momentum, decay, nesterov):
    ps = parameters(device, dtype)
    optimizer = SGD(ps, 0.1, momentum, decay, nesterov)
    want, velocity = [p.numpy().astype(np.float64) for p in ps], [0.0] * len(ps)
    for step in range(4):
        for i, p in enumerate(ps):
            dw = np.random.default_rng(step * 10 + i).standard_normal(p.shape).astype(dtype)
            p.grad = p.device.asarray(dw)
            g = dw.astype(np.float64) + decay * want[i]
            velocity[i] = momentum * velocity[i] + g
            want[i] = want[i] - 0.1 * (g + momentum * velocity[i] if nesterov else velocity[i])
        optimizer.step()
    for p, w in zip(ps, want, strict=True):
        assert np.allclose(p.numpy(), w, rtol=0, atol=1e-14 if dtype == np.float64 else 1e-5)


def test_thread_counts_give_equal_bits():
    results = set()
    for threads in (1, 2, 3, 4):
        p = tinyres.tensor(np.linspace(0, 1, 300_001).astype(np.float32), requires_grad=True)
        optimizer = SGD([p], 0.1, 0.9, 0.01)
        with tinyres.options(threads=threads):
            for _ in range(2):
                p.grad = np.sin(p.data)
                optimizer.step()
        results.add(p.data.tobytes())
    assert len(results) == 1


def test_parameters_without_gradient_stay():
    p, q = parameters("cpu")[:2]
    p.grad = np.ones(p.shape)
    before = q.data.copy()
    SGD([p, q], 0.1, weight_decay=1).step()
    assert np.array_equal(q.data, before)


def test_groups_have_their_own_decay():
    p, q = (tinyres.tensor(np.ones(2), requires_grad=True) for _ in range(2))
    p.grad, q.grad = np.zeros(2), np.zeros(2)
    SGD([{"params": [p], "weight_decay": 0.5}, {"params": [q]}], 1.0).step()
    assert p.data.tolist() == [0.5, 0.5] and q.data.tolist() == [1, 1]


def test_assigned_data_is_honoured():
    """Another dtype, another shape, a strided or a read-only array: the next step updates what is there."""
    p = tinyres.tensor(np.ones((4, 3)), requires_grad=True)
    optimizer = SGD([p], 0.5, momentum=0.5)
    p.grad = np.ones((4, 3))
    optimizer.step()
    p.data = p.data.astype(np.float32)
    p.grad = np.ones((4, 3), np.float32)
    optimizer.step()
    assert p.dtype == np.float32 and np.allclose(p.data, 1 - 0.5 - 0.75)
    frozen = np.zeros((6, 3), np.float32)[::2]
    frozen.flags.writeable = False
    p.data = frozen
    p.grad = np.ones((3, 3), np.float32)
    optimizer.step()
    assert np.allclose(p.data, -0.5) and not frozen.any()


def test_state_goes_on_to_the_same_bits():
    def run(steps, resume_at=None):
        (p, *_) = parameters("cpu")
        optimizer = SGD([p], 0.1, 0.9, 0.01, True)
        for step in range(steps):
            if step == resume_at:
                state, data = optimizer.state_dict(), p.data.copy()
                p = tinyres.tensor(data, requires_grad=True)
                optimizer = SGD([p], 7.0, 0.9, 0.01, True)
                optimizer.load_state_dict(state)
            p.grad = np.cos(p.data)
            optimizer.step()
        return p.data.tobytes()

    assert run(6) == run(6, resume_at=3)


def test_a_state_stays_what_it_was():
    (p, *_) = parameters("cpu")
    first, second = (SGD([p], 0.1, 0.9) for _ in range(2))
    p.grad = np.ones(p.shape, p.dtype)
    first.step()
    state = first.state_dict()
    second.load_state_dict(state)
    for optimizer in (first, second):
        optimizer.step()
        assert (state["velocity"]["0"] == 1).all()


def test_state_must_fit():
    p = parameters("cpu")[0]
    optimizer = SGD([p], 0.1, 0.9)
    p.grad = np.ones(p.shape)
    optimizer.step()
    state = optimizer.state_dict()
    bads = [
        {},
        None,
        *({**state, "velocity": v} for v in ({"5": np.ones(3)}, {"0": np.ones(3)}, {"0": 5}, {0: 5}, [1])),
    ]
    bads += [{**state, "lr": lr} for lr in ("x", -1, None)]
    bads += [{**state, "momentum": 5}, {**state, "nesterov": "no"}, {**state, "weight_decay": [float("nan")]}]
    for bad in bads:
        with pytest.raises(CheckpointError):
            optimizer.load_state_dict(bad)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1},
        {"lr": float("nan")},
        {"lr": "fast"},
        {"lr": 0.1, "momentum": 1},
        {"lr": 0.1, "weight_decay": -1},
        {"lr": 0.1, "nesterov": True},
    ],
)
def test_settings_are_checked(arguments):
    with pytest.raises(ArgumentError):
        SGD(parameters("cpu"), **arguments)


def test_parameters_are_checked():
    p = parameters("cpu")[0]
    for bad in ([1], [p * 2], [tinyres.tensor(np.ones(2))], p):
        with pytest.raises(DtypeError):
            SGD(bad, 0.1)
    for bad in ([], [p, p]):
        with pytest.raises(ArgumentError):
            SGD(bad, 0.1)
    for grad in (np.ones(2), [1.0], np.ones(p.shape, np.float32)):
        p.grad = grad
        with pytest.raises(ShapeError):
            SGD([p], 0.1).step()
    with pytest.raises(ArgumentError):
        SGD([{}], 0.1)


def test_schedules():
    decay = schedules.step_decay(0.1, (10, 20))
    assert [round(decay(s), 10) for s in (0, 9, 10, 19, 20, 99)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    cycle = schedules.one_cycle(0.4, 100)
    rates = [cycle(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.4 / 25) and max(rates) == rates[30] == pytest.approx(0.4)
    assert rates[15] == pytest.approx((0.4 / 25 + 0.4) / 2) and rates[65] == pytest.approx((0.4 + 0.4 / 1e4) / 2)
    assert rates[-1] < 0.4 / 500 and all(b > a for a, b in zip(rates[:30], rates[1:31], strict=True))
    assert schedules.one_cycle(0.4, 1)(0) > 0


def test_a_gradient_that_is_not_aligned():
    p = nn.Parameter(np.ones(3, np.float32))
    p.grad = np.zeros(3, [("a", "u1"), ("b", "f4")])["b"]
    SGD([p], 0.1).step()
    assert p.data.tolist() == [1, 1, 1]
