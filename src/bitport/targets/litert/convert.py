"""A captured program → a TFLite file: each aten operator is a row of a table.

A dequantize writes nothing by itself: an operator that the plan runs in integers takes what is behind it, one that
stays in float gets a DEQUANTIZE. What depends on constants alone is computed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...errors import ExportError
from ...graph import Graph
from ...plan import Plan
from ...plan.lower import BYTE, QUANTIZED
from ...plan.ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, UNPACK
from ._build import HALF, Builder, Size, Value, plain
from ._flatbuffer import Quant

Row = Callable[["Call"], Any]


@dataclass(frozen=True)
class Dequantized:
    """Integers, read as numbers. source: a value, or a constant with the parameters `quant`; None: 16-bit floats."""

    source: Value | Tensor
    quant: Quant | None


@dataclass(frozen=True)
class Ranged:
    """A float that a kernel rounds by itself while it runs."""

    value: Value


class Call:
    """One operator of the program: arguments by the names of its schema, results by `give`.

    integer: it takes integers and leaves them as `out` says.
    """

    def __init__(self, converter: Converter, node: fx.Node) -> None:
        self.node, self.b, self.name = node, converter.builder, converter.name(node)
        self.names, self.converter = converter.names, converter
        self.args = converter.arguments(node)
        self.result = node.meta["val"]
        made = converter.integer_result(node, self.name, self.args)
        self.integer = made is not None
        self.quant: Quant | None = made[0] if made is not None else None
        self.label = made[1] if made is not None else self.name

    def __getitem__(self, key: str) -> Any:
        return self.args.get(key)

    @property
    def hybrid(self) -> bool:
        """Whether the kernel takes floats and stored weights: it rounds what it reads while it runs."""
        return isinstance(self.args.get("input"), Ranged)

    def memo(self, tensor: Tensor, key: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """A constant made of another; the same one each time it is asked for."""
        found = self.converter.made.setdefault((id(tensor), str(self.node.target), key), make(tensor))
        self.b.kept.append(tensor)
        return found

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def bits(self, tensor: Tensor) -> int:
        """4 where a constant's codes have as many, and the kernel takes them; XNNPACK's convolutions don't."""
        takes = not self.integer or self.node.target is torch.ops.aten.linear.default
        return self.converter.widths.get(id(tensor), BYTE) if takes else BYTE

    def follows(self) -> Quant:
        """How the reader of this operator's integers means them."""
        return self.converter.meaning(self.node)

    @property
    def shape(self) -> tuple[Size, ...]:
        """Of the result; of the first one where there are several."""
        first = self.result[0] if isinstance(self.result, tuple | list) else self.result
        return plain(first.shape)

    def rank(self, key: str) -> int:
        return len(shape_of(self.args[key]))

    def read(self, key: str, last: bool | None = None) -> Value:
        return self.take(self.args[key], last)

    def take(self, given: Any, last: bool | None = None) -> Value:
        """An argument as a tensor of the file: integers where this operator runs in integers. last: its layout."""
        value = self.b_value(given, bool(last))
        return value if last is None else self.b.arranged(value, last)

    def b_value(self, given: Any, last: bool) -> Value:
        if isinstance(given, Dequantized):
            if isinstance(given.source, Tensor):
                value = self.stored(given, last)
                return value if self.integer else self.b.real(value)
            return given.source if self.integer else self.b.real(given.source)
        if isinstance(given, Tensor):
            return self.b.constant(given, self.names.get(id(given), f"{self.name}/constant"), last=last)
        if isinstance(given, Ranged):
            return given.value
        if isinstance(given, Value):
            return self.b.real(given) if given.quant is not None and not self.integer else given
        raise ExportError(f"{self.name}: LiteRT can't be given {given!r} as a tensor")

    def stored(self, given: Dequantized, last: bool = False) -> Value:
        """A quantized constant, as it is in the file."""
        assert isinstance(given.source, Tensor)
        return self.b.constant(given.source, self.constant_name(given), quant=given.quant, last=last)

    def constant_name(self, given: Dequantized) -> str:
        return self.names.get(id(given.source), f"{self.name}/constant")

    def give(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        shape: Sequence[Size] | None = None,
        *,
        last: bool = False,
        options: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        quant: Quant | None = None,
    ) -> Value:
        """The operator that makes the result (or, with a shape of its own, what it is made of)."""
        shape = self.shape if shape is None else shape
        if self.integer:
            return self.b.emit(
                kind, inputs, shape, name=self.label, dtype=torch.int8, quant=quant or self.quant, last=last,
                options=options,
            )  # fmt: skip
        if dtype is None:
            dtype = self.result.dtype if isinstance(self.result, Tensor) else torch.float32
        return self.b.emit(
            kind, inputs, shape, name=self.name, dtype=dtype, quant=quant, last=last, options=options
        )

    def step(self, kind: str, inputs: Sequence[Value | None], shape: Sequence[Size], **options: Any) -> Value:
        """An operator in between, of the inputs' type unless told otherwise."""
        last = options.pop("last", False)
        first = next(v for v in inputs if v is not None)
        dtype = options.pop("dtype", first.dtype)
        return self.b.emit(
            kind, inputs, shape, name=f"{self.name}/{kind.lower()}", dtype=dtype, quant=first.quant, last=last,
            options=options or None,
        )  # fmt: skip


class Converter:
    """Walks through a program.

    Args:
        rows: aten operator → what writes it. names: of constants in the program's state.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        graph: Graph,
        plan: Plan,
        rows: Mapping[Any, Row],
        names: Mapping[str, str],
        *,
        integer_io: bool = False,
    ) -> None:
        self.program, self.graph, self.plan, self.rows = program, graph, plan, rows
        self.integer_io = integer_io
        self.names: dict[int, str] = {}
        self.widths: dict[int, int] = {}  # bits in which codes are stored that are narrower than their type
        self.made: dict[tuple[int, str, str], Tensor] = {}
        self.env: dict[fx.Node, Any] = {}
        self.builder = Builder(self._symbols())
        self._load(names)

    def run(self) -> bytes:
        """The file's bytes. Raises ExportError naming an operator that there is no row for."""
        for node in self.program.graph.nodes:
            if node.op == "call_function" and (node.users or node.target is QUANTIZE):
                self.env[node] = self._call(node)
        ends: list[tuple[str, int]] = []
        (output,) = self.program.graph.find_nodes(op="output")
        sources = [value.index for _, value in self.inputs]
        for spec, node in zip(self.graph.outputs, output.args[0], strict=True):
            value = self._end(self.env[node], spec.name, [*sources, *(index for _, index in ends)])
            ends.append((spec.name, value.index))
        return self.builder.file.content([(name, value.index) for name, value in self.inputs], ends)

    def _end(self, given: Any, name: str, taken: Sequence[int]) -> Value:
        """An output under its own name, with the channels where the network has them."""
        b = self.builder
        if isinstance(given, Dequantized) and isinstance(given.source, Value):
            given = given.source if self.integer_io else b.real(given.source)
        elif self.integer_io and isinstance(given, Value) and given.dtype.is_floating_point:
            raise ExportError(f"io = 'integer': output {name!r} is no integer in the file; use io = 'float'")
        if isinstance(given, Tensor):
            given = b.constant(given, f"{name}/constant")
        value = b.arranged(given, False)
        tensor = b.file.tensors[value.index]
        if value.index in taken or tensor.buffer or str(tensor.name).endswith(QUANTIZED):
            value = b.reshaped(value, value.shape, name=name)
        return value

    # ------------------------------------------------------------------ what is known beforehand

    def _symbols(self) -> dict[Any, int]:
        """Dynamic axes as they are in the file: one sample, and other axes as in the example."""
        found: dict[Any, int] = {}
        placeholders = {node.name: node for node in self.program.graph.find_nodes(op="placeholder")}
        for name in self.program.graph_signature.user_inputs:
            shape = placeholders[str(name)].meta["val"].shape
            for axis, size in enumerate(shape):
                if not isinstance(size, int):
                    for symbol in size.node.expr.free_symbols:
                        found.setdefault(symbol, 1 if axis == 0 else int(size.node.hint))
        return found

    def _load(self, names: Mapping[str, str]) -> None:
        signature, program = self.program.graph_signature, self.program
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        specs = iter(self.graph.inputs)
        self.inputs: list[tuple[str, Value]] = []
        for node in program.graph.find_nodes(op="placeholder"):
            if node.name in held or node.name in constants:
                key = held.get(node.name) or constants[node.name]
                value = program.state_dict[key] if key in program.state_dict else program.constants[key]
                value = value.detach()
                self.env[node] = value
                self.names[id(value)] = names.get(key.removeprefix("module."), key)
                continue
            spec = next(specs)
            shape, dtype = plain(node.meta["val"].shape), node.meta["val"].dtype
            quant = (
                self._integer_input(node, spec.name) if self.integer_io and dtype.is_floating_point else None
            )
            dtype = dtype if quant is None else torch.int8
            value = self.builder.empty(shape, spec.name, dtype, quant)
            self.inputs.append((spec.name, value))
            self.env[node] = value

    def _integer_input(self, node: fx.Node, name: str) -> Quant | None:
        """How an input is given as integers. Raises ExportError for one that is read as floats."""
        readers = [user for user in node.users if user.target is not torch.ops.aten.sym_size.int]
        if not readers:
            return None
        if any(user.target is not QUANTIZE for user in readers):
            raise ExportError(f"io = 'integer': input {name!r} is read as float; use io = 'float'")
        asked = self.arguments_of_quantize(readers[0])
        return self._parameters(asked, asked["low"], asked["high"])

    # ------------------------------------------------------------------ operators

    def name(self, node: fx.Node) -> str:
        """The user's name of what a node came from."""
        stack = node.meta.get("nn_module_stack") or {}
        return next((path for path, _ in stack.values() if path), node.name)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, values in place of nodes, defaults filled in."""
        target: Any = node.target
        found = {}
        for index, parameter in enumerate(target._schema.arguments):
            if index < len(node.args):
                given = node.args[index]
            elif parameter.name in node.kwargs:
                given = node.kwargs[parameter.name]
            else:
                given = parameter.default_value if parameter.has_default_value() else None
            found[parameter.name] = fx.map_arg(given, self.env.__getitem__)
        return found

    def _call(self, node: fx.Node) -> Any:
        target, value = node.target, node.meta.get("val")
        if value is None or isinstance(
            value, int | float | bool | torch.SymInt | torch.SymBool | torch.SymFloat
        ):
            return value
        if target is operator.getitem:
            return self._source(node)[node.args[1]]
        if target is QUANTIZE:
            return self._quantize(node)
        if target is DEQUANTIZE:
            return self._dequantize(node)
        if target is QUANTIZE_DYNAMIC:
            return (Ranged(self._real(self._source(node))), None, None)
        if target is torch.ops.aten.to.dtype and _is_half(self._source(node)):
            return Dequantized(self._source(node), None)
        known = self._computed(node)
        if known is not None:
            if target is UNPACK:
                bits = self.arguments(node)["bits"]
                self.widths[id(known)] = HALF if bits <= HALF else BYTE
            return known
        row = self.rows.get(target)
        if row is None:
            raise ExportError(
                f"{self.name(node)}: LiteRT has no operator for {target}, or bitport doesn't write it: keep this part "
                "out of the network, or choose another target"
            )
        return row(Call(self, node))

    def _source(self, node: fx.Node) -> Any:
        """What its first argument stands for."""
        first = node.args[0]
        return self.env[first] if isinstance(first, fx.Node) else first

    def _real(self, given: Any) -> Value:
        if isinstance(given, Dequantized):
            given = given.source
        assert isinstance(given, Value)
        return self.builder.real(given)

    def _computed(self, node: fx.Node) -> Any:
        """The result of an operator of constants alone."""
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        if any(isinstance(leaf, torch.SymInt) for leaf in leaves):
            return None
        given = [self.env[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]
        if not all(isinstance(value, Tensor | int | float | bool) for value in given):
            return None
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        with torch.no_grad():
            found = node.target(*args, **kwargs)
        given_names = [self.names[id(value)] for value in given if id(value) in self.names]
        return self._named(found, given_names[0] if len(given_names) == 1 else self.name(node))

    def _named(self, found: Any, name: str) -> Any:
        for value in pytree.tree_leaves(found):
            if isinstance(value, Tensor):
                self.names.setdefault(id(value), name)
                self.builder.kept.append(value)
        return found

    # ------------------------------------------------------------------ rounding

    def _parameters(self, args: Mapping[str, Any], low: int = -128, high: int = 127) -> Quant:
        scale, zero_point, axis = args["scale"], args["zero_point"], args["axis"]
        return Quant(scale.numpy(), zero_point.numpy(), low, high, axis if scale.dim() else None)

    def _quantize(self, node: fx.Node) -> Value:
        args = self.arguments(node)
        quant, given, label = self._parameters(args, args["low"], args["high"]), args["x"], self.name(node)
        if isinstance(given, Value) and given.quant is not None and given.quant.same(quant):
            made = given
        else:
            dtype = args["zero_point"].dtype
            real = given.source if isinstance(given, Dequantized) else given
            if isinstance(real, Tensor):
                real = self.builder.constant(real, f"{label}/real")
            made = self.builder.quantized(real, quant, dtype, self._unclamped(label, quant, dtype))
        return self._clamped(made, quant, label)

    def _unclamped(self, label: str, quant: Quant, dtype: torch.dtype) -> str:
        limits = torch.iinfo(dtype)
        return label if (quant.low, quant.high) == (limits.min, limits.max) else f"{label}/wide"

    def _clamped(self, value: Value, quant: Quant, label: str) -> Value:
        """A format narrower than its type is carried in it: the integers themselves are clamped."""
        limits = torch.iinfo(value.dtype)
        for kind, end, limit in (("MAXIMUM", quant.low, limits.min), ("MINIMUM", quant.high, limits.max)):
            if end != limit:
                bound = self.builder.constant(
                    torch.tensor(end, dtype=value.dtype), f"{label}/{kind.lower()}", quant=quant
                )
                name = label if kind == "MINIMUM" or quant.high == limits.max else f"{label}/raised"
                value = self.builder.emit(
                    kind, [value, bound], value.shape, name=name, dtype=value.dtype, quant=quant, last=value.last,
                    options={"table": "MaximumMinimum"},
                )  # fmt: skip
        return value

    def _dequantize(self, node: fx.Node) -> Any:
        args = self.arguments(node)
        given = args["q"]
        if isinstance(given, Ranged):
            return given
        quant = self._parameters(args)
        if isinstance(given, Value) and not quant.same(given.quant):
            given = self._relabelled(given, quant, self.name(node))
        return Dequantized(given, quant)

    def _relabelled(self, value: Value, quant: Quant, name: str) -> Value:
        """The same integers, meant otherwise."""
        b = self.builder
        there = (
            [value.shape[dim] for dim in range(value.rank)] if not value.last else value.stored(value.shape)
        )
        target = b.target(there, name)
        return b.emit(
            "RESHAPE", [replace(value, quant=None), b.integers(target)], value.shape, name=f"{name}/scaled",
            dtype=value.dtype, quant=quant, last=value.last, options={"table": "Reshape", "newShape": target},
        )  # fmt: skip

    def integer_result(self, node: fx.Node, name: str, args: Mapping[str, Any]) -> tuple[Quant, str] | None:
        """How an operator that the plan runs in integers leaves them, and under which name; None: in float."""
        todo = self.plan.node(name)
        if todo.kernel is None or todo.mode is not None or todo.role not in ("compute", "elementwise"):
            return None
        users = list(node.users)
        if len(users) != 1 or users[0].target is not QUANTIZE:
            return None
        given = [
            leaf
            for leaf in pytree.tree_leaves(tuple(args.values()), is_leaf=_is_operand)
            if _is_operand(leaf)
        ]
        if not given or not all(isinstance(leaf, Dequantized) for leaf in given):
            return None
        asked = self.arguments_of_quantize(users[0])
        quant = self._parameters(asked, asked["low"], asked["high"])
        label = self.name(users[0])
        return quant, self._unclamped(label, quant, asked["zero_point"].dtype)

    def meaning(self, node: fx.Node) -> Quant:
        """What the first dequantize behind a node of integers says of them."""
        todo = [node]
        while todo:
            at = todo.pop(0)
            for user in at.users:
                if user.target is DEQUANTIZE:
                    found = {"scale": user.args[1], "zero_point": user.args[2], "axis": user.args[3]}
                    return self._parameters(fx.map_arg(found, lambda n: self.env[n]))
                todo.append(user)
        raise ExportError(f"{self.name(node)}: integers that nobody reads as numbers")

    def arguments_of_quantize(self, node: fx.Node) -> dict[str, Any]:
        """Of a quantize whose input isn't there yet."""
        names = [parameter.name for parameter in QUANTIZE._schema.arguments]
        read = {name: given for name, given in zip(names, node.args, strict=False) if name != "x"}
        return {name: fx.map_arg(given, lambda n: self.env[n]) for name, given in read.items()}


def _is_half(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype == torch.float16


def _is_operand(given: Any) -> bool:
    return isinstance(given, Dequantized | Value | Tensor | Ranged)


def shape_of(given: Any) -> tuple[Size, ...]:
    """The logical shape of an argument."""
    if isinstance(given, Dequantized):
        given = given.source
    if isinstance(given, Ranged):
        given = given.value
    return plain(given.shape)
