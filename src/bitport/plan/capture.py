"""A lowered module → `ExportedProgram`, the form that runtimes' exporters read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from ..errors import ExportError, first_line
from ..graph import Graph
from ..graph.export import quiet_export, strip
from .lower import Lowered

EXAMPLE_BATCH = 2  # 1 would be specialised to a constant


def capture(
    lowered: Lowered, graph: Graph, largest: Mapping[str, int] | None = None
) -> torch.export.ExportedProgram:
    """Export `lowered.module` with the dynamic axes of `graph`'s inputs.

    The user's names of operators arrive in `nn_module_stack`; stack traces do not.

    Args:
        largest: sizes of dynamic axes that are not exceeded, where a runtime plans its memory for them.

    Raises ExportError when torch.export refuses.
    """
    arguments, dynamic = _example(graph, largest or {})
    carrier = _Carrier(lowered.module).eval()
    error: Exception | None = None
    for shapes in (dynamic, _automatic(graph, largest or {})):
        try:
            with quiet_export(), traceback.preserve_node_meta(), torch.no_grad():
                program = torch.export.export(carrier, arguments, dynamic_shapes=(shapes,), strict=False)
        except Exception as caught:  # noqa: BLE001 - torch.export raises anything; the first cause is chained
            error = error or caught
            continue
        strip(program)
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            # whether it is a view depends on strides, which exporters' decompositions change
            node.target = torch.ops.aten.reshape.default
        return program
    assert error is not None
    raise ExportError(f"torch.export refuses the quantized graph: {first_line(error)}") from error


class _Carrier(nn.Module):
    """Runs the module node by node, so that each node's meta data reaches what is traced."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return fx.Interpreter(self.module, garbage_collect_values=False).run(*inputs)


def _example(
    graph: Graph, largest: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    axes: dict[str, Any] = {}
    tensors, dynamic = [], []
    for item in graph.inputs:
        sizes, named = [], {}
        for index, size in enumerate(item.shape):
            if isinstance(size, str):
                named[index] = axes.setdefault(size, torch.export.Dim(size, max=largest.get(size)))
                # what PyTorch's kernels choose by size narrows an axis to the example's side of it
                sizes.append(largest.get(size, max(EXAMPLE_BATCH, graph.sizes.get(size, EXAMPLE_BATCH))))
            else:
                sizes.append(size)
        tensors.append(torch.zeros(sizes, dtype=item.dtype))
        dynamic.append(named or None)
    return tuple(tensors), tuple(dynamic)


def _automatic(graph: Graph, largest: Mapping[str, int]) -> tuple[dict[int, Any] | None, ...]:
    """Let torch find relations between axes that names can't express (one a multiple of another)."""
    auto = torch.export.Dim.AUTO
    return tuple(
        {
            index: auto(max=largest[size]) if size in largest else auto
            for index, size in enumerate(item.shape)
            if isinstance(size, str)
        }
        or None
        for item in graph.inputs
    )
