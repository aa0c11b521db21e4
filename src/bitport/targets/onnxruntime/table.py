"""What ONNX Runtime's CPU provider runs in integers (u8 activations, s8 weights), as data.

Each row is exported, run and compared with the simulator by `bitport.testing.check_target`.
"""

from __future__ import annotations

import math

from torch import fx

from ...formats import Format
from ...graph import Graph, Op
from ...rules import (
    ANY_WEIGHT,
    Derived,
    Fixed,
    FormatCondition,
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
from .._base import has_integer_dot_product
from .blockwise import ROUNDS_ACTIVATIONS, layout

INT32_LIMIT = 2**31 - 1
LARGEST_ACTIVATION = 255  # u8 minus its zero point, at worst
LARGEST_WEIGHT = 128

MOVES = (
    "view", "transpose", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "getitem", "cat",
    "max_pool", "pad",
)  # fmt: skip

REASONS = {
    "hardswish": "ONNX Runtime runs hard-swish as two float operators",
    "gelu": "ONNX Runtime has no integer GELU",
    "silu": "ONNX Runtime has no integer SiLU",
    "layer_norm": "ONNX Runtime has no integer LayerNorm",
    "rms_norm": "ONNX Runtime has no integer RMSNorm",
    "group_norm": "ONNX Runtime has no integer GroupNorm",
    "instance_norm": "ONNX Runtime has no integer InstanceNorm",
    "batch_norm": "this BatchNorm follows no convolution that it could be folded into",
    "softmax": "ONNX Runtime's integer softmax is several times slower than the float one",
    "avg_pool": "ONNX Runtime's integer average pool is several times slower than the float one",
    "mean": "ONNX Runtime has no integer ReduceMean",
    "conv_transpose": "ONNX Runtime has no integer ConvTranspose, and computed weights or dilation keep this one from "
    "becoming a convolution",
    "lstm": "ONNX Runtime has no static integer LSTM",
    "gru": "ONNX Runtime has no static integer GRU",
    "sub": "ONNX Runtime has no integer Sub",
    "div": "ONNX Runtime has no integer Div",
}


def _contraction(graph: Graph, node: fx.Node, op: Op) -> str | None:
    weight = op.operands[1]
    objection = zero_padded_contraction(graph, node, op)
    if objection is not None or weight is None or weight.tensor is None:
        return objection
    return _overflow(graph, weight.tensor)


def _stack(graph: Graph, node: fx.Node, op: Op) -> str | None:
    weight = op.operands[1]
    if weight is None or weight.tensor is None:
        return "its weight is computed while running"
    return _overflow(graph, weight.tensor)


def _overflow(graph: Graph, weight: str) -> str | None:
    terms = math.prod(graph.tensor(weight).shape[1:])
    if terms * LARGEST_ACTIVATION * LARGEST_WEIGHT > INT32_LIMIT:
        return f"sums of {terms} products could overflow the 32-bit accumulator"
    return None


def _in_blocks(level: int) -> FormatCondition:
    """What MatMulNBits multiplies with: groups only, since at level 4 it rounds activations, too."""

    def objection(graph: Graph, node: fx.Node, op: Op, fmt: Format) -> str | None:
        weight = op.operands[1]
        if (
            not fmt.is_int
            or not fmt.group
            or fmt.axis not in (None, 0)
            or weight is None
            or weight.tensor is None
        ):
            return f"MatMulNBits takes integers in groups, not {fmt}"
        width = graph.tensor(weight.tensor).shape[-1]
        found = layout(fmt.bits, fmt.group, width, level)
        return None if found else f"MatMulNBits has no fast kernel for {fmt} at accuracy_level = {level}"

    return objection


def ruleset(*, integer_io: bool = False, level: int = ROUNDS_ACTIVATIONS) -> Ruleset:
    rows = (
        OpRule(
            ("conv",), (Free(), Weight(0), Derived("bias")), Free(), "QLinearConv", "compute",
            clamps=True, when=_contraction,
        ),
        OpRule(
            ("linear",), (Free(), Weight(0), Derived("bias")), Free(), "QGemm", "compute",
            clamps=True, float_output=True, when=_contraction,
        ),
        OpRule(
            ("experts",), (Free(), Weight(0), None), Free(), "MatMulIntegerToFloat", "compute",
            float_output=True, when=_stack,
        ),
        OpRule(
            ("linear",), (Ranged(), Weight(0), None), None, "DynamicQuantizeMatMul", "compute",
            mode="dynamic", when=constant_weight,
        ),
        OpRule(
            ("linear",), (None, Weight(0), None), None, "MatMulNBits", "compute",
            mode="weights", when=constant_weight, takes=_in_blocks(level),
        ),
        *decoding(),
        OpRule(("matmul",), (Free(),), Free(), "QLinearMatMul", "compute", float_output=True),
        OpRule(("add",), (Free(),), Free(), "QLinearAdd", "elementwise", clamps=True, when=plain_sum),
        OpRule(("mul",), (Free(),), Free(), "QLinearMul", "elementwise", clamps=True),
        OpRule(("global_avg_pool",), (Free(),), Free(), "QLinearGlobalAveragePool", "elementwise"),
        OpRule(("leaky_relu",), (Free(),), Free(), "QLinearLeakyRelu", "elementwise"),
        OpRule(("sigmoid",), (Free(),), Fixed(0.0, 1.0), "QLinearSigmoid", "elementwise"),
        OpRule(("relu",), (Free(),), Free(), "QuantizeLinear", "elementwise"),
        scaling(),
        *moving(MOVES, "Gather"),
    )  # fmt: skip
    return Ruleset(
        "onnxruntime",
        rows,
        activations=Holds(granularities=("global", "tensor")),
        weights={
            "static": Holds(symmetric=True),
            "dynamic": Holds(symmetric=True),
            "weights": ANY_WEIGHT,
        },
        widths=(2, 4, 8, 16),
        dynamic=Holds(exact=("int8",)),  # DynamicQuantizeLinear: all 256 codes, and a zero point of its own
        stored=("int16",),
        reasons=REASONS,
        fixed={"softmax": (0.0, 1.0)},
        # without VNNI pairs of u8 × s8 products saturate at 16 bits: 7-bit weights can't
        weight_limit=None if has_integer_dot_product() else 63,
        integer_io=integer_io,
    )


# Kinds that it fuses with the dequantize in front of them alone.
SWALLOWED = frozenset({"matmul"})

# Integer moves that are several times faster on floats: u8 → float → operator → u8 gives the same integers.
# Measured on 64×32×32: 0.16 ms on u8, 0.03 ms with the detour.
DETOURS = frozenset({"max_pool"})

# Kinds that ONNX Runtime fuses whenever they stand between a dequantize and a quantize, wanted or not. (Of the last
# three it even quantizes the float weights by itself, whatever the width of the result.)
FUSED_UNASKED = frozenset(
    {
        "softmax",
        "sigmoid",
        "leaky_relu",
        "avg_pool",
        "adaptive_avg_pool",
        "global_avg_pool",
        "add",
        "mul",
        "matmul",
        "conv",
        "conv_transpose",
        "linear",
    }
)

# Pad with zeros, then MaxPool: ONNX Runtime 1.31 moves the padding into the pool, where it means minus infinity, so
# windows of negative values lose their zeros (in float too; the AveragePool and Conv forms are right).
MERGED_WRONGLY = frozenset({("pad", "max_pool")})

# Float moves through which ONNX Runtime 1.31 carries a quantize back to what made the tensor. It doesn't count the
# outputs of the network as readers, so an output there would become the dequantized integers.
PASSED_BACK = frozenset(MOVES)
