"""Integer inputs and outputs: the first quantize and the last dequantize leave the file, their parameters stay in it.

The file's metadata names scale and zero point of each end under `bitport.io` (JSON), for whoever feeds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ExportError, TargetError
from ...graph import Graph
from .._runner import dequantize, quantize

if TYPE_CHECKING:
    import onnx_ir as ir

KEY = "bitport.io"
FIELDS = {"producer": str, "scale": float, "zero_point": int, "dtype": str}
DTYPES = ("uint8", "int8", "uint16", "int16")
REMEDY = "make the artifact again"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class End:
    """One integer input or output: real = scale · (integer − zero_point), stored as `dtype`.

    `producer` is the name of its tensor in the plan.
    """

    producer: str
    scale: float
    zero_point: int
    dtype: str

    def quantize(self, value: Array) -> Array:
        """As QuantizeLinear: divided in float32, rounded half to even, saturated."""
        q: Array = quantize(value, self.scale, self.zero_point, self.dtype)
        return q

    def dequantize(self, value: Array) -> Array:
        real: Array = dequantize(value, self.scale, self.zero_point)
        return real


def read_ends(metadata: Mapping[str, str]) -> dict[str, End]:
    """What `integer_ends` wrote; empty for a file with float inputs and outputs. Raises TargetError for all else."""
    found = {}
    for name, end in noted(metadata, KEY).items():
        if not isinstance(end, dict) or {key: type(value) for key, value in end.items()} != FIELDS:
            raise TargetError(f"the file's metadata {KEY!r} don't describe {name!r}: {REMEDY}")
        if end["dtype"] not in DTYPES or not (math.isfinite(end["scale"]) and end["scale"] > 0):
            raise TargetError(f"the file's metadata {KEY!r} describe {name!r} as no integers: {REMEDY}")
        found[name] = End(**end)
    return found


def noted(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object under a key of a file's metadata; empty where there is none. Raises TargetError for all else."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError, TypeError) as error:  # bytes that are no text, too
        raise TargetError(f"the file's metadata {key!r} can't be read ({error}): {REMEDY}") from error
    if not isinstance(found, dict):
        raise TargetError(f"the file's metadata {key!r} are no JSON object: {REMEDY}")
    return found


def integer_ends(model: ir.Model, graph: Graph) -> None:
    """Make the quantized inputs and outputs of `model` its own, in place.

    Raises ExportError for an end that is no integer: then the file is not what was asked for.
    """
    import onnx_ir

    ends: dict[str, End] = {}
    for value in model.graph.inputs:
        if value.dtype != onnx_ir.DataType.FLOAT:
            continue
        # integers have the same shape
        readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
        if not readers:
            continue
        if any(node.op_type != "QuantizeLinear" for node in readers):
            kinds = ", ".join(sorted({node.op_type for node in readers}))
            raise ExportError(
                f"io = 'integer': input {value.name!r} is read as float by {kinds}; use io = 'float'"
            )
        ends[str(value.name)] = _end(str(value.name), readers[0])
        for node in readers:
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
        value.dtype = onnx_ir.DataType.from_numpy(np.dtype(ends[str(value.name)].dtype))
    outputs = zip(list(model.graph.outputs), graph.outputs, graph.output_nodes(), strict=True)
    for index, (value, spec, source) in enumerate(outputs):
        if value.dtype != onnx_ir.DataType.FLOAT:
            continue
        last = value.producer()
        while last is not None and last.op_type == "Identity" and last.inputs[0] is not None:
            last = last.inputs[0].producer()
        if last is None or last.op_type != "DequantizeLinear" or last.inputs[0] is None:
            raise ExportError(
                f"io = 'integer': output {spec.name!r} is no integer in the file; use io = 'float'"
            )
        ends[spec.name] = _end(graph.name(source), last)
        # a copy under the output's own name: what makes the integers may have other readers and a name of its own
        copy = onnx_ir.node("Identity", inputs=[last.inputs[0]], name=f"{spec.name}/integers")
        model.graph.insert_after(last, copy)
        made, before = copy.outputs[0], value.producer()
        model.graph.outputs[index] = made
        value.name, made.name = f"{spec.name}/float", spec.name
        made.dtype, made.shape = onnx_ir.DataType.from_numpy(np.dtype(ends[spec.name].dtype)), value.shape
        _remove_unread(model, before)
    model.metadata_props[KEY] = json.dumps({name: asdict(end) for name, end in ends.items()}, sort_keys=True)


def _remove_unread(model: ir.Model, node: ir.Node | None) -> None:
    """The node and what only it read, as far back as dequantizes and copies go."""
    while node is not None and node.op_type in ("Identity", "DequantizeLinear"):
        out, source = node.outputs[0], node.inputs[0]
        if list(out.uses()) or out in model.graph.outputs:
            return
        model.graph.remove(node, safe=True)
        node = None if source is None else source.producer()


def _end(producer: str, node: ir.Node) -> End:
    scale, zero_point = (value.const_value for value in node.inputs[1:3] if value is not None)
    assert scale is not None and zero_point is not None
    return End(producer, float(scale.numpy()), int(zero_point.numpy()), zero_point.numpy().dtype.name)
