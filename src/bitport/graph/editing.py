"""Operators put in and taken out of a graph, names kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from . import names
from .graph import Graph


def insert(
    graph: Graph, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], name: str
) -> fx.Node:
    """A new operator called `name` (made unique), in front of a node and in its module's path."""
    with graph.gm.graph.inserting_before(before):
        node = graph.gm.graph.call_function(target, args)
    taken = {
        n.meta["bitport_name"] for n in graph.gm.graph.nodes if "bitport_name" in n.meta and n is not before
    }
    node.meta["bitport_name"] = names.unique(name, taken | {spec.name for spec in graph.inputs})
    node.meta["bitport_path"] = before.meta.get("bitport_path", "")
    return node


def replace(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """`new` takes the users and the name of `old`, which is erased."""
    name = graph.name(old)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    graph.gm.graph.erase_node(old)
    new.meta["bitport_name"] = name
