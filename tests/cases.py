"""The shapes that the op tests run, each with its reason, and hypothesis strategies for window geometries.

Vectors hold 4, 8 or 16 elements (SSE2, AVX2, AVX-512 in float32; half as many in float64), so sizes just under, at
and over these matter; primes divide into nothing.
N batch, H W input size, C channels, K filters, R S window, P Q output size.
"""

from dataclasses import dataclass

from hypothesis import strategies as st

SHAPES = {
    "scalar": (),
    "one": (1,),
    "under a vector": (3,),
    "under an AVX-512 vector": (15,),
    "an AVX-512 vector": (16,),
    "over an AVX-512 vector": (17,),
    "primes": (3, 5, 7),
    "axes of one": (2, 1, 3, 1),
}

BROADCASTS = {
    "same shape": ((3, 5), (3, 5)),
    "scalar on the left": ((), (5,)),
    "scalar on the right": ((2, 3), ()),
    "missing axis": ((3, 5), (5,)),
    "missing axis on the left": ((17,), (2, 17)),
    "outer": ((3, 1), (1, 2)),
    "both sides, ranks differ": ((2, 1, 3), (4, 1)),
    "axes of one kept": ((1, 1), (1,)),
    "rows of a vector and one": ((5, 17), (5, 1)),
}

# (M, K, N) of (M, K) @ (K, N)
MATMULS = {
    "ones": (1, 1, 1),
    "primes": (2, 3, 5),
    "around one AVX2 vector": (7, 8, 9),
    "around one AVX-512 vector": (15, 17, 16),
    "dot product": (1, 33, 1),
    "outer product": (5, 1, 18),
    "one row": (1, 10, 10),
    "several tiles high": (37, 4, 3),
    "over two vectors wide": (3, 2, 35),
}

MATMUL_BATCHES = {
    "a batch": ((2, 3, 4), (2, 4, 5)),
    "one matrix on the right": ((2, 3, 4), (4, 5)),
    "one matrix on the left": ((3, 4), (2, 4, 5)),
    "batches broadcast both ways": ((2, 1, 3, 4), (3, 4, 2)),
}


@dataclass(frozen=True)
class Geometry:
    """A window sliding over an image."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def x(self):
        return (self.N, self.H, self.W, self.C)

    @property
    def w(self):
        return (self.R, self.S, self.C, self.K)

    @property
    def y(self):
        P = (self.H + 2 * self.padding[0] - self.R) // self.stride[0] + 1
        Q = (self.W + 2 * self.padding[1] - self.S) // self.stride[1] + 1
        return (self.N, P, Q, self.K)


CONVS = {
    "one of everything": Geometry(1, 1, 1, 1, 1, 1, 1),
    "3x3 of a residual unit": Geometry(2, 6, 6, 16, 16, 3, 3, padding=(1, 1)),
    "3x3 on an image of 3 channels": Geometry(2, 5, 5, 3, 16, 3, 3, padding=(1, 1)),
    "3x3 stride 2 between stages": Geometry(1, 6, 6, 4, 8, 3, 3, stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2, odd size": Geometry(1, 7, 7, 4, 8, 3, 3, stride=(2, 2), padding=(1, 1)),
    "1x1 projection": Geometry(2, 4, 4, 5, 7, 1, 1),
    "1x1 stride 2 shortcut, unread pixels": Geometry(2, 5, 4, 4, 9, 1, 1, stride=(2, 2)),
    "7x7 stride 2 of the ImageNet stem": Geometry(1, 9, 9, 3, 5, 7, 7, stride=(2, 2), padding=(3, 3)),
    "primes, sides differ": Geometry(1, 7, 5, 3, 2, 3, 2, stride=(1, 2), padding=(0, 1)),
    "strides and padding differ by side": Geometry(1, 8, 5, 2, 3, 2, 3, stride=(3, 1), padding=(1, 2)),
    "stride larger than the window": Geometry(1, 8, 8, 2, 3, 2, 2, stride=(3, 3)),
    "window as large as the image": Geometry(2, 3, 4, 2, 5, 3, 4),
    "window larger than the image, less than padded": Geometry(1, 2, 2, 2, 2, 4, 4, padding=(1, 1)),
    "padding larger than the window": Geometry(1, 2, 3, 2, 2, 2, 2, padding=(3, 2)),
    "one row of pixels": Geometry(1, 1, 19, 2, 3, 1, 3, padding=(0, 1)),
    "one column of pixels": Geometry(1, 19, 1, 2, 3, 3, 1, padding=(1, 0)),
    "filters just under and over a vector": Geometry(1, 3, 3, 15, 17, 3, 3, padding=(1, 1)),
    "filters over two vectors": Geometry(1, 2, 3, 2, 35, 3, 3, padding=(1, 1)),
    "row longer than a tile of pixels": Geometry(1, 2, 34, 2, 16, 3, 3, padding=(1, 1)),
    "one channel in": Geometry(2, 4, 4, 1, 4, 3, 3, padding=(1, 1)),
    "one filter out": Geometry(2, 4, 4, 4, 1, 3, 3, padding=(1, 1)),
}

POOLS = {
    "one of everything": Geometry(1, 1, 1, 1, 1, 1, 1),
    "2x2, windows side by side": Geometry(2, 4, 6, 3, 3, 2, 2, stride=(2, 2)),
    "3x3 stride 2 padded, of the ImageNet stem": Geometry(1, 7, 7, 4, 4, 3, 3, stride=(2, 2), padding=(1, 1)),
    "overlapping": Geometry(1, 4, 5, 2, 2, 3, 2),
    "sides differ": Geometry(1, 7, 5, 2, 2, 3, 2, stride=(1, 2), padding=(1, 0)),
    "stride larger than the window": Geometry(1, 8, 8, 2, 2, 2, 2, stride=(3, 3)),
    "rest of the image unread": Geometry(1, 5, 6, 2, 2, 2, 3, stride=(2, 3)),
    "window as large as the image": Geometry(2, 3, 4, 2, 2, 3, 4),
    "channels over an AVX-512 vector": Geometry(1, 4, 4, 17, 17, 2, 2, stride=(2, 2)),
    "1x1 stride 2 of shortcut A": Geometry(1, 5, 6, 3, 3, 1, 1, stride=(2, 2)),
}


@st.composite
def conv_geometries(draw):
    """Valid by construction: the output size is drawn first and the input size follows from it."""
    (H, R, sh, ph), (W, S, sw, pw) = draw(_sides(pool=False)), draw(_sides(pool=False))
    N, C, K = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 9) | st.sampled_from((16, 17, 33)))
    return Geometry(N, H, W, C, K, R, S, (sh, sw), (ph, pw))


@st.composite
def pool_geometries(draw):
    """As conv_geometries; padding is at most half of the window, so that every window holds a pixel."""
    (H, R, sh, ph), (W, S, sw, pw) = draw(_sides(pool=True)), draw(_sides(pool=True))
    N, C = draw(st.integers(1, 3)), draw(st.integers(1, 5) | st.sampled_from((16, 17)))
    return Geometry(N, H, W, C, C, R, S, (sh, sw), (ph, pw))


@st.composite
def _sides(draw, pool):
    """(image, window, stride, padding) of one side."""
    window, stride, output = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    padded = (output - 1) * stride + window + draw(st.integers(0, stride - 1))  # the rest is not read
    padding = draw(st.integers(0, min((padded - 1) // 2, window // 2 if pool else 3)))
    return padded - 2 * padding, window, stride, padding


# What to do to valid arguments (x shape, w shape, stride, padding) of a convolution to make them invalid.
BREAKS = {
    "x of rank 3": lambda x, w, stride, padding: (x[1:], w, stride, padding),
    "x of rank 5": lambda x, w, stride, padding: ((1, *x), w, stride, padding),
    "w of rank 3": lambda x, w, stride, padding: (x, w[1:], stride, padding),
    "channels differ": lambda x, w, stride, padding: (x, (*w[:2], w[2] + 1, w[3]), stride, padding),
    "window too high": lambda x, w, stride, padding: (x, (x[1] + 2 * padding[0] + 1, *w[1:]), stride, padding),
    "window too wide": lambda x, w, stride, padding: (x, (w[0], x[2] + 2 * padding[1] + 1, *w[2:]), stride, padding),
    "no batch": lambda x, w, stride, padding: ((0, *x[1:]), w, stride, padding),
    "no rows": lambda x, w, stride, padding: ((x[0], 0, *x[2:]), w, stride, (0, 0)),
    "no channels": lambda x, w, stride, padding: ((*x[:3], 0), (*w[:2], 0, w[3]), stride, padding),
    "no filters": lambda x, w, stride, padding: (x, (*w[:3], 0), stride, padding),
    "empty window": lambda x, w, stride, padding: (x, (0, *w[1:]), stride, padding),
    "stride zero": lambda x, w, stride, padding: (x, w, (0, stride[1]), padding),
    "stride negative": lambda x, w, stride, padding: (x, w, (stride[0], -1), padding),
    "stride a float": lambda x, w, stride, padding: (x, w, (1.5, stride[1]), padding),
    "stride of three": lambda x, w, stride, padding: (x, w, (1, 1, 1), padding),
    "stride a string": lambda x, w, stride, padding: (x, w, "11", padding),
    "stride none": lambda x, w, stride, padding: (x, w, None, padding),
    "stride huge": lambda x, w, stride, padding: (x, w, (2**70, 1), padding),
    "padding negative": lambda x, w, stride, padding: (x, w, stride, (padding[0], -1)),
    "padding a float": lambda x, w, stride, padding: (x, w, stride, (0.5, 0)),
    "padding not a number": lambda x, w, stride, padding: (x, w, stride, (float("nan"), 0)),
    "padding of one": lambda x, w, stride, padding: (x, w, stride, (1,)),
}


def invalid_conv_geometries():
    """(x shape, w shape, stride, padding) of a valid geometry with one thing broken; must raise."""
    return st.builds(
        lambda g, change: change(g.x, g.w, g.stride, g.padding), conv_geometries(), st.sampled_from([*BREAKS.values()])
    )
