"""The network as it came out: every operator with what it runs in, and who feeds whom. Data for a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from ..graph import Graph
from ..graph.blocks import path_of
from ..graph.reading import placeholders
from ..plan import NodePlan, Plan
from ..targets._base import Inspection
from .integer import SILENT, formats_of_weights, multiplies_integers

FLOAT = "float"
# What a reader of a picture would call nothing: sizes, and names for parts of a result.
_UNSEEN = frozenset(("shape", "getitem", "identity", "dropout", "const"))


def network_record(graph: Graph, plan: Plan, inspection: Inspection) -> dict[str, Any]:
    """The `network` section of a measurement.

    Returns: `nodes`, in topological order, each with `name`, `op`, `module` (the user's module path), `role`
        (`input`, `compute`, `move`: only moves numbers, `fused`: part of the kernel of `into`, `index`: makes
        indices or masks, `output`), `precision` (the integer format that it works on, "float", or what an index is,
        as "int64"), `weights` (the format that its weights are stored in), `kernel` and `reason` (why float, or what
        it does while it runs), null where they don't apply; and `edges`: pairs of indices into `nodes`. Constants and
        sizes are left out.
    """
    made = _Picture(graph, plan, inspection)
    return {"nodes": made.nodes, "edges": [list(edge) for edge in made.edges]}


class _Picture:
    def __init__(self, graph: Graph, plan: Plan, inspection: Inspection) -> None:
        self.graph, self.plan, self.inspection = graph, plan, inspection
        self.reads: dict[str, str] = {}  # operator → precision of the first integer activation that it reads
        for edge, tie in plan.edges.items():
            if plan.ties[tie].source not in ("weight", "bias"):
                self.reads.setdefault(edge.consumer, _precision(plan, tie))
        self.nodes: list[dict[str, Any]] = []
        self.edges: list[tuple[int, int]] = []
        self.sources: dict[fx.Node, list[int]] = {}  # node → the drawn nodes whose numbers it carries
        for node in placeholders(graph):
            name = graph.name(node)
            self._add(node, name, "input", "input", precision=self._leaves(name, node))
        for node in graph.nodes():
            self._operator(node)
        for index, (spec, node) in enumerate(zip(graph.outputs, graph.output_nodes(), strict=True)):
            integer = next((t for e, t in plan.edges.items() if e[1:] == ("output", index)), None)
            precision = _type(node) if integer is None else _precision(plan, integer)
            self._add(None, spec.name, "output", "output", precision=precision, feeds=self._carried(node))

    def _operator(self, node: fx.Node) -> None:
        graph, name, kind = self.graph, self.graph.name(node), self.graph.op(node).kind
        feeds = list(dict.fromkeys(i for used in node.all_input_nodes for i in self._carried(used)))
        if kind in _UNSEEN or graph.is_constant(node):
            self.sources[node] = [] if graph.is_constant(node) else feeds
            return
        todo = self.plan.node(name)
        facts: dict[str, Any] = {"module": path_of(node), "feeds": feeds}
        if todo.absorbed_by is not None:
            precision = self._leaves(name, node)
            self._add(node, name, kind, "fused", precision=precision, into=todo.absorbed_by, **facts)
        elif todo.mode in ("weights", "dynamic") and name not in self.inspection.missed:
            facts |= {"weights": formats_of_weights(self.plan, name) or None, "kernel": todo.kernel}
            if multiplies_integers(self.plan, name, self.inspection):
                facts |= {"precision": "int8", "reason": "it rounds what it reads to 8 bits while it runs"}
            else:
                facts |= {"precision": FLOAT, "reason": "its weights alone are stored narrow"}
            self._add(node, name, kind, "compute", **facts)
        elif todo.kernel is not None and name not in self.inspection.missed:
            precision = self._leaves(name, node)
            if precision == FLOAT:  # the last layer gives float numbers and still computes on integers
                precision = self.reads.get(name, FLOAT)
            role = "move" if todo.role == "move" else "compute"
            facts |= {"weights": formats_of_weights(self.plan, name) or None, "kernel": todo.kernel or None}
            self._add(node, name, kind, role, precision=precision, **facts)
        else:
            precision = _type(node)
            role = "index" if precision != FLOAT else "move" if kind in SILENT else "compute"
            found = self._reason(name, todo, role)
            self._add(node, name, kind, role, precision=precision, reason=found, **facts)

    def _reason(self, name: str, todo: NodePlan, role: str) -> str | None:
        found = self.inspection.missed.get(name) or todo.reason
        if found is None and role == "compute" and not self.plan.quantized:
            return "the recipe quantizes nothing"
        return found

    def _leaves(self, name: str, node: fx.Node) -> str:
        tie = self.plan.tie_of(name)
        return _type(node) if tie is None else _precision(self.plan, tie)

    def _carried(self, node: fx.Node) -> list[int]:
        return self.sources.get(node, [])  # a parameter carries none

    def _add(
        self, node: fx.Node | None, name: str, op: str, role: str, *, precision: str,
        kernel: str | None = None, reason: str | None = None, into: str | None = None, module: str = "",
        weights: str | None = None, feeds: list[int] | None = None,
    ) -> None:  # fmt: skip
        index = len(self.nodes)
        row: Mapping[str, Any] = {
            "name": name, "op": op, "module": module, "role": role, "precision": precision, "kernel": kernel,
            "reason": reason, "into": into, "weights": weights,
        }  # fmt: skip
        self.nodes.append(dict(row))
        self.edges += [(source, index) for source in feeds or ()]
        if node is not None:
            self.sources[node] = [index]


def _type(node: fx.Node) -> str:
    """What a tensor outside the plan holds: float numbers, or `int64`, `bool` …: indices and masks."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        return str(value.dtype).removeprefix("torch.")
    return FLOAT


def _precision(plan: Plan, tie: str) -> str:
    """`int8`: the format's name without its options."""
    return str(plan.ties[tie].format).partition(" ")[0]
