"""Transposed convolutions become convolutions and a reordering of their channels into pixels.

For runtimes that have integer convolutions but no transposed ones. The work is the same where the kernel is a multiple
of the stride without overlap (2 by 2, stride 2); overlapping windows cost up to some 2.3 times the products, because
each phase is given the window of all.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..numerics.subpixel import Axis, axis, phase_bias, phase_weights
from .editing import insert, replace
from .graph import Graph
from .match import Op
from .products import readers

aten = torch.ops.aten
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
CLAMPS = ("relu", "relu6")


def convolve_phases(graph: Graph) -> None:
    """Rewrites every transposed convolution with constant weights and no dilation; each conv keeps its name."""
    stored: dict[tuple[Any, ...], str] = {}
    for node in graph.nodes():
        op = graph.op(node)
        if op.kind != "conv_transpose" or any(d != 1 for d in op.attrs["dilation"]):
            continue
        weight, bias = op.operands[1], op.operands[2]
        known = weight is not None and weight.tensor is not None and (bias is None or bias.tensor is not None)
        if known:
            _rewrite(graph, node, op, stored)


def _rewrite(graph: Graph, node: fx.Node, op: Op, stored: dict[tuple[Any, ...], str]) -> None:
    attrs = op.attrs
    source, weight, bias = op.operands[:3]
    assert source is not None and source.node is not None and weight is not None and weight.tensor is not None
    value = graph.tensor(weight.tensor).detach()
    geometry = zip(value.shape[2:], attrs["stride"], attrs["padding"], attrs["output_padding"], strict=True)
    axes = [axis(*numbers) for numbers in geometry]
    made = phase_weights(value, attrs["stride"], attrs["padding"], axes, attrs["groups"])
    key = (tuple(attrs["stride"]), tuple(attrs["padding"]), tuple(attrs["output_padding"]))
    tensors = [_stored(graph, node, weight.tensor, made, key, stored)]
    if bias is not None:
        assert bias.tensor is not None
        added = phase_bias(graph.tensor(bias.tensor).detach(), attrs["stride"])
        tensors.append(_stored(graph, node, bias.tensor, added, key, stored))
    name, x = graph.name(node), source.node
    even = all(a.before == a.after >= 0 for a in axes)
    if not even:
        pads = [n for a in reversed(axes) for n in (a.before, a.after)]
        x = insert(graph, node, aten.constant_pad_nd.default, (x, pads), f"{name}.pad")
    padding = [a.before for a in axes] if even else [0] * len(axes)
    ones = [1] * len(axes)
    arguments = (x, *tensors, *([None] * (2 - len(tensors))), ones, padding, ones, attrs["groups"])
    replace(graph, node, new := insert(graph, node, CONVOLUTIONS[len(axes)], arguments, name))
    users = list(new.users)
    last = users[0] if len(users) == 1 and _clamps(graph, users[0]) else new
    _spread(graph, last, name, attrs["stride"], axes)


def _clamps(graph: Graph, node: fx.Node) -> bool:
    return node.op in ("call_function", "call_module") and graph.op(node).kind in CLAMPS


def _stored(
    graph: Graph, node: fx.Node, dotted: str, value: Tensor, key: Any, stored: dict[tuple[Any, ...], str]
) -> fx.Node:
    """The tensor under its old name where nobody else reads it, else beside it."""
    name = stored.get((dotted, key))
    if name is None and readers(graph, graph.tensor(dotted)) == 1:
        graph.set_tensor(dotted, value)
        name = dotted
    elif name is None:
        name = f"{dotted.replace('.', '_')}_phases_{len(stored)}"
        graph.gm.register_parameter(name, nn.Parameter(value))
        stored[dotted, key] = name
    with graph.gm.graph.inserting_before(node):
        read = graph.gm.graph.get_attr(name)
    read.meta["val"] = value
    return read


def _spread(graph: Graph, node: fx.Node, name: str, stride: Any, axes: list[Axis]) -> None:
    """[B, O·Πs, *m] → [B, O, *(m·s)]: each phase goes to its pixels, superfluous ones at the ends are cut off."""
    steps, count = [int(s) for s in stride], len(axes)
    readers_before = list(node.users)
    with graph.gm.graph.inserting_after(node):
        anchor = graph.gm.graph.call_function(operator.pos, (node,))  # a place to insert in front of

    def put(target: Any, *args: Any) -> fx.Node:
        return insert(graph, anchor, target, args, f"{name}.pixels")

    def times(factors: list[Any]) -> Any:
        product: Any = 1
        for factor in factors:
            product = factor if isinstance(product, int) else put(operator.mul, product, factor)
        return product

    value = node
    if any(s != 1 for s in steps):
        sizes = [put(aten.sym_size.int, node, i) for i in range(count + 2)]
        # axis by axis from the innermost: transposing three or four axes is many times faster than all at once
        for i in reversed(range(count)):
            rows, behind = (
                times(sizes[2 : 3 + i]),
                [times([m, s]) for m, s in zip(sizes[3 + i :], steps[i + 1 :], strict=True)],
            )
            value = put(
                aten.reshape.default, value, [-1, steps[i], rows, *([times(behind)] if behind else [])]
            )
            value = put(aten.transpose.int, value, 1, 2)
        channels = put(operator.floordiv, sizes[1], prod(steps))
        whole = [times([size, s]) for size, s in zip(sizes[2:], steps, strict=True)]
        value = put(aten.reshape.default, value, [sizes[0], channels, *whole])
    for i, a in enumerate(axes):
        if a.crop:
            value = put(aten.slice.Tensor, value, 2 + i, 0, -a.crop)
    for reader in readers_before:
        reader.replace_input_with(node, value)
    graph.gm.graph.erase_node(anchor)
