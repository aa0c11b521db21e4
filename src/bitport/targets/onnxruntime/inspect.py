"""What ONNX Runtime made of a file: the operators of the optimized graph, and the bytes of the written one."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...numerics.packing import packed_bytes
from ...plan import Plan
from ...plan.lower import BYTE, QUANTIZED
from ...rules import DECODED
from .._base import Inspection
from .blockwise import MATMUL_NBITS, ROUNDS_ACTIVATIONS
from .decode import KEY
from .export import AGAIN

if TYPE_CHECKING:
    import onnx

INTEGER_KERNELS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")

# What a kernel may be called in the optimized file (the NHWC and com.microsoft forms compute the same integers; one
# rounding of an input that several layers read is an operator of its own).
ALIASES = {
    "QLinearMatMul": ("QLinearMatMul", "MatMulIntegerToFloat"),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
}
# PyTorch's exporter stores constants up to this size once where they are equal, under one of their names.
SMALL = 1024  # bytes


def inspected(nodes: Iterable[onnx.NodeProto], written: onnx.ModelProto, plan: Plan) -> Inspection:
    """The operators of an optimized file against what the plan wants.

    Args:
        nodes: of the optimized graph. written: the file as it was exported.
    """
    nodes = list(nodes)
    kernels: dict[str, list[str]] = {}
    for node in nodes:
        kernels.setdefault(user_name(node.name), []).append(node.op_type)
    stored = _Stored(written)
    missed = {}
    for name, todo in plan.nodes.items():
        if not todo.kernel or todo.role not in ("compute", "elementwise"):
            continue
        # a rounding alone runs under the name of the quantized tensor
        ran = [*kernels.get(name, []), *kernels.get((todo.absorbs or name) + QUANTIZED, [])]
        objection = None
        if todo.kernel == DECODED:
            decoding = [kind for step in ("dq", DECODED) for kind in kernels.get(f"{name}/{step}", [])]
            if decoding:
                objection = f"ONNX Runtime decodes its weights whenever it runs: {', '.join(decoding)}"
        elif not any(kind in ran for kind in ALIASES.get(todo.kernel, (todo.kernel,))):
            as_what = ", ".join(ran) or "nothing by that name"
            objection = f"ONNX Runtime did not fuse it into {todo.kernel}: it ran as {as_what}"
        objection = objection or _wide_weight(name, plan, stored)
        if objection is not None:
            missed[name] = objection
    integer = frozenset(node.op_type for node in nodes if computes_integers(node))
    found = {name: tuple(kinds) for name, kinds in kernels.items()}
    return Inspection(found, Counter(node.op_type for node in nodes), missed, integer)


def computes_integers(node: onnx.NodeProto) -> bool:
    """Whether a kernel multiplies or adds integers; MatMulNBits does where it rounds its activations."""
    if node.op_type == MATMUL_NBITS:
        level = [a.i for a in node.attribute if a.name == "accuracy_level"]
        return level == [ROUNDS_ACTIVATIONS]
    return node.op_type.startswith(INTEGER_KERNELS)


def user_name(name: str) -> str:
    """ONNX Runtime appends its own suffixes to the names of nodes that it makes."""
    return re.sub(rf"({AGAIN}\d+|_token_\d+|_nchwc|_nhwc|_quant)+$", "", name)


class _Stored:
    """The bytes of each initializer in a written file, and how many codes of a narrow weight they hold."""

    def __init__(self, model: onnx.ModelProto) -> None:
        notes = {item.key: item.value for item in model.metadata_props}
        self.counts = {
            name: math.prod(note["shape"]) for name, note in json.loads(notes.get(KEY, "{}")).items()
        }
        self.bytes: Mapping[str, int] = {i.name: _bytes(i) for i in model.graph.initializer}
        for initializer in model.graph.initializer:
            self.counts.setdefault(initializer.name, math.prod(initializer.dims))


def _bytes(initializer: onnx.TensorProto) -> int:
    outside: dict[str, Any] = {entry.key: entry.value for entry in initializer.external_data}
    if "length" in outside:
        return int(outside["length"])
    return len(initializer.raw_data) or initializer.ByteSize()


def _wide_weight(name: str, plan: Plan, stored: _Stored) -> str | None:
    """The reason why a weight of the operator is not stored at the width that the plan promises."""
    for edge, tie in plan.edges.items():
        if edge.consumer != name or plan.ties[tie].source != "weight":
            continue
        bits, tensor = plan.ties[tie].format.bits, f"{tie}{QUANTIZED}"
        count = stored.counts.get(tensor)
        if count is None and bits == BYTE and plan.nodes[name].kernel not in (DECODED, MATMUL_NBITS):
            continue  # int8 of an integer kernel, merged with an equal one
        if count is None:
            return f"its weight {edge.producer} is not in the file as {tensor}"
        promised, found = packed_bytes(count, bits), stored.bytes.get(tensor, 0)
        if found > promised or (not found and promised > SMALL):
            return f"its weight {edge.producer} takes {found} bytes in the file where {bits} bits take {promised}"
    return None
