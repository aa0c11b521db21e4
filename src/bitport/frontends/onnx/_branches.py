"""Branches that a constant decides: the nodes of the one that is taken stand in the If's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._calls import Array


def taken(graph: Any, constants: Mapping[str, Array]) -> Any:
    """The graph with the branches that are known; itself where there are none.

    An If stays where its condition is computed, or where a name in its branch has a meaning outside.
    """
    from onnx import GraphProto, NodeProto, numpy_helper

    if not any(node.op_type == "If" for node in graph.node):
        return graph
    known = {name: array for name, array in constants.items() if array.dtype == bool and array.size == 1}
    named = {*constants, *(item.name for item in graph.input)}
    named |= {name for node in graph.node for name in node.output}
    found = GraphProto()
    found.CopyFrom(graph)
    del found.node[:]
    waiting = list(graph.node)[::-1]
    while waiting:
        node = waiting.pop()
        value = node.attribute[0].t if node.op_type == "Constant" and len(node.attribute) == 1 else None
        if value is not None and value.data_type == value.BOOL and len(value.raw_data) == 1 and node.output:
            known[node.output[0]] = numpy_helper.to_array(value)
        branch = _branch(node, known)
        inner = set() if branch is None else _given(branch)
        if branch is None or len(branch.output) != len(node.output) or inner & named:
            found.node.append(node)
            continue
        named |= inner
        found.initializer.extend(branch.initializer)
        ends = [
            NodeProto(op_type="Identity", name=f"{node.name} {index}", input=[given.name], output=[name])
            for index, (given, name) in enumerate(zip(branch.output, node.output, strict=True))
            if name
        ]
        waiting += [*branch.node, *ends][::-1]
    return found


def _branch(node: Any, known: Mapping[str, Array]) -> Any | None:
    if node.op_type != "If" or node.domain not in ("", "ai.onnx") or list(node.input)[:1] == []:
        return None
    if node.input[0] not in known:
        return None
    wanted = "then_branch" if known[node.input[0]].item() else "else_branch"
    return next((item.g for item in node.attribute if item.name == wanted and item.HasField("g")), None)


def _given(graph: Any) -> set[str]:
    """The names that a branch gives meaning to."""
    return {tensor.name for tensor in graph.initializer} | {
        name for node in graph.node for name in node.output
    }
