"""The operators of lowered graphs, against onnx's own evaluation of QuantizeLinear and DequantizeLinear, opset 21."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bitport.formats import Format
from bitport.numerics import quantize as numerics
from bitport.numerics.codes import Grid, decode, encode, fit, values
from bitport.numerics.packing import pack
from bitport.plan.ops import DEQUANTIZE, LOOKUP, QUANTIZE, UNPACK, code_type

TYPES = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int16": TensorProto.INT16, "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4,
}  # fmt: skip


@cache
def evaluator(kind: str, text: str, axis: int, block: int) -> ReferenceEvaluator:
    """x, scale, zero_point (as int32) → what onnx makes of them, as int32 or float32."""
    stored = TYPES[text]
    cast = [helper.make_node("Cast", ["z"], ["zero_point"], to=stored)]
    options = {"axis": axis, "block_size": block} if axis >= 0 else {}
    if kind == "QuantizeLinear":
        nodes = [
            *cast, helper.make_node(kind, ["x", "scale", "zero_point"], ["codes"], **options),
            helper.make_node("Cast", ["codes"], ["y"], to=TensorProto.INT32),
        ]  # fmt: skip
        given, made = TensorProto.FLOAT, TensorProto.INT32
    else:
        nodes = [
            *cast, helper.make_node("Cast", ["x"], ["codes"], to=stored),
            helper.make_node(kind, ["codes", "scale", "zero_point"], ["y"], **options),
        ]  # fmt: skip
        given, made = TensorProto.INT32, TensorProto.FLOAT
    inputs = [("x", given), ("scale", TensorProto.FLOAT), ("z", TensorProto.INT32)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, t, None) for name, t in inputs],
        [helper.make_tensor_value_info("y", made, None)],
    )  # fmt: skip
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def by_onnx(
    kind: str, text: str, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = -1, block: int = 0
) -> Tensor:
    given = {"x": x.numpy(), "scale": scale.numpy(), "z": zero_point.numpy().astype(np.int32)}
    (found,) = evaluator(kind, text, axis, block).run(None, given)
    return torch.from_numpy(np.asarray(found))


def some(
    seed: int, shape: tuple[int, ...], text: str, parameters: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fmt = Format.parse(text)
    scale = torch.rand(parameters, generator=generator) * 0.3 + 0.01
    zero_point = torch.randint(fmt.low, fmt.high + 1, parameters, generator=generator).to(torch.int32)
    steps = torch.randint(4 * fmt.low - 9, 4 * fmt.high + 9, shape, generator=generator) / 4  # with many ties
    return steps * float(scale.reshape(-1)[0]), scale, zero_point


@given(st.sampled_from(sorted(TYPES)), st.sampled_from([-1, 0, 1, 2]), st.integers(0, 2**31))
def test_quantize_and_dequantize(text: str, axis: int, seed: int) -> None:
    shape, fmt = (3, 4, 5), Format.parse(text)
    x, scale, zero_point = some(seed, shape, text, () if axis < 0 else (shape[axis],))
    stored = zero_point.to(code_type(fmt.low, fmt.high))
    wanted = by_onnx("QuantizeLinear", text, x, scale, zero_point, axis)
    found = QUANTIZE(x, scale, stored, fmt.low, fmt.high, axis)
    assert found.dtype == stored.dtype and torch.equal(found.to(torch.int32), wanted)
    known = None if axis < 0 else axis
    assert torch.equal(numerics.quantize(x, scale, zero_point, fmt.low, fmt.high, known), wanted)

    back = by_onnx("DequantizeLinear", text, wanted, scale, zero_point, axis)
    assert torch.equal(DEQUANTIZE(found, scale, stored, axis), back)
    assert torch.equal(numerics.dequantize(wanted, scale, zero_point, known), back)


@given(
    st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    st.sampled_from([1, 2, 3, 4, 12]),
    st.integers(0, 2**31),
)
def test_blocks(text: str, block: int, seed: int) -> None:
    """A scale for each block of a row is onnx's blocked DequantizeLinear along the second axis."""
    fmt = Format.parse(f"{text} group({block},0)")
    x, scale, zero_point = some(seed, (5, 12), text, (5, 12 // block))
    codes = by_onnx("QuantizeLinear", text, x, scale, zero_point, 1, block)
    grid = Grid(fmt, scale, zero_point)
    assert torch.equal(encode(x, grid), codes)
    back = by_onnx("DequantizeLinear", text, codes, scale, zero_point, 1, block)
    assert torch.equal(decode(codes, grid), back)
    narrow = code_type(fmt.low, fmt.high)
    assert torch.equal(DEQUANTIZE(codes.to(narrow), scale, zero_point.to(narrow), 0, block), back)


@pytest.mark.parametrize("shape", [(4, 6), (4, 7), (3, 2, 3, 3), (1, 1), (5, 1), (2, 9)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("group", [1, 4, 100])
def test_groups_of_any_shape_and_axis(shape: tuple[int, ...], axis: int, group: int) -> None:
    """The operator finds the same groups as the numerics, tails and later axes included."""
    w = torch.randn(shape)
    for text in ("int4", "uint4", "nf4", "e2m1"):
        fmt = Format.parse(f"{text} group({group},{axis})")
        grid = fit(w, fmt)
        codes, wanted = encode(w, grid), decode(encode(w, grid), grid)
        if fmt.is_int:
            found = DEQUANTIZE(codes, grid.scale, grid.zero_point, axis, group)
        else:
            found = LOOKUP(codes.to(torch.uint8), values(fmt, grid.table), grid.scale, axis, group, text)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "text", ["int1", "int2", "int3", "int4", "uint4", "int5", "int7", "uint12", "int[-3,9]"]
)
@pytest.mark.parametrize("shape", [(1,), (3, 3), (2, 3, 5), (0, 4)])
def test_bit_streams(text: str, shape: tuple[int, ...]) -> None:
    fmt = Format.parse(text)
    codes = torch.randint(fmt.low, fmt.high + 1, shape, dtype=torch.int32)
    found = UNPACK(pack(codes - fmt.low, fmt.bits), fmt.bits, fmt.low, list(shape))
    assert torch.equal(found.to(torch.int32), codes) and found.shape == shape


def test_four_bits_lie_in_a_byte_as_onnx_has_them() -> None:
    codes = torch.tensor([-8, 7, 3, -1, 5])
    tensor = helper.make_tensor("w", TensorProto.INT4, [5], codes.numpy())
    packed = pack(codes & 15, 4)
    assert bytes(packed.tolist()) == bytes(value & 255 for value in tensor.int32_data) or (
        bytes(packed.tolist()) == tensor.raw_data
    )
