"""rules × graph → Plan: which edges are quantized, in which format, and which share their parameters.

1. Every operator gets a row of the target's table or a reason why it stays in float.
2. Integers spread: `compute` operators ask for quantized operands, `elementwise` ones follow where all their
   operands are integers anyway, `move` ones pass integers on.
3. Tensors that must share parameters are united (ties); biases and products with constants are derived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graph import Graph, Op
from ..graph.reading import producer_name, value_users
from ..graph.simplify import MASK_MAGNITUDE
from ..rules import Derived, Fixed, OpRule, Ruleset, Shared
from .build import build
from .decisions import CLAMPS, Decisions, Ties
from .model import Plan
from .options import WITH_WEIGHTS, Override, TensorOptions, mode_of

KEPT = "kept in float by the recipe"
# Kinds whose result lies in [0, 1] anyway: a clamp loses nothing by sharing their parameters.
UNIT_INTERVAL = ("sigmoid", "softmax", "hardsigmoid")


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


class _Planner(Decisions):
    # ------------------------------------------------------------------ who is an integer operator

    def plan(self) -> Plan:
        self.stored = self._stored()
        self._assign_rows()
        self._absorb_clamps()
        self._spread()
        self._tie()
        while self._release_clamps():
            self._spread()
            self._tie()
        return build(self)

    def _stored(self) -> set[torch.fx.Node]:
        """Operators whose results the recipe wants in a format that the target stores but can't compute with."""
        chosen = {node for node in self.nodes if self.activations[node].only_stored(self.ruleset)}
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
        row, reason = self._match(node, op)
        if row is not None and node in self.stored:
            row, reason = None, self._storage_reason(f"its result is {self.activations[node].format}")
        if row is not None and row.role == "elementwise":
            reason = self._mask_reason(node, op)
            row = None if reason else row
        if row is not None:
            self.rows[node] = row
        elif reason is not None:
            self.reasons[node] = reason

    def _match(self, node: torch.fx.Node, op: Op) -> tuple[OpRule | None, str | None]:
        weights, activations = self.weights[node], self.activations[node]
        mode = mode_of(weights, activations)
        if mode == "static" or (op.kind in WITH_WEIGHTS and mode in self.ruleset.weights):
            fmt = weights.for_weights(0) if op.kind in WITH_WEIGHTS and not weights.is_float else None
            row, reason = self.ruleset.match(self.graph, node, op, mode, fmt)
            return (None, KEPT) if row is not None and weights.is_float else (row, reason)
        row, reason = self.ruleset.match(self.graph, node, op)
        if row is not None:
            reason = KEPT if mode == "weights" else "only layers with weights are quantized while running"
        return None, reason

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
        for node, row in list(self.rows.items()):
            users = list(node.users)
            if not row.clamps or len(users) != 1 or users[0] not in self.ops:
                continue
            follower = users[0]
            if self.ops[follower].kind in CLAMPS:
                if self.activations[follower].is_float:
                    continue
                if self.fused_behind(follower):
                    self.rows.pop(follower, None)
                    self.reasons[follower] = "it is computed in one operator with what reads it"
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
            if self.options(root).symmetric is True or not all(self._within(name, upper) for name in group):
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
                wanted |= {o.node for _, o in self.quantized_slots(node, row) if o.node is not None}
        return wanted

    def _objection(self, node: torch.fx.Node, row: OpRule, wanted: set[torch.fx.Node]) -> str | None:
        sources = [operand for _, operand in self.quantized_slots(node, row)]
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
            if not self.static(self.owner(source)) and source not in wanted:
                return f"its operand {self.names[source]} is float"
        users = value_users(self.head(node), self.ops)
        if self.ops[node].kind == "getitem":
            return None  # a part of an integer list is integers, whoever reads it
        if self.ops[node].kind == "split" and not all(self.static(user) for user in users):
            return "one of its parts is kept in float"
        leaves = not any(user in self.ops for user in users) and self.head(node) not in self.asked
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
        if self.head(node) in self.asked:
            return True
        for user in value_users(self.head(node), self.ops):
            row = self.rows.get(user)
            if row is None or row.mode != "static":
                continue
            if row.role != "move" or self._reaches_integer(user):
                return True
        return False

    # ------------------------------------------------------------------ ties

    def _tie(self) -> None:
        while True:
            self.ties, self.fixed, self.scaled = Ties(), {}, {}
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
            out = self.names[self.head(node)]
            keys = [producer_name(self.graph, operand) for _, operand in self.quantized_slots(node, row)]
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
        if self.default.granularity == "global":
            self._share_everything()
        return None

    def _share_everything(self) -> None:
        """One range for all activations, but those settled without data or wanted otherwise."""
        settled = {self.ties.find(name) for name in (*self.fixed, *self.scaled)}
        for node, options in self.activations.items():
            if options != self.default and not options.is_float:
                settled.add(self.ties.find(self.names[node]))
        names = [self.names[self.head(node)] for node, row in self.rows.items() if row.mode == "static"]
        for node, row in self.rows.items():
            if row.mode == "static":
                names += [producer_name(self.graph, o) for _, o in self.quantized_slots(node, row)]
        free = [name for name in names if self.ties.find(name) not in settled]
        for name in free:
            self.ties.unite(free[0], name)

    def _differ(self, roots: set[str]) -> bool:
        """Whether tensors can't share parameters: some are settled without data, and not alike."""
        settled: dict[str, object] = {self.ties.find(name): bounds for name, bounds in self.fixed.items()}
        settled |= {self.ties.find(name): name for name in self.scaled}
        kinds = {settled.get(root) for root in roots}
        return kinds != {None} and len(kinds) > 1


def _is_value(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
