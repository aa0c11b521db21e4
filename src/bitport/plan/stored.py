"""Weights inside a lowered graph: buffers of their own width, and the operators that make numbers of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..formats import Format
from ..graph import Graph
from ..graph.reading import first_name
from ..numerics.codes import values
from ..numerics.packing import pack, unpack
from .constants import constant_codes
from .model import Plan
from .ops import DEQUANTIZE, LOOKUP, UNPACK, code_type


def unpacked(module: fx.GraphModule) -> dict[str, tuple[int, int]]:
    """Replace bit streams in a lowered module by integers of a type that torch has, in place.

    Returns: attribute of the buffer → (bits, lowest code), of what was packed.
    """
    found: dict[str, tuple[int, int]] = {}
    for node in list(module.graph.find_nodes(op="call_function", target=UNPACK)):
        args: Any = node.args
        packed, bits, low, shape = args
        if packed.target not in found:  # several readers share a buffer: the first one widens it
            codes = unpack(module.get_buffer(packed.target), bits, math.prod(shape)) + low
            setattr(module, packed.target, codes.reshape(shape).to(code_type(low, low + 2**bits - 1)))
            found[packed.target] = bits, low
        node.replace_all_uses_with(packed)
        module.graph.erase_node(node)
    return found


class StoredWeights:
    """Writes weights into the graph that is being built.

    Args:
        buffer: (name, value) → the node of a constant. call: (name, operator, arguments) → the node of a call.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        buffer: Callable[[str, Tensor], fx.Node],
        call: Callable[[str, Callable[..., Any], tuple[Any, ...]], fx.Node],
    ) -> None:
        self.graph, self.plan, self.buffer, self.call = graph, plan, buffer, call

    def name(self, tie_name: str, tensor: str) -> str:
        return self.plan.stored_name(tie_name, first_name(self.graph, tensor))

    def stored(self, name: str, codes: Tensor, fmt: Format) -> fx.Node:
        """Codes as a buffer of their own width: of a type that torch has, or as a bit stream."""
        low = fmt.low if fmt.is_int else 0
        dtype = code_type(low, fmt.high if fmt.is_int else 2**fmt.bits - 1)
        if fmt.bits == 8 * dtype.itemsize:
            return self.buffer(name, codes.to(dtype))
        packed = self.buffer(name, pack(codes - low, fmt.bits))
        return self.call(f"{name}/unpack", UNPACK, (packed, fmt.bits, low, list(codes.shape)))

    def decoded(self, tensor: str, tie_name: str, name: str) -> fx.Node:
        """A weight of any format as a float, made from its codes."""
        coded = constant_codes(self.graph, self.plan, tensor, tie_name)
        grid, fmt = coded.grid, coded.grid.format
        if fmt.unscaled:
            dtype = torch.float16 if fmt.exponent == 5 else torch.bfloat16
            narrow = self.buffer(f"{self.name(tie_name, tensor)}/q", coded.dequantize().to(dtype))
            return self.call(f"{name}/decoded", torch.ops.aten.to.dtype, (narrow, torch.float32))
        codes = self.stored(f"{self.name(tie_name, tensor)}/q", coded.codes, fmt)
        scale = self.buffer(f"{tie_name}/scale", grid.scale)
        axis = -1 if fmt.axis is None else fmt.axis
        if fmt.is_int:
            if fmt.group:
                zero_point = self.stored(f"{tie_name}/zero_point", grid.zero_point, fmt)
            else:
                narrow_zero = grid.zero_point.to(code_type(fmt.low, fmt.high))
                zero_point = self.buffer(f"{tie_name}/zero_point", narrow_zero)
            return self.call(f"{name}/dq", DEQUANTIZE, (codes, scale, zero_point, axis, fmt.group))
        table = self.buffer(f"{tie_name}/table", values(fmt, grid.table))
        kind = str(fmt).partition(" ")[0]
        return self.call(f"{name}/decoded", LOOKUP, (codes, table, scale, axis, fmt.group, kind))
