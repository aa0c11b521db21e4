"""Products of experts: one layer, with the gradients of its parts, in integers on the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow import Net2, assert_exact, prepare, ship
from torch import Tensor, nn

from bitport.frontends.pytorch import load_module
from bitport.graph.experts import EXPERT_LINEAR
from bitport.graph.simplify import simplify
from bitport.recipe.model import Override

ENDS = torch.tensor([2, 2, 7])  # the second of three experts has no rows


def apart(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    parts = zip([0, *ends.tolist()], ends.tolist(), stack, strict=False)
    return torch.cat([x[start:end] @ matrix for start, end, matrix in parts])


def grouped(m: Any, x: Tensor, ends: Tensor) -> Tensor:
    stack = m.w.transpose(1, 2) if m.w.shape[2] == 8 else m.w
    product: Callable[..., Tensor] = torch.ops.transformers.grouped_mm_fallback
    return m.b(product(m.a(x), stack, offs=ends))  # type: ignore[no-any-return]


def mixture(turned: bool = True) -> nn.Module:
    import transformers.integrations.moe  # noqa: F401 (registers the operator)

    model = Net2(grouped, a=nn.Linear(8, 8), b=nn.Linear(5, 4))
    model.register_parameter("w", nn.Parameter(torch.randn(3, 5, 8) if turned else torch.randn(3, 8, 5)))
    return model.eval()


def rows(ends: Tensor = ENDS) -> tuple[Tensor, Tensor]:
    return torch.randn(7, 8), ends.to(torch.int32)


def test_the_layer_is_the_product_of_each_expert_and_so_are_its_gradients() -> None:
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(15, 8, requires_grad=True)
    y = EXPERT_LINEAR(x, weight, ENDS)
    want = apart(x, weight.unflatten(0, (3, 5)).transpose(1, 2), ENDS)
    torch.testing.assert_close(y, want)
    factor = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad((y * factor).sum(), (x, weight)),
        torch.autograd.grad((want * factor).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert not EXPERT_LINEAR(x, weight, torch.tensor([2, 3, 5]))[5:].any()


@pytest.mark.parametrize("turned", [True, False])
def test_a_grouped_product_becomes_one_layer_under_the_stacks_own_name(turned: bool) -> None:
    model, example = mixture(turned), rows()
    graph = load_module(model, example, dynamic_shapes=None)
    simplify(graph)
    (node,) = (node for node in graph.nodes() if graph.op(node).kind == "experts")
    weight = graph.op(node).operands[1]
    assert weight is not None and weight.tensor == "w" and graph.tensor("w").shape == (15, 8)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(*example)[0], model(*example), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_experts_run_in_integers(granularity: str) -> None:
    prepared = prepare(
        load_module(mixture(), rows(), dynamic_shapes=None), [rows()], weights={"granularity": granularity}
    )
    shipped = ship(prepared, rows(), rows(torch.tensor([0, 7, 7])), rows(torch.tensor([3, 5, 7])))
    assert_exact(shipped)
    (name,) = (n for n, todo in prepared.plan.nodes.items() if todo.kernel == "MatMulIntegerToFloat")
    assert shipped.inspection.kernels[name].count("MatMulIntegerToFloat") == 3
    scales = prepared.plan.ties["w"].scale
    assert scales is not None and scales.numel() == (15 if granularity == "channel" else 1)


def test_experts_kept_in_float_stay_float() -> None:
    override = Override(match="*grouped*", weights={"format": "float32"})
    prepared = prepare(load_module(mixture(), rows(), dynamic_shapes=None), [rows()], overrides=[override])
    test = rows()
    shipped = ship(prepared, test)
    assert_exact(shipped)
    assert not any("MatMulIntegerToFloat" in kinds for kinds in shipped.inspection.kernels.values())
    torch.testing.assert_close(shipped.outputs[0], prepared.simulator().run(test)[0], rtol=1e-5, atol=1e-5)
