"""The rounding errors of Winograd's algorithm beside those of direct convolution and of PyTorch.

    python benchmarks/winograd_error.py [--against torch|none] [--json FILE]

For the 3x3 layers of ResNet-20: y, dx and dw in float32 against the same in float64, as norm of the difference over
norm of the result, the median over draws of normal x and dy and weights of He's initialisation. tinyres's two kernels
and PyTorch get the same arrays. Below it, y of the last layer by NumPy for other choices of the interpolation points.
docs/winograd.md has the tables.
"""

import argparse
import statistics
from fractions import Fraction

import numpy as np

import harness
import report

# batch, image size, channels and filters
LAYERS = [(128, 32, 16), (128, 16, 32), (128, 8, 64)]
DRAWS = 5

# (a, b) of the points 0, a, -a, b, -b and infinity
POINTS = [("3/4", "3/2"), ("1", "2"), ("1/2", "1"), ("1/2", "3/2"), ("2/3", "4/3"), ("1/2", "2")]


def drawn(layer, seed):
    """x, w, dy of a layer."""
    n, size, channels = layer
    rng = np.random.default_rng([seed, channels])
    x, dy = (rng.standard_normal((n, size, size, channels), np.float32) for _ in range(2))
    w = rng.standard_normal((3, 3, channels, channels), np.float32) * np.float32((2 / (9 * channels)) ** 0.5)
    return x, w, dy


def ours(algorithm, x, w, dy):
    """y, dx, dw by tinyres in the dtype of the arrays."""
    import tinyres

    kernels, one = tinyres.backend.get("cpu").kernels, (1, 1)
    with tinyres.options(conv=algorithm):
        y = kernels.conv2d_forward(x, w, one, one)
        dx = kernels.conv2d_backward_input(dy, w, x.shape, one, one)
        dw = kernels.conv2d_backward_weight(dy, x, w.shape, one, one)
    return y, dx, dw


def pytorchs(x, w, dy):
    """y, dx, dw by PyTorch, channels_last, in our layouts."""
    import torch

    x, dy = (torch.from_numpy(a).permute(0, 3, 1, 2).requires_grad_() for a in (x, dy))
    w = torch.from_numpy(w).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = torch.nn.functional.conv2d(x, w, padding=1)
    y.backward(dy)
    y, dx, dw = y.detach().permute(0, 2, 3, 1), x.grad.permute(0, 2, 3, 1), w.grad.permute(2, 3, 1, 0)
    return [a.numpy() for a in (y, dx, dw)]


def matrices(a, b):
    """A^T (4, 6), B^T (6, 6) and G (6, 3) for these points, as arrays of exact fractions."""
    points = [Fraction(0), Fraction(a), -Fraction(a), Fraction(b), -Fraction(b)]

    def numerator(roots):
        """Coefficients of the product of (t - root), lowest first."""
        result = [Fraction(1)]
        for root in roots:
            result = [low - root * high for low, high in zip([0, *result], [*result, 0], strict=True)]
        return result

    A, B, G = [], [], []
    for p in points:
        others = [q for q in points if q != p]
        A.append([p**i for i in range(4)])
        B.append([*numerator(others), Fraction(0)])
        G.append([p**i / np.prod([p - q for q in others]) for i in range(3)])
    A.append([Fraction(i == 3) for i in range(4)])
    B.append(numerator(points))
    G.append([Fraction(i == 2) for i in range(3)])
    return np.array(A, object).T, np.array(B, object), np.array(G, object)


def emulated(a, b, x, w):
    """y with padding 1 of images whose sides are multiples of 4, every step rounded to float32."""
    A, B, G = (matrix.astype(np.float32) for matrix in matrices(a, b))
    n, size, _, channels = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    tiles = np.lib.stride_tricks.sliding_window_view(padded, (6, 6), (1, 2))[:, ::4, ::4]  # n, row, column, c, 6, 6
    v = (B @ tiles @ B.T).reshape(-1, channels, 36)
    u = (G @ w.transpose(2, 3, 0, 1) @ G.T).reshape(channels, -1, 36)
    m = np.matmul(v.transpose(2, 0, 1), u.transpose(2, 0, 1)).transpose(1, 2, 0)  # tile, k, 36
    y = A @ m.reshape(*m.shape[:2], 6, 6) @ A.T
    y = y.reshape(n, size // 4, size // 4, -1, 4, 4).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, size, size, -1)


def measure_points():
    """For each choice of points the error of y."""
    x, w, dy = drawn((8, *LAYERS[-1][1:]), 0)
    want = ours("direct", *(a.astype(np.float64) for a in (x, w, dy)))[0]
    return {f"0, ±{a}, ±{b}": float(f"{error(emulated(a, b, x, w), want):.2g}") for a, b in POINTS}


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(layer, against):
    """A row of the result: the median error of y, dx and dw for each side."""
    sides = {"winograd": lambda *a: ours("winograd", *a), "direct": lambda *a: ours("direct", *a)}
    if against == "torch":
        sides["torch"] = pytorchs
    found = {name: ([], [], []) for name in sides}
    for seed in range(DRAWS):
        arrays = drawn(layer, seed)
        wanted = ours("direct", *(a.astype(np.float64) for a in arrays))
        for name, side in sides.items():
            for errors, got, want in zip(found[name], side(*arrays), wanted, strict=True):
                errors.append(error(got, want))
    n, size, channels = layer
    row = {"batch": n, "size": size, "channels": channels}
    for name, lists in found.items():
        medians = [float(f"{statistics.median(errors):.2g}") for errors in lists]
        row[name] = dict(zip(("y", "dx", "dw"), medians, strict=True))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("torch", "none"), default="torch")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from tinyres import _cpu

    rows = [measure(layer, args.against) for layer in LAYERS]
    result = harness.result("winograd_error", _cpu.threads(), _cpu.isa(), rows=rows, points=measure_points())
    print(report.render([result]))
    if args.json:
        harness.write_json(args.json, result)


if __name__ == "__main__":
    main()
