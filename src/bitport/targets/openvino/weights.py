"""Narrow weights on their way to OpenVINO: plain integers for PyTorch's exporter, 4 bits in the file.

PyTorch has no 4-bit tensors, so that what the plan stores as a bit stream travels as int8, and is written as uint4 at
the end: OpenVINO 2026.4 multiplies by uint4 weights twice as fast as by int4 ones (81 µs and 165 µs, 1024×1024 in
groups of 32, one row). Codes and zero points are shifted by 8 alike.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from ...numerics.packing import unpack
from ...plan.lower import Lowered
from ...plan.ops import DEQUANTIZE, UNPACK, code_type
from .._onnx import AGAIN

if TYPE_CHECKING:
    import onnx_ir as ir

HALF = 4  # bits
OFFSET = 8  # from int4 to uint4


def widened(lowered: Lowered) -> dict[str, int]:
    """Replace bit streams by integers of a type that torch has, and groups by blocks of a matrix's rows, in place.

    Returns the lowest code of those of 4 bits and fewer, by user-facing name.
    """
    graph, module = lowered.module.graph, lowered.module
    found: dict[str, int] = {}
    for node in list(graph.find_nodes(op="call_function", target=UNPACK)):
        packed: Any = node.args[0]
        bits, low, shape = _Unpack(*node.args[1:])
        name = lowered.names.get(packed.target, packed.target)
        if name not in found:  # several readers share a buffer: the first one widens it
            codes = unpack(module.get_buffer(packed.target), bits, math.prod(shape)) + low
            setattr(module, packed.target, codes.reshape(shape).to(code_type(low, low + 2**bits - 1)))
            found[name] = low
        node.replace_all_uses_with(packed)
        graph.erase_node(node)
    shapes: dict[str, torch.Size] = {}
    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE)):
        _add_in_float(module, node)
    for node in list(graph.find_nodes(op="call_function", target=DEQUANTIZE)):
        if len(node.args) > 4 and node.args[4]:
            _in_blocks(module, node, shapes)
    graph.lint()
    module.recompile()
    return found


class _Unpack(NamedTuple):
    bits: Any
    low: Any
    shape: Any


def _add_in_float(module: fx.GraphModule, node: fx.Node) -> None:
    """OpenVINO adds biases in float32: an int32 one is written as that, not as the operators that make it."""
    args: Any = node.args
    codes, scale, zero_point = args[:3]
    if codes.op != "get_attr" or module.get_buffer(codes.target).dtype != torch.int32:
        return
    integers, factor, zero = (module.get_buffer(part.target) for part in (codes, scale, zero_point))
    setattr(module, codes.target, (integers - zero).float() * factor)
    node.replace_all_uses_with(codes)
    module.graph.erase_node(node)


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
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def narrow(model: ir.Model, lows: dict[str, int]) -> None:
    """Write as uint4 what `widened` has named, in place, with their zero points; others' that are 0 are left out."""
    made: dict[ir.Value, ir.Value] = {}
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].const_value is None:
            continue
        codes, zero_point = node.inputs[0], node.inputs[2]
        low = lows.get(_first_name(codes))
        if low is None:
            if zero_point is not None and not _array(zero_point).any():
                node.replace_input_with(2, None)
            continue
        for slot, value in ((0, codes), (2, zero_point)):
            if value is not None:
                if value not in made:
                    made[value] = _uint4(value, OFFSET if low < 0 else 0)
                node.replace_input_with(slot, made[value])
    for value in list(model.graph.initializers.values()):
        if not value.uses() and value not in model.graph.outputs:
            del model.graph.initializers[str(value.name)]
    for value in made.values():
        if value.name in model.graph.initializers:  # others read it as it was
            value.name = f"{value.name}/uint4"
        model.graph.register_initializer(value)


def _first_name(value: ir.Value) -> str:
    """Without the number that tells apart what has the same name."""
    return str(value.name).split(AGAIN)[0]


def _array(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _uint4(value: ir.Value, offset: int) -> ir.Value:
    """The constant in that type, shifted."""
    import onnx_ir

    array = _array(value).astype(np.int16) + offset
    shape = onnx_ir.Shape([int(size) for size in array.shape])
    half = np.append(array.reshape(-1), [0] * (array.size % 2)).astype(np.uint8)
    packed = half[::2] | half[1::2] << HALF
    made = onnx_ir.Value(name=value.name, shape=shape, type=onnx_ir.TensorType(onnx_ir.DataType.UINT4))
    made.const_value = onnx_ir.PackedTensor(packed, onnx_ir.DataType.UINT4, shape=shape, name=value.name)
    return made
