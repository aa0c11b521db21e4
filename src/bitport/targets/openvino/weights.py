"""Narrow weights on their way to OpenVINO: plain integers for PyTorch's exporter, 4 bits in the file.

PyTorch has no 4-bit tensors, so that what the plan stores as a bit stream travels as int8, and is written as uint4 at
the end: OpenVINO 2026.4 multiplies by uint4 weights twice as fast as by int4 ones (81 µs and 165 µs, 1024×1024 in
groups of 32, one row). Codes and zero points are shifted by 8 alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from ...numerics.packing import pack
from ...plan import Plan
from ...plan.lower import BYTE, QUANTIZED, Lowered
from ...plan.ops import DEQUANTIZE
from ...plan.stored import unpacked
from .._onnx import AGAIN

if TYPE_CHECKING:
    import onnx_ir as ir

HALF = 4  # bits
OFFSET = 8  # from int4 to uint4


@dataclass
class Narrow:
    """What travels in a wider type, by user-facing name. codes: the lowest of 4-bit codes; floats: the narrow type."""

    codes: dict[str, int] = field(default_factory=dict)
    floats: dict[str, torch.dtype] = field(default_factory=dict)


def stored_bits(plan: Plan, consumer: str, width: int) -> int:
    """What a weight of so many bits takes in the file: integer kernels take no fewer than 8."""
    return next(
        n for n in (HALF if plan.node(consumer).mode else BYTE, BYTE, 2 * BYTE, 4 * BYTE) if width <= n
    )


def widened(lowered: Lowered, plan: Plan) -> Narrow:
    """Replace bit streams by integers of a type that torch has, and groups by blocks of a matrix's rows, in place."""
    graph, module = lowered.module.graph, lowered.module
    found, biases = Narrow(), set[str]()
    multiplied = {
        f"{plan.stored_name(tie, edge.producer)}{QUANTIZED}"
        for edge, tie in plan.edges.items()
        if plan.node(edge.consumer).mode is None
    }
    for buffer, (bits, low) in unpacked(module).items():
        label = lowered.names[buffer]
        if bits <= HALF and label not in multiplied:
            found.codes[label] = low
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)):
        stored: Any = node.args[0]
        name = lowered.names.get(str(stored.target)) if stored.op == "get_attr" else None
        if name is None:
            continue
        value = module.get_buffer(stored.target)
        if value.dtype in (torch.float16, torch.bfloat16):
            found.floats[name] = value.dtype
            setattr(module, stored.target, value.float())
        if name in found.floats:
            _pass(module, node, stored)
    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE)):
        _add_in_float(module, node, biases)
    shapes: dict[str, torch.Size] = {}
    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE)):
        if len(node.args) > 4 and node.args[4]:
            _in_blocks(module, node, shapes)
    graph.lint()
    module.recompile()
    return found


def _pass(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)


def _add_in_float(module: fx.GraphModule, node: fx.Node, done: set[str]) -> None:
    """OpenVINO adds biases in float32: an int32 one is written as that, not as the operators that make it.

    done: biases that are written so already.
    """
    args: Any = node.args
    codes, scale, zero_point = args[:3]
    if codes.op != "get_attr":
        return
    if module.get_buffer(codes.target).dtype == torch.int32:
        integers, factor, zero = (module.get_buffer(part.target) for part in (codes, scale, zero_point))
        setattr(module, codes.target, (integers - zero).float() * factor)
        done.add(codes.target)
    if codes.target in done:
        _pass(module, node, codes)


def _in_blocks(module: fx.GraphModule, node: fx.Node, shapes: dict[str, torch.Size]) -> None:
    """Channels as rows of a matrix, filled up to whole groups; what follows the dequantize makes the weight of it.

    shapes: of weights that are matrices already, as they were.
    """
    args: Any = node.args
    codes, scale, zero_point, axis, group = args
    shape = shapes.get(codes.target, module.get_buffer(codes.target).shape)
    rest = [size for dim, size in enumerate(shape) if dim != axis]
    width = math.prod(rest)
    if codes.target not in shapes:
        shapes[codes.target] = shape
        rows = module.get_buffer(codes.target).movedim(axis, 0).reshape(shape[axis], width)
        filled = rows if group >= width else F.pad(rows, (0, -width % group))
        setattr(module, codes.target, filled.contiguous())
    if group >= width:
        for parameter in (scale, zero_point):
            setattr(module, parameter.target, module.get_buffer(parameter.target).reshape(-1))
    with module.graph.inserting_before(node):
        call = module.graph.call_function
        new = call(DEQUANTIZE, (codes, scale, zero_point, 0, 0 if group >= width else group))
        if group < width and width % group:
            new = call(torch.ops.aten.slice.Tensor, (new, 1, 0, width))
        if len(shape) != 2 or axis:
            order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
            new = call(torch.ops.aten.reshape.default, (new, [shape[axis], *rest]))
            new = call(torch.ops.aten.permute.default, (new, order)) if axis else new
    _pass(module, node, new)


def narrow(model: ir.Model, wanted: Narrow) -> None:
    """Write what `widened` has found in its own type, in place: 4 bits as uint4, with their zero points.

    Zero points of others that are 0 are left out.
    """
    made: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        codes, zero_point = node.inputs[0], node.inputs[2]
        low = wanted.codes.get(_first_name(codes))
        if low is None:
            if zero_point is not None and not _array(zero_point).any():
                node.resize_inputs(2)
            continue
        for slot, value in ((0, codes), (2, zero_point)):
            if value is not None:
                if value not in made:
                    made[value] = _uint4(value, OFFSET if low < 0 else 0)
                node.replace_input_with(slot, made[value])
    for value in list(model.graph.initializers.values()):
        dtype = wanted.floats.get(_first_name(value))
        if dtype is not None:
            made[value] = _half(model, value, dtype)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and value not in model.graph.outputs:
            del model.graph.initializers[str(value.name)]
    for value in made.values():
        if value.name in model.graph.initializers:  # others read it as it was
            value.name = f"{value.name}/narrow"
        model.graph.register_initializer(value)


def _half(model: ir.Model, value: ir.Value, dtype: torch.dtype) -> ir.Value:
    """The constant in that type; what reads it reads a Cast."""
    import onnx_ir

    tensor = onnx_ir.tensor(torch.from_numpy(_array(value).copy()).to(dtype), name=value.name)
    made = onnx_ir.Value(name=value.name, shape=value.shape, type=onnx_ir.TensorType(tensor.dtype))
    made.const_value = tensor
    cast = onnx_ir.node("Cast", inputs=[made], attributes={"to": onnx_ir.DataType.FLOAT.value})
    cast.name = cast.outputs[0].name = f"{value.name}/wide"
    value.replace_all_uses_with(cast.outputs[0])
    model.graph.insert_before(next(iter(model.graph)), cast)
    return made


def _first_name(value: ir.Value) -> str:
    """Without the number that tells apart what has the same name."""
    return str(value.name).split(AGAIN)[0]


def _array(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _uint4(value: ir.Value, offset: int) -> ir.Value:
    """The constant in that type, shifted."""
    import onnx_ir

    array = np.asarray(_array(value).astype(np.int16) + offset)
    shape = onnx_ir.Shape([int(size) for size in array.shape])
    packed = pack(torch.from_numpy(array), HALF).numpy()
    made = onnx_ir.Value(name=value.name, shape=shape, type=onnx_ir.TensorType(onnx_ir.DataType.UINT4))
    made.const_value = onnx_ir.PackedTensor(packed, onnx_ir.DataType.UINT4, shape=shape, name=value.name)
    return made
