"""A lowered module → `ExportedProgram`, the form that runtimes' exporters read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from ..errors import ExportError, first_line
from ..graph import Graph
from ..graph.export import quiet_export, strip
from .lower import Lowered

EXAMPLE_BATCH = 2  # 1 would be specialised to a constant


def capture(lowered: Lowered, graph: Graph) -> torch.export.ExportedProgram:
    """Export `lowered.module` with the dynamic axes of `graph`'s inputs.

    The user's names of operators arrive in `nn_module_stack`; stack traces do not.

    Raises ExportError when torch.export refuses.
    """
    arguments, dynamic = _example(graph)
    carrier = _Carrier(lowered.module).eval()
    error: Exception | None = None
    for shapes in (dynamic, _automatic(dynamic)):
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


def _example(graph: Graph) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    axes: dict[str, Any] = {}
    tensors, dynamic = [], []
    for item in graph.inputs:
        sizes, named = [], {}
        for index, size in enumerate(item.shape):
            if isinstance(size, str):
                named[index] = axes.setdefault(size, torch.export.Dim(size))
                sizes.append(max(EXAMPLE_BATCH, graph.sizes.get(size, EXAMPLE_BATCH)))
            else:
                sizes.append(size)
        tensors.append(torch.zeros(sizes, dtype=item.dtype))
        dynamic.append(named or None)
    return tuple(tensors), tuple(dynamic)


def _automatic(dynamic: Sequence[dict[int, Any] | None]) -> tuple[dict[int, Any] | None, ...]:
    """Let torch find relations between axes that names can't express (one a multiple of another)."""
    return tuple(None if d is None else dict.fromkeys(d, torch.export.Dim.AUTO) for d in dynamic)
