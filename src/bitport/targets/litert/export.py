"""Graph + Plan → the bytes of a .tflite file."""

from __future__ import annotations

from typing import Any

import torch

from ...graph import Graph
from ...graph.export import quiet_export
from ...graph.simplify import split_attention
from ...plan import Plan, lower
from ...plan.capture import capture
from ...plan.retarget import with_signed_weights
from . import elementwise, layers, reducing, shaping
from .convert import Converter, Row

ROWS: dict[object, Row] = {**layers.ROWS, **elementwise.ROWS, **shaping.ROWS, **reducing.ROWS}


def export_model(graph: Graph, plan: Plan, *, integer_io: bool = False) -> bytes:
    """Raises ExportError naming the operator that can't be written."""
    if any(graph.op(node).kind == "sdpa" for node in graph.nodes()):
        graph = graph.clone()
        split_attention(graph)
    plan = with_signed_weights(plan)
    lowered = lower(graph, plan)
    program = capture(lowered, graph)
    program = _decomposed(program)
    return Converter(program, graph, plan, ROWS, lowered.names, integer_io=integer_io).run()


def _decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Operators without a row as those that they are made of."""
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
    table: dict[Any, Any] = dict(torch.export.default_decompositions())
    with quiet_export():
        made: torch.export.ExportedProgram = program.run_decompositions(
            {op: how for op, how in table.items() if op not in ROWS}
        )
    return made
