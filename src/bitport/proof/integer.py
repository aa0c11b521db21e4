"""Which share of the multiply-accumulates really runs in integers, and every float island with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats import Format
from ..graph import Graph
from ..numerics.codes import storage_bits
from ..plan import Plan, TensorPlan
from ..plan.constants import grid_of
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
    integer kernel that the plan names, and both operands are integers there: small floats and codebooks are not.
    """
    total = sum(macs.values())
    inside = 0
    islands = []
    for node in graph.nodes():
        name, kind = graph.name(node), graph.op(node).kind
        todo = plan.node(name)
        if todo.kernel is not None and name not in inspection.missed:
            if multiplies_integers(plan, name, inspection):
                inside += macs.get(name, 0)
                continue
            islands.append(_stored_only(graph, plan, name, kind, macs))
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


def stored_weights(plan: Plan, name: str) -> list[TensorPlan]:
    """How the weights that an operator reads are stored."""
    ties = (plan.ties[tie] for edge, tie in plan.edges.items() if edge.consumer == name)
    return [tie for tie in ties if tie.source == "weight"]


def formats_of_weights(plan: Plan, name: str) -> str:
    """`int4`: the formats of an operator's stored weights, without their options; empty: there are none."""
    formats = {str(stored.format).partition(" ")[0] for stored in stored_weights(plan, name)}
    return " and ".join(sorted(formats))


def multiplies_integers(plan: Plan, name: str, inspection: Inspection) -> bool:
    """Whether an operator that the runtime runs as planned has integers on both sides of its products."""
    todo = plan.node(name)
    stored = [stored.format for stored in stored_weights(plan, name)]
    return all(fmt.is_int for fmt in stored) and (todo.mode is None or todo.kernel in inspection.integer)


def _stored_only(graph: Graph, plan: Plan, name: str, kind: str, macs: Mapping[str, int]) -> dict[str, Any]:
    """A float island whose weights are stored narrow."""
    stored = formats_of_weights(plan, name) or "floats"
    reason = f"its weights alone are quantized ({stored}): it computes in float32"
    return {"name": name, "op": kind, "reason": reason, "macs": macs.get(name, 0)}


def storage_record(graph: Graph, plan: Plan, inspection: Inspection) -> list[dict[str, Any]]:
    """How weights are stored and what they are computed in: storage and compute width apart.

    Returns: `format`, `computes_in` (what the runtime's kernel multiplies them as), `tensors`, `values`, `bytes`
        (codes, scales, zero points and tables at their true width) and `bits_per_value`.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for edge, tie in plan.edges.items():
        stored = plan.ties[tie]
        if stored.source != "weight" or stored.scale is None:
            continue
        todo = plan.node(edge.consumer)
        computes = inspection.computes.get(todo.kernel or "", _multiplied_as(stored.format, todo.mode))
        row = rows.setdefault(
            (str(stored.format), computes),
            {"format": str(stored.format), "computes_in": computes, "seen": {}},
        )
        row["seen"][edge.producer] = (graph.tensor(edge.producer).numel(), tie)
    made = []
    for row in rows.values():
        seen = row.pop("seen")
        values = sum(count for count, _ in seen.values())
        bits = sum(storage_bits(count, grid_of(plan.ties[tie])) for count, tie in seen.values())
        made.append(
            {
                **row,
                "tensors": len(seen),
                "values": values,
                "bytes": -(-bits // 8),
                "bits_per_value": bits / max(1, values),
            }
        )
    return made


def _multiplied_as(fmt: Format, mode: str | None) -> str:
    """What a kernel multiplies weights as, if its runtime says nothing else."""
    if mode == "weights" or not fmt.is_int:
        return "float32"
    return "int8" if fmt.bits <= 8 else "int16"


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
        if stored.source == "bias" or stored.scale is None:
            after += value.numel() * 4
        else:
            after += -(-storage_bits(value.numel(), grid_of(stored)) // 8)
    return before, after
