"""User-facing names of nodes: the user's module path plus the operator.

A call of a raised module, or of a `torch.nn` leaf module that is one operator, is called by its path
(`layer1.0.conv1`); a functional operator in module `p` is `p.add`; repeats get `#2`, `#3` in order.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from bitport.graph.match import is_shape, op_name

_NOT_LEAF = ("container.", "transformer.", "activation.MultiheadAttention")
_MINOR = frozenset(["getitem", "zeros", "contiguous", "clone", "alias", "detach", "full", "zeros_like"])


class Site(NamedTuple):
    """Where in the user's model a node comes from."""

    path: str  # dotted path of the innermost module
    type: str  # its class, "torch.nn.modules.conv.Conv2d"
    call: str  # differs between two calls of one module


def site(node: fx.Node) -> Site:
    """The innermost module of the user's model that produced `node`; the root when unknown."""
    carried = node.meta.get("bitport_path")
    stack = node.meta.get("nn_module_stack") or {}
    if carried is not None:
        return Site(carried, "", "")
    for key, (path, kind) in reversed(list(stack.items())):
        if key.startswith("_empty_nn_module_stack"):
            continue
        kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        return Site(clean(path), kind, str(key))
    return Site("", "", "")


def clean(path: str) -> str:
    """A module path without the marks that capture adds (`@1` on the second call, a root prefix)."""
    parts = [p.split("@")[0] for p in path.split(".")]
    if parts and parts[0].startswith("L["):
        parts = parts[1:]
    return ".".join(parts)


def is_leaf(kind: str) -> bool:
    """Whether `kind` names a `torch.nn` module that is one operator by intent."""
    return kind.startswith("torch.nn.modules.") and not any(word in kind for word in _NOT_LEAF)


def base_name(node: fx.Node) -> str:
    """The name of a node before repeats are counted, taken by itself."""
    if node.op == "call_module":
        return str(node.target)
    path = site(node).path
    return f"{path}.{op_name(node)}" if path else op_name(node)


def assign(graph: fx.Graph, taken: set[str]) -> None:
    """Gives every operator node without a name one, in `node.meta["bitport_name"]`; `taken` are not
    reused."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_module")]
    _drop_doubles(nodes)
    used = set(taken) | {n.meta["bitport_name"] for n in nodes if "bitport_name" in n.meta}
    groups: dict[Site, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(site(node), []).append(node)
    for node in nodes:
        where = site(node)
        node.meta.setdefault("bitport_path", where.path)
    for where, group in groups.items():
        if not is_leaf(where.type) or any(n.op == "call_module" for n in group):
            continue
        main = [n for n in group if not is_shape(n) and op_name(n) not in _MINOR] or group
        if len(main) == 1:
            main[0].meta.setdefault("bitport_leaf", where.path)
    for node in nodes:
        if "bitport_name" not in node.meta:
            base = node.meta.get("bitport_leaf") or base_name(node)
            node.meta["bitport_name"] = unique(base, used)
            used.add(node.meta["bitport_name"])


def _drop_doubles(nodes: list[fx.Node]) -> None:
    """Several nodes that carry one name (a module re-exported as several operators): the main one keeps
    it."""
    holders: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if "bitport_name" in node.meta:
            holders.setdefault(node.meta["bitport_name"], []).append(node)
    for group in holders.values():
        main = [n for n in group if n.op == "call_module"]
        main += [n for n in group if n.op != "call_module" and not is_shape(n) and op_name(n) not in _MINOR]
        for node in group:
            if node is not (main or group)[0]:
                del node.meta["bitport_name"]


def unique(base: str, used: set[str]) -> str:
    """`base`, or `base#2`, `base#3` … where it is taken."""
    if base not in used:
        return base
    count = 2
    while f"{base}#{count}" in used:
        count += 1
    return f"{base}#{count}"
