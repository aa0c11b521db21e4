"""Operators of integers as operators of floats between DequantizeLinear and QuantizeLinear, one form for all files.

QLinearConv, QLinearMatMul and the `com.microsoft` operators of ONNX Runtime's quantizer become what they stand for;
products of activations that DynamicQuantizeLinear quantizes become products of the floats that it reads. What doesn't
fit stays as it is, and is imported as the integers that it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ._calls import Array
from ._reading import DOMAINS, Model, Node

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
CONTRIBUTED = "com.microsoft"
DYNAMIC = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def as_pairs(model: Model) -> Model:
    """The model without operators of integers that have a form in floats; itself where it has none."""
    contributed = [
        replace(node, domain="")
        if node.domain == CONTRIBUTED and node.kind in (QUANTIZE, DEQUANTIZE)
        else node
        for node in model.nodes
    ]
    model = _static(replace(model, nodes=contributed))
    return _dynamic(model)


@dataclass
class _Writer:
    """Writes the nodes that one operator becomes."""

    node: Node
    constants: dict[str, Array]
    nodes: list[Node] = field(default_factory=list)

    def real(self, slot: int, *, axis: int | None = None) -> str:
        """The float of an operand whose scale and zero point follow it. Raises KeyError where its scale isn't known."""
        return self.decoded(self.node.inputs[slot : slot + 3], axis=axis)

    def decoded(self, parts: Sequence[str], *, axis: int | None = None) -> str:
        made = f"{self.node.name} {len(self.nodes)}"
        if parts[1] not in self.constants:
            raise KeyError(parts[1])
        self._add(DEQUANTIZE, list(parts), made, {} if axis is None else {"axis": axis})
        return made

    def bias(self, slot: int, x_scale: str, w_scale: str) -> str:
        """int32 numbers on the product of two scales; "" where there are none. Raises KeyError for unknown ones."""
        name = self.node.inputs[slot] if slot < len(self.node.inputs) else ""
        if not name:
            return ""
        known = self.constants[name] * (self.constants[x_scale] * self.constants[w_scale])
        made = f"{name} decoded"
        self.constants[made] = known.astype(np.float32)
        return made

    def result(self, kind: str, inputs: list[str], scale: int, **attrs: object) -> None:
        """The operator in float, rounded by the operand at `scale` and the one behind it."""
        parts = [name for name in self.node.inputs[scale : scale + 2] if name]
        if not parts:
            self._add(kind, inputs, self.node.outputs[0], attrs)
            return
        made = f"{self.node.name} {len(self.nodes)}"
        self._add(kind, inputs, made, attrs)
        self._add(QUANTIZE, [made, *parts], self.node.outputs[0], {})

    def _add(self, kind: str, inputs: list[str], output: str, attrs: Mapping[str, object]) -> None:
        name = self.node.name if kind not in (QUANTIZE, DEQUANTIZE) else f"{self.node.name} {kind}"
        self.nodes.append(
            replace(self.node, kind=kind, domain="", name=name, inputs=inputs, outputs=[output], attrs=attrs)
        )


def _conv(w: _Writer) -> None:
    bias = w.bias(8, w.node.inputs[1], w.node.inputs[4])
    inputs = [w.real(0), w.real(3, axis=0), *([bias] if bias else [])]
    w.result("Conv", inputs, 6, **w.node.attrs)


def _matmul(w: _Writer) -> None:
    w.result("MatMul", [w.real(0), w.real(3, axis=-1)], 6)


def _gemm(w: _Writer) -> None:
    bias = w.bias(6, w.node.inputs[1], w.node.inputs[4])
    axis = 0 if w.node.attrs.get("transB") else 1
    w.result("Gemm", [w.real(0), w.real(3, axis=axis), *([bias] if bias else [])], 7, **w.node.attrs)


def _both(kind: str) -> Callable[[_Writer], None]:
    def write(w: _Writer) -> None:
        w.result(kind, [w.real(0), w.real(3)], 6)

    return write


def _one(kind: str, *dropped: str) -> Callable[[_Writer], None]:
    def write(w: _Writer) -> None:
        if w.node.attrs.get("channels_last"):
            raise KeyError("channels_last")
        attrs = {key: value for key, value in w.node.attrs.items() if key not in dropped}
        w.result(kind, [w.real(0)], 3, **attrs)

    return write


def _concat(w: _Writer) -> None:
    parts = w.node.inputs[2:]
    reals = [w.decoded(parts[at : at + 3]) for at in range(0, len(parts), 3)]
    w.result("Concat", reals, 0, **w.node.attrs)


WRITERS: dict[tuple[str, str], Callable[[_Writer], None]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    (CONTRIBUTED, "QLinearAdd"): _both("Add"),
    (CONTRIBUTED, "QLinearMul"): _both("Mul"),
    (CONTRIBUTED, "QGemm"): _gemm,
    (CONTRIBUTED, "QLinearSigmoid"): _one("Sigmoid"),
    (CONTRIBUTED, "QLinearLeakyRelu"): _one("LeakyRelu"),
    (CONTRIBUTED, "QLinearSoftmax"): _one("Softmax", "opset"),
    (CONTRIBUTED, "QLinearAveragePool"): _one("AveragePool", "channels_last"),
    (CONTRIBUTED, "QLinearGlobalAveragePool"): _one("GlobalAveragePool", "channels_last"),
    (CONTRIBUTED, "QLinearConcat"): _concat,
}


def _static(model: Model) -> Model:
    constants = dict(model.constants)
    nodes: list[Node] = []
    for node in model.nodes:
        domain = "" if node.domain in DOMAINS else node.domain
        write = WRITERS.get((domain, node.kind))
        writer = _Writer(node, constants)
        try:
            if write is not None:
                write(writer)
        except (IndexError, KeyError):  # an operand that isn't known, or isn't there
            writer.nodes.clear()
        nodes += writer.nodes or [node]
    return replace(model, nodes=nodes, constants=constants)


# ------------------------------------------------------------------------------------------ ranges while running


def _dynamic(model: Model) -> Model:
    """Products of DynamicQuantizeLinear's codes, brought back to floats by their scales, as products of floats."""
    made = {name: node for node in model.nodes for name in node.outputs}
    readers: dict[str, list[Node]] = {}
    for node in model.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    constants = dict(model.constants)
    instead: dict[str, Node] = {}  # by the output of the last of the nodes that a product is spread over
    for node in model.nodes:
        if node.kind not in DYNAMIC or node.domain not in DOMAINS or len(node.inputs) < 3:
            continue
        source = made.get(node.inputs[0])
        last, scale = _scaled(node, readers, made, constants)
        weight = constants.get(node.inputs[1])
        if source is None or source.kind != "DynamicQuantizeLinear" or weight is None or last is None:
            continue
        if node.inputs[2] != source.outputs[2] or scale is None or node.outputs[0] in model.outputs:
            continue
        zero = (
            constants.get(node.inputs[3])
            if len(node.inputs) > 3 and node.inputs[3]
            else np.zeros((), np.int32)
        )
        if zero is None or (zero.size > 1 and node.kind != "MatMulInteger"):
            continue
        name = f"{node.inputs[1]} decoded"
        constants[name] = ((weight.astype(np.int32) - zero.astype(np.int32)) * scale).astype(np.float32)
        instead[last.outputs[0]] = replace(
            node, kind=DYNAMIC[node.kind], inputs=[source.inputs[0], name], outputs=list(last.outputs)
        )
    if not instead:
        return model
    nodes = needed([instead.get(node.outputs[0], node) for node in model.nodes], model.outputs)
    note = f"the file is quantized: ranges of {len(instead)} products, taken while running, were taken out"
    return replace(model, nodes=nodes, constants=constants, notes=[*model.notes, note])


def _scaled(
    node: Node,
    readers: Mapping[str, Sequence[Node]],
    made: Mapping[str, Node],
    constants: Mapping[str, Array],
) -> tuple[Node | None, Array | None]:
    """The Mul that makes floats of a product's sums, and the scale of its weight: Cast, then times both scales."""
    cast = _only(readers, node.outputs[0])
    last = _only(readers, cast.outputs[0]) if cast is not None and cast.kind == "Cast" else None
    if cast is None or last is None:
        return None, None
    other = [name for name in last.inputs if name != cast.outputs[0]]
    scales = made.get(other[0]) if last.kind == "Mul" and len(other) == 1 else None
    source = made.get(node.inputs[0])
    if scales is None or scales.kind != "Mul" or source is None or source.outputs[1] not in scales.inputs:
        return None, None
    known = [constants[name] for name in scales.inputs if name in constants]
    if len(known) != 1 or (known[0].size > 1 and (node.kind != "MatMulInteger" or known[0].ndim != 1)):
        return None, None
    return last, known[0]


def _only(readers: Mapping[str, Sequence[Node]], name: str) -> Node | None:
    found = readers.get(name, ())
    return found[0] if len(found) == 1 else None


def needed(nodes: list[Node], outputs: Sequence[str]) -> list[Node]:
    """Those of the nodes that something reads."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]
