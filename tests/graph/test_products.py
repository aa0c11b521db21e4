"""Matrix products in every spelling: the same numbers, counted as work, and run in integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.flow import Net, Net2, assert_exact, prepare, ship
from torch import Tensor, nn

from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.simplify import simplify
from bitport.proof import cost

TOKENS, HEADS, MASK = torch.randn(3, 5, 8), torch.randn(3, 2, 5, 4), torch.randn(5, 5)


def simplified(model: nn.Module, *example: Tensor) -> tuple[Graph, list[str]]:
    graph = load_module(model, tuple(example))
    simplify(graph)
    graph.check()
    return graph, [graph.op(node).kind for node in graph.nodes()]


def same(model: nn.Module, graph: Graph, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(graph.run(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)


EINSUMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "a matrix": ("bij,jk->bik", (3, 5, 8), (8, 6)),
    "without arrow": ("bij,bjk", (3, 5, 8), (3, 8, 6)),
    "attention scores": ("bhid,bhjd->bhij", (3, 2, 5, 4), (3, 2, 7, 4)),
    "heads last": ("bihd,bjhd->bhij", (3, 5, 2, 4), (3, 7, 2, 4)),
    "attention values": ("bhij,bjhd->bihd", (3, 2, 5, 7), (3, 7, 2, 4)),
    "two shared axes": ("bihd,hdo->bio", (3, 5, 2, 4), (2, 4, 6)),
    "several columns": ("bij,jhd->bhid", (3, 5, 8), (8, 2, 4)),
    "an ellipsis": ("...ij,...kj->...ik", (3, 2, 5, 4), (3, 2, 7, 4)),
    "an axis that is spread": ("ibnd,jbnd->bnij", (5, 1, 2, 4), (7, 3, 2, 4)),
    "result turned": ("bij,bjk->kbi", (3, 5, 8), (3, 8, 6)),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_becomes_a_product(name: str) -> None:
    equation, first, second = EINSUMS[name]
    example = torch.randn(first), torch.randn(second)
    model = Net2(lambda m, x, y: torch.einsum(equation, x, y))
    graph, kinds = simplified(model, *example)
    assert "matmul" in kinds and not any(kind.startswith("other") for kind in kinds)
    same(model, graph, *example)
    batch = [torch.randn(7, *value.shape[1:]) if value.shape[0] == 3 else value for value in example]
    same(model, graph, *batch)


@pytest.mark.parametrize("equation", ["bij,bij->b", "bii,bij->bij", "bij,bjk->bi", "bij,bkl->bijkl"])
def test_other_einsums_stay_and_are_right(equation: str) -> None:
    example = torch.randn(3, 5, 5), torch.randn(3, 5, 5)
    model = Net2(lambda m, x, y: torch.einsum(equation, x, y))
    graph, _ = simplified(model, *example)
    same(model, graph, *example)


def test_einsum_of_several_operands_is_products_of_two() -> None:
    """As linear attention is often written: queries, keys times values, and the sums they are divided by."""
    example = torch.randn(3, 5, 4), torch.randn(3, 5, 6)

    def attention(m: Any, q: Tensor, v: Tensor) -> Tensor:
        kv = torch.einsum("bnd,bne->bde", q, v)
        return torch.einsum("bnd,bde,bn,fe->bnf", q, kv, q.sum(2), m.w)

    model = Net2(attention, w=torch.randn(2, 6))
    graph, kinds = simplified(model, *example)
    assert kinds.count("matmul") + kinds.count("linear") == 3
    same(model, graph, *example)


def test_products_that_turn_one_tensor_alike_turn_it_once() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        keys = m.c(x)
        scores = torch.einsum("bic,bjc->bij", m.a(x), keys) + torch.einsum("bic,bjc->bij", m.b(x), keys)
        return m.d(scores)  # type: ignore[no-any-return]

    names = {name: nn.Linear(8, 4) for name in "abc"}
    prepared = prepare(Net(both, **names, d=nn.Linear(5, 4)), [torch.randn(4, 5, 8)])
    assert_exact(ship(prepared, torch.randn(4, 5, 8)))


SPELLINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "addmm": lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix),
    "addmm with factors": lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix, alpha=0.5, beta=2.0),
    "addmm without the added": lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix, beta=0.0),
    "matmul": lambda m, x: x @ m.matrix + m.bias,
    "matmul transposed": lambda m, x: x @ m.turned.t() + m.bias,
    "einsum": lambda m, x: torch.einsum("bij,jk->bik", x, m.matrix) + m.bias,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_constant_matrix_is_a_linear(name: str) -> None:
    model = Net(SPELLINGS[name], matrix=torch.randn(8, 6), turned=torch.randn(6, 8), bias=torch.randn(6))
    graph, kinds = simplified(model, TOKENS)
    assert "linear" in kinds and "matmul" not in kinds
    same(model, graph, TOKENS)
    same(model, graph, torch.randn(9, 5, 8))
    assert sum(cost.macs(graph).values()) == 5 * 8 * 6


def test_the_weight_keeps_its_name_unless_others_read_it() -> None:
    graph, _ = simplified(Net(lambda m, x: x @ m.matrix, matrix=torch.randn(8, 6)), TOKENS)
    assert [tuple(v.shape) for n, v in graph.gm.state_dict().items() if n == "matrix"] == [(6, 8)]
    shared = Net(lambda m, x: (x @ m.matrix) * m.matrix.sum(0), matrix=torch.randn(8, 6))
    graph, _ = simplified(shared, TOKENS)
    same(shared, graph, TOKENS)
    twice = Net(lambda m, x: x @ m.matrix @ m.matrix, matrix=torch.randn(8, 8))
    graph, kinds = simplified(twice, TOKENS)
    assert kinds.count("linear") == 2 and len(list(graph.gm.parameters())) == 1
    same(twice, graph, TOKENS)


def test_a_batched_product_with_an_addition() -> None:
    model = Net2(lambda m, x, y: torch.baddbmm(y, x, x.transpose(1, 2), beta=0.5, alpha=0.1))
    example = TOKENS, torch.randn(3, 5, 5)
    graph, kinds = simplified(model, *example)
    assert "matmul" in kinds and "addmm" not in kinds
    same(model, graph, *example)


def test_work_is_counted_before_and_after_and_in_operators_without_a_row() -> None:
    model = Net(lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix),
                matrix=torch.randn(8, 6), bias=torch.randn(6))  # fmt: skip
    assert sum(cost.macs(load_module(model, TOKENS)).values()) == 5 * 8 * 6
    unknown = Net(lambda m, x: torch.einsum("bij,bjk->bi", x, x.transpose(1, 2)))
    assert sum(cost.macs(load_module(unknown, TOKENS)).values()) > 0
    no_product = Net(lambda m, x: torch.roll(x, 1, 1).cumsum(1))
    assert not cost.macs(load_module(no_product, TOKENS))


@pytest.mark.parametrize("name", ["addmm", "einsum"])
def test_they_run_in_integers(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = SPELLINGS[name](m, x).reshape(-1, 6)
        return m.head(torch.relu(y))  # type: ignore[no-any-return]

    model = Net(forward, matrix=torch.randn(8, 6), bias=torch.randn(6), head=nn.Linear(6, 4))
    prepared = prepare(model, [torch.randn(8, 5, 8)], weights={"granularity": "channel"})
    shipped = ship(prepared, torch.randn(8, 5, 8))
    assert_exact(shipped)
    assert sum(1 for todo in prepared.plan.nodes.values() if todo.kernel == "QGemm") == 2
