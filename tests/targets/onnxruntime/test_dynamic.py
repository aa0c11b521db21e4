"""Linear layers whose inputs are quantized while they run: one fused integer kernel, equal to its formula."""

from __future__ import annotations

import operator

import pytest
import torch
from tests.flow import Net
from tests.targets.onnxruntime.handmade import Handmade, largest
from torch import nn

from bitport.errors import ExportError
from bitport.numerics.packing import packed_bytes
from bitport.plan.ops import DEQUANTIZE, QUANTIZE_DYNAMIC

LINEAR = torch.ops.aten.linear.default


def layer(
    made: Handmade, name: str, x: object, rows: int, width: int, bits: int, channel: bool, bias: bool
) -> object:
    generator = torch.Generator().manual_seed(bits + rows)
    low, high = -(2 ** (bits - 1)), largest(bits)
    q = torch.randint(max(low, -high - 1), high + 1, (rows, width), generator=generator)
    scale = torch.rand((rows,) if channel else (), generator=generator) * 0.02 + 0.01
    weight = made.weight(f"{name}.weight", q, scale, torch.zeros(scale.shape), bits, low, 0)
    args = (x, weight, made.buffer(f"{name}.bias", torch.linspace(-1, 1, rows))) if bias else (x, weight)
    return made.call(name, LINEAR, *args)


def ranged(made: Handmade, name: str, x: object, low: int = 0, high: int = 255) -> object:
    parts = made.call(f"{name}/ranged", QUANTIZE_DYNAMIC, x, low, high)
    q, scale, zero = (made.call(f"{name}/ranged", operator.getitem, parts, i) for i in range(3))
    return made.call(f"{name}/dq", DEQUANTIZE, q, scale, zero, -1)


CASES = [(5, 8, True, True), (1, 8, False, False), (7, 4, True, False), (3, 3, False, True)]


@pytest.mark.parametrize(("width", "lead"), [(1, (3,)), (33, (1,)), (16, (2, 3))])
def test_layers_of_all_kinds_on_one_input(width: int, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, width, generator=torch.Generator().manual_seed(0)) + 0.3
    made = Handmade()
    names = [f"fc{i}" for i in range(len(CASES))]
    results = [
        layer(made, name, ranged(made, name, made.x), rows, width, bits, channel, bias)
        for name, (rows, bits, channel, bias) in zip(names, CASES, strict=True)
    ]
    layers = {n: nn.Linear(width, c[0], bias=c[3]) for n, c in zip(names, CASES, strict=True)}
    like = Net(lambda m, x: tuple(getattr(m, name)(x) for name in names), **layers)
    computed = made.computed(results, x)
    ran = made.run(results, like, x)
    for i, (name, (rows, bits, _, _)) in enumerate(zip(names, CASES, strict=True)):
        assert ran.by_name[name] == ["MatMulIntegerToFloat"], ran.by_name
        assert ran.bytes_of(f"{name}.weight/q") == packed_bytes(rows * width, bits)
        assert float((ran.outputs[i] - computed[i]).abs().max()) <= 2e-6 * float(computed[i].abs().max())
    assert ran.kinds.count("DynamicQuantizeLinear") == 1, "the input's range is taken once for all"
    assert set(ran.kinds) == {"DynamicQuantizeLinear", "MatMulIntegerToFloat"}


def test_one_fused_kernel_a_layer() -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    made = Handmade()
    hidden = layer(made, "a", ranged(made, "a", made.x), 9, 12, 8, True, True)
    y = layer(made, "b", ranged(made, "b", hidden), 5, 9, 8, False, False)
    (computed,) = made.computed([y], x)
    like = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(12, 9), b=nn.Linear(9, 5, bias=False))
    ran = made.run([y], like, x)
    assert ran.by_name == {"a": ["DynamicQuantizeMatMul"], "b": ["DynamicQuantizeMatMul"]}
    assert float((ran.outputs[0] - computed).abs().max()) <= 0.02 * float(computed.abs().max())


def test_layers_that_read_the_same_range() -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    made = Handmade()
    shared = ranged(made, "x", made.x)
    results = [layer(made, name, shared, 6 + i, 12, 8, True, bool(i)) for i, name in enumerate(("q", "k"))]
    computed = made.computed(results, x)
    like = Net(lambda m, x: (m.q(x), m.k(x)), q=nn.Linear(12, 6, bias=False), k=nn.Linear(12, 7))
    ran = made.run(results, like, x)
    for i, name in enumerate(("q", "k")):
        assert set(ran.by_name[name]) <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, ran.by_name
        assert float((ran.outputs[i] - computed[i]).abs().max()) <= 2e-6 * float(computed[i].abs().max())


def test_other_ranges_are_refused() -> None:
    made = Handmade()
    y = layer(made, "fc", ranged(made, "fc", made.x, 0, 15), 3, 4, 8, True, True)
    with pytest.raises(ExportError, match=r"0 … 255 only, not 0 … 15"):
        made.run([y], nn.Linear(4, 3), torch.randn(2, 4))
