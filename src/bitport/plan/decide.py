"""rules × graph → Plan: which edges are quantized, in which format, and which share their parameters.

1. Every operator gets a row of the target's table or a reason why it stays in float.
2. Integers spread: `compute` operators ask for quantized operands, `elementwise` ones follow where all their
   operands are integers anyway, `move` ones pass integers on.
3. Tensors that must share parameters are united (ties); biases and products with constants are derived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..formats import Format
from ..graph import Edge, Graph, Op, Operand
from ..graph.reading import (
    is_float,
    output_slots,
    placeholders,
    present,
    producer_name,
    value_users,
)
from ..rules import Derived, Fixed, Free, OpRule, Ruleset, Shared, Weight
from .model import NodePlan, Plan, TensorPlan
from .options import Override, TensorOptions, resolve

CLAMPS: dict[str, float | None] = {"relu": None, "relu6": 6.0}  # kind → upper bound; the lower one is 0
# Kinds whose result lies in [0, 1] anyway: a clamp loses nothing by sharing their parameters.
UNIT_INTERVAL = ("sigmoid", "softmax", "hardsigmoid")
# A constant operand beyond this is a mask, not a value: a range over it would leave no resolution for the rest.
MASK_MAGNITUDE = 1e3


def decide(
    graph: Graph,
    ruleset: Ruleset,
    *,
    weights: TensorOptions,
    activations: TensorOptions,
    overrides: Sequence[Override] = (),
) -> Plan:
    """The Plan of a folded graph on a target. Scales and zero points are not set yet.

    Raises:
        RecipeError: an override matches nothing.
        TargetError: the target's integer kernels can't hold a format that was asked for.
    """
    return _Planner(graph, ruleset, weights, activations, overrides).plan()


class _Ties:
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


class _Planner:
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
        self.stored = self._stored()
        self.rows: dict[torch.fx.Node, OpRule] = {}
        self.reasons: dict[torch.fx.Node, str] = {}
        self.absorbs: dict[torch.fx.Node, torch.fx.Node] = {}
        self.absorbed: dict[torch.fx.Node, torch.fx.Node] = {}
        self.ties = _Ties()
        self.fixed: dict[str, tuple[float, float]] = {}
        self.scaled: dict[str, tuple[str, float]] = {}

    # ------------------------------------------------------------------ who is an integer operator

    def plan(self) -> Plan:
        self._assign_rows()
        self._absorb_clamps()
        self._spread()
        self._tie()
        while self._release_clamps():
            self._spread()
            self._tie()
        return self._build()

    def _stored(self) -> set[torch.fx.Node]:
        """Operators whose results the recipe wants in a format that the target stores but can't compute with."""
        chosen = {node for node in self.nodes if self.activations[node].format in self.ruleset.stored}
        for node in list(chosen):
            users = list(node.users)
            if len(users) == 1 and users[0] in self.ops and self.ops[users[0]].kind in CLAMPS:
                chosen.add(users[0])  # the relu's result is the operator's
                self.activations[users[0]] = self.activations[node]
        return chosen

    def _assign_rows(self) -> None:
        for node in self.nodes:
            if _is_value(node) and self.ops[node].kind not in ("shape", "identity"):
                self._assign(node)

    def _assign(self, node: torch.fx.Node) -> None:
        op = self.ops[node]
        row, reason = self.ruleset.match(self.graph, node, op)
        if row is not None and (self.weights[node].is_float or self.activations[node].is_float):
            row, reason = None, "kept in float by the recipe"
        if row is not None and node in self.stored:
            row, reason = None, self._storage_reason(f"its result is {self.activations[node].format}")
        if row is not None and row.role == "elementwise":
            reason = self._mask_reason(node, op)
            row = None if reason else row
        if row is not None:
            self.rows[node] = row
        elif reason is not None:
            self.reasons[node] = reason

    def _storage_reason(self, why: str) -> str:
        return f"{why}, which {self.ruleset.name} stores but has no kernels for: it computes in float"

    def _mask_reason(self, node: torch.fx.Node, op: Op) -> str | None:
        users = value_users(node, self.ops)
        if (
            op.kind in ("add", "add_scalar", "sub")
            and users
            and all(self.ops[u].kind == "softmax" for u in users if u in self.ops)
        ):
            if all(u in self.ops for u in users):
                return "adds a mask or bias in front of a softmax: its range would swallow the scores'"
        for operand in op.operands:
            if operand is not None and operand.tensor is not None:
                value = self.graph.tensor(operand.tensor).detach()
                if value.is_floating_point() and value.numel():
                    if not bool(torch.isfinite(value).all()) or float(value.abs().max()) > MASK_MAGNITUDE:
                        return f"its constant operand {operand.tensor} looks like a mask (beyond ±{MASK_MAGNITUDE:g})"
        return None

    def _absorb_clamps(self) -> None:
        """conv → relu is one operator: the integers' saturation at the zero point is the relu."""
        for node, row in self.rows.items():
            users = list(node.users)
            if not row.clamps or len(users) != 1 or users[0] not in self.ops:
                continue
            follower = users[0]
            if self.ops[follower].kind in CLAMPS:
                if self.activations[follower].is_float:
                    continue
                self.absorbs[node], self.absorbed[follower] = follower, node
                if self.activations[follower] == self.default:
                    # what a recipe says of the result of the operator holds for what now is its result
                    self.activations[follower] = self.activations[node]
        for follower in self.absorbed:
            self.rows.pop(follower, None)
            self.reasons.pop(follower, None)

    def _release_clamps(self) -> bool:
        """Give back relus that saturation can't replace: integers shared with values beyond their bounds."""
        released = []
        for node, follower in self.absorbs.items():
            root = self.ties.find(self.names[follower])
            group = [name for name in self.ties.parent if self.ties.find(name) == root]
            upper = CLAMPS[self.ops[follower].kind]
            if self._options(root).symmetric or not all(self._within(name, upper) for name in group):
                released.append(node)
        for node in released:
            follower = self.absorbs.pop(node)
            del self.absorbed[follower]
            self._assign(follower)
        self.rows = {node: self.rows[node] for node in self.nodes if node in self.rows}
        return bool(released)

    def _within(self, name: str, upper: float | None) -> bool:
        """Whether the values of a tensor lie in [0, upper] by construction."""
        node = self.by_name.get(name)
        if node is None or node.op == "placeholder":
            if node is not None:
                return False
            value = self.graph.tensor(name).detach()
            return bool((value >= 0).all()) and (upper is None or bool((value <= upper).all()))
        row, kind = self.rows.get(node), self.ops[node].kind
        if (row is not None and row.role == "move") or kind in UNIT_INTERVAL:
            return True  # what a move makes is among its operands, which are in the same tie
        if kind not in CLAMPS:
            return False
        bound = CLAMPS[kind]
        return upper is None or (bound is not None and bound <= upper)

    def _head(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node whose value leaves an operator (its absorbed relu, if any)."""
        return self.absorbs.get(node, node)

    def _owner(self, node: torch.fx.Node) -> torch.fx.Node:
        return self.absorbed.get(node, node)

    def _quantized_slots(self, node: torch.fx.Node, row: OpRule) -> list[tuple[int, Operand]]:
        """Slots whose operand is an activation-like tensor (data or a constant in an activation's place)."""
        return [
            (slot, operand)
            for slot, operand in enumerate(self.ops[node].operands)
            if operand is not None and isinstance(row.operand(slot), Free | Shared)
        ]

    def _spread(self) -> None:
        """Drop `elementwise` and `move` rows whose operands aren't integers; repeat until nothing changes."""
        changed = True
        while changed:
            changed = False
            wanted = self._wanted()
            for node, row in list(self.rows.items()):
                reason = self._objection(node, row, wanted)
                if reason is not None:
                    del self.rows[node]
                    follower = self.absorbs.pop(node, None)
                    if follower is not None:
                        del self.absorbed[follower]
                        self.reasons[follower] = reason
                    self.reasons[node] = reason
                    changed = True

    def _wanted(self) -> set[torch.fx.Node]:
        """Float producers that are quantized anyway, because a compute operator reads them."""
        wanted: set[torch.fx.Node] = set(self.given)
        for node, row in self.rows.items():
            if row.role == "compute":
                wanted |= {o.node for _, o in self._quantized_slots(node, row) if o.node is not None}
        return wanted

    def _objection(self, node: torch.fx.Node, row: OpRule, wanted: set[torch.fx.Node]) -> str | None:
        sources = [operand for _, operand in self._quantized_slots(node, row)]
        for operand in sources:
            if operand.node in self.stored:
                return self._storage_reason(
                    f"its operand {self.names[operand.node]} is {self._format(operand.node)}"
                )
        if row.role == "compute":
            return None
        for operand in sources:
            source = operand.node
            if operand.tensor is not None or source is None:
                continue  # a constant can always be stored as integers
            if self._owner(source) not in self.rows and source not in wanted:
                return f"its operand {self.names[source]} is float"
        users = value_users(self._head(node), self.ops)
        if self.ops[node].kind == "getitem":
            return None  # a part of an integer list is integers, whoever reads it
        if self.ops[node].kind == "split" and not all(user in self.rows for user in users):
            return "one of its parts is kept in float"
        leaves = not any(user in self.ops for user in users) and self._head(node) not in self.asked
        if row.role == "elementwise" and leaves:
            return "its result leaves the network as float"
        if row.role == "move" and all(operand.tensor is None for operand in sources):
            # nobody downstream uses integers: moving floats costs the same and loses nothing
            if not self._reaches_integer(node):
                return "its result is only used as float"
        return None

    def _format(self, node: torch.fx.Node) -> str:
        return self.activations[node].format

    def _reaches_integer(self, node: torch.fx.Node) -> bool:
        if self._head(node) in self.asked:
            return True
        for user in value_users(self._head(node), self.ops):
            row = self.rows.get(user)
            if row is None:
                continue
            if row.role != "move" or self._reaches_integer(user):
                return True
        return False

    # ------------------------------------------------------------------ ties

    def _tie(self) -> None:
        while True:
            self.ties, self.fixed, self.scaled = _Ties(), {}, {}
            conflict = self._tie_once()
            if conflict is None:
                return
            node, reason = conflict
            self.rows.pop(node, None)
            self.reasons[node] = reason
            self._spread()

    def _tie_once(self) -> tuple[torch.fx.Node, str] | None:
        for node in self.nodes:
            bounds = self.ruleset.fixed.get(self.ops[node].kind)
            if bounds is not None and node not in self.rows:
                self.fixed[self.names[node]] = bounds
        for node, row in self.rows.items():
            out = self.names[self._head(node)]
            keys = [producer_name(self.graph, operand) for _, operand in self._quantized_slots(node, row)]
            if isinstance(row.output, Fixed):
                self.fixed[out] = (row.output.minimum, row.output.maximum)
            elif isinstance(row.output, Derived):
                self.scaled[out] = (keys[0], float(self.ops[node].attrs["value"]))
            elif isinstance(row.output, Shared):
                roots = {self.ties.find(key) for key in keys}
                if len(roots) > 1 and self._differ(roots):
                    return node, "its operands' ranges are fixed and differ: they can't share one scale"
                for key in keys:
                    self.ties.unite(keys[0], key)
                self.ties.unite(keys[0], out)
        return None

    def _differ(self, roots: set[str]) -> bool:
        """Whether tensors can't share parameters: some are settled without data, and not alike."""
        settled: dict[str, object] = {self.ties.find(name): bounds for name, bounds in self.fixed.items()}
        settled |= {self.ties.find(name): name for name in self.scaled}
        kinds = {settled.get(root) for root in roots}
        return kinds != {None} and len(kinds) > 1

    # ------------------------------------------------------------------ the plan itself

    def _build(self) -> Plan:
        float_out = self._float_outputs()
        edges: dict[Edge, str] = {}
        bias_edges: list[tuple[torch.fx.Node, int, Operand]] = []
        ties: dict[str, TensorPlan] = {}
        members: dict[str, list[str]] = {}

        def use(producer: str, consumer: str, slot: int) -> str:
            tie = self.ties.find(producer)
            edges[Edge(producer, consumer, slot)] = tie
            return tie

        for node in self.nodes:
            row = self.rows.get(node)
            name = self.names[node]
            if row is None:
                # a float operator reads the integers of an integer producer: nothing else is left of it
                for slot, operand in enumerate(self.ops[node].operands):
                    if (
                        operand is not None
                        and operand.node is not None
                        and self._emits(operand.node, float_out)
                    ):
                        if self._owner(node) is not operand.node:
                            use(self.names[operand.node], name, slot)
                continue
            for slot, operand in enumerate(self.ops[node].operands):
                if operand is None:
                    continue
                constraint = row.operand(slot)
                if isinstance(constraint, Free | Shared):
                    key = producer_name(self.graph, operand)
                    tie = use(key, name, slot)
                    moved = (
                        operand.node is not None
                        and (r := self.rows.get(operand.node)) is not None
                        and r.role == "move"
                    )
                    if not moved and key not in members.setdefault(tie, []):
                        members[tie].append(key)
                elif isinstance(constraint, Weight):
                    edges[Edge(producer_name(self.graph, operand), name, slot)] = self._weight_tie(
                        ties, node, slot, operand, constraint
                    )
                elif isinstance(constraint, Derived):
                    bias_edges.append((node, slot, operand))
        for producer in [*placeholders(self.graph), *self.nodes]:
            if self._emits(producer, float_out) or producer in self.asked:
                for index in output_slots(self.graph, producer):
                    use(self.names[producer], "output", index)
        for node, slot, operand in bias_edges:
            name = self.names[node]
            x_tie = edges[Edge(producer_name(self.graph, present(self.ops[node], 0)), name, 0)]
            w_tie = edges[Edge(producer_name(self.graph, present(self.ops[node], 1)), name, 1)]
            tie = f"{name}.bias"
            edges[Edge(producer_name(self.graph, operand), name, slot)] = tie
            granular = ties[w_tie].format
            ties[tie] = TensorPlan(
                Format.parse(
                    "int32",
                    symmetric=True,
                    granularity=granular.granularity,
                    axis=0 if granular.axis is not None else None,
                ),
                "bias",
                of=(x_tie, w_tie),
            )
        for tie in dict.fromkeys(edges.values()):
            if tie not in ties:
                ties[tie] = self._activation_tie(tie, members.get(tie, [tie]))
        return Plan(self.ruleset.name, edges, ties, self._node_plans(float_out))

    def _emits(self, node: torch.fx.Node, float_out: set[torch.fx.Node]) -> bool:
        """Whether an integer operator leaves its result as integers here."""
        owner = self._owner(node)
        if owner not in self.rows or owner in float_out:
            return node in self.given or (node in self.stored and self._head_of_stored(node))
        return self._head(owner) is node

    def _head_of_stored(self, node: torch.fx.Node) -> bool:
        """Whether the stored result is this one, not that of the relu behind it."""
        return not any(user in self.stored and self.ops[user].kind in CLAMPS for user in node.users)

    def _float_outputs(self) -> set[torch.fx.Node]:
        """Compute operators whose kernel may return float and whose result nobody reads as integers."""
        result = set()
        for node, row in self.rows.items():
            if row.float_output and node not in self.absorbs and node not in self.asked:
                if not any(user in self.rows for user in value_users(node, self.ops)):
                    result.add(node)
        return result

    def _weight_tie(
        self,
        ties: dict[str, TensorPlan],
        node: torch.fx.Node,
        slot: int,
        operand: Operand,
        constraint: Weight,
    ) -> str:
        options = self.weights[node]
        channel = options.granularity == "channel" and constraint.axis is not None
        fmt = Format.parse(
            options.format,
            symmetric=True,
            granularity="channel" if channel else "tensor",
            axis=constraint.axis if channel else None,
        )
        limit = self.ruleset.weight_limit
        if limit is not None and fmt.high > limit:
            fmt = fmt.with_(low=-limit, high=limit)
        key = producer_name(self.graph, operand)
        wanted = TensorPlan(fmt, "weight", range=options.range, members=(key,))
        for tie in (key, f"{key} of {self.names[node]}"):
            # one grid for a shared parameter, unless two users want it differently
            if ties.setdefault(tie, wanted) == wanted and tie not in self.ties.parent:
                return tie
        return tie

    def _activation_tie(self, tie: str, members: Sequence[str]) -> TensorPlan:
        options = self._options(tie)
        fmt = Format.parse(options.format, symmetric=options.symmetric)
        for name, bounds in self.fixed.items():
            if self.ties.find(name) == tie:
                return TensorPlan(fmt.with_(symmetric=False), "fixed", bounds=bounds)
        for name, (source, factor) in self.scaled.items():
            if self.ties.find(name) == tie:
                return TensorPlan(fmt, "scaled", of=(self.ties.find(source),), factor=factor)
        return TensorPlan(fmt, "measured", range=options.range, members=tuple(members))

    def _options(self, tie: str) -> TensorOptions:
        """What the recipe says of a tie: of any tensor in it, the last one in the network if several."""
        chosen = self.default
        for node in self.nodes:
            if self.activations[node] != self.default and not self.activations[node].is_float:
                if self.names[node] == tie or (
                    self.names[node] in self.ties.parent and self.ties.find(self.names[node]) == tie
                ):
                    chosen = self.activations[node]
        return chosen

    def _node_plans(self, float_out: set[torch.fx.Node]) -> dict[str, NodePlan]:
        plans: dict[str, NodePlan] = {}
        for node in self.nodes:
            name = self.names[node]
            row = self.rows.get(node)
            if row is not None:
                follower = self.absorbs.get(node)
                role = "scaled" if isinstance(row.output, Derived) else row.role
                plans[name] = NodePlan(
                    kernel=row.kernel,
                    role=role,
                    absorbs=self.names[follower] if follower is not None else None,
                )
            elif node in self.absorbed:
                plans[name] = NodePlan(absorbed_by=self.names[self.absorbed[node]])
            elif node in self.reasons:
                plans[name] = NodePlan(reason=self.reasons[node])
        return plans


def _is_value(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
