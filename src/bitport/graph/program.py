"""From an `ExportedProgram` to a `Graph`: clean, functionalize, raise, symbolise, name, check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitport.errors import LoadError
from bitport.graph import functionalize, names, shapes
from bitport.graph.export import _CARRIED, quiet_export
from bitport.graph.graph import Graph, InputSpec
from bitport.graph.raise_ops import Held, held_by, raise_graph

MARK = "bitport_mark"  # what a front end says of the operators that it wrote (`torch.fx.traceback.annotate`)


def from_program(
    program: torch.export.ExportedProgram,
    model: nn.Module | None = None,
    axes: Mapping[tuple[str, int], str] | None = None,
    notes: Sequence[str] = (),
    stage: str = "float",
) -> Graph:
    """Raises an exported program.

    Args:
        program: an eval-mode program, not yet decomposed.
        model: the module it was exported from, or None; gives ties, momentum and dropout rates their exact
        values.
            The graph shares its tensors: hand in a copy.
        axes: names of dynamic axes by (input name, axis); others are called `batch` or `<input>_<axis>`.

    Raises:
        GraphError: an alias, a region or a write to state that can't be kept.
        LoadError: inputs that aren't plain tensors; branches or loops that depend on data.
    """
    with quiet_export():
        gm = program.module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        functionalize.inline_regions(gm)
        _refuse_branches(gm)
        functionalize.drop_assertions(gm.graph)
        said = [*notes, *functionalize.functionalize(gm.graph)]
        inputs, sizes = _inputs(gm.graph, axes or {})
        held = held_by(model) if model is not None else held_in(program)
        originals = dict(model.named_modules(remove_duplicate=False)) if model is not None else {}
        raised, more = raise_graph(gm, held, originals)
        for node, item in zip(raised.graph.find_nodes(op="placeholder"), inputs, strict=True):
            node.meta["bitport_name"] = item.name
        for node in raised.graph.nodes:
            custom = node.meta.pop("custom", None) or {}
            node.meta.update({k: custom[k] for k in (*_CARRIED, MARK) if k in custom})
        return finish(raised, inputs, [*said, *more], stage, sizes)


def _refuse_branches(gm: fx.GraphModule) -> None:
    """`torch.cond` and its like keep sub-graphs, one of which runs; integers need one network that always does."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(gm, str(node.target), None), fx.GraphModule):
            users = ", ".join(str(user.target) for user in node.users)
            raise LoadError(
                f"the network chooses between sub-graphs by its data ({users}): write it as one computation, as with "
                "torch.where"
            )


def finish(
    raised: fx.GraphModule,
    inputs: Sequence[InputSpec],
    notes: Sequence[str],
    stage: str,
    sizes: Mapping[str, int],
) -> Graph:
    """Symbolic shapes, names and laws of a freshly raised module."""
    shapes.propagate(raised, [i.shape for i in inputs], [i.dtype for i in inputs], sizes)
    shapes.symbolise(raised.graph)
    names.assign(raised.graph, {i.name for i in inputs})
    for node in raised.graph.nodes:
        for key in (
            "stack_trace",
            "source_fn_stack",
            "from_node",
            "torch_fn",
            "tensor_meta",
            "nn_module_stack",
        ):
            node.meta.pop(key, None)
    raised.graph.lint()
    raised.recompile()
    graph = Graph(raised, inputs, notes, stage, sizes)
    graph.check("float")
    return graph


def spans(examples: Iterable[Any], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each float example; none of constant ones, which are placeholders, not data."""
    found = {}
    for name, value in zip(names, examples, strict=False):
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not value.is_meta:
            low, high = (float(end) for end in torch.aminmax(value.detach().float()))
            if low < high and math.isfinite(low) and math.isfinite(high):
                found[name] = (low, high)
    return found


def held_in(program: torch.export.ExportedProgram) -> list[Held]:
    """The tensors of a program that came from a file; ties are restored where tensors share their memory."""
    signature = program.graph_signature
    hidden = set(signature.non_persistent_buffers)
    parameters = set(signature.parameters)
    seen: dict[Any, Tensor] = {}
    found = []
    for name in (*program.state_dict, *hidden):
        tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        is_parameter = name in parameters or isinstance(tensor, nn.Parameter)
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, is_parameter)
        if tensor.numel():
            tensor = seen.setdefault(key, tensor)
        found.append(Held(name, tensor, is_parameter, name not in hidden))
    return found


def _inputs(graph: fx.Graph, axes: Mapping[tuple[str, int], str]) -> tuple[list[InputSpec], dict[str, int]]:
    symbols: dict[str, str] = {}
    sizes: dict[str, int] = {}
    found = []
    placeholders = graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in placeholders]
    for node, value in zip(placeholders, values, strict=True):
        if not isinstance(value, Tensor):
            raise LoadError(
                f"input {node.name!r} is no tensor ({value!r}): bind it in the model before loading"
            )
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and (str(node.target), axis) in axes:
                symbols.setdefault(str(size), axes[str(node.target), axis])
    for number, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        label = str(node.target)
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            default = "batch" if number == 0 and axis == 0 else f"{label}_{axis}"
            name = axes.get((label, axis)) or symbols.setdefault(str(size), default)
            hint = size.node.hint
            sizes.setdefault(name, int(hint) if hint is not None else 2)
            shape.append(name)
        found.append(InputSpec(label, tuple(shape), value.dtype))
    _unclaimed(found)
    return found, sizes


def _unclaimed(inputs: Iterable[InputSpec]) -> None:
    for item in inputs:
        if item.dtype.is_complex:
            raise LoadError(
                f"input {item.name!r} is complex ({item.dtype}): only real tensors can be compressed"
            )


__all__ = ["finish", "from_program", "held_in", "spans"]
