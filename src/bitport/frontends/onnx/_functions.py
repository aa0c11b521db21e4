"""A file's own operators, which are graphs of others, as those others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...errors import LoadError, first_line

DEEPEST = 100  # calls within calls; a tree of modules is much flatter
MOST = 2**20  # nodes, counted anew for each call


def inlined(proto: Any, name: str) -> Any:
    """The model without functions and without the data of its weights. `proto` is left as it is.

    Raises:
        LoadError: functions that call themselves, or that would make too many nodes.
    """
    import onnx
    import onnx.inliner

    _check(proto, name)
    bare = onnx.ModelProto()  # weights may be larger than what passes through the inliner
    for field, value in proto.ListFields():
        if field.name != "graph":
            _put(bare, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _put(bare.graph, field.name, value)
    for tensor in proto.graph.initializer:
        bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    try:
        return onnx.inliner.inline_local_functions(bare)
    except (RuntimeError, ValueError, LookupError) as error:  # what its C++ raises
        raise LoadError(f"{name}: its functions can't be taken apart: {first_line(error)}") from error


def _put(message: Any, name: str, value: Any) -> None:
    if isinstance(value, str | bytes | int):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def _check(proto: Any, name: str) -> None:
    """What functions make is finite, and not too much: each may call another twice, which calls another twice …"""
    bodies: dict[tuple[str, str, str], Any] = {}
    for function in proto.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise LoadError(f"{name}: function {function.name!r} is given twice")
        bodies[key] = function.node
    counted: dict[tuple[str, str, str], int] = {}

    def count(nodes: Any, depth: int) -> int:
        total = 0
        for node in _all(nodes):
            key = (node.domain, node.op_type, node.overload)
            if key in bodies and key not in counted:
                if depth == DEEPEST:
                    raise LoadError(
                        f"{name}: node {node.name!r} calls function {node.op_type!r} {DEEPEST} calls deep: functions "
                        "may not call themselves"
                    )
                counted[key] = count(bodies[key], depth + 1)
            total += counted.get(key, 1)
        if total > MOST:
            raise LoadError(f"{name}: its functions make more than {MOST} nodes: the file is damaged")
        return total

    count(proto.graph.node, 0)


def _all(nodes: Any) -> Iterator[Any]:
    """Nodes, and those in the graphs of them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _all(inner.node)
