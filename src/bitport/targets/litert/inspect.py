"""What a .tflite file runs: the operators and the types that they compute in, against what the plan wants."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ...plan import Plan
from ...plan.lower import BYTE, QUANTIZED
from ...rules import DECODED
from .._base import Inspection
from ._build import HALF
from ._flatbuffer import AGAIN, BITS, schema
from .reading import kind_of
from .table import HYBRID

INTEGER = " I8"  # after the kind of an operator that takes and gives 8-bit integers


def inspected(model: Any, plan: Plan) -> Inspection:
    """model: the file as the schema's classes."""
    s = schema()
    types = {value: key for key, value in vars(s.TensorType).items() if isinstance(value, int)}
    (graph,) = model.subgraphs
    kernels: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for step in graph.operators:
        called = kind_of(model, step)
        read = [types[graph.tensors[index].type] for index in step.inputs if index >= 0]
        made = types[graph.tensors[step.outputs[0]].type]
        if made == "INT8" and read[0] == "INT8":
            called += INTEGER
        elif called in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D") and read[1] in ("INT8", "INT4"):
            called += HYBRID
        counts[called] += 1
        name = re.sub(rf"{AGAIN}\d+$", "", graph.tensors[step.outputs[0]].name.decode())
        kernels.setdefault(_user_name(name, plan), []).append(called)
    missed = _wide(graph, types, plan)
    for name, todo in plan.nodes.items():
        if todo.kernel in (None, DECODED) or todo.role not in ("compute", "elementwise"):
            continue
        ran = [*kernels.get(name, []), *kernels.get(todo.absorbs or name, [])]
        wanted = f"{todo.kernel}{INTEGER}" if todo.mode is None else str(todo.kernel)
        if wanted not in ran:
            as_what = ", ".join(dict.fromkeys(ran)) or "nothing by that name"
            missed[name] = f"the file doesn't run it as {wanted}: it runs as {as_what}"
    integer = frozenset(kind for kind in counts if kind.endswith((INTEGER, HYBRID)))
    return Inspection({name: tuple(ran) for name, ran in kernels.items()}, counts, missed, integer)


def _user_name(name: str, plan: Plan) -> str:
    """What an operator of the file is part of: it bears the name of what it makes."""
    parts = name.split("/")
    for length in range(len(parts), 0, -1):
        found = "/".join(parts[:length])
        if found in plan.nodes:
            return found
    return name.removesuffix(QUANTIZED)


def _wide(graph: Any, types: dict[int, str], plan: Plan) -> dict[str, str]:
    """Operators whose weights take more bits in the file than the plan promises, with the reason."""
    bits = {
        tensor.name.decode(): BITS[types[tensor.type]]
        for tensor in graph.tensors
        if types[tensor.type] in BITS
    }
    found = {}
    for edge, tie in plan.edges.items():
        if plan.ties[tie].source != "weight":
            continue
        width, node = plan.ties[tie].format.bits, plan.node(edge.consumer)
        # XNNPACK's integer convolutions take no nibbles
        least = BYTE if node.mode is None and node.kernel != "FULLY_CONNECTED" else HALF
        promised = next(n for n in (least, BYTE, 2 * BYTE, 4 * BYTE) if width <= n)
        stored = bits.get(f"{plan.stored_name(tie, edge.producer)}{QUANTIZED}", promised)
        if stored > promised:
            found[edge.consumer] = (
                f"its weight {edge.producer} takes {stored} bits in the file, not {promised}"
            )
    return found
