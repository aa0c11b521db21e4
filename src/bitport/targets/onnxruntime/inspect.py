"""What ONNX Runtime made of a file: the operators of the optimized graph, and the bytes of the written one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import TargetError
from ...numerics.packing import packed_bytes
from ...plan import Plan
from ...plan.lower import BYTE, QUANTIZED
from ...rules import DECODED
from .._base import Inspection
from .._onnx import AGAIN
from .blockwise import MATMUL_NBITS
from .decode import KEY
from .ends import REMEDY, noted

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


def read_model(path: Path) -> onnx.ModelProto:
    """A file without the weights that lie beside it. Raises TargetError for names that are no text."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    names = [name for node in model.graph.node for name in (node.name, node.op_type, *node.output)]
    names += [initializer.name for initializer in model.graph.initializer]
    for name in names:
        if not isinstance(name, str):  # protobuf gives bytes then
            raise TargetError(f"{path.name} holds a name that is no text ({name[:50]!r}): {REMEDY}")
    return model


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
    rounding = sum(node.op_type == MATMUL_NBITS and computes_integers(node) for node in nodes)
    notes = (
        (
            f"ONNX Runtime's MatMulNBits rounds what {rounding} layers read to 8 bits, block by block, while it runs; "
            "[target] accuracy_level = 0 keeps floats, and is several times slower",
        )
        if rounding
        else ()
    )
    computes = {MATMUL_NBITS: "int8, in blocks" if rounding else "float32, in blocks"}
    return Inspection(found, Counter(node.op_type for node in nodes), missed, integer, computes, notes)


def computes_integers(node: onnx.NodeProto) -> bool:
    """Whether a kernel multiplies or adds integers; MatMulNBits does where it rounds its activations."""
    if node.op_type == MATMUL_NBITS:
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        return rounds_activations(sizes["bits"], sizes["block_size"], sizes.get("accuracy_level", 0))
    return node.op_type.startswith(INTEGER_KERNELS)


@cache
def rounds_activations(bits: int, block: int, level: int) -> bool:
    """Whether this host's MatMulNBits of such a layout rounds its activations: one row is multiplied to see it."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    # each activation times 1; of 127 steps up to the largest, 1, a third is none
    x = np.full((1, block), 1 / 3, np.float32)
    x[0, 0] = 1
    one_above_the_zero_point = np.full(
        (1, 1, block * bits // BYTE), _repeated(2 ** (bits - 1) + 1, bits), np.uint8
    )
    constants: dict[str, np.ndarray[Any, Any]] = {
        "B": one_above_the_zero_point,
        "scales": np.ones(1, np.float32),
    }
    sizes: dict[str, Any] = {"K": block, "N": 1, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node(MATMUL_NBITS, ["x", *constants], ["y"], domain="com.microsoft", **sizes)
    graph = helper.make_graph(
        [node], "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, block])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    total = float(x.astype(np.float64).sum())
    return abs(float(session.run(None, {"x": x})[0].item()) - total) > 1e-4 * total


def _repeated(code: int, bits: int) -> int:
    """A byte full of one code."""
    return sum(code << shift for shift in range(0, BYTE, bits))


def user_name(name: str) -> str:
    """ONNX Runtime appends its own suffixes to the names of nodes that it makes."""
    return re.sub(rf"({AGAIN}\d+|_token_\d+|_nchwc|_nhwc|_quant)+$", "", name)


class _Stored:
    """The bytes of each initializer in a written file, and how many codes of a narrow weight they hold."""

    def __init__(self, model: onnx.ModelProto) -> None:
        notes = noted({item.key: item.value for item in model.metadata_props}, KEY)
        if not all(isinstance(note, dict) and _is_shape(note.get("shape")) for note in notes.values()):
            raise TargetError(f"the file's metadata {KEY!r} don't describe its weights: {REMEDY}")
        self.counts = {name: math.prod(note["shape"]) for name, note in notes.items()}
        self.bytes: Mapping[str, int] = {i.name: _bytes(i) for i in model.graph.initializer}
        for initializer in model.graph.initializer:
            self.counts.setdefault(initializer.name, math.prod(initializer.dims))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _bytes(initializer: onnx.TensorProto) -> int:
    for entry in initializer.external_data:
        if entry.key == "length" and entry.value.isdecimal():
            return int(entry.value)
    return len(initializer.raw_data) or initializer.ByteSize()


def _wide_weight(name: str, plan: Plan, stored: _Stored) -> str | None:
    """The reason why a weight of the operator is not stored at the width that the plan promises."""
    for edge, tie in plan.edges.items():
        if edge.consumer != name or plan.ties[tie].source != "weight":
            continue
        bits, tensor = plan.ties[tie].format.bits, f"{plan.stored_name(tie, edge.producer)}{QUANTIZED}"
        count = stored.counts.get(tensor)
        if count is None and bits == BYTE and plan.nodes[name].kernel not in (DECODED, MATMUL_NBITS):
            continue  # int8 of an integer kernel, merged with an equal one
        if count is None:
            return f"its weight {edge.producer} is not in the file as {tensor}"
        promised, found = packed_bytes(count, bits), stored.bytes.get(tensor, 0)
        if found > promised or (not found and promised > SMALL):
            return f"its weight {edge.producer} takes {found} bytes in the file where {bits} bits take {promised}"
    return None
