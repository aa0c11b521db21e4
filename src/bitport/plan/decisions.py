"""What is decided of each operator before the plan is written down: the state that `decide` fills and `build` reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graph import Graph, Op, Operand
from ..graph.reading import is_float, made_by, placeholders, value_users
from ..rules import Free, OpRule, Ruleset, Shared
from .options import Override, TensorOptions, resolve

CLAMPS: dict[str, float | None] = {"relu": None, "relu6": 6.0}  # kind → upper bound; the lower one is 0


class Ties:
    """Union-find over tensor names."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        self.parent.setdefault(name, name)
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def unite(self, first: str, second: str) -> None:
        self.parent[self.find(second)] = self.find(first)


class Decisions:
    """Rows of operators, absorbed clamps, ties of tensors."""

    def __init__(
        self,
        graph: Graph,
        ruleset: Ruleset,
        weights: TensorOptions,
        activations: TensorOptions,
        overrides: Sequence[Override],
    ) -> None:
        self.graph, self.ruleset = graph, ruleset
        self.nodes = graph.nodes()
        self.names = {node: graph.name(node) for node in graph.gm.graph.nodes if node.op != "output"}
        self.by_name = {name: node for node, name in self.names.items() if node.op != "get_attr"}
        self.ops: dict[torch.fx.Node, Op] = {node: graph.op(node) for node in self.nodes}
        # with integer inputs and outputs these are integers whoever makes or reads them
        ends = (placeholders(graph), graph.output_nodes()) if ruleset.integer_io else ((), ())
        self.given, self.asked = ({node for node in end if is_float(node)} for end in ends)
        self.weights, self.activations = resolve(graph, ruleset, weights, activations, overrides)
        self.default = activations
        self.stored: set[torch.fx.Node] = set()
        self.rows: dict[torch.fx.Node, OpRule] = {}
        self.reasons: dict[torch.fx.Node, str] = {}
        self.absorbs: dict[torch.fx.Node, torch.fx.Node] = {}
        self.absorbed: dict[torch.fx.Node, torch.fx.Node] = {}
        self.ties = Ties()
        self.fixed: dict[str, tuple[float, float]] = {}
        self.scaled: dict[str, tuple[str, float]] = {}

    def head(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node whose value leaves an operator (its absorbed relu, if any)."""
        return self.absorbs.get(node, node)

    def owner(self, node: torch.fx.Node) -> torch.fx.Node:
        """The operator whose kernel makes a node's value (it may have absorbed the node)."""
        return self.absorbed.get(node, node)

    def static(self, node: torch.fx.Node) -> bool:
        """Whether an operator runs on integers whose ranges are known beforehand."""
        return node in self.rows and self.rows[node].mode == "static"

    def quantized_slots(self, node: torch.fx.Node, row: OpRule) -> list[tuple[int, Operand]]:
        """Slots whose operand is an activation-like tensor (data or a constant in an activation's place)."""
        return [
            (slot, operand)
            for slot, operand in enumerate(self.ops[node].operands)
            if operand is not None and isinstance(row.operand(slot), Free | Shared)
            if not self.is_fused(operand, row)
        ]

    def is_fused(self, operand: Operand, row: OpRule) -> bool:
        """Whether the runtime computes the operand and what reads it at once, without rounding in between."""
        source = operand.node
        if source in self.ops and self.ops[source].kind in CLAMPS and len(source.users) == 1:
            source = made_by(self.ops[source], 0)
        return source in self.rows and self.ops[source].kind in row.fuses and len(source.users) == 1

    def fused_behind(self, clamp: torch.fx.Node) -> bool:
        """Whether a clamp and what it reads are computed at once with what reads it."""
        return any(self._fuses(user, clamp) for user in clamp.users)

    def _fuses(self, user: torch.fx.Node, node: torch.fx.Node) -> bool:
        row = self.rows.get(user)
        return row is not None and any(
            operand is not None and operand.node is node and self.is_fused(operand, row)
            for operand in self.ops[user].operands
        )

    def emits(self, node: torch.fx.Node, float_out: set[torch.fx.Node]) -> bool:
        """Whether an integer operator leaves its result as integers here."""
        owner = self.owner(node)
        if not self.static(owner) or owner in float_out:
            return node in self.given or (node in self.stored and self._head_of_stored(node))
        return self.head(owner) is node

    def _head_of_stored(self, node: torch.fx.Node) -> bool:
        """Whether the stored result is this one, not that of the relu behind it."""
        return not any(user in self.stored and self.ops[user].kind in CLAMPS for user in node.users)

    def float_outputs(self) -> set[torch.fx.Node]:
        """Compute operators whose kernel may return float and whose result nobody reads as integers."""
        result = set()
        for node, row in self.rows.items():
            if row.float_output and node not in self.absorbs and node not in self.asked:
                if not any(self._rounds(user, node) for user in value_users(node, self.ops)):
                    result.add(node)
        return result

    def _rounds(self, user: torch.fx.Node, node: torch.fx.Node) -> bool:
        """Whether an operator reads the result of another one as integers."""
        return self.static(user) and not self._fuses(user, node)

    def options(self, tie: str) -> TensorOptions:
        """What the recipe says of a tie: of any tensor in it, the last one in the network if several."""
        chosen = self.default
        for node in self.nodes:
            if self.activations[node] != self.default and not self.activations[node].is_float:
                if self.names[node] == tie or (
                    self.names[node] in self.ties.parent and self.ties.find(self.names[node]) == tie
                ):
                    chosen = self.activations[node]
        return chosen
