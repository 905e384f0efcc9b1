"""The CIFAR networks of both papers: three stages of equally many residual units (2015, section 4.2; 2016, appendix).

stage                 1         2         3
output size           32 x 32   16 x 16   8 x 8
filters               16        32        64        basic and single
filters, bottleneck   64        128       256
"""

from __future__ import annotations

from tinyres.errors import ArgumentError, expect
from tinyres.models.blocks import basic, bottleneck, design, single, stages
from tinyres.nn import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential
from tinyres.ops import checks

BLOCKS = {"single": single, "basic": basic, "bottleneck": bottleneck}  # of 1, 2 and 3 convolutions
BOTTLENECKS = (164, 1001)  # the depths that are bottleneck networks in the paper


def cifar_resnet(
    depth: int,
    shortcut: str | None = None,
    plain: bool = False,
    num_classes: int = 10,
    *,
    block: str | None = None,
    unit: str = "original",
    skip: str = "identity",
    scales: tuple[float, float] | None = None,
    gate_bias: float | None = None,
    dropout: float | None = None,
    filters: int = 16,
) -> Sequential:
    """The network of `depth` layers for (N, 32, 32, 3) images; logits (N, num_classes).

    depth      6n + 2: 20, 32, 44, 56, 110, 1202 in 2015; with block "bottleneck" 9n + 2: 164, 1001 in 2016; with block
               "single" 3n + 2
    shortcut   how dimensions are matched: "A", "B" or "C" (2015, section 3.3); A unless given, B for bottlenecks
    plain      the same layers without shortcuts
    block      the residual function: "single", "basic" or "bottleneck"; basic unless given, but for 164 and 1001
    unit       the order of activations (2016, Table 2), one of blocks.UNITS
    skip       what the skip connection does (2016, Table 1), one of blocks.SKIPS, with
    scales       of "constant": (on the shortcut, on the residual function); (0.5, 0.5) unless given
    gate_bias    of "exclusive_gate" and "shortcut_gate": where the gate's biases start; -6
    dropout      of "dropout": the share dropped; 0.5
    filters    of the first stage's 3x3 convolutions; 16 in the papers
    Raises ArgumentError or DtypeError for anything else, saying what is possible.
    """
    op = "cifar_resnet"
    depth = checks.integer(op, "depth", depth, 1)
    block = ("bottleneck" if depth in BOTTLENECKS else "basic") if block is None else block
    convs = BLOCKS[checks.choice(op, "block", block, tuple(BLOCKS))]
    layers = 3 * (1 + [*BLOCKS].index(block))  # of a unit in each of the three stages
    first = ", ".join(str(layers * n + 2) for n in range(1, 5))
    fits = depth > 2 and depth % layers == 2
    expect(fits, op, f"with block {block}, depth must be {layers}n + 2: {first}, ...", ArgumentError, depth=depth)
    num_classes = checks.integer(op, "num_classes", num_classes, 1)
    filters = checks.integer(op, "filters", filters, 1)
    option = ("B" if block == "bottleneck" else "A") if shortcut is None else shortcut
    d = design(op, convs, option, plain, unit, skip, scales=scales, gate_bias=gate_bias, dropout=dropout)
    width = 4 * filters if block == "bottleneck" else filters
    return Sequential(
        Conv2d(3, filters, 3, padding=1),
        BatchNorm2d(filters),
        ReLU(),
        *stages(filters, (width, 2 * width, 4 * width), [(depth - 2) // layers] * 3, d),
        GlobalAvgPool2d(),
        Linear(4 * width, num_classes),
    )
