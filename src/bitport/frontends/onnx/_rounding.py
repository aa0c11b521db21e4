"""Quantized files as the float networks that they were made of: pairs of QuantizeLinear and DequantizeLinear go.

What such a pair gives stands for what it reads, and what moved codes between them moves floats; one whose codes begin
at zero has taken a ReLU's place, where nothing else keeps its tensor from being negative. Weights that a
DequantizeLinear decodes become floats, on their grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...graph import GivenScale
from ._calls import Array, Call
from ._qoperators import DEQUANTIZE, QUANTIZE, as_pairs, needed
from ._reading import DOMAINS, Model, Node
from .quantized import dequantize

NEVER_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Softplus", "Exp", "Sqrt"}
SUMS = {"Add", "Mul", "Concat", "Max", "Sum", "Mean"}  # of what is never negative
ARRANGED = {
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "Reshape",
    "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Gather", "Split", "Expand", "Tile", "Dropout",
}  # fmt: skip
# what moves codes between a pair, as it moves floats
MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "MaxPool", "Slice", "Gather"}


def without_rounding(model: Model) -> Model:
    """The model in float; itself where there is nothing to take out. A note tells what went."""
    model = _pairs_together(_narrow(as_pairs(model)))
    made = {name: node for node in model.nodes for name in node.outputs if node.domain in DOMAINS}
    constants: dict[str, Array] = dict(model.constants)
    nodes: list[Node] = []
    instead: dict[str, str] = {}  # what stands for a tensor
    positive: set[str] = set()  # what is never negative
    given: dict[str, GivenScale] = {}
    pairs = weights = 0
    for node in model.nodes:
        node = replace(node, inputs=[instead.get(name, name) for name in node.inputs])
        if node.kind == DEQUANTIZE and node.domain in DOMAINS:
            source = made.get(node.inputs[0])
            if source is not None and source.kind == QUANTIZE and _same_grid(source, node, constants):
                read = instead.get(source.inputs[0], source.inputs[0])
                pairs += 1
                if read in made and read not in positive and _starts_at_zero(source, constants):
                    nodes.append(replace(node, kind="Relu", inputs=[read], attrs={}, scope=""))
                    positive.update(node.outputs)
                    read = node.outputs[0]
                else:
                    instead[node.outputs[0]] = read
                scale = _scale(source, constants)
                if scale is not None:
                    given[read] = scale
                continue
            if all(name in constants for name in node.inputs if name):
                constants[node.outputs[0]] = _decoded(node, model, constants)
                weights += 1
                continue
        if _stays_positive(node, positive, constants):
            positive.update(node.outputs)
        nodes.append(node)
    if not pairs and not weights:
        return model
    for name in model.outputs:
        if name in instead:  # outputs keep their names
            nodes.append(Node("Identity", "", f"{name} as it is", [instead[name]], [name], {}, scope=""))
    nodes = needed(nodes, model.outputs)
    note = (
        f"the file is quantized: {pairs} roundings of activations were taken out, {weights} weights decoded"
    )
    return replace(model, nodes=nodes, constants=constants, notes=[*model.notes, note], given=given)


def _scale(quantize: Node, constants: Mapping[str, Array]) -> GivenScale | None:
    """What a rounding rounds to; None: each channel has a scale of its own, or what is stored are floats."""
    scale = constants.get(quantize.inputs[1])
    zero = constants.get(quantize.inputs[2]) if len(quantize.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or zero.dtype.kind not in "iu":
        return None
    if len(quantize.inputs) < 3 and quantize.attrs.get("output_dtype"):
        return None
    info = np.iinfo(zero.dtype)
    found = GivenScale(float(scale.reshape(())), int(zero.reshape(-1)[0]), int(info.min), int(info.max))
    return found.checked(quantize.name)


def _narrow(model: Model) -> Model:
    """The model without input channels that zeros multiply: our own files repeat some, because it is faster so."""
    made = {name: node for node in model.nodes for name in node.outputs}
    readers = Counter(name for node in model.nodes for name in node.inputs)
    readers.update(model.outputs)

    def joined(name: str) -> tuple[Node, Node] | None:
        """(Concat, DequantizeLinear) of a convolution's operand that nothing else reads."""
        decode = made.get(name)
        concat = made.get(decode.inputs[0]) if decode is not None and decode.kind == DEQUANTIZE else None
        if decode is None or concat is None or concat.kind != "Concat" or concat.attrs.get("axis") != 1:
            return None
        return (concat, decode) if readers[name] == readers[concat.outputs[0]] == 1 else None

    instead: dict[str, str] = {}
    for conv in model.nodes:
        operands = [joined(name) for name in conv.inputs[:2]] if conv.kind == "Conv" else []
        if len(operands) < 2 or operands[0] is None or operands[1] is None:
            continue
        (read, _), (weight, decode) = operands[0], operands[1]
        channels = _nonzero_channels(weight, decode, model.constants)
        if channels and _repeats(read, made, model.constants, *channels):
            instead |= {concat.outputs[0]: concat.inputs[0] for concat in (read, weight)}
    nodes = [replace(node, inputs=[instead.get(name, name) for name in node.inputs]) for node in model.nodes]
    return replace(model, nodes=needed(nodes, model.outputs)) if instead else model


def _nonzero_channels(weight: Node, decode: Node, constants: Mapping[str, Array]) -> tuple[int, int] | None:
    """(input channels, further ones that are zeros) of a weight that is put together of the two; None: it isn't."""
    parts = [constants.get(name) for name in weight.inputs]
    zero = constants.get(decode.inputs[2]) if len(decode.inputs) > 2 and decode.inputs[2] else np.zeros(())
    if len(parts) != 2:
        return None
    own, more = parts
    if own is None or more is None or zero is None or own.ndim < 3 or zero.size not in (1, len(own)):
        return None
    zeros = bool((more == zero.reshape(-1, *[1] * (own.ndim - 1))).all())
    return (own.shape[1], more.shape[1]) if zeros else None


def _repeats(
    read: Node, made: Mapping[str, Node], constants: Mapping[str, Array], own: int, more: int
) -> bool:
    """Whether channels are put together of `own` and, `more` in all, the same or the first of them once more."""
    first, *others = read.inputs
    count = 0
    for name in others:
        part = made.get(name)
        if name == first:
            count += own
            continue
        cut = part is not None and part.kind == "Slice" and len(part.inputs) == 4 and part.inputs[0] == first
        ends = [constants.get(end) for end in part.inputs[1:]] if cut and part is not None else []
        if not ends or any(end is None or end.size != 1 for end in ends):
            return False
        start, last, axis = (int(end.reshape(())) for end in ends if end is not None)
        if start or axis != 1 or not 0 < last < own:
            return False
        count += last
    return count == more


def _pairs_together(model: Model) -> Model:
    """The model with what moves codes put behind their DequantizeLinear, where all readers have the same one scale."""
    nodes = list(model.nodes)
    while True:
        readers: dict[str, list[int]] = {}
        for place, node in enumerate(nodes):
            for name in node.inputs:
                readers.setdefault(name, []).append(place)
        made = {name: node for node in nodes for name in node.outputs}
        for place, move in enumerate(nodes):
            moves = move.kind in MOVES and len(move.outputs) == 1
            source = made.get(move.inputs[0]) if moves else None
            while source is not None and source.kind in MOVES:
                source = made.get(source.inputs[0])
            behind = (
                readers.get(move.outputs[0], []) if source is not None and source.kind == QUANTIZE else []
            )
            after = [nodes[at] for at in behind]
            if not after or move.outputs[0] in model.outputs or move.inputs.count(move.inputs[0]) != 1:
                continue
            first = after[0]
            alike = all(node.kind == DEQUANTIZE and node.inputs[1:] == first.inputs[1:] for node in after)
            scale = model.constants.get(first.inputs[1]) if alike else None
            known = all(name in model.constants for name in first.inputs[1:] if name)
            if scale is None or scale.size != 1 or not known:
                continue
            decoded = f"{move.outputs[0]} decoded"
            nodes[place] = replace(first, name=f"{move.name} decoded", inputs=[move.inputs[0], *first.inputs[1:]],
                                   outputs=[decoded])  # fmt: skip
            moved = [
                replace(move, name=f"{move.name} {i}" if i else move.name, inputs=[decoded, *move.inputs[1:]],
                        outputs=list(node.outputs))
                for i, node in enumerate(after)
            ]  # fmt: skip
            kept = [node for at, node in enumerate(nodes) if at not in behind]
            at = kept.index(nodes[place]) + 1
            nodes = [*kept[:at], *moved, *kept[at:]]
            break
        else:
            return replace(model, nodes=nodes)


def _starts_at_zero(quantize: Node, constants: Mapping[str, Array]) -> bool:
    """Whether a rounding makes zeros of negative numbers."""
    zero = constants.get(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if zero is None or zero.dtype.kind not in "iu":
        return zero is None and not quantize.attrs.get(
            "output_dtype"
        )  # of bytes without a sign, zero is the lowest
    return bool((zero == np.iinfo(zero.dtype).min).all())


def _stays_positive(node: Node, positive: set[str], constants: Mapping[str, Array]) -> bool:
    """Whether what a node gives is never negative. positive: the tensors before it that aren't."""
    if node.kind in NEVER_NEGATIVE:
        return True
    known = [
        bool((constants[name] >= 0).all()) if name in constants else name in positive for name in node.inputs
    ]
    return all(known) if node.kind in SUMS else node.kind in ARRANGED and known[:1] == [True]


def _same_grid(first: Node, second: Node, constants: Mapping[str, Array]) -> bool:
    """Whether a pair decodes with what it encoded by: the same names, or equal numbers."""
    grids = [
        [constants[name].tolist() if name in constants else name for name in node.inputs[1:]]
        for node in (first, second)
    ]
    return grids[0] == grids[1]


def _decoded(node: Node, model: Model, constants: Mapping[str, Array]) -> Array:
    call = Call(node.kind, node.name, node.attrs, model.opset)
    found = dequantize(call, *(constants[name] if name else None for name in node.inputs))
    return np.asarray(found.numpy())
