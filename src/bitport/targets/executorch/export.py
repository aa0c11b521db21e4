"""A graph and its plan → a program of ExecuTorch, with XNNPACK's delegates in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ...errors import FOREIGN, ExportError, first_line
from ...graph import Graph
from ...plan import Plan, lower
from ...plan.capture import capture
from ...plan.retarget import with_signed_weights
from ._sdk import quiet
from .decomposed import STACK, decompose

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager

NOTE = "bitport"  # a method of the file that returns what is written there: names and shapes, as JSON
HANDLE = "debug_handle"
RESHAPE = "aten.view_copy.default"
SPLITS = (
    torch.ops.aten.chunk.default,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split.sizes,
    torch.ops.aten.split_with_sizes.default,
)
NO_KERNEL = ("getitem", "executorch_call_delegate", "sym_size", "alloc")


def export_model(
    graph: Graph, plan: Plan, path: Path, *, batch: int, length: int, taps: bool = False
) -> None:
    """Write the program.

    Args:
        batch, length: the largest size of the batch and of other dynamic axes (or the example's, if that is larger):
            ExecuTorch plans its memory ahead.
        taps: with the integers of each quantized tensor as outputs behind those of the network.

    Raises ExportError where ExecuTorch refuses.
    """
    lowered = lower(graph, with_signed_weights(plan))
    shown = decompose(lowered, graph, taps=taps)
    first = _batch(graph)
    largest = {
        axis: max(batch if axis == first else length, graph.sizes.get(axis, 0))
        for spec in graph.inputs
        for axis in spec.shape
        if isinstance(axis, str)
    }
    program = capture(lowered, graph, largest)
    _slice_parts(program.graph_module)
    note: dict[str, Any] = {
        "inputs": [[spec.name, *_sizes(spec.shape, largest)] for spec in graph.inputs],
        "taps": shown,
        "batch": None if first is None else largest[first],
    }
    with quiet():
        from executorch.exir.error import ExportError as Refused
        from executorch.exir.error import InternalError
        from torch._export.verifier import SpecViolationError

        try:
            made = _lowered(program, note)
        except (*FOREIGN, Refused, InternalError, SpecViolationError) as error:
            raise ExportError(f"ExecuTorch refused the network: {first_line(error)}") from error
        path.write_bytes(made.buffer)


def _batch(graph: Graph) -> str | None:
    """The axis that is the first one of all inputs and outputs, if there is one."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in graph.inputs}
    firsts |= {spec.shape[0] if spec.shape else 0 for spec in graph.outputs}
    first = firsts.pop()
    return first if not firsts and isinstance(first, str) else None


def _sizes(
    shape: tuple[int | str, ...], largest: Mapping[str, int]
) -> tuple[list[int | None], list[int | None]]:
    """(sizes that are fixed, largest sizes of axes that aren't)."""
    fixed = [size if isinstance(size, int) else None for size in shape]
    return fixed, [largest[size] if isinstance(size, str) else None for size in shape]


def _lowered(program: torch.export.ExportedProgram, note: dict[str, Any]) -> ExecutorchProgramManager:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        program, transform_passes=[_infer_sizes], partitioner=[XnnpackPartitioner()]
    )
    _check_axes(edge.exported_program(), note["inputs"])
    whole = edge.exported_program().graph_module
    delegated = [part.original_module.graph for part in whole.modules() if hasattr(part, "original_module")]
    note["delegated"] = {
        node.meta[HANDLE]: _user_name(node)
        for graph in delegated
        for node in graph.nodes
        if HANDLE in node.meta and _user_name(node)
    }
    left: dict[str, list[str]] = {}
    for node in whole.graph.nodes:
        kind = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_function" and not kind.startswith(NO_KERNEL):
            left.setdefault(_user_name(node), []).append(kind)
    note["left"] = left
    # by now all names are known
    noted = EdgeProgramManager(edge.exported_program(), {NOTE: json.dumps(note)}, edge.compile_config)
    return noted.to_executorch()


def _user_name(node: fx.Node) -> str:
    stack = node.meta.get(STACK)
    return str(next(iter(stack.values()))[0]) if stack else ""


def _check_axes(program: torch.export.ExportedProgram, inputs: Sequence[Any]) -> None:
    """Raise ExportError where an axis that is dynamic has become as long as the example's."""
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    for end, (name, fixed, _) in zip(program.graph_signature.user_inputs, inputs, strict=True):
        value = values[str(end)]
        for axis, (size, wanted) in enumerate(zip(value.shape, fixed, strict=True)):
            if isinstance(size, int) and wanted is None:
                raise ExportError(
                    f"ExecuTorch fixes axis {axis} of {name!r} at {size}: load the network without dynamic axes, with "
                    "inputs of the sizes that it shall run with"
                )


def _slice_parts(module: fx.GraphModule) -> None:
    """Parts of a tensor as slices: ExecuTorch's way with a split makes a constant of the batch."""
    for target in SPLITS:
        for node in list(module.graph.find_nodes(op="call_function", target=target)):
            args: Any = node.args
            dim = args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
            sizes = [part.shape[dim] for part in node.meta["val"]]
            for user in list(node.users):
                start = sum(sizes[: user.args[1]])
                with module.graph.inserting_before(user):
                    part = module.graph.call_function(
                        torch.ops.aten.slice.Tensor, (args[0], dim, start, start + sizes[user.args[1]])
                    )
                part.meta = user.meta
                user.replace_all_uses_with(part)
                module.graph.erase_node(user)
            module.graph.erase_node(node)
    module.recompile()


def _infer_sizes(module: fx.GraphModule) -> PassResult:
    """One size that is only known while running is written as −1: with a symbol XNNPACK doesn't take a reshape."""
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == RESHAPE:
            sizes = node.args[1]
            if sum(not isinstance(size, int) for size in sizes) == 1 and -1 not in sizes:
                node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in sizes])
    module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, True)
