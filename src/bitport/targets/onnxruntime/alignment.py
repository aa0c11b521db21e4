"""Integer convolutions of few input channels read a multiple of four of them.

ONNX Runtime multiplies bytes in fours. Where a window's C·kH·kW values are no multiple of four, it copies the rest of
every window byte by byte. Measured on version 1.31.1, x86-64 with AVX-512 VNNI: the first convolution of an RGB image
(3×3, 64×64 pixels, 32 filters) takes 80 µs with a fourth channel, 149 µs without. Windows of more than some 128 values
gain nothing by it, and one channel in strides loses more by the longer copies than it gains.

The integers stay what they were: the channels added are some of the same once more, and zeros multiply them. They come
by Concat, whose result can't be larger than what it joins, whatever numbers a damaged file holds; Pad's can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graph import Graph
from ...plan import Plan

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 4  # bytes that are multiplied at once
LONGEST = 128  # values of a window
KERNEL = "QLinearConv"


def align_channels(model: ir.Model, graph: Graph, plan: Plan) -> None:
    """Give the convolutions in `model` that gain by it more input channels, in place."""
    for node in list(model.graph):
        todo = plan.nodes.get(str(node.name))
        if node.op_type != "Conv" or todo is None or todo.kernel != KERNEL:
            continue
        op = graph.op(graph.node(str(node.name)))
        weight = op.operands[1]
        if weight is None or weight.tensor is None or op.attrs["groups"] != 1:
            continue
        shape = graph.tensor(weight.tensor).shape  # [O, C, kH, kW]
        missing = missing_channels(*shape[1:], strided=any(stride > 1 for stride in op.attrs["stride"]))
        if missing:
            _widen(model.graph, node, shape, missing)


def missing_channels(channels: int, *window: int, strided: bool) -> int:
    """How many input channels a convolution lacks; 0 where more of them gain nothing."""
    values = channels * math.prod(window)
    if values % ALIGNMENT == 0 or values > LONGEST or (channels == 1 and strided):
        return 0
    return -channels % ALIGNMENT


def _widen(graph: ir.Graph, conv: ir.Node, shape: Sequence[int], missing: int) -> None:
    """Conv(DequantizeLinear(x), DequantizeLinear(w)): both integers get more channels behind their own."""
    import onnx_ir

    decodes = [value.producer() if value is not None else None for value in conv.inputs[:2]]
    for decode in decodes:
        if decode is None or decode.op_type != "DequantizeLinear":
            return
        if len(decode.outputs[0].uses()) > 1 or decode.outputs[0].is_graph_output():
            return  # others read it, too

    def constant(name: str, value: np.ndarray[Any, Any]) -> ir.Value:
        made = onnx_ir.Value(name=f"{conv.name}/{name}", const_value=onnx_ir.tensor(value))
        graph.initializers.add(made)
        return made

    def operator(
        kind: str, name: str, inputs: Sequence[ir.Value | None], before: ir.Node, **more: int
    ) -> ir.Value:
        made = onnx_ir.node(kind, inputs, more, name=f"{conv.name}/{name}")
        made.outputs[0].name = f"{made.name}/out"
        graph.insert_before(before, made)
        return made.outputs[0]

    read, weight = decodes
    assert read is not None and weight is not None
    zero_point = None if weight.inputs[2] is None else weight.inputs[2].const_value
    if zero_point is None:
        return
    times, rest = divmod(missing, shape[1])
    more = [read.inputs[0]] * times
    if rest:
        ends = [constant(name, np.array([at])) for name, at in (("first", 0), ("last", rest), ("axis", 1))]
        more.append(operator("Slice", "input/more", [read.inputs[0], *ends], read))
    zero = zero_point.numpy().reshape(-1, *[1] * (len(shape) - 1))  # one, or one for each output
    zeros = constant("weight/more", np.broadcast_to(zero, (shape[0], missing, *shape[2:])).copy())
    for decode, name, parts in ((read, "input", more), (weight, "weight", [zeros])):
        joined = operator("Concat", f"{name}/joined", [decode.inputs[0], *parts], decode, axis=1)
        decode.replace_input_with(0, joined)
