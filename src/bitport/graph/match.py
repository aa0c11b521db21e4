"""One uniform reading of a node, whether it is a raised module or a functional aten call.

`classify` returns an `Op`: a canonical kind, the tensor operands in canonical slot order and the canonical
attributes. What there is to know about an operator is one row of `aten_table.ROWS` (functional calls) or of
`module_table.MODULES` (raised modules); this file only binds arguments and looks rows up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from bitport.errors import GraphError

SHAPE_TARGETS = frozenset({"sym_size", "sym_numel", "sym_stride", "sym_storage_offset"})


@dataclass(frozen=True)
class Operand:
    """One tensor operand of a node.

    `node` is the producing node of the fx graph (placeholder, operator or get_attr), or None when the
    tensor is
    owned by the raised module itself. `tensor` is the dotted name when the operand is a parameter or buffer.
    """

    node: fx.Node | None
    tensor: str | None = None


@dataclass(frozen=True)
class Op:
    """A node read canonically: kind, tensor operands by slot (None: absent, e.g. no bias), attributes."""

    kind: str
    operands: tuple[Operand | None, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


class Row(NamedTuple):
    """How to read one aten operator: its kind, the argument names that hold tensors, its attributes."""

    kind: str | Callable[[Call], str]
    slots: tuple[str, ...]
    attrs: Callable[[Call], dict[str, Any]]


class Call:
    """The arguments of one call_function node, by the names of the operator's schema, defaults filled in."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.args: dict[str, Any] = {}
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            self.args = {f"arg{i}": a for i, a in enumerate(node.args)} | dict(node.kwargs)
            return
        for i, arg in enumerate(schema.arguments):
            if not arg.kwarg_only and i < len(node.args):
                self.args[arg.name] = node.args[i]
            elif arg.name in node.kwargs:
                self.args[arg.name] = node.kwargs[arg.name]
            elif arg.has_default_value():
                self.args[arg.name] = arg.default_value

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def value(self, name: str) -> Any:
        """The example value (a fake tensor or number) of an argument, or None where there is none."""
        arg = self.args.get(name)
        return arg.meta.get("val") if isinstance(arg, fx.Node) else None

    @property
    def out(self) -> Any:
        return self.node.meta.get("val")

    def rank(self, name: str = "self") -> int | None:
        value = self.value(name)
        return value.dim() if isinstance(value, torch.Tensor) else None

    def dim(self, arg: Any, name: str = "self", extra: int = 0) -> Any:
        """`arg` (an axis or several) counted from the front, where the rank of `name` is known."""
        rank = self.rank(name)
        if arg is None or rank is None:
            return tuple(arg) if isinstance(arg, list | tuple) else arg
        rank = max(rank + extra, 1)
        if isinstance(arg, list | tuple):
            return tuple(a % rank for a in arg)
        return arg % rank

    def is_tensor(self, name: str) -> bool:
        return is_tensor(self.args.get(name))


def is_tensor(arg: Any) -> bool:
    """Whether an argument of a node is a tensor (as opposed to a number, a symbolic integer or a list)."""
    if not isinstance(arg, fx.Node):
        return False
    if "val" in arg.meta and arg.meta["val"] is not None:
        return isinstance(arg.meta["val"], torch.Tensor)
    return not is_shape(arg)


def is_shape(node: fx.Node) -> bool:
    """Whether a node computes a size (or arithmetic on sizes), not a tensor."""
    if node.op != "call_function":
        return False
    if op_name(node) in SHAPE_TARGETS:
        return True
    value = node.meta.get("val")
    if value is not None:
        return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)

    scalar = getattr(node.target, "__module__", "") in ("_operator", "math")
    args = [a for a in node.args if isinstance(a, fx.Node)]
    return scalar and node.target is not operator.getitem and all(is_shape(a) for a in args)


def op_name(node: fx.Node) -> str:
    """The bare operator name of a call_function node: `conv2d`, `add`, `getitem`; in-place underscore
    removed."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        name = str(packet.__name__)
        return name if name.startswith("_") else name.rstrip("_")
    return str(getattr(target, "__name__", target)).strip("_")


def operand_of(arg: Any) -> Operand | None:
    """`arg` as an operand; None when absent. A get_attr node gives its dotted tensor name as well."""
    if not isinstance(arg, fx.Node):
        return None
    return Operand(arg, str(arg.target) if arg.op == "get_attr" else None)


def _flat_tensors(arg: Any) -> list[Operand | None]:
    if isinstance(arg, list | tuple):
        return [operand_of(a) if is_tensor(a) else None for a in arg]
    return [operand_of(arg) if is_tensor(arg) else None]


def _strip(operands: list[Operand | None], keep: int) -> tuple[Operand | None, ...]:
    """Trailing absences are dropped beyond the canonical slots, so that `(x, None)` scalars read as
    `(x,)`."""
    while len(operands) > keep and operands[-1] is None:
        operands.pop()
    return tuple(operands)


def classify(graph_module: fx.GraphModule, node: fx.Node) -> Op:
    """Reads `node` canonically.

    Raises:
        GraphError: the node is no operator (placeholder, get_attr, output).
    """
    from bitport.graph.aten_table import ROWS
    from bitport.graph.module_table import classify_module

    if node.op == "call_module":
        return classify_module(graph_module, node)
    if node.op != "call_function":
        raise GraphError(f"{node.name} is a {node.op}, not an operator: only operators can be classified")
    if node.target is operator.getitem:
        return Op("getitem", (operand_of(node.args[0]),), {"index": node.args[1]})
    if is_shape(node):
        return Op("shape", tuple(operand_of(a) for a in node.args if is_tensor(a)), {"op": op_name(node)})
    call, name = Call(node), op_name(node)
    row = ROWS.get(name) if _is_aten(node.target) else ROWS.get(f"{_namespace(node.target)}::{name}")
    if row is None:
        operands = [o for a in node.all_input_nodes if is_tensor(a) for o in [operand_of(a)]]
        return Op(f"other:{name}", tuple(operands), dict(call.args))
    kind = row.kind if isinstance(row.kind, str) else row.kind(call)
    operands_: list[Operand | None] = []
    for slot in row.slots:
        operands_ += _flat_tensors(call[slot])
    keep = len(row.slots) if kind in FIXED_ARITY else 1
    return Op(kind, _strip(operands_, keep if row.slots else 0), row.attrs(call))


# kinds whose absent operands keep their slot, so that slot numbers mean the same thing everywhere
FIXED_ARITY = frozenset(
    [
        "conv",
        "conv_transpose",
        "linear",
        "batch_norm",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "instance_norm",
        "sdpa",
    ]
)


def _namespace(target: Any) -> str:
    return str(getattr(target, "namespace", ""))


def _is_aten(target: Any) -> bool:
    return _namespace(target) == "aten"
