"""The laws of a graph, as code that runs after every stage.

float:  every name is unique; no operator writes in place; every tensor named by the graph exists; the
graph is in
        topological order; nothing but known node kinds.
folded: the laws of float, and no batch normalisation directly follows a convolution or linear that only it
uses.
qdq:    the laws of float, and every dequantize reads a quantize or a constant, one dequantize per use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, fx

from bitport.errors import GraphError
from bitport.graph.functionalize import is_inplace
from bitport.graph.match import op_name
from bitport.graph.shapes import fetch

if TYPE_CHECKING:
    from bitport.graph.graph import Graph

Law = Callable[["Graph"], None]


def _structure(graph: Graph) -> None:
    try:
        graph.gm.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise GraphError(f"law 'well-formed' broken: {error}") from error
    outputs = graph.gm.graph.find_nodes(op="output")
    if len(outputs) != 1:
        raise GraphError(f"law 'one output' broken: there are {len(outputs)} output nodes")
    count = len(graph.gm.graph.find_nodes(op="placeholder"))
    if count != len(graph.inputs):
        raise GraphError(f"law 'inputs match' broken: {count} placeholders for {len(graph.inputs)} inputs")
    for node in graph.gm.graph.nodes:
        if node.op == "call_method":
            raise GraphError(
                f"{graph.name(node)}: law 'functions and modules only' broken: a call_method node"
            )


def _names(graph: Graph) -> None:
    seen: dict[str, fx.Node] = {}
    for node in (*graph.gm.graph.find_nodes(op="placeholder"), *graph.nodes()):
        name = graph.name(node)
        if name in seen:
            raise GraphError(f"{name}: law 'unique names' broken: {node.name} and {seen[name].name} share it")
        seen[name] = node


def _functional(graph: Graph) -> None:
    for node in graph.nodes():
        if is_inplace(node):
            raise GraphError(f"{graph.name(node)}: law 'no writes' broken: {node.target} writes in place")


def _tensors(graph: Graph) -> None:
    for node in graph.gm.graph.nodes:
        if node.op == "get_attr":
            try:
                value = fetch(graph.gm, str(node.target))
            except AttributeError:
                raise GraphError(f"{node.name}: law 'tensors exist' broken: no {node.target!r}") from None
            if not isinstance(value, Tensor):
                raise GraphError(f"{node.name}: law 'tensors only' broken: {node.target!r} is no tensor")


def _folded(graph: Graph) -> None:
    from bitport.graph.simplify import foldable  # a law and the step that makes it hold agree by construction

    for node in graph.nodes():
        source = foldable(graph, node)
        if source is not None:
            raise GraphError(
                f"{graph.name(node)}: law 'folded' broken: could be folded into {graph.name(source)}"
            )


def _qdq(graph: Graph) -> None:
    for node in graph.nodes():
        if node.op != "call_function" or not op_name(node).startswith("dequantize"):
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "call_function" and "quantize" not in op_name(source):
            raise GraphError(f"{graph.name(node)}: law 'pairs' broken: dequantizes {graph.name(source)}")
        if len(node.users) > 1:
            raise GraphError(
                f"{graph.name(node)}: law 'one dequantize per use' broken: {len(node.users)} users"
            )


_FLOAT: tuple[Law, ...] = (_structure, _names, _functional, _tensors)
LAWS: dict[str, tuple[Law, ...]] = {"float": _FLOAT, "folded": (*_FLOAT, _folded), "qdq": (*_FLOAT, _qdq)}


def check(graph: Graph, stage: str) -> None:
    """Checks `graph` against the laws of `stage`.

    Raises:
        GraphError: naming the node and the law, or the stage when it is unknown.
    """
    if stage not in LAWS:
        raise GraphError(f"unknown stage {stage!r}; known: {', '.join(LAWS)}")
    for law in LAWS[stage]:
        law(graph)
