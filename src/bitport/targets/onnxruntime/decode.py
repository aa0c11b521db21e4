"""Narrow weights in an ONNX file: stored at their true width, made wide again by operators that are folded at load.

ONNX Runtime computes nodes whose inputs are constants once, when it loads a file (level 1 of its optimizer, before
anything is fused), and forgets their inputs. So a weight can lie in the file as a bit stream and still reach the kernel
as the tensor that the kernel wants. Measured on version 1.31.1: casts from int4, uint4, float8, float16 and bfloat16,
BitShift and bitwise operators on bytes, and Gather are all folded; there is no Cast from float4.

What `blockwise` leaves in the graph are nodes of the domain `bitport`, which PyTorch's optimizer can't fold (it would
write the wide tensor into the file). `expand` replaces each by operators of ONNX.

    unpack(packed) bits low shape        integers of a bit stream (`numerics.packing`): code + low
    widen(x)                             float16, bfloat16 → float32
    decode(q, scale, zero) axis group    (q − zero) · scale
    lookup(q, table, scale) axis group   table[q] · scale
    unsigned(q) low                      int8 codes as uint8: q − low
    spread(scale) rows columns repeat    scales [N, G] (or [N], or 0-d) as [N, columns], each `repeat` times
    blocks(q) bits block                 codes [N, K] as MatMulNBits stores them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._onnx import SCOPES

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "bitport"
KEY = "bitport.stored"  # metadata of a file: name of a narrow weight → its bits and shape (JSON)
OPSET = 21  # the first one that knows int4
BYTE = 8  # bits
HALF = 4  # bits of the narrow integers that ONNX has a type for and ONNX Runtime has casts from
_SMALL_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
Array = np.ndarray[Any, Any]


def expand(model: ir.Model) -> bool:
    """Replace the nodes of domain `bitport` in place; whether there were any."""
    found = [node for node in model.graph if node.domain == DOMAIN]
    for node in found:
        writer = _Writer(model.graph, node)
        result = _EXPANSIONS[node.op_type](writer, node)
        node.outputs[0].replace_all_uses_with(result)
        result.dtype, result.shape = node.outputs[0].dtype, node.outputs[0].shape
        model.graph.remove(node, safe=True)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and value not in model.graph.outputs:
            del model.graph.initializers[str(value.name)]
    model.opset_imports.pop(DOMAIN, None)
    domains = {node.domain for node in model.graph}
    for domain in domains - {""}:
        model.opset_imports.setdefault(domain, 1)
    return bool(found)


class _Writer:
    """Puts operators in front of a node, which bear its name."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        import onnx_ir

        made = onnx_ir.node(kind, inputs=list(inputs), attributes=attributes)
        if SCOPES in self.node.metadata_props:
            made.metadata_props[SCOPES] = self.node.metadata_props[SCOPES]
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def constant(self, value: int | Sequence[int], dtype: Any = np.int64) -> ir.Value:
        """Small numbers; equal ones are stored once."""
        import onnx_ir

        array = np.array(value, dtype)
        digits = "x".join(map(str, array.reshape(-1).tolist()))
        name = f"{DOMAIN}/{array.dtype.name}{'_' if array.ndim else '='}{digits}"
        if name not in self.graph.initializers:
            self.store(name, onnx_ir.tensor(array, name=name))
        return self.graph.initializers[name]

    def store(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        import onnx_ir

        shape = onnx_ir.Shape([int(size) for size in tensor.numpy().shape])
        value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def owns(self, value: ir.Value) -> bool:
        """Whether the node is the only one that reads a constant: then it may be stored in another type."""
        return value.const_value is not None and [use.node for use in value.uses()] == [self.node]

    def restored(self, old: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """`tensor` in the place and under the name of a constant that nothing else reads."""
        name = str(old.name)
        self.node.replace_input_with([*self.node.inputs].index(old), None)
        del self.graph.initializers[name]
        return self.store(name, tensor)

    # ---------------------------------------------------------------- pieces

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        if value.shape is not None and list(value.shape) == list(shape):
            return value
        return self.op("Reshape", value, self.constant(shape))

    def first(self, value: ir.Value, count: int, axis: int) -> ir.Value:
        return self.op("Slice", value, self.constant([0]), self.constant([count]), self.constant([axis]))

    def padded(self, value: ir.Value, before_and_after: Sequence[int]) -> ir.Value:
        return self.op("Pad", value, self.constant(before_and_after))

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        import onnx_ir

        wide = self.op("Cast", value, to=onnx_ir.DataType[dtype].value)
        wide.shape = value.shape
        return wide

    def repeated(self, value: ir.Value, rows: int, groups: int, repeat: int, columns: int) -> ir.Value:
        """[rows, groups] → [rows, columns], each number `repeat` times, what exceeds the columns cut off."""
        if repeat == 1 and groups == columns:
            return self.reshape(value, [rows, columns])
        wide = self.op(
            "Expand", self.reshape(value, [rows, groups, 1]), self.constant([rows, groups, repeat])
        )
        flat = self.reshape(wide, [rows, groups * repeat])
        return flat if groups * repeat == columns else self.first(flat, columns, 1)

    def along(self, value: ir.Value, shape: Sequence[int], axis: int, group: int) -> ir.Value:
        """Scales or zero points shaped to broadcast over a tensor of `shape`."""
        count = _numel(value)
        if not group:
            if count == 1:
                return self.reshape(value, [1])
            return self.reshape(
                value, [count if dim == axis % len(shape) else 1 for dim in range(len(shape))]
            )
        axis %= len(shape)
        rest = [size for dim, size in enumerate(shape) if dim != axis]
        wide = self.repeated(value, shape[axis], count // shape[axis], group, math.prod(rest))
        wide = self.reshape(wide, [shape[axis], *rest])
        if axis == 0:
            return wide
        order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
        return self.op("Transpose", wide, perm=order)


# -------------------------------------------------------------------- expansions


def _unpack(w: _Writer, node: ir.Node) -> ir.Value:
    bits, low, shape = _int(node, "bits"), _int(node, "low"), _ints(node, "shape")
    packed = _input(node, 0)
    if bits == HALF and low in (0, -(2 ** (HALF - 1))) and w.owns(packed):
        return _half_bytes(w, packed, low, shape)
    count = math.prod(shape)
    codes = _octets(w, packed, bits, count) if BYTE % bits else _in_bytes(w, packed, bits, count)
    signed = low < 0
    fits = low + 2**bits - 1 <= (127 if signed else 255) and low >= -128
    kind = ("INT8" if signed else "UINT8") if fits else "INT16" if low + 2**bits <= 2**15 else "INT32"
    if low or not fits:
        wide = w.cast(codes, "INT32")
        codes = w.cast(w.op("Add", wide, w.constant(low, np.int32)) if low else wide, kind)
    return w.reshape(codes, shape)


def _half_bytes(w: _Writer, packed: ir.Value, low: int, shape: Sequence[int]) -> ir.Value:
    """An int4 or uint4 initializer, which ONNX packs as we do, and a Cast."""
    import onnx_ir

    data = _array(packed)
    # two's complement of code − 8: the highest bit turned
    data = data ^ np.uint8(0x88) if low else data
    if low and math.prod(shape) % 2:
        data[-1] &= 0x0F
    dtype = onnx_ir.DataType.INT4 if low else onnx_ir.DataType.UINT4
    stored = w.restored(
        packed, onnx_ir.PackedTensor(data, dtype, shape=onnx_ir.Shape(shape), name=packed.name)
    )
    return w.cast(stored, "INT8" if low else "UINT8")


def _in_bytes(w: _Writer, packed: ir.Value, bits: int, count: int) -> ir.Value:
    """Codes of 1, 2 or 4 bits, several in each byte."""
    each = BYTE // bits
    shifts = w.constant([bits * i for i in range(each)], np.uint8)
    shifted = w.op("BitShift", w.reshape(packed, [-1, 1]), shifts, direction="RIGHT")
    codes = w.reshape(w.op("BitwiseAnd", shifted, w.constant(2**bits - 1, np.uint8)), [-1])
    return codes if count % each == 0 else w.first(codes, count, 0)


def _octets(w: _Writer, packed: ir.Value, bits: int, count: int) -> ir.Value:
    """Codes of any other width: 8 of them fill `bits` bytes; each lies in up to three of these."""
    missing = -(-count // BYTE) * bits - _numel(packed)
    rows = w.reshape(w.padded(packed, [0, missing]) if missing else packed, [-1, bits])
    starts = [bits * i for i in range(BYTE)]
    wide = bits > BYTE
    kind: Any = np.uint32 if wide else np.uint8
    result: ir.Value | None = None
    for step in range(3 if wide else 2):
        # a byte behind the code adds bits that the mask takes away; behind the row any byte does
        bytes_ = w.op("Gather", rows, w.constant([min(s // BYTE + step, bits - 1) for s in starts]), axis=1)
        bytes_ = w.cast(bytes_, "UINT32") if wide else bytes_
        moves = [BYTE * step - s % BYTE for s in starts]
        if step == 0:
            part = w.op("BitShift", bytes_, w.constant([-m for m in moves], kind), direction="RIGHT")
        else:
            # by 8 a byte would leave the byte: 7 moves it above the mask as well
            limit = BYTE - 1 if not wide else 2 * BYTE
            part = w.op(
                "BitShift", bytes_, w.constant([min(m, limit) for m in moves], kind), direction="LEFT"
            )
        result = part if result is None else w.op("BitwiseOr", result, part)
    assert result is not None
    codes = w.reshape(w.op("BitwiseAnd", result, w.constant(2**bits - 1, kind)), [-1])
    return codes if count % BYTE == 0 else w.first(codes, count, 0)


def _widen(w: _Writer, node: ir.Node) -> ir.Value:
    return w.cast(_input(node, 0), "FLOAT")


def _decode(w: _Writer, node: ir.Node) -> ir.Value:
    codes, scale, zero = (_input(node, slot) for slot in range(3))
    shape, axis, group = _folded(w, node)
    real = w.cast(w.reshape(codes, shape), "FLOAT")
    if not (zero.const_value is not None and not _array(zero).any()):
        real = w.op("Sub", real, w.along(w.cast(zero, "FLOAT"), shape, axis, group))
    return _unfolded(w, node, w.op("Mul", real, w.along(scale, shape, axis, group)), shape)


def _folded(w: _Writer, node: ir.Node) -> tuple[list[int], int, int]:
    """(shape, axis, group) to compute in: whole groups along axis 0 are rows, so that their scales only broadcast.

    What is folded at load stays in memory until all of the file is: the fewer tensors of full size, the better.
    """
    shape, axis, group = _ints(node, "shape"), _int(node, "axis"), _int(node, "group")
    width = math.prod(shape[1:])
    if group and axis == 0 and width % group == 0:
        return [shape[0] * width // group, group], 0, 0
    return shape, axis, group


def _unfolded(w: _Writer, node: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    wanted = _ints(node, "shape")
    return value if list(shape) == wanted else w.reshape(value, wanted)


def _lookup(w: _Writer, node: ir.Node) -> ir.Value:
    import onnx_ir

    codes, table, scale = (_input(node, slot) for slot in range(3))
    shape, axis, group = _folded(w, node)
    small = _SMALL_FLOATS.get(node.attributes["kind"].as_string())
    if small is not None and w.owns(codes) and _is_table_of(small, _array(table)):
        bits = torch.from_numpy(_array(codes)).view(small)
        dtype = onnx_ir.DataType.FLOAT8E4M3FN if small is torch.float8_e4m3fn else onnx_ir.DataType.FLOAT8E5M2
        data = bits.view(torch.uint8).numpy().view(dtype.numpy())
        stored = w.restored(codes, onnx_ir.Tensor(data, dtype, name=codes.name))
        real = w.reshape(w.cast(stored, "FLOAT"), shape)
    else:
        real = w.op("Gather", table, w.cast(w.reshape(codes, shape), "INT32"), axis=0)
    return _unfolded(w, node, w.op("Mul", real, w.along(scale, shape, axis, group)), shape)


def _unsigned(w: _Writer, node: ir.Node) -> ir.Value:
    wide = w.op("Sub", w.cast(_input(node, 0), "INT32"), w.constant(_int(node, "low"), np.int32))
    return w.cast(wide, "UINT8")


def _spread(w: _Writer, node: ir.Node) -> ir.Value:
    rows, columns, repeat = (_int(node, name) for name in ("rows", "columns", "repeat"))
    value = _input(node, 0)
    count = _numel(value)
    if count == 1:
        return w.op("Expand", w.reshape(value, [1, 1]), w.constant([rows, columns]))
    return w.repeated(value, rows, count // rows, repeat, columns)


def _blocks(w: _Writer, node: ir.Node) -> ir.Value:
    (rows, width), bits, block = _ints(node, "shape"), _int(node, "bits"), _int(node, "block")
    count = -(-width // block)
    codes = _input(node, 0)
    if width % block:
        codes = w.padded(codes, [0, 0, 0, count * block - width])
    each = BYTE // bits
    if each == 1:
        return w.reshape(codes, [rows, count, block])
    parts = w.reshape(codes, [rows, count, block // each, each])
    result: ir.Value | None = None
    for place in range(each):
        part = w.op("Gather", parts, w.constant(place), axis=3)
        part = w.op("BitShift", part, w.constant(bits * place, np.uint8), direction="LEFT") if place else part
        result = part if result is None else w.op("BitwiseOr", result, part)
    assert result is not None
    return result


_EXPANSIONS: dict[str, Callable[[_Writer, Any], Any]] = {
    "unpack": _unpack,
    "widen": _widen,
    "decode": _decode,
    "lookup": _lookup,
    "unsigned": _unsigned,
    "spread": _spread,
    "blocks": _blocks,
}


def _is_table_of(dtype: torch.dtype, table: Array) -> bool:
    """Whether `table` [256] holds the values of a float type of ONNX, code by code."""
    known = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    return table.shape == known.shape and np.array_equal(known, table, equal_nan=True)


def _input(node: ir.Node, slot: int) -> ir.Value:
    value = node.inputs[slot]
    assert value is not None
    return value


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _ints(node: ir.Node, name: str) -> list[int]:
    return [int(size) for size in node.attributes[name].as_ints()]


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.array(value.const_value.numpy())


def _numel(value: ir.Value) -> int:
    assert value.shape is not None
    return math.prod(int(size) for size in _fixed(value.shape))


def _fixed(shape: Any) -> Iterator[int]:
    for size in shape:
        assert isinstance(size, int)
        yield size
