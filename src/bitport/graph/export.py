"""Re-export of a raised graph: names travel with the nodes, paths of this machine do not."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx import traceback
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from bitport.errors import GraphError, first_line
from bitport.graph.blocks import path_of
from bitport.graph.match import is_shape
from bitport.graph.shapes import execute

if TYPE_CHECKING:
    from bitport.graph.graph import Graph

_TRACES = ("stack_trace", "source_fn_stack", "from_node", "torch_fn")
_CARRIED = ("bitport_name", "bitport_path")


def _only_told(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


_FAKE = logging.getLogger("torch._subclasses.fake_tensor")


def _silent(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def quiet_export() -> Iterator[None]:
    """What every capture needs: no fast path, no check of torch's own that reads values, the caller's random
    state kept, torch's own warnings kept in."""
    fast = torch.backends.mha.get_fastpath_enabled()
    state = torch.random.get_rng_state()
    detect = transformer._detect_is_causal_mask
    validate = torch.distributions.Distribution._validate_args
    torch.backends.mha.set_fastpath_enabled(False)
    _FAKE.addFilter(_silent)  # it prints the traceback of what is raised anyway
    # both read values: whether a given mask is the causal one (a hint that changes no result), and whether the
    # parameters of a distribution are in their range
    transformer._detect_is_causal_mask = _only_told
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _FAKE.removeFilter(_silent)
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = detect
        torch.distributions.Distribution.set_default_validate_args(validate)
        torch.random.set_rng_state(state)


def export_graph(graph: Graph) -> torch.export.ExportedProgram:
    """See `Graph.export`.

    Raises:
        GraphError: torch.export refuses the graph.
    """
    gm = copy.deepcopy(graph.gm).eval()
    carrier = nn.Module()
    # the very same tables: torch.export swaps tensors in them, and the nodes below read through `gm`
    for kind in ("_parameters", "_buffers", "_modules"):
        carrier.__dict__[kind] = getattr(gm, kind)
    carrier._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    carrier.eval()
    args, kwargs, dynamic = _example(graph, gm)
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]

    def around(node: fx.Node) -> Any:
        if is_shape(node):  # sizes are rebuilt at load, and named by rule
            return nullcontext()
        return traceback.annotate({"bitport_name": graph.name(node), "bitport_path": path_of(node)})

    def forward(*given: Any, **named: Any) -> Any:
        by_name = dict(zip(info.orig_args, given, strict=False)) | named
        flat = pytree.tree_leaves([by_name[name] for name in info.orig_args])
        result = execute(gm, flat, None, around)
        return pytree.tree_unflatten(pytree.tree_leaves(result, is_leaf=lambda v: v is None), info.out_spec)

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD

    arguments = [inspect.Parameter(n, either) for n in info.orig_args]
    setattr(forward, "__signature__", inspect.Signature(arguments))  # noqa: B010 (how callers may name inputs)
    carrier.forward = forward
    # the copy keeps its own names: graph.name() is asked through `names`, computed on the original's twin
    twins = dict(zip(gm.graph.nodes, graph.gm.graph.nodes, strict=True))
    for node, twin in twins.items():
        if node.op in ("call_function", "call_module"):
            node.meta["bitport_name"] = graph.name(twin)
    program = _export(carrier, args, kwargs, dynamic)
    strip(program)
    return program


def _export(
    carrier: nn.Module, args: Any, kwargs: Any, dynamic: dict[str, Any]
) -> torch.export.ExportedProgram:
    auto = pytree.tree_map(
        lambda d: None if d is None else dict.fromkeys(d, torch.export.Dim.AUTO), dynamic, is_leaf=_is_spec
    )
    error: Exception | None = None
    for shapes in (dynamic, auto):
        try:
            with quiet_export(), traceback.preserve_node_meta():
                return torch.export.export(carrier, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as caught:  # noqa: BLE001 (torch.export raises anything; all of it is reported)
            error = error or caught
    assert error is not None
    raise GraphError(f"torch.export refuses the graph: {first_line(error)}") from error


def _is_spec(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(k, int) for k in value))


def _example(graph: Graph, gm: fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    device = next((p.device for p in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    axes: dict[str, Any] = {}
    tensors, specs = [], []
    for item in graph.inputs:
        dims: dict[int, Any] = {}
        sizes = []
        for i, axis in enumerate(item.shape):
            if isinstance(axis, str):
                axes.setdefault(axis, torch.export.Dim(axis))
                dims[i] = axes[axis]
                sizes.append(max(2, graph.sizes.get(axis, 2)))
            else:
                sizes.append(axis)
        tensors.append(torch.zeros(sizes, dtype=item.dtype, device=device))
        specs.append(dims or None)
    args, kwargs = pytree.tree_unflatten(tensors, info.in_spec)
    spec_args, spec_kwargs = pytree.tree_unflatten(specs, info.in_spec)
    named = dict(zip(info.orig_args, spec_args, strict=False)) | spec_kwargs
    return tuple(args), dict(kwargs), named


def strip(program: torch.export.ExportedProgram) -> None:
    """Removes stack traces and source locations from a program, in place; keeps names."""
    for module in program.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            for key in _TRACES:
                node.meta.pop(key, None)
            custom = {k: v for k, v in (node.meta.pop("custom", None) or {}).items() if k in _CARRIED}
            if custom:
                node.meta["custom"] = custom
        module.meta.pop("stack_trace", None)
    program.graph_module.meta.pop("custom", None)
