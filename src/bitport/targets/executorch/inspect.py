"""What is in a program of ExecuTorch: the operators of XNNPACK's graphs with their types, and what is left outside."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...plan import Plan
from ...plan.lower import QUANTIZED
from .._base import Inspection
from .table import DYNAMIC, STATIC

FORWARD = "forward"
PRECISIONS = {"qint8": STATIC, "qdint8": DYNAMIC, "fp32": "f32", "fp16": "f16"}
INTEGERS = (STATIC, DYNAMIC)
BITS = {"qint8": 8, "qcint8": 8, "qcint4": 4, "qbint4": 4}
CONVERT = "Convert"
DEPTHWISE = "Depthwise"  # the same kernel by another name, where each channel has its own filter


def inspected(data: bytes, note: Mapping[str, Any], plan: Plan) -> Inspection:
    """The operators of a file against what the plan wants. note: what the exporter wrote into the file."""
    names: Mapping[str, str] = note["delegated"]
    kernels: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    widths: dict[str, int] = {}
    graphs, others = _programs(data)
    for graph in graphs:
        values = {value["id_out"]: value for value in map(_tensor, graph["xvalues"])}
        for node in graph["xnodes"]:
            kind = _called(node, values)
            counts[kind] += 1
            name = names.get(str(node["debug_handle"]), "")
            kernels.setdefault(name, []).append(kind)
            weight = values.get(node["xnode_union"].get("filter_id"))
            if weight is not None:
                widths[name] = BITS.get(_type(weight), 32)
    counts.update(others)
    for name, kinds in note["left"].items():
        kernels.setdefault(name, []).extend(kinds)
    kernels.pop("", None)
    missed = {}
    for name, todo in plan.nodes.items():
        if todo.role in ("compute", "elementwise") and todo.kernel is not None:
            reason = _objection(todo.kernel, kernels.get(name, []), _promised(plan, name), widths.get(name))
            if reason is not None:
                missed[name] = reason
    found = {name.removesuffix(QUANTIZED): tuple(kinds) for name, kinds in kernels.items()}
    return Inspection(found, counts, missed, frozenset(kind for kind in counts if kind.endswith(INTEGERS)))


def _objection(wanted: str, ran: list[str], promised: int | None, width: int | None) -> str | None:
    if wanted not in (kind.removeprefix(DEPTHWISE) for kind in ran):
        as_what = ", ".join(ran) or "nothing by that name"
        return f"XNNPACK does not run it as {wanted}: it runs as {as_what}"
    if promised is not None and width is not None and width > promised:
        return f"its weight takes {width} bits in the file, not {promised}"
    return None


def _promised(plan: Plan, name: str) -> int | None:
    """Bits of the weight that an operator multiplies by."""
    bits = [plan.ties[tie].format.bits for edge, tie in plan.edges.items() if edge.consumer == name
            and plan.ties[tie].source == "weight"]  # fmt: skip
    return None if not bits else 4 if max(bits) <= 4 and plan.node(name).mode == "dynamic" else 8


def _called(node: Mapping[str, Any], values: Mapping[int, Mapping[str, Any]]) -> str:
    """`Conv2d qs8`: what an operator of XNNPACK is called, and what it computes in."""
    kind = str(node["xnode_union_type"]).removeprefix("XNN")
    if kind == CONVERT:
        return kind
    ids = node["xnode_union"]
    first = values[ids.get("input_id", ids.get("input1_id"))]
    precision = PRECISIONS.get(_type(first), _type(first))
    return f"{kind} {precision}"


def _tensor(value: Mapping[str, Any]) -> Mapping[str, Any]:
    inside: Mapping[str, Any] = value["xvalue_union"]
    found: Mapping[str, Any] = inside.get("tensor_value", inside)
    return found


def _type(tensor: Mapping[str, Any]) -> str:
    return str(tensor["datatype"]).removeprefix("xnn_datatype_")


def _programs(data: bytes) -> tuple[list[Mapping[str, Any]], Counter[str]]:
    """(the graphs of XNNPACK's delegates, the calls of ExecuTorch's own operators)."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    program = deserialize_pte_binary(data).program
    (plan,) = (plan for plan in program.execution_plan if plan.name == FORWARD)
    graphs: list[Mapping[str, Any]] = []
    others: Counter[str] = Counter()
    for instruction in (step.instr_args for chain in plan.chains for step in chain.instructions):
        if isinstance(instruction, KernelCall):
            operator = plan.operators[instruction.op_index]
            others[f"{operator.name}.{operator.overload}".removesuffix(".")] += 1
        elif isinstance(instruction, DelegateCall):
            where = plan.delegates[instruction.delegate_index].processed.index
            graphs.append(_xnnpack_graph(program.backend_delegate_data[where].data))
    return graphs, others


def _xnnpack_graph(payload: bytes) -> Mapping[str, Any]:
    import executorch.backends.xnnpack.serialization as package
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(bytes(payload[: XNNHeader.EXPECTED_LENGTH]))
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        schema = Path(next(iter(package.__path__))) / "schema.fbs"
        (folder / "graph.bin").write_bytes(bytes(payload[start : start + header.flatbuffer_size]))
        _flatc_decompile(scratch, str(schema), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
        # bounds of clamps; JSON knows no infinity, flatc and Python write it in ways of their own
        found: Mapping[str, Any] = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))
    return found
