"""Narrow weights: stored at their true width, run by the kernel that was meant, equal to what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.flow import Net
from tests.targets.onnxruntime.handmade import Handmade, Ran
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.numerics.arithmetic import along, grouped
from bitport.numerics.packing import packed_bytes
from bitport.targets.onnxruntime.blockwise import Layout, layout

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Case:
    """A Linear of a width that all cases of a file share: outputs, bits, values that share a scale (0: a row)."""

    rows: int
    bits: int
    group: int
    symmetric: bool = False
    bias: bool = True

    def drawn(self, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(codes, scale, zero point, what they stand for)."""
        generator = torch.Generator().manual_seed(seed)
        low = -(2 ** (self.bits - 1))
        shape = (self.rows, -(-width // self.group)) if self.group else (self.rows,)
        q = torch.randint(low, -low, (self.rows, width), generator=generator)
        zero = torch.zeros(shape, dtype=torch.int64)
        if not self.symmetric:
            zero = torch.randint(low, -low, shape, generator=generator)
        scale = torch.rand(shape, generator=generator) * 0.02 + 0.01
        if self.group:
            zeros, scales = (grouped(v, q.shape, 0, self.group) for v in (zero, scale))
        else:
            zeros, scales = (along(v, 2, 0) for v in (zero, scale))
        return q, scale, zero, (q - zeros) * scales


def run(
    cases: Sequence[Case], width: int, *, blockwise: bool = True, level: int = 4, lead: tuple[int, ...] = (3,)
) -> tuple[Ran, list[Tensor]]:
    """All cases side by side in one file: what ran, and what the weights stand for gives."""
    made, results, wanted, layers = Handmade(), [], [], {}
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(1))
    for i, case in enumerate(cases):
        q, scale, zero, w = case.drawn(width, i)
        weight = made.weight(f"fc{i}.weight", q, scale, zero, case.bits, -(2 ** (case.bits - 1)), case.group)
        bias = torch.linspace(-1, 1, case.rows) if case.bias else None
        args = (made.x, weight) if bias is None else (made.x, weight, made.buffer(f"fc{i}.bias", bias))
        results.append(made.call(f"fc{i}", LINEAR, *args))
        wanted.append(F.linear(x, w, bias))
        layers[f"fc{i}"] = nn.Linear(width, case.rows, bias=case.bias)
    like = Net(lambda m, x: tuple(getattr(m, name)(x) for name in layers), **layers)
    ran = made.run(results, like, x, list(layers) if blockwise else [], level)
    assert len(ran.outputs) == len(cases)
    return ran, wanted


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def assert_stored(ran: Ran, cases: Sequence[Case], width: int) -> None:
    for i, case in enumerate(cases):
        name = f"fc{i}.weight/q"
        if name not in ran.names and width == 1:
            continue  # PyTorch's exporter stores equal small constants once
        assert ran.bytes_of(name) == packed_bytes(case.rows * width, case.bits), (name, case)
        assert ran.stored[name] == {"bits": case.bits, "shape": [case.rows, width]}


@pytest.mark.parametrize(
    "width", [pytest.param(1, marks=pytest.mark.slow), 17, pytest.param(33, marks=pytest.mark.slow), 96]
)
@pytest.mark.parametrize("level", [0, 4])
def test_blockwise_products(width: int, level: int) -> None:
    cases = [
        Case(rows, bits, group, symmetric, bias)
        for bits in ((1, 2, 3, 4, 5, 8) if level else (1, 2, 3, 4))
        for rows, group, symmetric, bias in (
            (5, 32, True, True), (3, 16, False, False), (1, 96, False, True), (4, 0, False, True), (2, 48, True, False),
            (6, 64, False, True),
        )
    ]  # fmt: skip
    ran, wanted = run(cases, width, level=level, lead=(3,) if level else (2, 3))
    assert set(ran.kinds) == {"MatMulNBits"}
    assert_stored(ran, cases, width)
    for i, want in enumerate(wanted):
        assert ran.by_name[f"fc{i}"] == ["MatMulNBits"]
        assert_close(ran.outputs[i], want, 0.03 if level else 1e-6)
        if cases[i].symmetric and cases[i].bits in (4, 8):
            assert f"fc{i}.weight/zero_point" not in ran.names, "it is what the kernel assumes"


def test_a_row_that_shares_one_scale_stores_one() -> None:
    for width in (300, 1000):
        cases = [Case(4, 4, 0), Case(4, 8, 0), Case(4, 2, 0)]
        ran, wanted = run(cases, width)
        assert_stored(ran, cases, width)
        for i, want in enumerate(wanted):
            assert ran.bytes_of(f"fc{i}.weight/scale") == 16
            assert ran.by_name[f"fc{i}"] == ["MatMulNBits"]
            assert_close(ran.outputs[i], want, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rows"), [(1, 1), (17, 3), (33, 1), (64, 4), (5, 7)])
def test_decoded_when_the_file_is_loaded(width: int, rows: int) -> None:
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 15)
    cases = [Case(rows, bits, group) for bits in widths for group in (0, 8, 100)]
    ran, wanted = run(cases, width, blockwise=False)
    assert set(ran.kinds) <= {"Gemm", "FusedGemm"}, "something is decoded whenever it runs"
    assert_stored(ran, cases, width)
    for i, want in enumerate(wanted):
        assert ran.by_name[f"fc{i}"] == ["Gemm"]
        assert_close(ran.outputs[i], want, 1e-6)


def test_layouts() -> None:
    assert layout(4, 32, 1024, 4) == Layout(4, 32)
    assert layout(3, 32, 1024, 0) == Layout(4, 32)
    assert layout(2, 16, 1024, 4) == Layout(4, 16), "2 bits in blocks of 16 would multiply floats, and slowly"
    assert layout(2, 32, 1024, 4) == Layout(4, 32), "the kernel for 2 bits in blocks of 32 is slower"
    assert layout(2, 256, 1024, 4) == Layout(2, 128) and layout(2, 64, 1024, 4) == Layout(2, 64)
    assert layout(4, 96, 1024, 4) == Layout(4, 32)
    assert layout(8, 32, 1024, 0) is None and layout(8, 32, 1024, 4) == Layout(8, 32)
    assert layout(4, 24, 1024, 4) is None and layout(4, 24, 20, 4) == Layout(4, 32)
    assert layout(9, 32, 1024, 4) is None
    assert layout(4, 0, 300, 4) == Layout(4, 64)
