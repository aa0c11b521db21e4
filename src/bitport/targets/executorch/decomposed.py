"""`bitport::quantize` and `bitport::dequantize` as `quantized_decomposed`, which ExecuTorch's partitioner reads.

XNNPACK's tensors have one scale and zero point and no bounds, so that integers narrower than 8 bits are clamped by an
operator of their own, and biases are float32 numbers that the exporter rounds again (`arithmetic.stored_bias`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from ...graph import Graph
from ...plan.lower import QUANTIZED, Lowered
from ...plan.ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC
from ...plan.stored import unpacked
from .arithmetic import real_bias
from .table import DELEGATED

OPS = torch.ops.quantized_decomposed
LOW, HIGH = -128, 127
LOW4, HIGH4 = -8, 7
STACK = "nn_module_stack"


def decompose(lowered: Lowered, graph: Graph, *, taps: bool = False) -> tuple[str, ...]:
    """Rewrite a lowered module in place.

    Args:
        taps: return the integers of each quantized tensor behind the outputs.

    Returns the names of the tapped tensors, in their order.
    """
    return _Decomposer(lowered.module, graph).run(taps)


class _Decomposer:
    def __init__(self, module: fx.GraphModule, graph: Graph) -> None:
        self.module, self.nodes = module, module.graph
        self.kinds = {graph.name(node): graph.op(node).kind for node in graph.nodes()}
        self.made: dict[fx.Node, tuple[Any, ...]] = {}

    def run(self, taps: bool) -> tuple[str, ...]:
        unpacked(self.module)  # narrow weights travel as int8, and XNNPACK's exporter packs them
        for node in list(self.nodes.find_nodes(op="call_function", target=QUANTIZE_DYNAMIC)):
            self._quantize_rows(node)
        self._move_in_float()
        quantized = [node for node in self.nodes.nodes if node.target is QUANTIZE]
        shown = {_name(node).removesuffix(QUANTIZED): self._quantize(node) for node in quantized}
        shown = {name: node for name, node in shown.items() if not name.endswith(_MOVED)}
        for node in list(self.nodes.find_nodes(op="call_function", target=DEQUANTIZE)):
            self._dequantize(node)
        if taps:
            end = self.nodes.output_node()
            outputs: Any = end.args[0]
            end.args = ((*outputs, *shown.values()),)
        self.nodes.eliminate_dead_code()
        for node in list(self.nodes.find_nodes(op="get_attr")):
            if not node.users:
                self.nodes.erase_node(node)
            elif (value := self.module._buffers.get(str(node.target))) is not None:
                # strides of axes of length one may be any, and ExecuTorch takes the order of axes from them
                setattr(
                    self.module, str(node.target), torch.empty(value.shape, dtype=value.dtype).copy_(value)
                )
        self.nodes.lint()
        self.module.recompile()
        return tuple(shown) if taps else ()

    def _move_in_float(self) -> None:
        """Integers that XNNPACK moves itself are moved between a dequantize and a quantize that change nothing."""
        for node in list(self.nodes.nodes):
            if node.target is QUANTIZE:
                self.made[node] = node.args[1:3]
                continue
            sources = [source for source in node.all_input_nodes if source in self.made]
            if node.op in ("output", "placeholder", "get_attr") or node.target is DEQUANTIZE or not sources:
                continue
            parameters = self.made[sources[0]]
            if self.kinds.get(_name(node)) not in DELEGATED:
                self.made[node] = parameters
                continue
            for source in node.all_input_nodes:
                if source not in self.made and not self._is_constant(source):
                    continue
                with self.nodes.inserting_before(node):
                    real = self._call(DEQUANTIZE, (source, *parameters, -1), node)
                node.replace_input_with(source, real)
            if node.target is torch.ops.aten.constant_pad_nd.default:
                node.args = (node.args[0], node.args[1], 0.0)
            with self.nodes.inserting_after(node):
                back = self._call(QUANTIZE, (node, *parameters, LOW, HIGH, -1), node, _MOVED)
            for user in [user for user in node.users if user is not back]:
                user.replace_input_with(node, back)
            self.made[back] = parameters

    def _is_constant(self, node: fx.Node) -> bool:
        """Stored integers, as they are or moved."""
        if node.op == "get_attr":
            return self._tensor(node).dtype == torch.int8
        source = node.args[0] if node.args and node.target not in (QUANTIZE, DEQUANTIZE) else None
        return isinstance(source, fx.Node) and self._is_constant(source)

    def _quantize(self, node: fx.Node) -> fx.Node:
        args: Any = node.args
        value, scale, zero_point, low, high, _ = args
        s, z = self._number(scale), int(self._number(zero_point))
        node.target = OPS.quantize_per_tensor.default
        node.args = (value, s, z, LOW, HIGH, torch.int8)
        if (low, high) == (LOW, HIGH):
            return node
        with self.nodes.inserting_after(node):
            real = self._call(OPS.dequantize_per_tensor.default, (node, *node.args[1:]), node)
        with self.nodes.inserting_after(real):
            bounds = ((low - z) * s, (high - z) * s)
            held = self._call(torch.ops.aten.hardtanh.default, (real, *bounds), node)
        with self.nodes.inserting_after(held):
            clamped = self._call(OPS.quantize_per_tensor.default, (held, *node.args[1:]), node)
        for user in [user for user in node.users if user is not real]:
            user.replace_input_with(node, clamped)
        return clamped

    def _quantize_rows(self, node: fx.Node) -> None:
        """A range for each row, which is how XNNPACK takes ranges while running."""
        value = node.args[0]
        (real,) = dict.fromkeys(user for part in node.users for user in part.users)
        integers = (LOW, HIGH, torch.int8)
        with self.nodes.inserting_before(node):
            ranged = self._call(OPS.choose_qparams_per_token_asymmetric.default, (value, torch.int8), node)
            parts = [self._call(operator.getitem, (ranged, index), node) for index in range(2)]
            rounded = self._call(OPS.quantize_per_token.default, (value, *parts, *integers), node)
            args = (rounded, *parts, *integers, torch.float32)
            self._pass(real, self._call(OPS.dequantize_per_token.default, args, real))

    def _pass(self, node: fx.Node, source: fx.Node) -> None:
        node.replace_all_uses_with(source)
        self.nodes.erase_node(node)

    def _dequantize(self, node: fx.Node) -> None:
        args: Any = node.args
        codes, scale, zero_point, axis, *rest = args
        if codes.op == "get_attr" and self._tensor(codes).dtype == torch.int32:
            if codes not in self.made:
                setattr(self.module, str(codes.target), real_bias(self._tensor(codes), self._tensor(scale)))
                self.made[codes] = ()
        if codes.op == "get_attr" and codes in self.made:
            self._pass(node, codes)
        elif axis == -1:
            node.target = OPS.dequantize_per_tensor.default
            node.args = (codes, self._number(scale), int(self._number(zero_point)), LOW, HIGH, torch.int8)
        else:
            node.target = OPS.dequantize_per_channel.default
            zeros = self._tensor(zero_point).to(torch.int64)
            setattr(self.module, str(zero_point.target), zeros)
            low, high = self._bounds(node, codes)
            node.args = (codes, scale, zero_point, axis, low, high, torch.int8)
            if rest and rest[0]:
                node.target = OPS.dequantize_per_channel_group.default
                node.args = (codes, scale, zero_point, low, high, torch.int8, rest[0], torch.float32)

    def _bounds(self, node: fx.Node, codes: fx.Node) -> tuple[int, int]:
        """Of a weight: 4 bits where they do, and ranges are taken while running: else XNNPACK has no such kernel."""
        values = self._tensor(codes)
        reads = {source.target for user in node.users for source in user.all_input_nodes}
        narrow = values.numel() and int(values.min()) >= LOW4 and int(values.max()) <= HIGH4
        return (LOW4, HIGH4) if narrow and OPS.dequantize_per_token.default in reads else (LOW, HIGH)

    def _tensor(self, node: Any) -> torch.Tensor:
        return self.module.get_buffer(str(node.target))

    def _number(self, node: Any) -> float:
        return float(self._tensor(node))

    def _call(
        self, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node, suffix: str = ""
    ) -> fx.Node:
        made = self.nodes.call_function(target, args)
        made.meta = {STACK: {"": (_name(like) + suffix, "torch.nn.Module")}}
        return made


_MOVED = "/moved"  # suffix of the name of integers that are only put back


def _name(node: fx.Node) -> str:
    found: tuple[str, str] = next(iter(node.meta[STACK].values()))
    return found[0]
