"""Embeddings: read as they are stored or decoded at load, and stored once where a Linear reads them too."""

from __future__ import annotations

import pytest
import torch
from tests.flow import Net
from tests.targets.onnxruntime.handmade import Handmade, Ran
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bitport.numerics.arithmetic import along, grouped
from bitport.numerics.packing import packed_bytes
from bitport.plan.ops import DEQUANTIZE

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default
ROWS, WIDTH = 12, 32
IDS = torch.tensor([[0, 3, 11], [7, 7, 1]])


def table(made: Handmade, bits: int, group: int, per_row: bool = True) -> tuple[list[fx.Node], Tensor]:
    """(codes, scale, zero point), twice read; what they stand for."""
    generator = torch.Generator().manual_seed(bits)
    low = -(2 ** (bits - 1))
    q = torch.randint(low, -low, (ROWS, WIDTH), generator=generator)
    shape = (ROWS, WIDTH // group) if group else (ROWS,) if per_row else ()
    scale = torch.rand(shape, generator=generator) + 0.1
    zero = torch.randint(low, -low, shape, generator=generator)
    parts = [made.codes("e.weight/q", q, bits, low), made.buffer("e.weight/scale", scale)]
    parts.append(
        made.codes("e.weight/zero_point", zero, bits, low) if group else made.buffer("z", zero.to(torch.int8))
    )
    wide = [grouped(v, q.shape, 0, group) if group else along(v, 2, 0) for v in (zero, scale)]
    return parts, (q - wide[0]) * wide[1]


def looked_up(made: Handmade, weight: fx.Node) -> Ran:
    y = made.call("e", EMBEDDING, weight, made.x)
    return made.run([y], nn.Embedding(ROWS, WIDTH), IDS)


@pytest.mark.parametrize("per_row", [True, False])
def test_rows_of_bytes_are_taken_as_they_are(per_row: bool) -> None:
    made = Handmade()
    parts, real = table(made, 8, 0, per_row)
    ran = looked_up(made, made.call("e/dq", DEQUANTIZE, *parts, 0 if per_row else -1))
    assert "Gather" in ran.by_name["e"] and "e/dq" not in ran.by_name
    assert torch.equal(ran.outputs[0], real[IDS])
    assert ran.bytes_of("e.weight/q") == ROWS * WIDTH
    assert ran.stored["e.weight/q"] == {"bits": 8, "shape": [ROWS, WIDTH]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision(dtype: torch.dtype) -> None:
    made = Handmade()
    w = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = made.call("e/decoded", torch.ops.aten.to.dtype, made.buffer("e.weight/q", w), torch.float32)
    ran = looked_up(made, wide)
    assert sorted(ran.kinds) == ["Cast", "Gather"]
    assert torch.equal(ran.outputs[0], w.float()[IDS])
    assert ran.bytes_of("e.weight/q") == 2 * ROWS * WIDTH


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_narrow_tables_are_decoded_at_load(bits: int) -> None:
    made = Handmade()
    parts, real = table(made, bits, 16)
    ran = looked_up(made, made.call("e/dq", DEQUANTIZE, *parts, 0, 16))
    assert ran.kinds == ["Gather"]
    assert torch.equal(ran.outputs[0], real[IDS])
    assert ran.bytes_of("e.weight/q") == packed_bytes(ROWS * WIDTH, bits)


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (4, 16), (8, 16), (8, 0)])
@pytest.mark.parametrize("blockwise", [True, False])
def test_a_tied_weight_is_stored_once(bits: int, group: int, blockwise: bool) -> None:
    made = Handmade()
    parts, real = table(made, bits, group)
    embedded, read = (made.call(f"{name}/dq", DEQUANTIZE, *parts, 0, group) for name in ("e", "head"))
    hidden = made.call("e", EMBEDDING, embedded, made.x)
    y = made.call("head", LINEAR, hidden, read)
    like = Net(
        lambda m, i: m.head(m.e(i)), e=nn.Embedding(ROWS, WIDTH), head=nn.Linear(WIDTH, ROWS, bias=False)
    )
    ran = made.run([y], like, IDS, ["head"] if blockwise else [])
    assert (
        ran.by_name["head"] == ["MatMulNBits"] if blockwise else ran.by_name["head"][0] in ("MatMul", "Gemm")
    )
    want = F.linear(real[IDS], real)
    assert float((ran.outputs[0] - want).abs().max()) <= (0.03 if blockwise else 1e-6) * float(
        want.abs().max()
    )
    assert ran.bytes_of("e.weight/q") == packed_bytes(ROWS * WIDTH, bits)
    weights = sum(len(i.raw_data) for i in ran.model.graph.initializer if i.name.startswith("e.weight/q"))
    assert weights == packed_bytes(ROWS * WIDTH, bits)
