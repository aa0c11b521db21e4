"""Copies of a graph: nothing is shared but what is asked for, and no shape is computed again."""

from __future__ import annotations

import pytest
import torch
from tests.flow import Net, conv, images
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module
from bitport.graph import Graph, shapes


@pytest.fixture
def graph() -> Graph:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    return load_module(net.eval(), images(2))


@pytest.mark.parametrize("sharing", [False, True])
def test_a_clone_brings_its_shapes_along(
    graph: Graph, sharing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "propagate", lambda *given: pytest.fail("shapes were propagated"))
    twin = graph.clone(sharing=sharing)
    twin.check()
    found = [[(g.name(n), g.shape(n), g.op(n).kind) for n in g.nodes()] for g in (graph, twin)]
    assert found[0] == found[1] and found[0][0][1] is not None
    assert (twin.inputs, twin.outputs, twin.stage) == (graph.inputs, graph.outputs, graph.stage)
    x = images(3)
    assert torch.equal(twin.run(x)[0], graph.run(x)[0])


@pytest.mark.parametrize("sharing", [False, True])
def test_what_is_done_to_a_clone_is_not_done_to_the_graph(graph: Graph, sharing: bool) -> None:
    x = images(3)
    before = graph.run(x)[0]
    twin = graph.clone(sharing=sharing)
    twin.set_tensor("a.weight", torch.zeros(8, 3, 3, 3))
    twin.notes.append("a note")
    twin.origin["made of"] = "a clone"
    twin.examples["x"] = (0.0, 1.0)
    twin.gm.graph.erase_node(_behind(twin))
    twin.propagate()
    assert torch.equal(graph.run(x)[0], before)
    assert len(graph.nodes()) == len(twin.nodes()) + 1
    assert not graph.notes and not graph.origin and graph.examples["x"] != (0.0, 1.0)


def _behind(graph: Graph) -> torch.fx.Node:
    """The ReLU, with what it read in its place."""
    node = next(n for n in graph.nodes() if graph.op(n).kind == "relu")
    node.replace_all_uses_with(node.all_input_nodes[0])
    return node
