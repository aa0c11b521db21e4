"""Which share of the multiply-accumulates really runs in integers, and every float island with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..graph import Graph
from ..plan import Plan
from ..targets._base import Inspection

# Kinds that compute nothing worth a line in a report when they stay in float.
SILENT = frozenset(
    (
        *(
            "identity",
            "dropout",
            "shape",
            "view",
            "transpose",
            "expand",
            "slice",
            "select",
            "squeeze",
            "unsqueeze",
        ),
        *("split", "getitem", "cat", "stack", "pad", "cast", "max_pool", "const", "index"),
    )
)


def integer_record(
    graph: Graph, plan: Plan, inspection: Inspection, macs: Mapping[str, int]
) -> dict[str, Any]:
    """The `integer` section of a measurement.

    A multiply-accumulate counts as integer only if the runtime's own optimized file runs the operator in the
    integer kernel that the plan names.
    """
    total = sum(macs.values())
    inside = 0
    islands = []
    for node in graph.nodes():
        name, kind = graph.name(node), graph.op(node).kind
        todo = plan.node(name)
        if todo.kernel is not None and name not in inspection.missed:
            inside += macs.get(name, 0)
            continue
        if todo.absorbed_by is not None or kind in SILENT or graph.is_constant(node):
            continue
        reason = inspection.missed.get(name) or todo.reason
        if reason is None and not plan.quantized:
            reason = "the recipe quantizes nothing"
        if reason is not None:
            islands.append({"name": name, "op": kind, "reason": reason, "macs": macs.get(name, 0)})
    return {
        "mac_share": inside / total if total else 0.0,
        "macs_integer": inside,
        "macs_total": total,
        "float_ops": islands,
        "kernels": {
            kind: count for kind, count in sorted(inspection.counts.items()) if kind in inspection.integer
        },
        "operators": dict(sorted(inspection.counts.items())),
    }


def layer_bytes(graph: Graph, plan: Plan, name: str) -> tuple[int, int]:
    """(float bytes, stored bytes) of an operator's parameters."""
    before = after = 0
    node = graph.node(name)
    for operand in graph.op(node).operands:
        if operand is None or operand.tensor is None:
            continue
        value = graph.tensor(operand.tensor)
        before += value.numel() * value.element_size()
        tie = next(
            (t for e, t in plan.edges.items() if e.consumer == name and e.producer == operand.tensor), None
        )
        if tie is None:
            after += value.numel() * value.element_size()
            continue
        stored = plan.ties[tie]
        bits = 32 if stored.source == "bias" else stored.format.bits
        after += (value.numel() * bits + 7) // 8
        after += 0 if stored.scale is None or stored.source == "bias" else stored.scale.numel() * 5
    return before, after
