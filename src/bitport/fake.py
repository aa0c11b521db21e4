"""The plan with gradients: a stretch of the float graph whose planned edges are fake-quantized.

What `simulate` computes in integers, here in floats that a loss can be taken through: rounding passes gradients
straight through (Bengio et al. 2013, arXiv:1308.3432), scales may be learned (Esser et al. 2020, arXiv:1902.08153), and
a share of the activations may be left unrounded at random (Wei et al. 2022, arXiv:2203.05740). It follows the plan's
edges as the simulator does, not a runtime's last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .graph import Edge, Graph, Op
from .graph.reading import producer_name
from .numerics.quantize import fake_quantize_learned, qparams
from .plan import Plan
from .plan.constants import stored_values

Drop = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Fake:
    """A graph under a plan, differentiable.

    Attributes:
        weights: tensor's name → what stands for it, already on its grid, biases too; others are stored as the
            plan says.
        scales: activation tie → its scale, which may need a gradient; others are the plan's.
        drop: (rounded, real) → what the network goes on with; None: rounded.
    """

    graph: Graph
    plan: Plan
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    drop: Drop | None = None
    _stored: dict[str, Tensor] = field(default_factory=dict)

    def run(self, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The values of `nodes`, in order, given those they read from outside; both as the float network has them."""
        known = dict(values)
        rounded: dict[fx.Node, Tensor] = {}
        for node in nodes:
            name, op = self.graph.name(node), self.graph.op(node)
            todo = self.plan.node(name)
            result = self._operator(node, op, name, known, rounded)
            # a ReLU that the range stands in for is run all the same: values left unrounded need it
            integers = self.plan.makes_integers(name) and todo.role not in ("move", "scaled")
            tie = self.plan.tie_of(name) if integers and todo.absorbs is None else None
            known[node] = self._rounded(result, tie) if tie is not None else result
        return known

    def _operator(
        self, node: fx.Node, op: Op, name: str, known: Mapping[fx.Node, Any], rounded: dict[fx.Node, Tensor]
    ) -> Any:
        by_node: dict[fx.Node, Any] = {}
        owned: dict[str, Tensor] = {}
        for slot, operand in enumerate(op.operands):
            if operand is None:
                continue
            tie = self.plan.edges.get(Edge(producer_name(self.graph, operand), name, slot))
            if operand.tensor is not None:
                value = self._constant(operand.tensor, tie)
                if operand.node is not None:
                    by_node[operand.node] = value
                else:
                    owned[operand.tensor.rpartition(".")[2]] = value
            elif tie is not None and operand.node is not None and torch.is_tensor(known[operand.node]):
                if not self.plan.makes_integers(self.graph.name(operand.node)):
                    if operand.node not in rounded:
                        rounded[operand.node] = self._rounded(known[operand.node], tie)
                    by_node[operand.node] = rounded[operand.node]

        def read(source: fx.Node) -> Any:
            if source in by_node:
                return by_node[source]
            return self.graph.tensor(str(source.target)) if source.op == "get_attr" else known[source]

        args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
        if node.op == "call_module":
            module = self.graph.gm.get_submodule(str(node.target))
            return torch.func.functional_call(module, owned, args, kwargs, strict=False)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _constant(self, tensor: str, tie: str | None) -> Tensor:
        if tensor in self.weights:
            return self.weights[tensor]
        if tie is None or self.plan.ties[tie].source == "bias":
            return self.graph.tensor(tensor).detach()
        key = f"{tensor}\n{tie}"
        if key not in self._stored:
            self._stored[key] = stored_values(self.graph, self.plan, tensor, tie)
        return self._stored[key]

    def _rounded(self, value: Tensor, tie: str) -> Tensor:
        stored = self.plan.ties[tie]
        if stored.source == "dynamic":
            ends = torch.aminmax(value.detach())
            scale, zero_point = qparams(*ends, stored.format)
        else:
            scale, zero_point = stored.parameters()
        found = fake_quantize_learned(
            value, self.scales.get(tie, scale), zero_point, stored.format.low, stored.format.high
        )
        return found if self.drop is None else self.drop(found, value)
