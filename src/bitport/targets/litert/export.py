"""Graph + Plan → the bytes of a .tflite file."""

from __future__ import annotations

from ...graph import Graph
from ...graph.simplify import split_attention
from ...plan import Plan, lower
from ...plan.capture import capture
from . import elementwise, layers, reducing, shaping
from .convert import Converter, Row

ROWS: dict[object, Row] = {**layers.ROWS, **elementwise.ROWS, **shaping.ROWS, **reducing.ROWS}


def export_model(graph: Graph, plan: Plan, *, integer_io: bool = False) -> bytes:
    """Raises ExportError naming the operator that can't be written."""
    if any(graph.op(node).kind == "sdpa" for node in graph.nodes()):
        graph = graph.clone()
        split_attention(graph)
    lowered = lower(graph, plan)
    program = capture(lowered, graph)
    program = _decomposed(program)
    return Converter(program, graph, plan, ROWS, lowered.names, integer_io=integer_io).run()


def _decomposed(program):  # type: ignore[no-untyped-def]
    """Operators without a row as those that they are made of."""
    import torch

    missing = {
        node.target
        for node in program.graph.nodes
        if node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and node.target not in ROWS
        and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
    }
    if not missing:
        return program
    table = torch.export.default_decompositions()
    kept = {op: made for op, made in table.items() if op not in ROWS}
    return program.run_decompositions(kept)
