"""Single steps of recurrent layers (`nn.LSTMCell`, `GRUCell`, `RNNCell`) become two linear layers and their gates.

The formulas are those of torch's documentation of these modules. Letters: x input, h state, c cell; W, b as torch
stores them, gates along the first axis.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .editing import insert, replace
from .graph import Graph
from .match import Call, op_name

aten = torch.ops.aten


def spell_cells(graph: Graph) -> None:
    for node in graph.nodes():
        name = op_name(node) if node.op == "call_function" else ""
        if name == "lstm_cell":
            _Cell(graph, node).lstm()
        elif name == "gru_cell":
            _Cell(graph, node).gru()
        elif name in ("rnn_tanh_cell", "rnn_relu_cell"):
            _Cell(graph, node).plain(aten.tanh.default if "tanh" in name else aten.relu.default)


class _Cell:
    def __init__(self, graph: Graph, node: fx.Node) -> None:
        self.graph, self.node, self.call, self.name = graph, node, Call(node), graph.name(node)
        hx: Any = self.call["hx"]
        self.states = list(hx) if isinstance(hx, list | tuple) else [hx]

    def _new(self, what: str, target: Any, *args: Any) -> fx.Node:
        return insert(self.graph, self.node, target, args, f"{self.name}.{what}")

    def _sides(self) -> tuple[fx.Node, fx.Node]:
        """x·W_ihᵀ + b_ih and h·W_hhᵀ + b_hh."""
        call, linear = self.call, aten.linear.default
        return (
            self._new("input", linear, call["input"], call["w_ih"], call["b_ih"]),
            self._new("state", linear, self.states[0], call["w_hh"], call["b_hh"]),
        )

    def _parts(self, gates: fx.Node, count: int) -> list[fx.Node]:
        parts = self._new("gates", aten.chunk.default, gates, count, 1)
        return [self._new("gate", operator.getitem, parts, i) for i in range(count)]

    def _sigmoid(self, value: fx.Node) -> fx.Node:
        return self._new("sigmoid", aten.sigmoid.default, value)

    def _add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._new("add", aten.add.Tensor, a, b)

    def _mul(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._new("mul", aten.mul.Tensor, a, b)

    def lstm(self) -> None:
        """c' = σ(f)·c + σ(i)·tanh(g), h' = σ(o)·tanh(c')."""
        i, f, g, o = self._parts(self._add(*self._sides()), 4)
        kept = self._mul(self._sigmoid(f), self.states[1])
        cell = self._add(kept, self._mul(self._sigmoid(i), self._new("tanh", aten.tanh.default, g)))
        state = self._mul(self._sigmoid(o), self._new("tanh", aten.tanh.default, cell))
        for user in list(self.node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with((state, cell)[int(user.args[1])])  # type: ignore[arg-type]
            self.graph.gm.graph.erase_node(user)
        self.graph.gm.graph.erase_node(self.node)

    def gru(self) -> None:
        """n = tanh(x_n + σ(r)·h_n), h' = n + σ(z)·(h − n)."""
        given, before = (self._parts(side, 3) for side in self._sides())
        reset, keep = (self._sigmoid(self._add(a, b)) for a, b in zip(given[:2], before[:2], strict=True))
        new = self._new("tanh", aten.tanh.default, self._add(given[2], self._mul(reset, before[2])))
        change = self._new("sub", aten.sub.Tensor, self.states[0], new)
        replace(self.graph, self.node, self._add(new, self._mul(keep, change)))

    def plain(self, activation: Any) -> None:
        replace(self.graph, self.node, self._new("new", activation, self._add(*self._sides())))
