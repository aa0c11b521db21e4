"""What OpenVINO made of a file: the operators of the compiled network and the types that they compute in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...plan import Plan
from ...plan.lower import QUANTIZED
from ...rules import DECODED
from .._base import Inspection
from .._onnx import AGAIN
from .weights import stored_bits

MADE_BY = ["bitport", "outputs"]  # where the file tells which operator makes an output
INTEGER = " I8"  # after the kind of an operator whose kernel takes 8-bit integers; precision tells of weights as well
ENDS = ("Input", "Output", "Const")
LAST = "_original"  # after the name of an output: what made it, where that isn't all that stands before it


def inspected(compiled: Any, written: Any, plan: Plan) -> Inspection:
    """The operators of a compiled network, and the constants of the file, against what the plan wants.

    Args:
        compiled: an `openvino.Model` as `get_runtime_model` gives it. written: the file's.
    """
    told = written.get_rt_info(MADE_BY).value
    outputs: Mapping[str, str] = told if isinstance(told, dict) else {}  # one who forges it names nothing
    kernels: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for node in compiled.get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        kind = info["layerType"]
        if kind in ENDS:
            continue
        called = kind + INTEGER if info["primitiveType"].endswith("_I8") else kind
        counts[called] += 1
        names = [node.get_friendly_name(), *info["originalLayersNames"].split(",")]
        for name in dict.fromkeys(user_name(name, outputs, plan) for name in names):
            kernels.setdefault(name, []).append(called)
    missed = _wide(written, plan)
    for name, todo in plan.nodes.items():
        if todo.role not in ("compute", "elementwise") or todo.kernel in (None, DECODED):
            continue
        ran = [*kernels.get(name, []), *kernels.get(f"{todo.absorbs or name}{QUANTIZED}", [])]
        wanted = f"{todo.kernel}{INTEGER}"
        if todo.role == "compute" and wanted not in ran:
            as_what = ", ".join(ran) or "nothing by that name"
            missed[name] = f"OpenVINO did not run it as {wanted}: it ran as {as_what}"
    found = {name: tuple(kinds) for name, kinds in kernels.items()}
    return Inspection(found, counts, missed, frozenset(kind for kind in counts if kind.endswith(INTEGER)))


def _wide(written: Any, plan: Plan) -> dict[str, str]:
    """Operators whose weights take more bits in the file than the plan promises, with the reason."""
    bits = {
        node.get_friendly_name(): node.get_element_type().bitwidth
        for node in written.get_ordered_ops()
        if node.get_type_name() == "Constant"
    }
    found = {}
    for edge, tie in plan.edges.items():
        if plan.ties[tie].source != "weight":
            continue
        promised = stored_bits(plan, edge.consumer, plan.ties[tie].format.bits)
        stored = bits.get(f"{plan.stored_name(tie, edge.producer)}{QUANTIZED}", promised)
        if stored > promised:
            reason = f"its weight {edge.producer} takes {stored} bits in the file, not {promised}"
            found[edge.consumer] = reason
    return found


def user_name(name: str, outputs: Mapping[str, str], plan: Plan) -> str:
    """OpenVINO appends its own suffixes to the names of what it makes of an operator."""
    parts = [re.sub(rf"{AGAIN}\d+$", "", part) for part in name.split("/")]
    for count in range(len(parts), 0, -1):
        found = "/".join(parts[:count])
        if found in plan.nodes or found.endswith(QUANTIZED):
            return found
    last = parts[0].removesuffix(LAST)
    return outputs.get(last, name)
