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
UNFIT = (IndexError, KeyError, ValueError)  # an operand that isn't known, isn't there, or is of another size
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
        """int32 numbers on the product of two scales; "" where there are none.

        Raises KeyError for unknown ones, ValueError where they don't fit.
        """
        name = self.node.inputs[slot] if slot < len(self.node.inputs) else ""
        if not name:
            return ""
        codes, scales = self.constants[name], self.constants[w_scale].reshape(-1)
        if scales.size not in (1, codes.size) or self.constants[x_scale].size != 1:
            raise ValueError("a scale for other channels")
        made = f"{name} decoded for {self.node.name}"
        self.constants[made] = (codes * (scales * self.constants[x_scale].reshape(()))).astype(np.float32)
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
        except UNFIT:
            writer.nodes.clear()
        nodes += writer.nodes or [node]
    return replace(model, nodes=nodes, constants=constants)


# ------------------------------------------------------------------------------------------ ranges while running


def _dynamic(model: Model) -> Model:
    """Products of DynamicQuantizeLinear's codes, brought back to floats by their scales, as products of floats."""
    found = _Products(model)
    instead: dict[str, Node] = {}  # by the output of the last of the nodes that a product is spread over
    for node in model.nodes:
        if node.kind not in DYNAMIC or node.domain not in DOMAINS:
            continue
        try:
            made = found.in_float(node)
        except UNFIT:
            continue
        instead[made.outputs[0]] = made
    if not instead:
        return model
    nodes = [instead.get(node.outputs[0], node) if node.outputs else node for node in model.nodes]
    note = f"the file is quantized: ranges of {len(instead)} products, taken while running, were taken out"
    return replace(
        model, nodes=needed(nodes, model.outputs), constants=found.constants, notes=[*model.notes, note]
    )


class _Products:
    """Reads products of integers that a scale behind them makes floats of."""

    def __init__(self, model: Model) -> None:
        self.constants, self.outputs = dict(model.constants), set(model.outputs)
        self.made = {name: node for node in model.nodes for name in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in model.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)

    def in_float(self, node: Node) -> Node:
        """The product that gives what the Mul behind it gives. Raises what `UNFIT` lists where it is another one."""
        source = self.made[node.inputs[0]]
        codes, scale, zero_point = source.outputs
        if source.kind != "DynamicQuantizeLinear" or node.inputs[0] != codes or node.inputs[2] != zero_point:
            raise ValueError("another operand")
        weight, (scales, last) = self.constants[node.inputs[1]], self._after(node, scale)
        factor = self._factor(scales, scale)
        zero = (
            self.constants[node.inputs[3]] if node.inputs[3:] and node.inputs[3] else np.zeros((), np.int32)
        )
        per_column = (1, weight.shape[-1]) if node.kind == "MatMulInteger" else (1,)
        if factor.size not in per_column or zero.size not in per_column:
            raise ValueError("a scale or zero point for each row")
        factor, zero = (part.reshape(()) if part.size == 1 else part.reshape(-1) for part in (factor, zero))
        name = f"{node.inputs[1]} decoded for {node.name}"
        self.constants[name] = ((weight.astype(np.int32) - zero.astype(np.int32)) * factor).astype(np.float32)
        inputs, outputs = [source.inputs[0], name], list(last.outputs)
        return replace(node, kind=DYNAMIC[node.kind], inputs=inputs, outputs=outputs)

    def _after(self, node: Node, scale: str) -> tuple[Node, Node]:
        """(the Mul of both scales, the Mul by it), behind the Cast of a product."""
        cast = self._reader(node.outputs[0], "Cast")
        last = self._reader(cast.outputs[0], "Mul")
        (other,) = (name for name in last.inputs if name != cast.outputs[0])
        scales = self.made[other]
        if scales.kind != "Mul" or scale not in scales.inputs:
            raise ValueError("another scale")
        return scales, last

    def _factor(self, scales: Node, scale: str) -> Array:
        """The weight's scale."""
        (other,) = (name for name in scales.inputs if name != scale)
        return self.constants[other]

    def _reader(self, name: str, kind: str) -> Node:
        (found,) = self.readers[name]
        if found.kind != kind or name in self.outputs:
            raise ValueError(f"not read by {kind}")
        return found


def needed(nodes: list[Node], outputs: Sequence[str]) -> list[Node]:
    """Those of the nodes that something reads."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]
