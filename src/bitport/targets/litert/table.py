"""What LiteRT's CPU kernels run in integers (s8 activations, s8 weights), as data.

Each row is exported, run and compared with the simulator by `bitport.testing.check_target`.
"""

from __future__ import annotations

from torch import fx

from ...formats import Format
from ...graph import Graph, Op
from ...rules import (
    Derived,
    Fixed,
    Free,
    Holds,
    OpRule,
    Ranged,
    Ruleset,
    Weight,
    constant_weight,
    decoding,
    moving,
    plain_sum,
    scaling,
    zero_padded_contraction,
)

MOVES = (
    "view", "transpose", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "cat", "stack",
    "max_pool", "pad",
)  # fmt: skip

HYBRID = " I8 weights"  # after the kind of an operator that rounds the floats that it reads

REASONS = {
    "hardswish": "LiteRT's integer hard-swish isn't reproduced",
    "gelu": "LiteRT's integer GELU isn't reproduced",
    "softmax": "LiteRT's integer softmax isn't reproduced",
    "avg_pool": "LiteRT's integer average pool has one scale for both ends",
    "leaky_relu": "LiteRT's integer leaky ReLU isn't reproduced",
    "relu": "this ReLU follows nothing that it could be a part of",
    "silu": "LiteRT has no integer SiLU",
    "layer_norm": "LiteRT has no integer LayerNorm",
    "rms_norm": "LiteRT has no integer RMSNorm",
    "group_norm": "LiteRT has no integer GroupNorm",
    "instance_norm": "LiteRT has no integer InstanceNorm",
    "batch_norm": "this BatchNorm follows no convolution that it could be folded into",
    "conv_transpose": "LiteRT's transposed convolution isn't reproduced in integers",
}


def _contraction(graph: Graph, node: fx.Node, op: Op) -> str | None:
    objection = zero_padded_contraction(graph, node, op)
    if objection is None and op.kind == "conv" and op.attrs["ndim"] > 2:
        return "LiteRT's 3-D convolution is a float one"
    return objection


def _stored(graph: Graph, node: fx.Node, op: Op, fmt: Format) -> str | None:
    if fmt.unscaled and fmt.exponent == 5:
        return None
    return f"LiteRT decodes float16 weights, not {fmt}" if fmt.kind != "int" else None


def ruleset(kernels: str, *, integer_io: bool = False) -> Ruleset:
    """kernels: xnnpack or reference."""
    rows = (
        *(
            OpRule(
                ("conv",), (Free(), Weight(0), Derived("bias")), Free(), kernel, "compute",
                clamps=True, when=when,
            )
            for kernel, when in (("DEPTHWISE_CONV_2D", _depthwise), ("CONV_2D", _contraction))
        ),
        OpRule(
            ("linear",), (Free(), Weight(0), Derived("bias")), Free(), "FULLY_CONNECTED", "compute",
            clamps=True, when=_contraction,
        ),
        OpRule(
            ("linear",), (Ranged(), Weight(0), None), None, f"FULLY_CONNECTED{HYBRID}", "compute",
            mode="dynamic", when=constant_weight,
        ),
        OpRule(("matmul",), (Free(),), Free(), "BATCH_MATMUL", "compute"),
        OpRule(("add",), (Free(),), Free(), "ADD", "elementwise", clamps=True, when=plain_sum),
        OpRule(("mul",), (Free(),), Free(), "MUL", "elementwise", clamps=True),
        OpRule(("global_avg_pool",), (Free(),), Free(), "MEAN", "elementwise"),
        OpRule(("sigmoid",), (Free(),), Fixed(0.0, 1.0), "LOGISTIC", "elementwise"),
        *decoding(_stored),
        scaling(),
        *moving(MOVES, "GATHER"),
    )  # fmt: skip
    return Ruleset(
        "litert",
        rows,
        activations=Holds(granularities=("global", "tensor")),
        weights={
            "static": Holds(symmetric=True),
            "dynamic": Holds(symmetric=True),
            "weights": Holds(("int", "float"), granularities=("global", "tensor", "channel")),
        },
        dynamic=Holds(exact=("int8",)),  # its kernels take all 256 codes, and a zero point of their own
        reasons=REASONS,
        fixed={"softmax": (0.0, 1.0)},
        integer_io=integer_io,
    )


def _depthwise(graph: Graph, node: fx.Node, op: Op) -> str | None:
    objection = _contraction(graph, node, op)
    weight = op.operands[1]
    if objection is None and weight is not None and weight.tensor is not None:
        if op.attrs["groups"] == 1 or graph.tensor(weight.tensor).shape[1] != 1:
            return "each channel is convolved with all others"
    return objection
