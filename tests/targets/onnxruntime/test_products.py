"""Linear layers on float inputs against ONNX Runtime: rounded while running to the bit, blockwise to 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.targets.onnxruntime.one_op import OneOp
from tests.targets.onnxruntime.test_arithmetic import needs_dot_product
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import TargetError
from bitport.formats import Format
from bitport.numerics.arithmetic import Call
from bitport.numerics.codes import encode, fit
from bitport.numerics.packing import pack
from bitport.plan.constants import Coded
from bitport.targets.onnxruntime.blockwise import layout
from bitport.targets.onnxruntime.products import kernels


def coded(w: Tensor, text: str) -> Coded:
    grid = fit(w, Format.parse(text))
    return Coded(encode(w, grid), grid)


def inputs(width: int, lead: tuple[int, ...] = (5,)) -> list[Tensor]:
    """Ordinary, one-sided, huge, tiny, all-zero, and with a row of zeros."""
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(width))
    row = x.clone()
    row[..., 0, :] = 0
    return [x, x.abs() + 1, -x.abs(), x * 1e6, x * 1e-6, x * 0, row]


@needs_dot_product
@pytest.mark.parametrize(
    ("width", "rows", "bias"), [(1, 1, True), (17, 3, False), (64, 33, True), (512, 8, False)]
)
@pytest.mark.parametrize(
    "text", ["int8n symmetric channel(0)", "int8 symmetric", "int4 symmetric channel(0)"]
)
def test_dynamic_products_to_the_bit(width: int, rows: int, bias: bool, text: str) -> None:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    weight, b = coded(w, text), torch.linspace(-1, 1, rows) if bias else None
    distinct = set()
    for x in inputs(width):
        graph = OneOp()
        operands = [
            graph.input(x.numpy()),
            graph.constant(weight.codes.numpy().astype(np.int8).T.copy()),
            graph.constant(weight.grid.scale.numpy()), "", graph.constant(b.numpy()) if b is not None else "",
        ]  # fmt: skip
        graph.floating(graph.op("DynamicQuantizeMatMul", *operands, domain="com.microsoft"))
        got, kinds = graph.run()
        assert kinds == ["DynamicQuantizeMatMul"]
        want = kernels(0)["linear_dynamic"](Call("linear_dynamic", {}, (x, weight, b), None))
        assert torch.equal(got, want)
        distinct |= set(got.reshape(-1).tolist())
    assert len(distinct) > 1


@pytest.mark.parametrize("level", [0, 1, 4])
@pytest.mark.parametrize(
    ("bits", "group"), [(2, 32), (2, 128), (4, 16), (4, 32), (4, 256), (8, 16), (8, 64), (4, 0), (8, 0)]
)
def test_blockwise_products(bits: int, group: int, level: int) -> None:
    for width, rows in ((1, 3), (33, 1), (300, 5)):
        found = layout(bits, group, width, level)
        if found is None:
            assert level < 4 and bits == 8
            continue
        w = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        weight = coded(w, f"int{bits} {f'group({group},0)' if group else 'channel(0)'}")
        count = -(-width // found.block)
        repeat = -(-min(group or width, count * found.block) // found.block)
        scale, zero = (
            v.reshape(rows, -1).repeat_interleave(repeat, 1)[:, :count]
            for v in (weight.grid.scale, weight.grid.zero_point + 2 ** (bits - 1))
        )
        u = F.pad(weight.codes + 2 ** (bits - 1), (0, count * found.block - width))
        zero = F.pad(zero, (0, -count % (8 // found.bits)))
        for x in inputs(width, (2, 3)):
            graph = OneOp()
            operands = [
                graph.input(x.numpy()),
                graph.constant(pack(u, found.bits).reshape(rows, count, -1).numpy()),
                graph.constant(scale.numpy()), graph.constant(pack(zero, found.bits).numpy()),
            ]  # fmt: skip
            sizes = {"K": width, "N": rows, "bits": found.bits, "block_size": found.block}
            graph.floating(
                graph.op("MatMulNBits", *operands, domain="com.microsoft", accuracy_level=level, **sizes)
            )
            got, _ = graph.run()
            want = kernels(level)["linear_weights"](Call("linear_weights", {}, (x, weight, None), None))
            assert got.shape == want.shape
            size = float((x.abs() @ weight.dequantize().abs().T).max())
            assert float((got - want).abs().max()) <= 2e-6 * size
            if level == 4 and width > 1 and size:
                plain = F.linear(x, weight.dequantize())
                assert float((got - plain).abs().max()) > 1e-5 * size, "the activations were not rounded"


def test_what_the_kernels_refuse() -> None:
    w = torch.randn(4, 32)
    for weight, message in ((coded(w, "int4 group(16,0)"), "can't multiply"), (w, "a stored weight")):
        with pytest.raises(TargetError, match=message):
            kernels(0)["linear_dynamic"](Call("linear_dynamic", {}, (torch.zeros(1, 32), weight, None), None))
