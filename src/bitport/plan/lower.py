"""Plan → a graph of `bitport::quantize` / `bitport::dequantize` operators, ready for a target's exporter.

Integer producers leave as integers; each use has a dequantize of its own (a shared one makes runtimes refuse or
miss fusions). Operators that only move values run on the integers themselves: nothing has to be fused there.
An absorbed ReLU vanishes, since the quantize's saturation at the zero point is the ReLU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import GraphError
from ..graph import Edge, Graph, Op, Operand
from ..graph.reading import made_by, present, producer_name
from ..graph.simplify import CONTRACTIONS
from .constants import constant_integers, is_plain
from .decisions import CLAMPS
from .model import NodePlan, Plan
from .ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC, code_type
from .stored import StoredWeights

BYTE = 8  # bits
QUANTIZED = "/q"  # suffix of a quantized tensor's name in a model file
# Moves that a runtime's optimizer swaps with a quantize, and clamps that it drops in front of one: so it fuses what is
# before them.
LOOKED_THROUGH = frozenset(
    {"view", "transpose", "squeeze", "unsqueeze", "expand", "slice", "select", *CLAMPS}
)
CONVOLUTIONS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("conv", 1): torch.ops.aten.conv1d.default,
    ("conv", 2): torch.ops.aten.conv2d.default,
    ("conv", 3): torch.ops.aten.conv3d.default,
    ("conv_transpose", 1): torch.ops.aten.conv_transpose1d.default,
    ("conv_transpose", 2): torch.ops.aten.conv_transpose2d.input,
    ("conv_transpose", 3): torch.ops.aten.conv_transpose3d.input,
}


@dataclass(frozen=True)
class Lowered:
    """A module of plain operators and q/dq pairs.

    Attributes:
        module: takes the flat inputs, returns the flat outputs as a tuple.
        quantized: producer names whose integers exist in the module, in order.
        names: attribute of a constant in the module → its user-facing name.
    """

    module: fx.GraphModule
    quantized: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


def lower(
    graph: Graph,
    plan: Plan,
    *,
    dtype: torch.dtype = torch.int8,
    offset: int = 0,
    flatten_linear: bool = False,
    barriers: frozenset[str] = frozenset(),
    swallowed: frozenset[str] = frozenset(),
    detours: frozenset[str] = frozenset(),
    apart: frozenset[tuple[str, str]] = frozenset(),
    passed: frozenset[str] = frozenset(),
) -> Lowered:
    """Lower `graph` under `plan`; neither is changed.

    Args:
        dtype: storage type of activations in the model file.
        offset: added to activations' integers and zero points (128 with uint8).
        flatten_linear: run Linear above 2-D on flattened rows, with a bias of zeros where it has none.
        barriers: kinds that the runtime would fuse although the plan keeps them in float; a maximum with the
            lowest float behind them changes no value and stops that.
        swallowed: kinds that the runtime fuses with the dequantize in front of them alone, although the plan keeps
            them in float: a barrier behind them comes too late.
        detours: kinds of moves that run on dequantized values between two such barriers, because the runtime
            is slow on integers; the integers stay the same.
        apart: (producer's kind, consumer's kind) that the runtime would merge wrongly in float.
        passed: kinds of float moves that the runtime would carry a quantize through, into an output of the network.

    Raises:
        GraphError: the plan speaks of edges that the graph doesn't have, or of unmeasured ranges.
    """
    return _Lowering(
        graph, plan, dtype, offset, flatten_linear, barriers, swallowed, detours, apart, passed
    ).run()


class _Lowering:
    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        dtype: torch.dtype,
        offset: int,
        flatten_linear: bool,
        barriers: frozenset[str],
        swallowed: frozenset[str],
        detours: frozenset[str],
        apart: frozenset[tuple[str, str]],
        passed: frozenset[str],
    ) -> None:
        self.graph, self.plan, self.barriers, self.detours = graph, plan, barriers, detours
        self.swallowed = swallowed
        self.apart, self.passed = apart, passed
        self.ends = set(graph.output_nodes())
        self.dtype, self.offset, self.flatten_linear = dtype, offset, flatten_linear
        self.new = fx.Graph()
        self.root = torch.nn.Module()
        self.floats: dict[fx.Node, fx.Node] = {}
        self.ints: dict[fx.Node, fx.Node] = {}
        self.buffers: dict[str, fx.Node] = {}
        self.modules: dict[str, str] = {}
        self.quantized: list[str] = []
        self.names: dict[str, str] = {}
        self.weights = StoredWeights(graph, plan, self._buffer, self._call)
        self.flattened: dict[fx.Node, list[fx.Node | int]] = {}

    def run(self) -> Lowered:
        for node in self.graph.gm.graph.nodes:
            if node.op == "placeholder":
                new = self.new.placeholder(node.name)
                new.meta["val"] = node.meta.get("val")
                self._leave(node, new)
            elif node.op == "get_attr":
                continue  # fetched where a float operator reads it
            elif node.op == "output":
                self._output(node)
            else:
                self._operator(node)
        module = fx.GraphModule(self.root, self.new)
        module.graph.lint()
        return Lowered(module, tuple(self.quantized), self.names)

    # ------------------------------------------------------------------ operators

    def _operator(self, node: fx.Node) -> None:
        name = self.graph.name(node)
        op, todo = self.graph.op(node), self.plan.node(name)
        if todo.absorbed_by is not None:
            source = op.operands[0]
            assert source is not None and source.node is not None
            new = self.floats.pop(source.node)
            self._leave(node, new)
        elif todo.role == "scaled":
            self.ints[node] = self.ints[made_by(op, 0)]
        elif todo.role == "move":
            self.ints[node] = self._move(node, op, name)
        elif todo.kernel is not None:
            self._leave(node, self._integer(node, op, name, todo))
        else:
            self._leave(node, self._in_float(node, op, name))

    def _in_float(self, node: fx.Node, op: Op, name: str) -> fx.Node:
        """The operator in float, kept apart where the runtime would fuse it with the q/dq around it."""
        reads_integers = self._reads_integers(name, op)
        fusible = op.kind in self.barriers and reads_integers
        if op.kind in self.swallowed and reads_integers:
            apart = {n: self._barrier(self._read(n, name, op), name) for n in (made_by(op, 0),)}
            return self._copy(node, lambda n: apart[n] if n in apart else self._read(n, name, op))
        through = op.kind in self.passed and self._meets_quantize(node)
        kept = {
            n
            for n in node.all_input_nodes
            if (self._kind(n), op.kind) in self.apart or (through and n in self.ends)
        }
        read = {n: self._barrier(self._read(n, name, op), name) for n in kept}
        new = self._copy(node, lambda n: read[n] if n in read else self._read(n, name, op))
        return self._barrier(new, name) if fusible and self._is_rounded(node) else new

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether a float result is quantized, itself or behind float moves that a runtime looks through."""
        if self.plan.tie_of(self.graph.name(node)) is not None:
            return True
        return any(
            self._kind(user) in LOOKED_THROUGH and self._is_rounded(user)
            for user in node.users
            if user.op != "output"
        )

    def _meets_quantize(self, node: fx.Node) -> bool:
        """Whether a float move's result is quantized, at once or behind further moves."""
        if self.plan.tie_of(self.graph.name(node)) is not None:
            return True
        return any(self._kind(user) in self.passed and self._meets_quantize(user) for user in node.users)

    def _kind(self, node: fx.Node) -> str:
        return self.graph.op(node).kind if node.op in ("call_function", "call_module") else node.op

    def _barrier(self, value: fx.Node, name: str) -> fx.Node:
        lowest = self._buffer("lowest", torch.tensor(torch.finfo(torch.float32).min))
        return self._call(f"{name}/barrier", torch.ops.aten.maximum.default, (value, lowest))

    def _reads_integers(self, name: str, op: Op) -> bool:
        # a runtime may quantize weights by itself where only the input and the output are integers
        operands = op.operands[:1] if op.kind in CONTRACTIONS else op.operands
        reads = [
            Edge(producer_name(self.graph, o), name, slot) in self.plan.edges
            for slot, o in enumerate(operands)
            if o
        ]
        return bool(reads) and all(reads)

    def _leave(self, node: fx.Node, new: fx.Node) -> None:
        """Register a float result, and its integers where the plan wants them."""
        self.floats[node] = new
        name = self.graph.name(node)
        if self.plan.node(name).absorbs is not None:
            return  # the absorbed ReLU's result is quantized instead
        tie = self.plan.tie_of(name)
        leading = self.flattened.get(new)
        if tie is not None:
            self.ints[node] = self._quantize(new, tie, name)
            if leading is not None:
                self.ints[node] = self._unflatten(name, self.ints[node], leading)
        elif leading is not None:
            self.floats[node] = self._unflatten(name, new, leading)

    def _move(self, node: fx.Node, op: Op, name: str) -> fx.Node:
        """The operator itself, on integers."""
        tie = self.plan.tie_of(name)
        sources = {
            operand.node: self._int_operand(operand, name, slot)
            for slot, operand in enumerate(op.operands)
            if operand is not None
            and operand.node is not None
            and Edge(producer_name(self.graph, operand), name, slot) in self.plan.edges
        }
        if op.kind == "embedding":
            weight = op.operands[1]
            assert weight is not None
            table = self._int_operand(weight, name, 1)
            return self._call(
                name, torch.ops.aten.embedding.default, (table, self._read_float(made_by(op, 0)))
            )
        if op.kind in self.detours and tie is not None:
            reals = {
                n: self._barrier(self._dequantize(q, tie, constant=False, name=name), name)
                for n, q in sources.items()
            }
            moved = self._copy(node, lambda n: reals[n] if n in reals else self._read(n, name, op))
            return self._requantize(self._barrier(moved, name), tie, f"{name}/back")
        if op.kind == "pad" and tie is not None:
            _, zero_point = self.plan.ties[tie].parameters()
            args = (next(iter(sources.values())), list(op.attrs["pad"]), int(zero_point) + self.offset)
            return self._call(name, torch.ops.aten.constant_pad_nd.default, args)
        return self._copy(node, lambda n: sources[n] if n in sources else self._read(n, name, op))

    def _integer(self, node: fx.Node, op: Op, name: str, todo: NodePlan) -> fx.Node:
        """DQ → operator; the quantize follows where the result is left."""
        reads: list[fx.Node | None] = []
        leading: list[fx.Node | int] | None = None
        for slot, operand in enumerate(op.operands):
            if operand is None:
                reads.append(None)
                continue
            tie = self.plan.edges.get(Edge(producer_name(self.graph, operand), name, slot))
            if tie is None or (todo.mode is not None and operand.tensor is None):
                reads.append(self._float_operand(operand, tie, name, op))
                continue
            if operand.tensor is not None and (
                todo.mode is not None or not is_plain(self.plan.ties[tie].format)
            ):
                reads.append(self.weights.decoded(operand.tensor, tie, name))
                continue
            integers = self._int_operand(operand, name, slot)
            if op.kind == "conv" and slot == 0 and isinstance(op.attrs["padding"], str):
                _, zero_point = self.plan.ties[tie].parameters()
                integers = self._pad_unevenly(integers, op, int(zero_point) + self.offset, name)
            if op.kind == "linear" and slot == 0 and self.flatten_linear and self._rank(operand) != 2:
                out_features, width = self.graph.tensor(producer_name(self.graph, present(op, 1))).shape
                leading = [
                    self._call(f"{name}/size", torch.ops.aten.sym_size.int, (integers, axis))
                    for axis in range(self._rank(operand) - 1)
                ]
                leading.append(out_features)
                integers = self._call(f"{name}/rows", torch.ops.aten.reshape.default, (integers, [-1, width]))
            reads.append(self._dequantize(integers, tie, constant=operand.tensor is not None, name=name))
        if op.kind == "conv" and todo.mode is not None and isinstance(op.attrs["padding"], str):
            assert reads[0] is not None
            reads[0] = self._pad_unevenly(reads[0], op, 0, name)
        if op.kind in ("conv", "conv_transpose"):
            new = self._convolution(op, name, reads)
        elif op.kind == "linear":
            if reads[2] is None and self.flatten_linear and todo.mode is None:
                reads[2] = self._no_bias(op, name)
            new = self._call(name, torch.ops.aten.linear.default, tuple(reads))
            if leading is not None:
                self.flattened[new] = leading
        elif op.kind == "embedding":
            new = self._call(name, torch.ops.aten.embedding.default, (reads[1], reads[0]))
        elif node.op == "call_module":
            raise GraphError(f"{name}: a module of kind {op.kind} can't be lowered to integers")
        else:
            sources = {
                operand.node: read
                for operand, read in zip(op.operands, reads, strict=True)
                if operand is not None and operand.node is not None and read is not None
            }
            new = self._copy(node, lambda n: sources[n] if n in sources else self._read(n, name, op))
        return new

    def _float_operand(self, operand: Operand, tie: str | None, name: str, op: Op) -> fx.Node:
        """What a kernel that takes floats reads; rounded first where its range is taken while running."""
        if operand.tensor is not None:
            return self._buffer(operand.tensor, self.graph.tensor(operand.tensor))
        assert operand.node is not None
        if tie is None:
            return self._read_float(operand.node)
        if self.plan.ties[tie].source != "dynamic":
            value = self._dequantize(self.ints[operand.node], tie, constant=False, name=f"{name}/x")
            # else the runtime might take the stored weights and these integers for a kernel of its own
            return self._barrier(value, name) if op.kind in self.barriers else value
        source, producer = operand.node, self.graph.name(operand.node)
        if self.plan.makes_integers(producer):
            made_as = self.plan.tie_of(producer)
            assert made_as is not None
            value = self._dequantize(self.ints[source], made_as, constant=False, name=name)
        else:
            value = self._read_float(source)
        fmt = self.plan.ties[tie].format
        bounds = (fmt.low + self.offset, fmt.high + self.offset)
        parts = self._call(f"{name}/ranged", QUANTIZE_DYNAMIC, (value, *bounds))
        q, scale, zero_point = (
            self._call(f"{name}/ranged", operator.getitem, (parts, index)) for index in range(3)
        )
        return self._call(f"{name}/dq", DEQUANTIZE, (q, scale, zero_point, -1))

    def _pad_unevenly(self, values: fx.Node, op: Op, zero: int, name: str) -> fx.Node:
        """`padding="same"` with an even kernel: one more zero behind than in front, as torch does."""
        kernel = self.graph.tensor(producer_name(self.graph, present(op, 1))).shape[2:]
        pads: list[int] = []
        for size, dilation in zip(reversed(kernel), reversed(op.attrs["dilation"]), strict=True):
            total = dilation * (size - 1)
            pads += [total // 2, total - total // 2]
        args = (values, pads, zero)
        return self._call(f"{name}/pad", torch.ops.aten.constant_pad_nd.default, args)

    def _no_bias(self, op: Op, name: str) -> fx.Node:
        """A bias of integer zeros: with it a Linear is one fused kernel."""
        weight = present(op, 1)
        w_tie = self.plan.ties[self.plan.edges[Edge(producer_name(self.graph, weight), name, 1)]]
        x_tie = self.plan.ties[self.plan.edges[Edge(producer_name(self.graph, present(op, 0)), name, 0)]]
        scale = x_tie.parameters()[0] * w_tie.parameters()[0]
        zeros = torch.zeros(self.graph.tensor(producer_name(self.graph, weight)).shape[0], dtype=torch.int32)
        read = (
            self._buffer(f"{name}.bias/q", zeros),
            self._buffer(f"{name}.bias/scale", scale),
            self._buffer(f"{name}.bias/zero_point", torch.zeros_like(scale, dtype=torch.int32)),
        )
        return self._call(f"{name}/dq", DEQUANTIZE, (*read, 0 if scale.ndim else -1))

    def _unflatten(self, name: str, value: fx.Node, shape: list[fx.Node | int]) -> fx.Node:
        """Give a flattened Linear's rows their leading axes back."""
        return self._call(f"{name}/unflatten", torch.ops.aten.reshape.default, (value, shape))

    def _convolution(self, op: Op, name: str, reads: list[fx.Node | None]) -> fx.Node:
        a = op.attrs
        target = CONVOLUTIONS[op.kind, a["ndim"]]
        # uneven padding was done on the integers
        padding = [0] * a["ndim"] if isinstance(a["padding"], str) else list(a["padding"])
        geometry: tuple[Any, ...] = (list(a["stride"]), padding)
        if op.kind == "conv_transpose":
            geometry += (list(a["output_padding"]), a["groups"], list(a["dilation"]))
        else:
            geometry += (list(a["dilation"]), a["groups"])
        return self._call(name, target, (*reads, *geometry))

    def _output(self, node: fx.Node) -> None:
        results = []
        for index, value in enumerate(self.graph.output_nodes()):
            tie = self.plan.edges.get(Edge(self.graph.name(value), "output", index))
            if tie is not None:
                results.append(
                    self._dequantize(self.ints[value], tie, constant=False, name=self.graph.name(value))
                )
            else:
                results.append(self._read_float(value))
        self.new.output(tuple(results))

    # ------------------------------------------------------------------ values

    def _read(self, source: fx.Node, consumer: str, op: Op) -> fx.Node:
        """A float operator's view of an operand: dequantized where the edge is planned."""
        if source.op != "get_attr":
            for slot, operand in enumerate(op.operands):
                if operand is not None and operand.node is source:
                    tie = self.plan.edges.get(Edge(self.graph.name(source), consumer, slot))
                    if tie is not None:
                        return self._dequantize(self.ints[source], tie, constant=False, name=consumer)
        return self._read_float(source)

    def _read_float(self, source: fx.Node) -> fx.Node:
        if source.op == "get_attr":
            return self._buffer(str(source.target), self.graph.tensor(str(source.target)))
        if source not in self.floats:
            name = self.graph.name(source)
            tie = self.plan.tie_of(name)
            assert tie is not None
            return self._dequantize(self.ints[source], tie, constant=False, name=name)
        return self.floats[source]

    def _int_operand(self, operand: Operand, consumer: str, slot: int) -> fx.Node:
        if operand.tensor is None:
            assert operand.node is not None
            return self.ints[operand.node]
        tie_name = self.plan.edges[Edge(operand.tensor, consumer, slot)]
        tie = self.plan.ties[tie_name]
        q = constant_integers(self.graph, self.plan, operand.tensor, tie_name).q
        if tie.source == "bias":
            return self._buffer(f"{tie_name}/q", q)
        if tie.source == "weight":
            return self.weights.stored(f"{self.weights.name(tie_name, operand.tensor)}/q", q, tie.format)
        return self._buffer(f"{operand.tensor}/q", (q + self.offset).to(self.dtype))

    def _rank(self, operand: Operand) -> int:
        assert operand.node is not None
        shape = self.graph.shape(operand.node)
        return len(shape) if shape is not None else 0

    def _quantize(self, value: fx.Node, tie_name: str, name: str) -> fx.Node:
        self.quantized.append(name)
        return self._requantize(value, tie_name, name + QUANTIZED)

    def _requantize(self, value: fx.Node, tie_name: str, label: str) -> fx.Node:
        tie = self.plan.ties[tie_name]
        scale, zero_point = self._parameters(tie_name, constant=False)
        _, offset = self._storage(tie_name)
        bounds = (tie.format.low + offset, tie.format.high + offset)
        return self._call(label, QUANTIZE, (value, scale, zero_point, *bounds, -1))

    def _dequantize(self, value: fx.Node, tie_name: str, *, constant: bool, name: str) -> fx.Node:
        scale, zero_point = self._parameters(tie_name, constant=constant)
        axis = self.plan.ties[tie_name].format.axis
        return self._call(f"{name}/dq", DEQUANTIZE, (value, scale, zero_point, -1 if axis is None else axis))

    def _parameters(self, tie_name: str, *, constant: bool) -> tuple[fx.Node, fx.Node]:
        tie = self.plan.ties[tie_name]
        scale, zero_point = tie.parameters()
        if tie.source == "bias":
            stored = zero_point.to(torch.int32)
        elif tie.source == "weight":
            stored = zero_point.to(code_type(tie.format.low, tie.format.high))
        else:
            dtype, offset = self._storage(tie_name)
            stored = (zero_point + offset).to(dtype)
        return self._buffer(f"{tie_name}/scale", scale), self._buffer(f"{tie_name}/zero_point", stored)

    def _storage(self, tie_name: str) -> tuple[torch.dtype, int]:
        """(type, offset) of an activation's integers in the file: wider ones than bytes are signed everywhere."""
        wide = self.plan.ties[tie_name].format.bits > BYTE
        return (torch.int16, 0) if wide else (self.dtype, self.offset)

    def _buffer(self, name: str, value: Tensor) -> fx.Node:
        if name not in self.buffers:
            attribute = f"b{len(self.buffers)}"
            self.root.register_buffer(attribute, value.detach().clone())
            self.names[attribute] = name
            at_start = next(iter(self.new.nodes), None)
            if at_start is None:
                self.buffers[name] = self.new.get_attr(attribute)
            else:
                with self.new.inserting_before(at_start):
                    self.buffers[name] = self.new.get_attr(attribute)
        return self.buffers[name]

    def _copy(self, node: fx.Node, read: Callable[[fx.Node], fx.Node]) -> fx.Node:
        new = self.new.node_copy(node, read)
        if node.op == "call_module":
            # one copy of a module that is called twice, so that its weights are stored once
            target = self.modules.setdefault(str(node.target), f"m{len(self.modules)}")
            module = self.graph.gm.get_submodule(str(node.target))
            self.root.add_module(target, module)
            self.names |= {
                f"{target}.{name}": f"{node.target}.{name}" for name, _ in module.named_parameters()
            }
            new.target = target
        return _named(new, self.graph.name(node))

    def _call(self, name: str, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        return _named(self.new.call_function(target, args), name)


def _named(node: fx.Node, name: str) -> fx.Node:
    """The user's name of an operator travels through export in `nn_module_stack`."""
    node.meta = {"nn_module_stack": {"": (name, "torch.nn.Module")}}
    return node
