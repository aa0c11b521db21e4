"""What ExecuTorch's XNNPACK delegate runs in integers (s8 activations, s8 weights), as data.

Each row is exported, run and compared with the simulator by `bitport.testing.check_target`.
"""

from __future__ import annotations

from torch import fx

from ...formats import Format
from ...graph import Graph, Op
from ...rules import (
    Derived,
    Free,
    Holds,
    OpRule,
    Ranged,
    Ruleset,
    Weight,
    constant_weight,
    moving,
    plain_sum,
    zero_padded_contraction,
)

STATIC = "qs8"  # behind a kernel's name: integers in and out
DYNAMIC = "qd8"  # integers whose ranges are taken while running, out come floats

NARROW = 4  # bits of weights that it multiplies while ranges are taken; others are 8
GROUPS = 32  # weights that share a scale: a multiple of these

MOVES = (
    "view", "transpose", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "cat",
    "max_pool", "pad",
)  # fmt: skip
# Moves that XNNPACK takes where they stand between a dequantize and a quantize of the same parameters; the others run
# on integers, in operators of ExecuTorch's own.
DELEGATED = frozenset({"view", "transpose", "cat", "max_pool", "pad"})

REASONS = {
    "matmul": "XNNPACK multiplies two tensors in float only",
    "conv_transpose": "XNNPACK has no integer deconvolution, and computed weights or dilation keep this one from "
    "becoming a convolution",
    "hardswish": "XNNPACK has no integer hard-swish in ExecuTorch",
    "gelu": "XNNPACK has no integer GELU",
    "silu": "XNNPACK has no integer SiLU",
    "layer_norm": "XNNPACK has no integer LayerNorm",
    "rms_norm": "XNNPACK has no integer RMSNorm",
    "group_norm": "XNNPACK has no integer GroupNorm",
    "batch_norm": "this BatchNorm follows no convolution that it could be folded into",
    "softmax": "XNNPACK has no integer softmax",
    "sigmoid": "XNNPACK has no integer sigmoid in ExecuTorch",
    "avg_pool": "XNNPACK has no integer average pool in ExecuTorch",
    "mean": "XNNPACK has integer means of whole images only",
    "mul_scalar": "a tensor of XNNPACK has one scale: it can't be read with another",
}


def _contraction(graph: Graph, node: fx.Node, op: Op) -> str | None:
    objection = zero_padded_contraction(graph, node, op)
    if objection is None and op.kind == "conv" and op.attrs["ndim"] > 2:
        return "XNNPACK has no 3-D convolution"
    return objection


def _in_rows(graph: Graph, node: fx.Node, op: Op, fmt: Format) -> str | None:
    weight = op.operands[1]
    assert weight is not None and weight.tensor is not None
    width = graph.tensor(weight.tensor).shape[-1]
    if fmt.group and (fmt.bits > NARROW or fmt.group % GROUPS or width % fmt.group):
        return (
            f"XNNPACK takes groups of {NARROW}-bit weights only, of a multiple of {GROUPS} that divides the row "
            f"({width} here), not {fmt}"
        )
    return None


def _image(graph: Graph, node: fx.Node, op: Op) -> str | None:
    source = op.operands[0]
    shape = graph.shape(source.node) if source is not None and source.node is not None else None
    return None if shape is not None and len(shape) == 4 else REASONS["mean"]


def ruleset() -> Ruleset:
    rows = (
        OpRule(
            ("conv",), (Free(), Weight(0), Derived("bias")), Free(), f"Conv2d {STATIC}", "compute",
            clamps=True, when=_contraction,
        ),
        OpRule(
            ("linear",), (Free(), Weight(0), Derived("bias")), Free(), f"FullyConnected {STATIC}", "compute",
            clamps=True, when=_contraction,
        ),
        OpRule(
            ("linear",), (Ranged(), Weight(0), None), None, f"FullyConnected {DYNAMIC}", "compute",
            mode="dynamic", when=constant_weight, takes=_in_rows,
        ),
        OpRule(("add",), (Free(),), Free(), f"Add {STATIC}", "elementwise", clamps=True, when=plain_sum),
        OpRule(("mul",), (Free(),), Free(), f"Multiply {STATIC}", "elementwise", clamps=True),
        OpRule(
            ("global_avg_pool",), (Free(),), Free(), f"GlobalAvgPooling2d {STATIC}", "elementwise", when=_image
        ),
        *moving(MOVES, "embedding"),
    )  # fmt: skip
    return Ruleset(
        "executorch",
        rows,
        activations=Holds(granularities=("global", "tensor")),
        weights={
            "static": Holds(symmetric=True),
            "dynamic": Holds(symmetric=True, granularities=("channel", "group")),
        },
        dynamic=Holds(exact=("int8",)),  # all 256 integers, and a zero point of its own for each row
        reasons=REASONS,
        fixed={"softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0)},
        widths=(4, 8),
    )
