"""rules × graph → Plan: which edges are quantized, in which format, and which share their parameters.

1. Every operator gets a row of the target's table or a reason why it stays in float.
2. Integers spread: `compute` operators ask for quantized operands, `elementwise` ones follow where all their
   operands are integers anyway, `move` ones pass integers on.
3. Tensors that must share parameters are united (ties); biases and products with constants are derived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from ..errors import RecipeError, TargetError
from ..formats import Format
from ..graph import Edge, Graph, Op, Operand
from ..graph.reading import output_slots, placeholders, type_name
from ..rules import Derived, Fixed, Free, OpRule, Ruleset, Shared, Weight
from .model import NodePlan, Plan, TensorPlan

CLAMPS = {"relu": None, "relu6": 6.0}
# A constant operand beyond this is a mask, not a value: a range over it would leave no resolution for the rest.
MASK_MAGNITUDE = 1e3


@dataclass(frozen=True)
class TensorOptions:
    """What a recipe says of weights or of activations."""

    format: str = "int8"
    granularity: str = "tensor"
    range: str | Mapping[str, Any] = "minmax"
    symmetric: bool = False

    def changed(self, options: Mapping[str, Any]) -> TensorOptions:
        return TensorOptions(**{**vars(self), **options})

    @property
    def is_float(self) -> bool:
        return Format.parse(self.format).kind == "float"


class Override(Protocol):
    """A recipe's exception for some operators (`recipe.Override` is one)."""

    @property
    def match(self) -> str: ...
    @property
    def op(self) -> str | None: ...
    @property
    def type(self) -> str | None: ...
    @property
    def weights(self) -> Mapping[str, Any] | None: ...
    @property
    def activations(self) -> Mapping[str, Any] | None: ...


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
        self.ops: dict[torch.fx.Node, Op] = {node: graph.op(node) for node in self.nodes}
        self.weights, self.activations = self._resolve(weights, activations, overrides)
        self.default = activations
        self.rows: dict[torch.fx.Node, OpRule] = {}
        self.reasons: dict[torch.fx.Node, str] = {}
        self.absorbs: dict[torch.fx.Node, torch.fx.Node] = {}
        self.absorbed: dict[torch.fx.Node, torch.fx.Node] = {}
        self.ties = _Ties()
        self.fixed: dict[str, tuple[float, float]] = {}
        self.scaled: dict[str, tuple[str, float]] = {}

    # ------------------------------------------------------------------ options

    def _resolve(
        self, weights: TensorOptions, activations: TensorOptions, overrides: Sequence[Override]
    ) -> tuple[dict[torch.fx.Node, TensorOptions], dict[torch.fx.Node, TensorOptions]]:
        w = dict.fromkeys(self.nodes, weights)
        a = dict.fromkeys(self.nodes, activations)
        for index, override in enumerate(overrides):
            hits = [node for node in self.nodes if self._matches(node, override)]
            if not hits:
                raise RecipeError(
                    f"overrides[{index}] (match={override.match!r}, op={override.op!r}, type={override.type!r}) "
                    "matches no operator; `bitport inspect MODEL` lists their names, operators and types"
                )
            for node in hits:
                w[node] = w[node].changed(override.weights or {})
                a[node] = a[node].changed(override.activations or {})
        for options, allowed, what in (
            (w, self.ruleset.weights, "weights"),
            (a, self.ruleset.activations, "activations"),
        ):
            for chosen in options.values():
                if not chosen.is_float and chosen.format not in allowed:
                    raise TargetError(
                        f"{self.ruleset.name} has no integer kernels for {chosen.format} {what}; "
                        f"it holds {', '.join(allowed)} (or float32)"
                    )
                if what == "weights" and chosen.granularity not in self.ruleset.granularities:
                    raise TargetError(
                        f"{self.ruleset.name} holds weights per {' or '.join(self.ruleset.granularities)}, "
                        f"not per {chosen.granularity}"
                    )
        return w, a

    def _matches(self, node: torch.fx.Node, override: Override) -> bool:
        if override.op is not None and self.ops[node].kind != override.op:
            return False
        if override.type is not None and type_name(self.graph, node) != override.type:
            return False
        return fnmatchcase(self.names[node], override.match)

    # ------------------------------------------------------------------ who is an integer operator

    def plan(self) -> Plan:
        self._assign_rows()
        self._absorb_clamps()
        self._spread()
        self._tie()
        return self._build()

    def _assign_rows(self) -> None:
        for node in self.nodes:
            op = self.ops[node]
            if not _is_value(node) or op.kind in ("shape", "identity"):
                continue
            row, reason = self.ruleset.match(self.graph, node, op)
            if row is not None and (self.weights[node].is_float or self.activations[node].is_float):
                row, reason = None, "kept in float by the recipe"
            if row is not None and row.role == "elementwise":
                reason = self._mask_reason(node, op)
                row = None if reason else row
            if row is not None:
                self.rows[node] = row
            elif reason is not None:
                self.reasons[node] = reason

    def _mask_reason(self, node: torch.fx.Node, op: Op) -> str | None:
        users = _users(node, self.ops)
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
            if self.ops[follower].kind in CLAMPS and not self.activations[follower].symmetric:
                if self.activations[follower].is_float:
                    continue
                self.absorbs[node], self.absorbed[follower] = follower, node
        for follower in self.absorbed:
            self.rows.pop(follower, None)
            self.reasons.pop(follower, None)

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
        wanted: set[torch.fx.Node] = set()
        for node, row in self.rows.items():
            if row.role == "compute":
                wanted |= {o.node for _, o in self._quantized_slots(node, row) if o.node is not None}
        return wanted

    def _objection(self, node: torch.fx.Node, row: OpRule, wanted: set[torch.fx.Node]) -> str | None:
        if row.role == "compute":
            return None
        sources = [operand for _, operand in self._quantized_slots(node, row)]
        for operand in sources:
            source = operand.node
            if operand.tensor is not None or source is None:
                continue  # a constant can always be stored as integers
            if self._owner(source) not in self.rows and source not in wanted:
                return f"its operand {self.names[source]} is float"
        users = _users(self._head(node), self.ops)
        if row.role == "elementwise" and not any(user in self.ops for user in users):
            return "its result leaves the network as float"
        if row.role == "move" and all(operand.tensor is None for operand in sources):
            # nobody downstream uses integers: moving floats costs the same and loses nothing
            if not self._reaches_integer(node):
                return "its result is only used as float"
        return None

    def _reaches_integer(self, node: torch.fx.Node) -> bool:
        for user in _users(self._head(node), self.ops):
            row = self.rows.get(user)
            if row is None:
                continue
            if row.role != "move" or self._reaches_integer(user):
                return True
        return False

    # ------------------------------------------------------------------ ties

    def _key(self, operand: Operand) -> str:
        return operand.tensor if operand.tensor is not None else self.names[_node(operand)]

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
            keys = [self._key(operand) for _, operand in self._quantized_slots(node, row)]
            if isinstance(row.output, Fixed):
                self.fixed[out] = (row.output.minimum, row.output.maximum)
            elif isinstance(row.output, Derived):
                self.scaled[out] = (keys[0], float(self.ops[node].attrs["value"]))
            elif isinstance(row.output, Shared):
                roots = {self.ties.find(key) for key in keys}
                special = [r for r in roots if r in self._special_roots()]
                if len(roots) > 1 and special:
                    return node, "its operands' ranges are fixed and differ: they can't share one scale"
                for key in keys:
                    self.ties.unite(keys[0], key)
                self.ties.unite(keys[0], out)
        return None

    def _special_roots(self) -> set[str]:
        return {self.ties.find(name) for name in (*self.fixed, *self.scaled)}

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
                    key = self._key(operand)
                    tie = use(key, name, slot)
                    moved = (
                        operand.node is not None
                        and (r := self.rows.get(operand.node)) is not None
                        and r.role == "move"
                    )
                    if not moved and key not in members.setdefault(tie, []):
                        members[tie].append(key)
                elif isinstance(constraint, Weight):
                    edges[Edge(self._key(operand), name, slot)] = self._weight_tie(
                        ties, node, slot, operand, constraint
                    )
                elif isinstance(constraint, Derived):
                    bias_edges.append((node, slot, operand))
        for producer in [*placeholders(self.graph), *self.nodes]:
            if self._emits(producer, float_out):
                for index in output_slots(self.graph, producer):
                    use(self.names[producer], "output", index)
        for node, slot, operand in bias_edges:
            name = self.names[node]
            x_tie = edges[Edge(self._key(_operand(self.ops[node], 0)), name, 0)]
            w_tie = edges[Edge(self._key(_operand(self.ops[node], 1)), name, 1)]
            tie = f"{name}.bias"
            edges[Edge(self._key(operand), name, slot)] = tie
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
            return False
        return self._head(owner) is node

    def _float_outputs(self) -> set[torch.fx.Node]:
        """Compute operators whose kernel may return float and whose result nobody reads as integers."""
        result = set()
        for node, row in self.rows.items():
            if row.float_output and node not in self.absorbs:
                if not any(user in self.rows for user in _users(node, self.ops)):
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
        key = self._key(operand)
        wanted = TensorPlan(fmt, "weight", range=options.range, members=(key,))
        for tie in (key, f"{key} of {self.names[node]}"):
            # one grid for a shared parameter, unless two users want it differently
            if ties.setdefault(tie, wanted) == wanted and tie not in self.ties.parent:
                return tie
        return tie

    def _activation_tie(self, tie: str, members: Sequence[str]) -> TensorPlan:
        producer = {self.names[n]: n for n in self.nodes}.get(tie)
        options = self.activations[producer] if producer is not None else self.default
        fmt = Format.parse(options.format, symmetric=options.symmetric)
        for name, bounds in self.fixed.items():
            if self.ties.find(name) == tie:
                return TensorPlan(fmt.with_(symmetric=False), "fixed", bounds=bounds)
        for name, (source, factor) in self.scaled.items():
            if self.ties.find(name) == tie:
                return TensorPlan(fmt, "scaled", of=(self.ties.find(source),), factor=factor)
        return TensorPlan(fmt, "measured", range=options.range, members=tuple(members))

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


def _users(node: torch.fx.Node, ops: Mapping[torch.fx.Node, Op]) -> list[torch.fx.Node]:
    """Users of a tensor's values (not of its sizes); the graph's output counts as one."""
    return [user for user in node.users if user not in ops or ops[user].kind != "shape"]


def _is_value(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _node(operand: Operand) -> torch.fx.Node:
    assert operand.node is not None
    return operand.node


def _operand(op: Op, slot: int) -> Operand:
    operand = op.operands[slot]
    assert operand is not None
    return operand
