"""Graph + Plan → ONNX with the operators that ONNX Runtime fuses into integer kernels."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...graph import Graph
from ...plan import Plan, lower
from ...plan.lower import BYTE, Lowered
from .._onnx import U8_OFFSET, save, to_onnx, with_heads
from . import decode
from .alignment import align_channels
from .blockwise import MATMUL_NBITS, specialize
from .ends import integer_ends
from .table import DETOURS, FUSED_UNASKED, MERGED_WRONGLY, PASSED_BACK, SWALLOWED

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET_OF_INT16 = 21  # the first one whose QuantizeLinear knows 16 bits


def export_model(
    graph: Graph, plan: Plan, path: Path, *, opset: int, integer_io: bool = False, accuracy_level: int = 0
) -> None:
    """Write `graph` under `plan` to `path`. accuracy_level: of MatMulNBits.

    Raises ExportError when PyTorch's exporter refuses, naming its reason.
    """
    graph = with_heads(graph)
    lowered = lower(
        graph,
        plan,
        dtype=torch.uint8,
        offset=U8_OFFSET,
        flatten_linear=True,
        barriers=FUSED_UNASKED,
        swallowed=SWALLOWED,
        detours=DETOURS,
        apart=MERGED_WRONGLY,
        passed=PASSED_BACK,
    )
    blockwise = [name for name, todo in plan.nodes.items() if todo.kernel == MATMUL_NBITS]
    wide = any(tie.format.bits > BYTE and tie.source not in ("weight", "bias") for tie in plan.ties.values())
    opset = max(opset, OPSET_OF_INT16) if wide else opset
    model = lowered_to_onnx(lowered, graph, blockwise, opset=opset, accuracy_level=accuracy_level)
    align_channels(model, graph, plan)
    if integer_io:
        integer_ends(model, graph)
    save(model, path)


def lowered_to_onnx(
    lowered: Lowered, graph: Graph, blockwise: Collection[str], *, opset: int, accuracy_level: int
) -> ir.Model:
    """A lowered graph as an ONNX model with the names of `graph`. blockwise: what MatMulNBits runs.

    Narrow weights raise the opset to the first one that has their types.

    Raises ExportError when PyTorch's exporter refuses, naming its reason.
    """
    lowered, stored = specialize(lowered, blockwise, accuracy_level)
    opset = max(opset, decode.OPSET) if stored else opset
    model = to_onnx(lowered, graph, opset=opset, rewrite=decode.expand)
    if stored:
        model.metadata_props[decode.KEY] = json.dumps(stored, sort_keys=True)
    return model
