"""The sweep, its traps (each has bitten a small engine before), hooks, grad, no_grad and custom Functions."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import tinyres
from op_case import DEVICES
from tinyres import Function, ops
from tinyres.errors import ArgumentError, DeviceError, DtypeError, GraphError, ShapeError


def leaf(values, device="cpu", dtype=np.float64):
    return tinyres.tensor(np.asarray(values, dtype), requires_grad=True, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_reused_intermediate(device):
    """y = x * x used twice: the gradient must wait for both consumers."""
    x = leaf([3.0], device)
    y = x * x
    (y + y * x).sum().backward()  # 2x + 3x^2
    assert x.grad.tolist() == [33.0]


@pytest.mark.parametrize("device", DEVICES)
def test_diamond_of_unequal_paths(device):
    x = leaf([2.0], device)
    a = x * 3
    b = ((a * a).exp().log() + a).relu()  # the long path joins the short one late
    (b * a).sum().backward()
    assert x.grad.item() == pytest.approx(3 * (3 * 36 + 2 * 6))  # d/da (a^3 + a^2) = 3a^2 + 2a, a = 6


def test_gradients_accumulate_and_are_cleared():
    x = leaf([1.0, 2.0])
    for _ in range(2):
        (x * x).sum().backward()
    assert x.grad.tolist() == [4.0, 8.0]
    x.zero_grad()
    assert x.grad is None


def test_each_leaf_owns_its_gradient():
    """a + b hands both the same array; adding to one gradient must not change the other."""
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    (a + b).backward(np.ones(2))
    a.grad += 10
    assert b.grad.tolist() == [1.0, 1.0]


def test_upstream_gradient_is_not_kept_or_changed():
    x, upstream = leaf([1.0, 2.0]), np.array([5.0, 6.0])
    y = x.reshape(2, 1).reshape(2)
    y.backward(upstream)
    x.grad += 1
    x.grad = None
    x.backward(upstream)
    x.grad += 1
    assert upstream.tolist() == [5.0, 6.0]


def test_many_consumers_of_one_value():
    x = leaf([1.0])
    y = x * 2
    total = y
    for _ in range(5):
        total = total + y
    total.sum().backward()
    assert x.grad.tolist() == [12.0]


def test_deep_chain_needs_no_recursion():
    x = leaf([1.0])
    y = x
    for _ in range(50_000):
        y = y + 1.0
    y.sum().backward()
    assert x.grad.tolist() == [1.0]
    del y
    gc.collect()


def test_second_sweep_raises():
    y = (leaf([1.0]) * 2).sum()
    y.backward()
    with pytest.raises(GraphError, match="swept already"):
        y.backward()


def test_retained_graph_can_be_swept_again():
    x = leaf([3.0])
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [12.0]


def test_saved_arrays_are_freed_by_the_sweep():
    class Keep(Function):
        def forward(self, x):
            self.saved = x * 1
            kept.append(weakref.ref(self.saved))
            return x * 2

        def backward(self, dy):
            return dy * 2

    kept = []
    y = Keep.apply(leaf([1.0, 2.0])).sum()
    assert kept[0]() is not None
    y.backward()
    assert kept[0]() is None


def test_activations_that_no_backward_needs_are_freed():
    """A node holds nodes, not tensors: the sum below needs neither operand."""
    x = leaf(np.ones(1000))
    a = x * 2
    data = weakref.ref(a.data)
    y = a + 1.0
    del a
    assert data() is None
    y.sum().backward()
    assert x.grad[0] == 2


def test_no_grad():
    x = leaf([1.0])
    with tinyres.no_grad():
        y = x * 2
    assert not y.requires_grad

    @tinyres.no_grad()
    def double(x):
        return x * 2

    assert not double(x).requires_grad and (x * 2).requires_grad
    with pytest.raises(GraphError):
        y.backward(np.ones(1))


def test_no_grad_belongs_to_its_thread():
    x, seen = leaf([1.0]), []
    with tinyres.no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_backward_needs_a_recorded_result():
    with pytest.raises(GraphError):
        tinyres.tensor(np.ones(1)).backward()
    with pytest.raises(ShapeError, match="must be given"):
        (leaf([1.0, 2.0]) * 2).backward()
    with pytest.raises(ShapeError):
        (leaf([1.0, 2.0]) * 2).backward(np.ones(3))
    with pytest.raises(DtypeError):
        (leaf([1.0, 2.0]) * 2).backward(np.array(["a", "b"]))


def test_backward_on_a_leaf():
    x = leaf([1.0, 2.0])
    x.backward(np.array([3.0, 4.0]))
    assert x.grad.tolist() == [3.0, 4.0]


# grad ---------------------------------------------------------------------------------------------------------


def test_grad_of_leaves_and_intermediates():
    x, w = leaf([2.0]), leaf([5.0])
    h = x * w
    y = (h * h).sum()
    dh, dx, dw = tinyres.grad(y, [h, x, w])
    assert dh.tolist() == [20.0] and dx.tolist() == [100.0] and dw.tolist() == [40.0]
    assert x.grad is None and w.grad is None


def test_grad_of_several_results():
    x = leaf([2.0])
    (dx,) = tinyres.grad([x * 3, x * x], x, gradients=[np.array([1.0]), np.array([10.0])])
    assert dx.tolist() == [43.0]


def test_grad_of_something_unrelated():
    with pytest.raises(GraphError, match="every x must lead to a y"):
        tinyres.grad((leaf([1.0]) * 2).sum(), leaf([1.0]))
    with pytest.raises(DtypeError):
        tinyres.grad((leaf([1.0]) * 2).sum(), np.ones(1))


# hooks --------------------------------------------------------------------------------------------------------


def test_hooks_see_the_whole_gradient_once():
    x, seen = leaf([1.0]), []
    y = x * 2
    y.register_hook(lambda g: seen.append(("y", g.tolist())))
    x.register_hook(lambda g: seen.append(("x", g.tolist())))
    (y * 3 + y * 4).sum().backward()
    assert seen == [("y", [7.0]), ("x", [14.0])]


def test_hooks_replace_and_are_removed():
    x = leaf([1.0])
    y = x * 2
    handle = y.register_hook(lambda g: g * 100)
    y.sum().backward(retain_graph=True)
    assert x.grad.tolist() == [200.0]
    handle.remove()
    x.zero_grad()
    y.sum().backward()
    assert x.grad.tolist() == [2.0]


def test_hooks_outlive_their_tensor():
    x, seen = leaf([1.0]), []
    y = x * 2
    y.register_hook(lambda g: seen.append(g.tolist()))
    z = (y * 5).sum()
    del y
    z.backward()
    assert seen == [[5.0]]


def test_hooks_are_checked():
    with pytest.raises(GraphError):
        tinyres.tensor(np.ones(1)).register_hook(print)
    with pytest.raises(ArgumentError):
        leaf([1.0]).register_hook(3)
    x = leaf([1.0])
    x.register_hook(lambda g: g.astype(np.float32))
    with pytest.raises(GraphError, match="hook"):
        (x * 2).sum().backward()


# Function -----------------------------------------------------------------------------------------------------


class Swap(Function):
    """Two inputs, two outputs."""

    def forward(self, a, b):
        return b * 2, a * 3

    def backward(self, dfirst, dsecond):
        return dsecond * 3, dfirst * 2


def test_function_of_several_outputs():
    a, b = leaf([1.0]), leaf([2.0])
    first, second = Swap.apply(a, b)
    first.sum().backward()  # the second output gets no gradient: zeros
    assert a.grad.tolist() == [0.0] and b.grad.tolist() == [2.0]
    assert second.numpy().tolist() == [3.0]


def test_function_mistakes_are_named():
    class Wrong(Function):
        def forward(self, x, give):
            self.give = give
            return x * 2

        def backward(self, dy):
            return self.give

    for give, rule in (
        (np.ones(3), "shape and dtype"),
        (np.ones(2, np.float32), "shape and dtype"),
        ((None, None), "for each input"),
    ):
        with pytest.raises(GraphError, match=rule):
            Wrong.apply(leaf([1.0, 2.0]), give=give).sum().backward()
    with pytest.raises(DtypeError, match="must be Tensors"):
        Wrong.apply(np.ones(2), give=None)
    with pytest.raises(DeviceError):
        Swap.apply(leaf([1.0]), leaf([1.0], "reference"))


def test_failed_sweep_changes_no_gradient():
    class Fails(Function):
        def forward(self, x):
            return x * 1

        def backward(self, dy):
            raise RuntimeError("no")

    x, w = leaf([1.0]), leaf([2.0])
    with pytest.raises(RuntimeError):
        (Fails.apply(x) * w).sum().backward()
    assert x.grad is None and w.grad is None


# tensor -------------------------------------------------------------------------------------------------------


def test_tensor_of_lists_numbers_and_arrays():
    assert tinyres.tensor([1.0, 2.0]).dtype == np.float32
    assert tinyres.tensor(np.ones(2)).dtype == np.float64
    assert tinyres.tensor([1, 2]).dtype.kind == "i"
    assert tinyres.tensor(np.ones(2, ">f8")).dtype.isnative
    assert tinyres.tensor(3.5, dtype=np.float64).item() == 3.5
    assert np.isinf(tinyres.tensor([1e300]).item())
    assert tinyres.tensor([1, 2], requires_grad=True, dtype="float32").requires_grad


@pytest.mark.parametrize(
    "data",
    [
        [1, 2],
        ["a"],
        [object()],
        [[1.0], [1.0, 2.0]],
        np.ones(2, np.float16),
        np.ones(2, complex),
        np.array(["2020-01-01"], "M8[D]"),
        {"a": 1},
    ],
)
def test_tensor_refuses(data):
    with pytest.raises((DtypeError, ShapeError)):
        tinyres.tensor(data, requires_grad=True)


def test_tensor_refuses_devices_and_dtypes():
    with pytest.raises(ArgumentError, match="must be one of"):
        tinyres.tensor([1.0], device="tpu")
    with pytest.raises(DtypeError):
        tinyres.tensor([1.0], dtype="nonsense")


def test_assigned_data_is_honoured():
    x = leaf([1.0, 2.0])
    (x * 2).sum().backward()
    x.data = np.ones(3, np.float32)
    assert x.grad is None and x.dtype == np.float32 and (x * 2).dtype == np.float32
    with pytest.raises(DtypeError):
        x.data = np.ones(3, int)


def test_arithmetic_with_numbers_and_arrays():
    x = leaf([1.0, 2.0])
    y = 1 + x * 2 - 0.5 / x + x**2 + 2**x + (-x) + np.ones(2) * x
    want = 1 + x.data * 2 - 0.5 / x.data + x.data**2 + 2**x.data
    assert np.allclose(y.numpy(), want)


def test_steady_state_of_training_allocates_nothing():
    """The allocator's blocks of one step serve the next."""
    model = tinyres.fuse(tinyres.models.cifar_resnet(8))
    optimizer = tinyres.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    x, labels = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32), np.arange(8)

    def step():
        loss = ops.cross_entropy(model(tinyres.tensor(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    with tinyres.options(threads=1):  # more threads may hold more scratch at one moment than at another
        for _ in range(3):
            step()
        before = tinyres.backend.memory.stats()
        for _ in range(3):
            step()
        after = tinyres.backend.memory.stats()
    assert after["system_allocations"] == before["system_allocations"]
    assert after["bytes_held"] == before["bytes_held"]
    assert after["taken"] > before["taken"], "the step must use the allocator at all"


def test_steady_state_of_inference_allocates_nothing():
    model = tinyres.fold_batch_norm(tinyres.models.cifar_resnet(8))
    x = tinyres.tensor(np.ones((8, 32, 32, 3), np.float32))
    with tinyres.options(threads=1), tinyres.no_grad():
        for _ in range(2):
            model(x)
        before = tinyres.backend.memory.stats()
        model(x)
        after = tinyres.backend.memory.stats()
    assert after["system_allocations"] == before["system_allocations"] and after["taken"] > before["taken"]


def test_gradients_of_grad_share_no_memory():
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    s = a + b
    gradients = tinyres.grad(s.sum(), [a, b, s, a])
    for i, g in enumerate(gradients):
        for other in gradients[:i]:
            assert not np.shares_memory(g, other)


def test_hooks_may_write_and_return_anything():
    """Neither writing into a gradient nor returning one buffer twice reaches another tensor's gradient."""
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    a.register_hook(lambda g: g.fill(0))
    (a + b).backward(np.ones(2))
    assert a.grad.tolist() == [0, 0] and b.grad.tolist() == [1, 1]

    a, b, mine = leaf([1.0]), leaf([2.0]), np.array([7.0])
    for x in (a, b):
        x.register_hook(lambda g: mine)
    (a * b).sum().backward()
    assert not np.shares_memory(a.grad, b.grad) and not np.shares_memory(a.grad, mine)


def test_no_grad_can_be_nested_in_itself():
    x, quiet = leaf([1.0]), tinyres.no_grad()
    with quiet:
        with quiet:
            assert not (x * 2).requires_grad
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_failing_hook_leaves_all_gradients():
    a, b = leaf([1.0]), leaf([2.0])
    b.register_hook(lambda g: np.ones(3))
    with pytest.raises(GraphError):
        (a * b).sum().backward()
    assert a.grad is None and b.grad is None


@pytest.mark.parametrize("held", [np.ones(1, np.float32), np.ones(3), [1.0]], ids=["dtype", "shape", "list"])
def test_a_foreign_grad_is_refused(held):
    x = leaf([1.0])
    x.grad = held
    before = leaf([3.0])
    before.grad = np.array([5.0])
    with pytest.raises(GraphError, match="grad must be an array"):
        (x * 2 + before * 2).sum().backward()  # whose gradient is complete first
    assert before.grad.tolist() == [5]


def test_functions_must_give_arrays():
    class Listed(Function):
        def forward(self, x):
            return [1.0]

    class Number(Function):
        def forward(self, x):
            return x * 1

        def backward(self, dy):
            return 1.0

    with pytest.raises(DtypeError, match="must return arrays"):
        Listed.apply(leaf([1.0]))
    with pytest.raises(GraphError, match="must be an array"):
        Number.apply(leaf([1.0])).sum().backward()


def test_tensors_meet_numpy():
    x = leaf([[1.0, 2.0], [3.0, 4.0]])
    assert np.asarray(x).dtype == np.float64 and float(x.sum()) == 10
    assert (np.ones((2, 2)) @ x).numpy().tolist() == [[4, 6], [4, 6]]
    assert (x @ np.ones((2, 2))).numpy().tolist() == [[3, 3], [7, 7]]
    assert x.reshape(np.int64(4)).shape == (4,)
    unaligned = np.frombuffer(b"\0" * 17, np.uint8)[1:].view(np.float32)
    assert (tinyres.tensor(unaligned) + 1.0).numpy().tolist() == [1] * 4
    with pytest.raises(ArgumentError):
        x + 10**400


def test_models_can_be_copied():
    model = tinyres.fuse(tinyres.models.cifar_resnet(8))
    x = tinyres.tensor(np.ones((1, 8, 8, 3), np.float32))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.eval()(x).numpy(), model.eval()(x).numpy())
        assert next(twin.parameters()) is not next(model.parameters())
        assert next(twin.parameters()).device is tinyres.backend.get("cpu")
