"""The compiled extension, csrc/bindings_cpu.cpp. Kernels write into their first arguments; csrc/kernels.h says what."""

from numpy import ndarray
from numpy.typing import DTypeLike

_Pair = tuple[int, int]

conv_algorithms: tuple[str, ...]

def isa() -> str: ...
def isas() -> list[str]: ...
def threads() -> int: ...
def set_threads(count: int, /) -> None: ...
def default_threads() -> int: ...
def empty(shape: tuple[int, ...], dtype: DTypeLike, /) -> ndarray: ...
def memory_stats() -> dict[str, int]: ...
def memory_reset_peak() -> None: ...
def memory_release() -> None: ...
def binary(name: str, y: ndarray, a: ndarray, b: ndarray, /) -> None: ...
def unary(name: str, y: ndarray, x: ndarray, /) -> None: ...
def unary_backward(name: str, dx: ndarray, dy: ndarray, y: ndarray, /) -> None: ...
def add_relu(y: ndarray, a: ndarray, b: ndarray, /) -> None: ...
def maximum_backward(da: ndarray, db: ndarray, dy: ndarray, a: ndarray, b: ndarray, /) -> None: ...
def pow_backward(da: ndarray, db: ndarray, dy: ndarray, a: ndarray, b: ndarray, y: ndarray, /) -> None: ...
def dropout(y: ndarray, x: ndarray, p: float, key: int, draw: int, /) -> None: ...
def copy(y: ndarray, a: ndarray, /) -> None: ...
def fill(y: ndarray, value: float, /) -> None: ...
def sum(y: ndarray, x: ndarray, /) -> None: ...
def max(y: ndarray, x: ndarray, /) -> None: ...
def max_backward(dx: ndarray, dy: ndarray, x: ndarray, y: ndarray, /) -> None: ...
def matmul(y: ndarray, a: ndarray, b: ndarray, /) -> None: ...
def conv2d_forward(y: ndarray, x: ndarray, w: ndarray, stride: _Pair, padding: _Pair, algorithm: str, /) -> None: ...
def conv2d_bias_forward(
    y: ndarray,
    x: ndarray,
    w: ndarray,
    b: ndarray,
    residual: ndarray | None,
    relu: bool,
    stride: _Pair,
    padding: _Pair,
    algorithm: str,
    /,
) -> None: ...
def conv2d_backward_input(
    dx: ndarray, dy: ndarray, w: ndarray, stride: _Pair, padding: _Pair, algorithm: str, add: bool, /
) -> None: ...
def conv2d_backward_weight(
    dw: ndarray, dy: ndarray, x: ndarray, stride: _Pair, padding: _Pair, algorithm: str, /
) -> None: ...
def batch_norm_forward(
    y: ndarray,
    mean: ndarray,
    inv_std: ndarray,
    running_mean: ndarray | None,
    running_var: ndarray | None,
    x: ndarray,
    gamma: ndarray,
    beta: ndarray,
    residual: ndarray | None,
    relu: bool,
    momentum: float,
    eps: float,
    /,
) -> None: ...
def batch_norm_backward(
    dx: ndarray,
    dresidual: ndarray | None,
    dgamma: ndarray,
    dbeta: ndarray,
    dy: ndarray,
    x: ndarray,
    y: ndarray | None,
    gamma: ndarray,
    beta: ndarray | None,
    mean: ndarray,
    inv_std: ndarray,
    /,
) -> None: ...
def batch_norm_inference(
    y: ndarray,
    x: ndarray,
    gamma: ndarray,
    beta: ndarray,
    mean: ndarray,
    var: ndarray,
    residual: ndarray | None,
    relu: bool,
    eps: float,
    /,
) -> None: ...
def batch_norm_inference_backward(
    dx: ndarray,
    dgamma: ndarray,
    dbeta: ndarray,
    dy: ndarray,
    x: ndarray,
    gamma: ndarray,
    mean: ndarray,
    var: ndarray,
    eps: float,
    /,
) -> None: ...
def max_pool2d_forward(
    y: ndarray, argmax: ndarray, x: ndarray, window: _Pair, stride: _Pair, padding: _Pair, /
) -> None: ...
def max_pool2d_backward(
    dx: ndarray, dy: ndarray, argmax: ndarray, window: _Pair, stride: _Pair, padding: _Pair, /
) -> None: ...
def avg_pool2d_forward(y: ndarray, x: ndarray, window: _Pair, stride: _Pair, padding: _Pair, /) -> None: ...
def avg_pool2d_backward(dx: ndarray, dy: ndarray, window: _Pair, stride: _Pair, padding: _Pair, /) -> None: ...
def global_avg_pool2d_forward(y: ndarray, x: ndarray, /) -> None: ...
def global_avg_pool2d_backward(dx: ndarray, dy: ndarray, /) -> None: ...
def cross_entropy(loss: ndarray, dlogits: ndarray, logits: ndarray, labels: ndarray, smoothing: float, /) -> None: ...
def sgd(
    weights: list[ndarray],
    velocities: list[ndarray] | None,
    gradients: list[ndarray],
    decays: list[float],
    lr: float | ndarray,
    momentum: float,
    nesterov: bool,
    copies: list[ndarray | None] | None,
    /,
) -> None: ...
def augment(
    x: ndarray,
    images: ndarray,
    index: ndarray,
    top: ndarray,
    left: ndarray,
    flip: ndarray,
    mean: ndarray,
    scale: ndarray,
    /,
) -> None: ...
def augment_step(
    x: ndarray,
    batch_labels: ndarray,
    images: ndarray,
    labels: ndarray,
    order: ndarray,
    counter: ndarray,
    mean: ndarray,
    scale: ndarray,
    key: int,
    batch_size: int,
    steps_per_epoch: int,
    padding: int | None,
    /,
) -> None: ...
def philox(out: ndarray, key: int, draw: int, /) -> None: ...
