"""A product beside a Linear layer: what the network computes, what keeps its name, and what a file gives back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.flow import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.errors import GraphError
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.graph.archive import load_pt2, save_pt2
from bitport.graph.beside import is_free, names_beside, put_beside


def loaded(net: nn.Module, x: Tensor) -> Graph:
    return load_module(net.eval(), x).clone()


def product(outputs: int, inputs: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    return torch.randn(rank, inputs), torch.randn(outputs, rank)


def single(*layers: nn.Module) -> tuple[Graph, Tensor]:
    x = torch.randn(4, 6)
    torch.manual_seed(0)
    return loaded(nn.Sequential(*layers), x), x


def test_readers_get_the_sum_and_names_stay() -> None:
    graph, x = single(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    before, names = graph.run(x)[0], [graph.name(node) for node in graph.nodes()]
    made = graph.clone()
    first, last = product(10, 6), product(6, 10, 2)
    put_beside(made, {"0": first, "2": last})
    made.check()
    hidden = F.relu(F.linear(x, graph.tensor("0.weight") + first[1] @ first[0], graph.tensor("0.bias")))
    wanted = F.linear(hidden, graph.tensor("2.weight") + last[1] @ last[0], graph.tensor("2.bias"))
    assert torch.allclose(made.run(x)[0], wanted, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)
    found = [made.name(node) for node in made.nodes()]
    assert [name for name in found if "low_rank" not in name] == names
    assert set(found) - set(names) == {*names_beside("0"), *names_beside("2")}
    assert torch.equal(graph.run(x)[0], before), "the graph that it was made of is as it was"
    assert made.outputs == graph.outputs


def test_zeros_add_nothing_to_the_bit() -> None:
    graph, x = single(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    made = graph.clone()
    put_beside(made, {"0": (torch.zeros(3, 6), torch.zeros(10, 3))})
    assert torch.equal(made.run(x)[0], graph.run(x)[0])


def test_a_layer_that_is_an_output_or_has_many_readers() -> None:
    x = torch.randn(2, 5, 6)
    graph = loaded(Net(lambda m, x: (m.a(x), m.a(x).mean()), a=nn.Linear(6, 4)), x)
    name = next(graph.name(node) for node in graph.nodes() if graph.op(node).kind == "linear")
    made = graph.clone()
    down, up = product(4, 6)
    put_beside(made, {name: (down, up)})
    for real, found in zip(graph.run(x)[:1], made.run(x)[:1], strict=True):
        assert torch.allclose(found, real + x @ down.T @ up.T, atol=1e-5)


def test_a_file_gives_back_the_same_graph(tmp_path: Path) -> None:
    graph, x = single(nn.Linear(6, 10), nn.ReLU(), nn.Sequential(nn.Linear(10, 6)))
    put_beside(graph, {"2.0": product(6, 10), "0": product(10, 6)})
    save_pt2(graph, tmp_path / "graph.pt2")
    again = load_pt2(tmp_path / "graph.pt2")
    assert again.digest() == graph.digest()
    assert [again.name(node) for node in again.nodes()] == [graph.name(node) for node in graph.nodes()]
    assert torch.equal(again.run(x)[0], graph.run(x)[0])
    assert torch.equal(again.tensor(names_beside("2.0").tensors[0]), product(6, 10)[0])


def test_the_same_twice_is_refused() -> None:
    graph, _ = single(nn.Linear(6, 10))
    assert is_free(graph, "0")
    put_beside(graph, {"0": product(10, 6)})
    assert not is_free(graph, "0")
    with pytest.raises(GraphError, match="0: something stands beside it already"):
        put_beside(graph, {"0": product(10, 6)})


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        ("1", (10, 6), "1: nothing can stand beside it"),
        ("0", (6, 10), "doesn't fit weights of"),
        ("nowhere", (10, 6), "no node is called 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_named(layer: str, shapes: tuple[int, int], message: str) -> None:
    graph, _ = single(nn.Linear(6, 10), nn.ReLU())
    with pytest.raises(GraphError, match=message):
        put_beside(graph, {layer: product(*shapes)})


def test_convolutions_have_no_place_for_it() -> None:
    graph = loaded(conv(), torch.randn(2, 3, 8, 8))
    name = graph.name(graph.nodes()[0])
    with pytest.raises(GraphError, match="it is no Linear"):
        put_beside(graph, {name: product(8, 27)})
