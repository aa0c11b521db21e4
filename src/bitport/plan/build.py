"""Decisions → Plan: edges, ties and what becomes of each operator, written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..formats import Format
from ..graph import Edge, Operand
from ..graph.reading import first_name, output_slots, placeholders, present, producer_name
from ..graph.simplify import CONTRACTIONS
from ..rules import Derived, Free, Ranged, Shared, Weight
from .decisions import Decisions
from .model import NodePlan, Plan, TensorPlan
from .options import TensorOptions

EVERY_WEIGHT = "every weight"  # the tie of weights that share one global scale


def build(decided: Decisions) -> Plan:
    """The Plan of what was decided. Scales and zero points are not set yet."""
    return _Builder(decided).build()


class _Builder:
    def __init__(self, decided: Decisions) -> None:
        self.d = decided
        self.float_out = decided.float_outputs()
        self.edges: dict[Edge, str] = {}
        self.ties: dict[str, TensorPlan] = {}
        self.members: dict[str, list[str]] = {}
        self.biases: list[tuple[torch.fx.Node, int, Operand]] = []

    def build(self) -> Plan:
        d = self.d
        for node in d.nodes:
            if node in d.rows:
                self._operands(node)
            else:
                for slot, operand in enumerate(d.ops[node].operands):
                    self._float_read(node, slot, operand)
        for producer in [*placeholders(d.graph), *d.nodes]:
            if d.emits(producer, self.float_out) or producer in d.asked:
                for index in output_slots(d.graph, producer):
                    tie = self._use(d.names[producer], "output", index)
                    self._member(tie, d.names[producer], producer)
        for node, slot, operand in self.biases:
            self._bias(node, slot, operand)
        multiplied = self._multiplied()
        for tie in dict.fromkeys(self.edges.values()):
            if tie not in self.ties:
                options = d.options(tie) if tie in multiplied else d.options(tie).away_from_layers()
                self.ties[tie] = self._activation_tie(tie, self.members.get(tie, [tie]), options)
        return Plan(d.ruleset.name, self.edges, self.ties, self._node_plans())

    def _use(self, producer: str, consumer: str, slot: int) -> str:
        tie = self.d.ties.find(producer)
        self.edges[Edge(producer, consumer, slot)] = tie
        return tie

    def _member(self, tie: str, name: str, producer: torch.fx.Node | None) -> None:
        """Let a tensor's values count for the range of its tie; a move makes no values."""
        row = self.d.rows.get(producer) if producer is not None else None
        known = self.members.setdefault(tie, [])
        if name not in known and (row is None or row.role != "move"):
            known.append(name)

    def _float_read(self, node: torch.fx.Node, slot: int, operand: Operand | None) -> None:
        """A float operator reads the integers of an integer producer: nothing else is left of it."""
        d = self.d
        if operand is not None and operand.node is not None and d.emits(operand.node, self.float_out):
            if d.owner(node) is not operand.node:
                self._use(d.names[operand.node], d.names[node], slot)

    def _operands(self, node: torch.fx.Node) -> None:
        d, row, name = self.d, self.d.rows[node], self.d.names[node]
        for slot, operand in enumerate(d.ops[node].operands):
            if operand is None or d.is_fused(operand, row):
                continue
            constraint, key = row.operand(slot), producer_name(d.graph, operand)
            if isinstance(constraint, Free | Shared):
                tie = self._use(key, name, slot)
                self._member(tie, key, operand.node)
            elif isinstance(constraint, Weight):
                self.edges[Edge(key, name, slot)] = self._weight_tie(node, slot, operand, constraint)
            elif isinstance(constraint, Derived):
                self.biases.append((node, slot, operand))
            elif isinstance(constraint, Ranged):
                tie = f"{name}.x"
                self.edges[Edge(key, name, slot)] = tie
                self.ties[tie] = TensorPlan(d.activations[node].for_activations(), "dynamic")
            elif row.mode != "static":
                self._float_read(node, slot, operand)

    def _bias(self, node: torch.fx.Node, slot: int, operand: Operand) -> None:
        """An int32 bias on the grid scale_x · scale_w; in float where the weight's scales make no such grid."""
        d, name = self.d, self.d.names[node]
        x_tie = self.edges[Edge(producer_name(d.graph, present(d.ops[node], 0)), name, 0)]
        w_tie = self.edges[Edge(producer_name(d.graph, present(d.ops[node], 1)), name, 1)]
        granular = self.ties[w_tie].format
        if not granular.is_int or granular.granularity == "group" or granular.axis not in (None, 0):
            return
        tie = f"{name}.bias"
        self.edges[Edge(producer_name(d.graph, operand), name, slot)] = tie
        per_channel = granular.axis is not None
        fmt = Format.parse(
            "int32",
            symmetric=True,
            granularity="channel" if per_channel else "tensor",
            axis=0 if per_channel else None,
        )
        self.ties[tie] = TensorPlan(fmt, "bias", of=(x_tie, w_tie))

    def _weight_tie(self, node: torch.fx.Node, slot: int, operand: Operand, constraint: Weight) -> str:
        d, options = self.d, self.d.weights[node]
        fmt = options.for_weights(constraint.axis)
        mode = d.rows[node].mode
        limit = None if mode == "weights" else d.ruleset.weight_limit
        if limit is not None and fmt.high > limit:
            fmt = fmt.with_(low=-limit, high=limit, bits=fmt.bits)
        key = producer_name(d.graph, operand)
        first = first_name(d.graph, key)
        held = d.ruleset.weights[mode]
        choose = options.symmetric == "auto" and fmt.is_int and not held.symmetric
        wanted = TensorPlan(fmt, "weight", range=options.range, members=(key,), choose=choose)
        if fmt.granularity == "global":
            return self._global_tie(replace(wanted, members=(first,)))
        # one grid for a shared parameter, under whichever name, unless two users want it differently
        for tie, member in ((first, first), (key, key), (f"{key} of {d.names[node]}", key)):
            mine = replace(wanted, members=(member,))
            if tie not in d.ties.parent and self.ties.setdefault(tie, mine) == mine:
                break
        return tie

    def _global_tie(self, wanted: TensorPlan) -> str:
        """The tie of all weights that are wanted alike; those that an override wants otherwise have one of theirs."""
        for tie in (EVERY_WEIGHT, f"{EVERY_WEIGHT} ({wanted.format}, {wanted.range})"):
            before = self.ties.setdefault(tie, wanted)
            if replace(before, members=wanted.members) == wanted:
                break
        members = dict.fromkeys((*before.members, *wanted.members))
        self.ties[tie] = replace(wanted, members=tuple(members))
        return tie

    def _activation_tie(self, tie: str, members: Sequence[str], options: TensorOptions) -> TensorPlan:
        d = self.d
        fmt = options.for_activations()
        for name, bounds in d.fixed.items():
            if d.ties.find(name) == tie:
                return TensorPlan(fmt.with_(symmetric=False), "fixed", bounds=bounds)
        for name, (source, factor) in d.scaled.items():
            if d.ties.find(name) == tie:
                return TensorPlan(fmt, "scaled", of=(d.ties.find(source),), factor=factor)
        # a relu that saturation replaces needs its zero at the end of the range
        clamped = any(d.ties.find(d.names[follower]) == tie for follower in d.absorbs.values())
        choose = options.symmetric == "auto" and not clamped
        return TensorPlan(fmt, "measured", range=options.range, members=tuple(members), choose=choose)

    def _multiplied(self) -> set[str]:
        """Ties of tensors that a layer multiplies by its weights."""
        d = self.d
        layers = {d.names[node] for node in d.nodes if d.ops[node].kind in CONTRACTIONS}
        return {tie for edge, tie in self.edges.items() if edge.consumer in layers}

    def _node_plans(self) -> dict[str, NodePlan]:
        d = self.d
        plans: dict[str, NodePlan] = {}
        for node in d.nodes:
            name = d.names[node]
            row = d.rows.get(node)
            if row is not None:
                follower = d.absorbs.get(node)
                plans[name] = NodePlan(
                    kernel=row.kernel,
                    role="scaled" if isinstance(row.output, Derived) else row.role,
                    absorbs=d.names[follower] if follower is not None else None,
                    mode=None if row.mode == "static" else row.mode,
                )
            elif node in d.absorbed:
                plans[name] = NodePlan(absorbed_by=d.names[d.absorbed[node]])
            elif node in d.reasons:
                plans[name] = NodePlan(reason=d.reasons[node])
        return plans
