"""Single steps of recurrent layers: the same numbers, and their products in integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import assert_exact, prepare, ship
from torch import Tensor, nn

from bitport.frontends.pytorch import load_module
from bitport.graph.simplify import simplify

CELLS: dict[str, tuple[type[nn.RNNCellBase], dict[str, Any]]] = {
    "lstm": (nn.LSTMCell, {}),
    "lstm without bias": (nn.LSTMCell, {"bias": False}),
    "gru": (nn.GRUCell, {}),
    "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}


class Loop(nn.Module):
    """A recurrent layer written as a loop over its steps."""

    def __init__(self, kind: type[nn.RNNCellBase], options: dict[str, Any]) -> None:
        super().__init__()
        self.cell = kind(6, 8, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.new_zeros(x.shape[0], 8)
        if isinstance(self.cell, nn.LSTMCell):
            state = (state, x.new_zeros(x.shape[0], 8))
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_becomes_linear_layers(name: str) -> None:
    model = Loop(*CELLS[name]).eval()
    graph = load_module(model, torch.randn(1, 4, 6))
    simplify(graph)
    graph.check()
    kinds = [graph.op(node).kind for node in graph.nodes()]
    assert kinds.count("linear") == 2 * 4 + 1 and not any("cell" in kind for kind in kinds)
    x = torch.randn(3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_its_products_run_in_integers(name: str) -> None:
    prepared = prepare(Loop(*CELLS[name]), [torch.randn(4, 3, 6)], weights={"granularity": "channel"})
    assert_exact(ship(prepared, torch.randn(4, 3, 6), torch.randn(1, 3, 6)))
    assert sum(todo.kernel == "QGemm" for todo in prepared.plan.nodes.values()) == 2 * 3 + 1
