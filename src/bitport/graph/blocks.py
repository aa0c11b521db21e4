"""Blocks: a graph cut into callable sub-graphs by the user's module tree.

The children of repeated containers (`layer1.0`, `encoder.layers.3`) are blocks, where at least two of them
hold
several operators with weights; what lies outside is grouped by top-level child. Everything is read off the
paths
that the nodes carry, so that blocks survive edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from bitport.graph.graph import Graph

_WEIGHTED = frozenset(["conv", "conv_transpose", "linear", "matmul", "sdpa", "lstm", "gru"])


@dataclass(frozen=True)
class Block:
    """A stretch of the graph. `graph_module(*values of inputs)` returns the values of `outputs` as a tuple.

    It shares its parameters and submodules with the graph. Names are node names (`Graph.name`).
    """

    name: str
    graph_module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]


def blocks(graph: Graph) -> list[Block]:
    """The blocks of `graph` in order of execution; together they hold every operator node once."""
    nodes = graph.nodes()
    paths = {node: path_of(node) for node in nodes}
    homes = _block_paths(graph, paths)
    stretches: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        label = _label(paths[node], homes)
        if stretches and (label in ("", stretches[-1][0])):
            stretches[-1][1].append(node)  # operators of the root join the stretch they follow
        else:
            stretches.append((label, [node]))
    if len(stretches) > 1 and stretches[0][0] == "":
        label, first = stretches.pop(0)
        stretches[0] = (stretches[0][0], first + stretches[0][1])
    counts: dict[str, int] = {}
    made = []
    for label, members in stretches:
        label = label or "root"
        counts[label] = counts.get(label, 0) + 1
        made.append(_cut(graph, label if counts[label] == 1 else f"{label}#{counts[label]}", members))
    return made


def path_of(node: fx.Node) -> str:
    """The module path that a node belongs to; nodes inserted by edits inherit it from what they read."""
    for _ in range(64):
        if "bitport_path" in node.meta:
            return str(node.meta["bitport_path"])
        if not node.all_input_nodes:
            return ""
        node = node.all_input_nodes[0]
    return ""


def _block_paths(graph: Graph, paths: dict[fx.Node, str]) -> set[str]:
    """Paths of blocks: for each node the deepest numbered module that is one of several like it."""
    weights: dict[str, int] = {}
    for node, path in paths.items():
        if graph.op(node).kind in _WEIGHTED:
            parts = path.split(".")
            for depth in range(1, len(parts) + 1):
                key = ".".join(parts[:depth])
                weights[key] = weights.get(key, 0) + 1
    families: dict[str, list[str]] = {}
    for path, count in weights.items():
        parent, _, leaf = path.rpartition(".")
        if leaf.isdigit() and count >= 2:
            families.setdefault(parent, []).append(path)
    return {path for family in families.values() if len(family) >= 2 for path in family} | _lone(
        weights, families
    )


def _lone(weights: dict[str, int], families: dict[str, list[str]]) -> set[str]:
    """Single-member stages (`layer1.0` beside `layer2.0`) count when their parents are alike by name."""
    singles = [(parent, paths[0]) for parent, paths in families.items() if len(paths) == 1]
    by_stem: dict[str, list[str]] = {}
    for parent, path in singles:
        by_stem.setdefault(parent.rstrip("0123456789"), []).append(path)
    repeated = {p.rstrip("0123456789") for p, paths in families.items() if len(paths) >= 2}
    return {p for stem, paths in by_stem.items() if len(paths) >= 2 or stem in repeated for p in paths}


def _label(path: str, homes: set[str]) -> str:
    parts = path.split(".") if path else []
    for depth in range(len(parts), 0, -1):
        if ".".join(parts[:depth]) in homes:
            return ".".join(parts[:depth])
    return parts[0] if parts else ""


def _cut(graph: Graph, name: str, members: list[fx.Node]) -> Block:
    inside = set(members)
    outside: dict[fx.Node, None] = {}
    for node in members:
        for used in node.all_input_nodes:
            if used not in inside and used.op != "get_attr":
                outside.setdefault(used)
    results = [n for n in members if any(user not in inside for user in n.users)]
    cut = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in outside:
        env[node] = cut.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in members:
        for used in node.all_input_nodes:
            if used.op == "get_attr" and used not in env:
                env[used] = cut.node_copy(used)
        env[node] = cut.node_copy(node, lambda n: env[n])
    cut.output(tuple(env[n] for n in results))
    module = fx.GraphModule(graph.gm, cut, class_name="Block")
    return Block(name, module, [graph.name(n) for n in outside], [graph.name(n) for n in results])
