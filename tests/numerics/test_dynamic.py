"""Ranges taken while running, against onnx's own evaluation of DynamicQuantizeLinear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from bitport.formats import Format
from bitport.numerics.dynamic import quantize_dynamic
from bitport.plan.ops import QUANTIZE_DYNAMIC

INT8 = Format.parse("int8")


def _evaluator() -> ReferenceEvaluator:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_point"])
    outputs = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (
            ("q", TensorProto.UINT8),
            ("scale", TensorProto.FLOAT),
            ("zero_point", TensorProto.UINT8),
        )
    ]
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs
    )
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


EVALUATOR = _evaluator()


def by_onnx(x: Tensor) -> tuple[Tensor, float, int]:
    q, scale, zero_point = EVALUATOR.run(None, {"x": x.numpy()})
    return torch.from_numpy(q.astype(np.int32)), float(scale), int(zero_point)


values = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4)


@given(st.lists(values, min_size=2, max_size=40).filter(any))
def test_bytes_as_onnx_defines_them(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    q, scale, zero_point = by_onnx(x)
    mine = quantize_dynamic(x, INT8)
    # ours is computed in float64 and rounded once, onnx's in float32: a unit in the last place, a step at a tie
    assert float(mine.scale) == pytest.approx(scale, rel=2e-7)
    assert abs(int(mine.zero_point) + 128 - zero_point) <= 1
    assert int((mine.q + 128 - q).abs().max()) <= 1
    assert float((mine.dequantize() - (q - zero_point) * scale).abs().max()) <= 1.001 * scale
    assert (mine.low, mine.high) == (-128, 127)


@given(st.lists(values, min_size=2, max_size=40).filter(any))
def test_the_operator_of_lowered_graphs_is_onnx_to_the_bit(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    q, scale, zero_point = by_onnx(x)
    mine, my_scale, my_zero_point = QUANTIZE_DYNAMIC(x, 0, 255)
    assert mine.dtype == my_zero_point.dtype == torch.uint8
    assert float(my_scale) == scale and int(my_zero_point) == zero_point
    assert torch.equal(mine.to(torch.int32), q)


def test_examples_of_the_standard() -> None:
    # onnx: DynamicQuantizeLinear, "Y_Scale = (max(x) - min(x)) / 255", its three examples
    for numbers, scale, zero_point in (
        ([0, 2, -3, -2.5, 1.34, 0.5], 0.0196078438, 153),
        ([-1.0, -2.1, -1.3, -2.5, -3.34, -4.0], 0.0156862754, 255),
        ([1, 2.1, 1.3, 2.5, 3.34, 4.0, 1.5, 2.6, 3.9, 4.0, 3.0, 2.345], 0.0156862754, 0),
    ):
        found = quantize_dynamic(torch.tensor(numbers), INT8)
        assert float(found.scale) == pytest.approx(scale, rel=1e-7)
        assert int(found.zero_point) + 128 == zero_point


@pytest.mark.parametrize("text", ["int8", "int8 symmetric", "int4", "uint4", "int[-20,70]", "int16"])
def test_other_formats_hold_their_own_range(text: str) -> None:
    fmt, x = Format.parse(text), torch.randn(50) * 3 + 1
    found = quantize_dynamic(x, fmt)
    assert int(found.q.min()) >= fmt.low and int(found.q.max()) <= fmt.high
    assert float((found.dequantize() - x).abs().max()) <= 0.501 * float(found.scale)
    if fmt.symmetric:
        assert int(found.zero_point) == fmt.zero_point


def test_nothing_and_zeros() -> None:
    for x in (torch.zeros(0, 3), torch.zeros(2, 3)):
        found = quantize_dynamic(x, INT8)
        assert found.q.shape == x.shape and torch.equal(found.dequantize(), x)
    q, scale, zero_point = QUANTIZE_DYNAMIC(torch.zeros(2, 3), -128, 127)
    assert float(scale) == 1 and torch.equal(q, zero_point.expand(2, 3))
