"""Narrow weights of a lowered graph, each turned into what ONNX Runtime runs it with.

    MatMulNBits          a Linear whose weight has one scale per block of a row; the activations stay float
    MatMulInteger        a Linear whose input is quantized while running (fused into DynamicQuantizeMatMul)
    DequantizeLinear     the weight of a static integer kernel, of any width up to 8 bits, wide again at load
    all others           decoded at load (`decode`): the kernel is the float one

What MatMulNBits takes, measured on version 1.31.1, CPU: 2, 4 or 8 bits; blocks of 16 … 256 values (powers of two); any
K, N, rank and zero points; a bias. With accuracy_level 4 it rounds each block of the activations to 8 bits before it
multiplies, without a word; below that it multiplies floats. It falls back to a kernel that is a hundred times slower,
again without a word, for 2 and 8 bits below level 4 and for 2 bits in blocks of 16 or 256. Its kernel for 2 bits in
blocks of 32 is slower than floats from 4 rows on (0.6×, where the one for 4 bits reaches 1.2×).

Legend: N output features, K input features, G groups of a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...numerics.packing import pack
from ...plan.lower import Lowered
from ...plan.ops import DEQUANTIZE, LOOKUP, QUANTIZE_DYNAMIC, UNPACK, code_type
from .decode import BYTE, DOMAIN

MATMUL_NBITS = "MatMulNBits"
ROUNDS_ACTIVATIONS = 4  # the accuracy level at which MatMulNBits multiplies integers
LEVELS = (0, 1, ROUNDS_ACTIVATIONS)
# bits of the kernel → sizes of its blocks, by whether activations are rounded
_ROUNDED = {2: (128, 64), 4: (256, 128, 64, 32, 16), 8: (256, 128, 64, 32, 16)}
_FLOAT = {4: (256, 128, 64, 32, 16)}
_WASTE = 8  # a longer block may fill up a row by an eighth
_LINEAR = torch.ops.aten.linear.default
_EMBEDDING = torch.ops.aten.embedding.default
_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


@dataclass(frozen=True)
class Layout:
    """How MatMulNBits holds a weight: bits a code, and how many consecutive codes of a row share a scale."""

    bits: int
    block: int


def layout(bits: int, group: int, width: int, level: int) -> Layout | None:
    """The fastest kernel that takes codes of `bits` bits, or None where none is faster than the float one.

    Args:
        bits: width of a code; one without a kernel is carried in the next wider one.
        group: consecutive values of a row that share a scale; 0 for the whole row.
        width: K.
        level: accuracy_level.
    """
    for carrier, blocks in (_ROUNDED if level == ROUNDS_ACTIVATIONS else _FLOAT).items():
        if carrier < bits:
            continue
        if group and group < width:
            fitting = [block for block in blocks if group % block == 0]
        else:
            waste = {block: -width % block for block in blocks}
            fitting = [block for block in blocks if waste[block] * _WASTE <= width]
            fitting = fitting or [min(blocks, key=lambda block: (waste[block], -block))]
        if fitting:
            return Layout(carrier, fitting[0])
    return None


def specialize(lowered: Lowered, blockwise: Collection[str], level: int) -> tuple[Lowered, dict[str, Any]]:
    """The graph of `lowered` with ONNX Runtime's own operators in it; only for export: torch can't run them.

    Args:
        lowered: changed in place.
        blockwise: names of the operators that the plan runs with MatMulNBits.
        level: accuracy_level of those.

    Returns:
        The graph, and how its narrow weights are stored: name → {"bits", "shape"}.
    """
    return _Specializing(lowered, frozenset(blockwise), level).run()


class _Specializing:
    def __init__(self, lowered: Lowered, blockwise: frozenset[str], level: int) -> None:
        self.lowered, self.blockwise, self.level = lowered, blockwise, level
        self.module, self.graph = lowered.module, lowered.module.graph
        self.names = dict(lowered.names)
        self.stored: dict[str, Any] = {}
        self.buffers: dict[tuple[str, str], fx.Node] = {}
        constants = self.graph.find_nodes(op="get_attr")
        # what other operators read too stays as it is: in two forms it would be stored twice
        self.shared = {str(node.target) for node in constants if _readers(node) > 1}

    def run(self) -> tuple[Lowered, dict[str, Any]]:
        for node in list(self.graph.find_nodes(op="call_function", target=_LINEAR)):
            self._linear(node)
        for node in list(self.graph.find_nodes(op="call_function", target=_EMBEDDING)):
            self._embedding(node)
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._decoded(node)
        self.graph.eliminate_dead_code()
        self._drop_unread()
        self.graph.lint()
        self.module.recompile()
        return Lowered(self.module, self.lowered.quantized, self.names), self.stored

    # ---------------------------------------------------------------- linear layers

    def _linear(self, node: fx.Node) -> None:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        if weight.target is not DEQUANTIZE or not _is_constant(weight):
            return
        if x.target is DEQUANTIZE and not _is_constant(x):
            ranged = x.args[0]
            if isinstance(ranged, fx.Node) and _is_ranged(ranged) and not _group(weight):
                self._dynamic(node, x, weight, bias)
        elif _name(node) in self.blockwise:
            self._blocks(node, x, weight, bias)

    def _dynamic(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any) -> None:
        codes, scale, zero = weight.args[:3]
        assert isinstance(codes, fx.Node) and isinstance(zero, fx.Node)
        bits, low = self._width(codes)
        source = _buffer_of(codes)
        across = self._value(codes).T.contiguous()
        with self.graph.inserting_before(node):
            if str(source.target) in self.shared:
                turned = self._call(codes, torch.ops.aten.t.default, codes)
            elif codes.target is UNPACK:
                stored = self._buffer(source, "transposed", pack(across.to(torch.int32) - low, bits))
                turned = self._call(codes, UNPACK, stored, bits, low, list(across.shape))
            else:
                turned = self._buffer(source, "transposed", across)
            self._note(source, bits, self._value(codes).shape)
            plain = not bool(self._value(zero).any())
            args = (*x.args[:3], turned, scale, None if plain else zero, bias)
            new = self._call(node, _dynamic_linear, *args)
        self._replace(node, new)

    def _blocks(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any) -> None:
        codes, scale, zero, axis = weight.args[:4]
        assert isinstance(codes, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero, fx.Node)
        bits, low = self._width(codes)
        values = self._value(codes)
        rows, width = values.shape
        group = _group(weight) or width
        found = layout(bits, group, width, self.level) if axis in (0, -1) else None
        if found is None:
            return  # decoded; `inspect` finds no MatMulNBits by this name and says so
        count = -(-width // found.block)
        repeat = -(-min(group, count * found.block) // found.block)
        unsigned = values.to(torch.int32) - low
        source = _buffer_of(codes)
        self._note(source, bits, values.shape)
        with self.graph.inserting_before(node):
            shared = str(source.target) in self.shared
            if bits == found.bits and width % found.block == 0 and not shared:
                shape = (rows, count, found.block * bits // BYTE)
                matrix = self._buffer(source, "blocks", pack(unsigned, bits).reshape(shape))
            else:
                if codes.target is UNPACK:
                    plain = self._call(codes, UNPACK, source, bits, 0, [rows, width])
                elif shared:
                    plain = self._call(weight, _unsigned, source, low)
                else:
                    plain = self._buffer(source, "unsigned", unsigned.to(torch.uint8))
                matrix = self._call(weight, _as_blocks, plain, found.bits, found.block)
            scales = self._call(weight, _spread, scale, rows, count, repeat)
            zeros = self._zero_points(zero, low, rows, count, repeat, found.bits)
            args = (x, matrix, scales, zeros, bias, width, rows, found.bits, found.block, self.level)
            new = self._call(node, _matmul_nbits, *args)
        self._replace(node, new)

    def _zero_points(
        self, zero: fx.Node, low: int, rows: int, count: int, repeat: int, bits: int
    ) -> fx.Node | None:
        """uint8 [rows · bytes of a row], codes packed row by row; None where they are what the kernel assumes."""
        values = self._value(zero).to(torch.int32) - low
        if bool((values == 2 ** (bits - 1)).all()):
            return None
        if bool((values == values.reshape(-1)[0]).all()):
            filled = torch.full((1, count), int(values.reshape(-1)[0]))
            byte = pack(torch.full((BYTE // bits,), int(filled[0, 0])), bits)
            one = self._buffer(_buffer_of(zero), f"same{bits}", byte)
            size = rows * -(-count * bits // BYTE)
            return self._call(zero, torch.ops.aten.expand.default, one, [size])
        wide = values.reshape(rows, -1).repeat_interleave(repeat, 1)[:, :count]
        missing = -count % (BYTE // bits)
        packed = pack(torch.nn.functional.pad(wide, (0, missing)), bits)
        return self._buffer(_buffer_of(zero), f"rows{bits}", packed)

    # ---------------------------------------------------------------- all others

    def _embedding(self, node: fx.Node) -> None:
        """Rows are taken from the table as it is stored, where that is no slower than from the wide one.

        Measured on 30,000 × 768, 128 rows, against float32: 1.9× as fast from float16, 1.6× from int8; 0.3 … 1.0×
        from 2, 4 or 8 bits in groups (GatherBlockQuantized).
        """
        table: Any = node.args[0]
        if not isinstance(table, fx.Node) or not _is_constant(table) or table.op == "get_attr":
            return
        args: Any = table.args
        if not isinstance(args[0], fx.Node) or args[0].op != "get_attr":
            return
        with self.graph.inserting_before(node):
            if table.target in _CASTS and self._value(args[0]).is_floating_point():
                rows = self._call(node, _EMBEDDING, args[0], *node.args[1:])
                new = self._call(node, torch.ops.aten.to.dtype, rows, torch.float32)
            elif table.target is DEQUANTIZE and args[3] in (0, -1) and not _group(table):
                new = self._call(
                    node, _embedded, *args[:3], not bool(self._value(args[2]).any()), *node.args[1:]
                )
            else:
                return
        self._note_plain(args[0])
        self._replace(node, new)

    def _decoded(self, node: fx.Node) -> None:
        if not _is_constant(node):
            return
        args: Any = node.args
        with self.graph.inserting_before(node):
            if node.target is UNPACK:
                new = self._call(node, _unpack, *args)
                self._note(args[0], args[1], args[3])
            elif node.target is LOOKUP:
                new = self._call(node, _lookup, *args)
                self._note_plain(args[0])
            elif node.target in _CASTS and isinstance(args[0], fx.Node) and args[0].op == "get_attr":
                if not self._value(args[0]).is_floating_point():
                    return
                new = self._call(node, _widen, args[0])
                self._note_plain(args[0])
            elif node.target is DEQUANTIZE and not _of_integer_kernel(node):
                group = args[4] if len(args) > 4 else 0
                new = self._call(node, _decode, *args[:4], group)
                self._note_plain(args[0])
            else:
                return
        self._replace(node, new)

    def _note_plain(self, codes: Any) -> None:
        if isinstance(codes, fx.Node) and codes.op == "get_attr":
            value = self._value(codes)
            self._note(codes, BYTE * value.dtype.itemsize, value.shape)

    # ---------------------------------------------------------------- nodes

    def _note(self, source: fx.Node, bits: int, shape: Any) -> None:
        name = self.names.get(str(source.target))
        if name is not None:
            self.stored[name] = {"bits": bits, "shape": [int(size) for size in shape]}

    def _width(self, codes: fx.Node) -> tuple[int, int]:
        """(bits, lowest code) of a constant's codes."""
        if codes.target is UNPACK:
            bits, low = codes.args[1], codes.args[2]
            assert isinstance(bits, int) and isinstance(low, int)
            return bits, low
        limits = torch.iinfo(self._value(codes).dtype)
        return limits.bits, limits.min

    def _value(self, node: fx.Node) -> Tensor:
        """A constant, computed."""
        if node.op == "get_attr":
            value: Tensor = getattr(self.module, str(node.target))
            return value
        assert callable(node.target)
        args = fx.map_arg(node.args, self._value)
        result: Tensor = node.target(*args, **fx.map_arg(node.kwargs, self._value))
        return result

    def _buffer(self, source: fx.Node, form: str, value: Tensor) -> fx.Node:
        """A constant in another form, under the name of the one that it replaces; the same one for every reader."""
        key = (str(source.target), form)
        if key not in self.buffers:
            attribute = f"{source.target}_{form}"
            self.module.register_buffer(attribute, value)
            if (name := self.names.get(str(source.target))) is not None:
                self.names[attribute] = name
            with self.graph.inserting_before(source):
                self.buffers[key] = self.graph.get_attr(attribute)
        return self.buffers[key]

    def _call(self, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A node that bears the name of `like`."""
        new = self.graph.call_function(target, args)
        new.meta = {"nn_module_stack": like.meta["nn_module_stack"]} if "nn_module_stack" in like.meta else {}
        return new

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _drop_unread(self) -> None:
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for name in [name for name, _ in self.module.named_buffers(recurse=False) if name not in read]:
            delattr(self.module, name)
            self.names.pop(name, None)


def _readers(codes: fx.Node) -> int:
    """How many operators read a constant, unpacked or as it is."""
    return sum(_readers(user) if user.target is UNPACK else 1 for user in codes.users)


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is computed from buffers alone."""
    if node.op != "call_function":
        return node.op == "get_attr"
    return bool(node.all_input_nodes) and all(map(_is_constant, node.all_input_nodes))


def _of_integer_kernel(node: fx.Node) -> bool:
    """Whether a constant's dequantize is fused into a kernel: it stands beside one of an activation."""
    if len(node.args) > 4 and node.args[4]:
        return False
    return any(_reads_integers(user) for user in node.users)


def _reads_integers(node: fx.Node) -> bool:
    return any(
        source.target is DEQUANTIZE and not _is_constant(source) and not _is_ranged(source.args[0])
        for source in node.all_input_nodes
    )


def _is_ranged(value: Any) -> bool:
    """Whether a value is one of the results of `quantize_dynamic`."""
    return (
        isinstance(value, fx.Node)
        and value.target is operator.getitem
        and isinstance(value.args[0], fx.Node)
        and value.args[0].target is QUANTIZE_DYNAMIC
    )


def _group(dequantize: fx.Node) -> int:
    group = dequantize.args[4] if len(dequantize.args) > 4 else 0
    assert isinstance(group, int)
    return group


def _name(node: fx.Node) -> str | None:
    stack: Mapping[str, tuple[str, str]] = node.meta.get("nn_module_stack", {})
    return next((name for name, _ in stack.values()), None)


def _buffer_of(codes: fx.Node) -> fx.Node:
    source = codes.args[0] if codes.op == "call_function" else codes
    assert isinstance(source, fx.Node) and source.op == "get_attr"
    return source


# -------------------------------------------------------------------- operators of ONNX, while a graph is captured


def _symbolic(
    kind: str, inputs: Sequence[Tensor | None], attributes: Mapping[str, Any], shape: Any, dtype: torch.dtype
) -> Tensor:
    made: Tensor = torch.onnx.ops.symbolic(kind, inputs, dict(attributes), dtype=dtype, shape=shape)
    return made


def _matmul_nbits(
    x: Tensor, matrix: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *sizes: int
) -> Tensor:
    names = ("K", "N", "bits", "block_size", "accuracy_level")
    attributes = dict(zip(names, sizes, strict=True))
    inputs = (x, matrix, scales, zeros, None, bias)
    shape = [*x.shape[:-1], attributes["N"]]
    return _symbolic(f"com.microsoft::{MATMUL_NBITS}", inputs, attributes, shape, torch.float32)


def _dynamic_linear(
    q: Tensor,
    q_scale: Tensor,
    q_zero: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The operators that ONNX Runtime fuses; q: [..., K], weight: [K, N]."""
    shape = [*q.shape[:-1], weight.shape[1]]
    sums = _symbolic("MatMulInteger", (q, weight, q_zero, zero), {}, shape, torch.int32)
    product = sums.to(torch.float32) * (q_scale * scale)
    return product if bias is None else product + bias


def _embedded(codes: Tensor, scale: Tensor, zero: Tensor, symmetric: bool, *ids: Any) -> Tensor:
    """Rows of a table of integers, made real afterwards; scale, zero: 0-d or one a row."""
    real = _EMBEDDING(codes, *ids).to(torch.float32)
    zero, scale = (_EMBEDDING(v.reshape(-1, 1), *ids) if v.ndim else v for v in (zero, scale))
    real = real if symmetric else real - zero.to(torch.float32)
    product: Tensor = real * scale
    return product


def _unsigned(codes: Tensor, low: int) -> Tensor:
    return _symbolic(f"{DOMAIN}::unsigned", (codes,), {"low": low}, codes.shape, torch.uint8)


def _as_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    rows, width = codes.shape
    shape = [rows, -(-width // block), block * bits // BYTE]
    attributes = {"bits": bits, "block": block, "shape": [rows, width]}
    return _symbolic(f"{DOMAIN}::blocks", (codes,), attributes, shape, torch.uint8)


def _spread(scale: Tensor, rows: int, columns: int, repeat: int) -> Tensor:
    attributes = {"rows": rows, "columns": columns, "repeat": repeat}
    return _symbolic(f"{DOMAIN}::spread", (scale,), attributes, [rows, columns], torch.float32)


def _unpack(packed: Tensor, bits: int, low: int, shape: Sequence[int]) -> Tensor:
    dtype = code_type(low, low + 2**bits - 1)
    attributes = {"bits": bits, "low": low, "shape": list(shape)}
    return _symbolic(f"{DOMAIN}::unpack", (packed,), attributes, shape, dtype)


def _widen(x: Tensor) -> Tensor:
    return _symbolic(f"{DOMAIN}::widen", (x,), {}, x.shape, torch.float32)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int) -> Tensor:
    attributes = {"axis": axis, "group": group, "shape": list(codes.shape)}
    return _symbolic(f"{DOMAIN}::decode", (codes, scale, zero), attributes, codes.shape, torch.float32)


def _lookup(codes: Tensor, table: Tensor, scale: Tensor, axis: int, group: int, kind: str) -> Tensor:
    attributes = {"axis": axis, "group": group, "shape": list(codes.shape), "kind": kind}
    return _symbolic(f"{DOMAIN}::lookup", (codes, table, scale), attributes, codes.shape, torch.float32)
