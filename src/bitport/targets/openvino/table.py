"""What OpenVINO's CPU plugin runs in integers (u8 activations, s8 weights), as data.

Each row is exported, run and compared with the simulator by `bitport.testing.check_target`.
"""

from __future__ import annotations

from torch import fx

from ...formats import GRANULARITIES, Format
from ...graph import Graph, Op
from ...rules import (
    Derived,
    Free,
    Holds,
    OpRule,
    Ruleset,
    Weight,
    decoding,
    moving,
    plain_sum,
    scaling,
    zero_padded_contraction,
)
from .._base import has_integer_dot_product

# Not transpose: integers that are transposed are multiplied as floats behind it.
MOVES = (
    "view", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "cat",
    "max_pool", "pad",
)  # fmt: skip

# Grouped convolutions with AMX instructions, 8 or more channels a group: kernels of 16, 24 and 32 are wrong by more
# than the largest output; those up to 15, of 17, 18, 20 and 31 are right.
WRONG_FROM = 16

# What it computes on dequantized integers although the plan keeps it in float: with padding that counts it is wrong.
SWALLOWED = frozenset({"avg_pool"})

REASONS = {
    "matmul": "OpenVINO multiplies two tensors in float where they have zero points",
    "transpose": "behind an integer transpose OpenVINO would multiply floats",
    "hardswish": "OpenVINO has no integer hard-swish",
    "gelu": "OpenVINO has no integer GELU",
    "silu": "OpenVINO has no integer SiLU",
    "layer_norm": "OpenVINO has no integer LayerNorm",
    "rms_norm": "OpenVINO has no integer RMSNorm",
    "batch_norm": "this BatchNorm follows no convolution that it could be folded into",
    "softmax": "OpenVINO has no integer softmax",
    "sigmoid": "OpenVINO has no integer sigmoid",
    "mean": "OpenVINO 2026.4 computes means of 8-bit tensors wrongly along some axes",
}


def _contraction(graph: Graph, node: fx.Node, op: Op) -> str | None:
    weight = op.operands[1]
    objection = zero_padded_contraction(graph, node, op)
    if objection is not None or op.kind != "conv" or weight is None or weight.tensor is None:
        return objection
    shape = graph.tensor(weight.tensor).shape
    if op.attrs["groups"] > 1 and shape[1] > 1 and shape[-1] >= WRONG_FROM:
        return f"OpenVINO 2026.4 computes grouped convolutions of kernels {WRONG_FROM} and longer wrongly in 8 bits"
    return None


def _pool(graph: Graph, node: fx.Node, op: Op) -> str | None:
    if op.attrs.get("divisor_override"):
        return "OpenVINO divides average pools by the size of their windows alone"
    counts = op.attrs.get("count_include_pad", True) and any(op.attrs["padding"])
    return "OpenVINO 2026.4 counts an average pool's padding as codes of 0, not as zeros" if counts else None


def _stored(graph: Graph, node: fx.Node, op: Op, fmt: Format) -> str | None:
    return f"OpenVINO stores no {fmt} weights" if fmt.kind == "float" and not fmt.unscaled else None


def ruleset() -> Ruleset:
    rows = (
        OpRule(
            ("conv",), (Free(), Weight(0), Derived("bias")), Free(), "Convolution", "compute",
            clamps=True, float_output=True, when=_contraction,
        ),
        OpRule(
            ("linear",), (Free(), Weight(0), Derived("bias")), Free(), "FullyConnected", "compute",
            clamps=True, float_output=True, when=_contraction,
        ),
        OpRule(
            ("add",), (Free(),), Free(), "Eltwise", "elementwise",
            clamps=True, when=plain_sum, fuses=frozenset({"conv"}),
        ),
        OpRule(("mul",), (Free(),), Free(), "Eltwise", "elementwise", clamps=True),
        OpRule(("global_avg_pool",), (Free(),), Free(), "Reduce", "elementwise"),
        OpRule(("avg_pool",), (Free(),), Free(), "Pooling", "elementwise", when=_pool),
        OpRule(("relu",), (Free(),), Free(), "FakeQuantize", "elementwise"),
        *decoding(_stored),
        scaling(),
        *moving(MOVES, "Gather"),
    )  # fmt: skip
    return Ruleset(
        "openvino",
        rows,
        activations=Holds(granularities=("global", "tensor")),
        weights={
            "static": Holds(symmetric=True),
            "weights": Holds(("int", "float"), granularities=GRANULARITIES),
        },
        reasons=REASONS,
        fixed={"softmax": (0.0, 1.0), "sigmoid": (0.0, 1.0)},
        widths=(4, 8, 16),
        # without VNNI pairs of u8 × s8 products saturate at 16 bits: 7-bit weights can't
        weight_limit=None if has_integer_dot_product() else 63,
    )
