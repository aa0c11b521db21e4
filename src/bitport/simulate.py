"""The exact simulator: graph + plan + one runtime's arithmetic → the integers that runtime computes.

It interprets the float graph operator by operator. An operator that the plan runs in integers is handed to the
target's own formula; one without a formula, and every float operator, runs in float32 on dequantized operands
and is quantized after it. It is the oracle that a runtime's integers are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .errors import GraphError
from .graph import Edge, Graph, Op, Operand
from .graph.reading import made_by, present, producer_name
from .numerics.arithmetic import Call, QSpec, QTensor, quantize
from .numerics.dynamic import quantize_dynamic
from .plan import NodePlan, Plan
from .plan.constants import Coded, constant_codes, constant_integers, is_plain
from .rules import DECODED

Tap = Callable[[str, Tensor], Tensor]
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Arithmetic:
    """How one runtime rounds.

    Attributes:
        kernels: operator kind → integers of its result (int32; float32 where `Call.out` is None).
        floats: operator kind → its float kernel, `(attrs, *operands) -> result`, where torch's differs.
        quantize: float32 → integers.
    """

    kernels: Mapping[str, Callable[[Call], Tensor]] = field(default_factory=dict)
    floats: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    quantize: Callable[[Tensor, QSpec], Tensor] = quantize

    def rough(self) -> Arithmetic:
        """The same integers, float operators as torch computes them: a last bit apart, and several times faster."""
        return replace(self, floats={})


class Simulator:
    """Runs a planned graph as a runtime would.

    Args:
        graph: folded float graph. It isn't changed.
        plan: a plan whose parameters are all known; an empty one simulates plain float.
        arithmetic: the runtime's.
    """

    def __init__(self, graph: Graph, plan: Plan, arithmetic: Arithmetic) -> None:
        self.graph, self.plan, self.arithmetic = graph, plan, arithmetic
        self._constants: dict[tuple[str, str, bool], QTensor | Coded] = {}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(graph.gm.graph.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self._last.setdefault(node, []).append(source)

    def run(
        self, inputs: Sequence[Tensor], tap: Tap | None = None, watch: Watch | None = None
    ) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs.

        Args:
            tap: called with (producer name, integers) for each tensor that is quantized; what it returns is
                what the network goes on with (the runtime's own integers, for a layer-local comparison).
            watch: told the name and the result of each operator that takes and returns floats.
        """
        with torch.no_grad():
            return Run(self, list(inputs), tap, watch).outputs()

    def begin(self, inputs: Sequence[Tensor]) -> Run:
        """A run of one batch that the caller takes operator by operator, so that several batches go abreast."""
        return Run(self, list(inputs), None, None)

    def change(self, plan: Plan) -> None:
        """Go on with another plan, and with the graph's parameters as they are now."""
        self.plan = plan
        self._constants.clear()

    def constant(self, tensor: str, tie: str, coded: bool = False) -> QTensor | Coded:
        """A parameter under a tie. coded: as a kernel takes it that computes on floats."""
        key = (tensor, tie, coded)
        if key not in self._constants:
            stored = self.plan.ties[tie]
            plain = stored.source == "bias" or (is_plain(stored.format) and not coded)
            make = constant_integers if plain else constant_codes
            self._constants[key] = make(self.graph, self.plan, tensor, tie)
        return self._constants[key]


class Run:
    """One batch on its way through the network."""

    def __init__(
        self, simulator: Simulator, inputs: list[Tensor], tap: Tap | None, watch: Watch | None
    ) -> None:
        self.s, self.tap, self.watch = simulator, tap, watch
        self.graph = simulator.graph
        self.values: dict[fx.Node, Any] = {}
        self.inputs = iter(inputs)

    @property
    def plan(self) -> Plan:
        return self.s.plan

    def outputs(self) -> tuple[Tensor, ...]:
        """All operators, then the flat outputs."""
        for node in self.graph.gm.graph.nodes:
            if node.op == "output":
                return tuple(self._output(value, i) for i, value in enumerate(self.graph.output_nodes()))
            self.step(node)
        raise GraphError("the graph has no output")

    def step(self, node: fx.Node) -> None:
        """Run one node, in the graph's order; values that nobody reads any more are dropped."""
        self.compute(node)
        self.drop(node)

    def compute(self, node: fx.Node) -> None:
        """The first half of `step`: what the node reads is still there."""
        if node.op == "placeholder":
            self._leave(node, next(self.inputs))
        elif node.op == "get_attr":
            self.values[node] = self.graph.tensor(str(node.target)).detach()
        else:
            self._operator(node)

    def drop(self, node: fx.Node) -> None:
        """The second half of `step`."""
        for source in self.s._last.get(node, ()):
            self.values.pop(source, None)

    def value(self, node: fx.Node) -> Any:
        """What a node left for those that read floats, while somebody still reads it."""
        return self._float(node)

    def read(self, node: fx.Node, slot: int) -> Tensor:
        """What an operator's kernel reads as an operand, as numbers; before `step` of that operator."""
        operand = self.graph.op(node).operands[slot]
        assert operand is not None
        name = self.graph.name(node)
        tie = self.plan.edges.get(Edge(producer_name(self.graph, operand), name, slot))
        if tie is not None and self.plan.ties[tie].source == "dynamic":
            assert operand.node is not None
            return quantize_dynamic(self._float(operand.node), self.plan.ties[tie].format).dequantize()
        value = self._operand(operand, name, slot)
        assert value is not None
        return value.dequantize() if isinstance(value, QTensor | Coded) else value

    def _operator(self, node: fx.Node) -> None:
        name = self.graph.name(node)
        op, todo = self.graph.op(node), self.plan.node(name)
        if todo.absorbed_by is not None:
            self.values[node] = self.values[made_by(op, 0)]
        elif todo.role == "scaled":
            source = self.values[made_by(op, 0)]
            tie = self.plan.tie_of(name)
            assert tie is not None and isinstance(source, QTensor)
            self.values[node] = self._wrap(source.q, tie)
        elif todo.role == "move":
            self.values[node] = self._move(node, op, name)
        elif todo.mode is not None:
            result = self._on_floats(node, op, name, todo)
            if self.watch is not None:
                self.watch(name, result)
            self._leave(node, result)
        elif todo.kernel is not None:
            self._kernel(node, op, name, todo.absorbs or name)
        else:
            result = self._run_float(node, op)
            if self.watch is not None and isinstance(result, Tensor):
                self.watch(name, result)
            self._leave(node, result)

    def _leave(self, node: fx.Node, value: Any) -> None:
        """Store a float result, quantized where the plan says so (its float readers keep the float)."""
        name = self.graph.name(node)
        tie = self.plan.tie_of(name)
        if tie is None:
            self.values[node] = value
            return
        q = self.s.arithmetic.quantize(value, self._spec(tie))
        self.values[node] = _Both(value, self._tapped(name, q, tie))

    def _on_floats(self, node: fx.Node, op: Op, name: str, todo: NodePlan) -> Tensor:
        """A kernel that takes and returns floats: its weights are stored narrow, what it reads may be rounded."""
        operands: list[QTensor | Coded | Tensor | None] = []
        kernel = self.s.arithmetic.kernels.get(f"{op.kind}_{todo.mode}") if todo.kernel != DECODED else None
        for slot, operand in enumerate(op.operands):
            tie = (
                None
                if operand is None
                else self.plan.edges.get(Edge(producer_name(self.graph, operand), name, slot))
            )
            if operand is None:
                operands.append(None)
            elif tie is not None and self.plan.ties[tie].source == "dynamic":
                assert operand.node is not None
                value = self._float(operand.node)
                fmt = self.plan.ties[tie].format
                operands.append(value if kernel is not None else quantize_dynamic(value, fmt))
            else:
                operands.append(self._operand(operand, name, slot, coded=True))
        if kernel is not None:
            return kernel(Call(f"{op.kind}_{todo.mode}", op.attrs, tuple(operands), None))
        return self._run_float(node, op, operands)  # type: ignore[no-any-return]

    def _kernel(self, node: fx.Node, op: Op, name: str, out_name: str) -> None:
        tie = self.plan.tie_of(out_name)
        operands: list[QTensor | Coded | Tensor | None] = []
        for slot, operand in enumerate(op.operands):
            operands.append(None if operand is None else self._operand(operand, name, slot))
        kernel = self.s.arithmetic.kernels.get(op.kind)
        spec = self._spec(tie) if tie is not None else None
        if kernel is not None:
            result = kernel(Call(op.kind, op.attrs, tuple(operands), spec))
        else:
            result = self._run_float(node, op, operands)
            if spec is not None:
                result = self.s.arithmetic.quantize(result, spec)
        self.values[node] = result if tie is None else self._tapped(out_name, result, tie)

    def _move(self, node: fx.Node, op: Op, name: str) -> QTensor | tuple[QTensor, ...]:
        tie = self.plan.tie_of(name)
        assert tie is not None
        if op.kind == "embedding":
            table = self._operand(present(op, 1), name, 1)
            assert isinstance(table, QTensor)
            return self._wrap(torch.nn.functional.embedding(self._float(made_by(op, 0)), table.q), tie)
        if op.kind == "getitem":
            parts = self.values[made_by(op, 0)]
            return parts[op.attrs["index"]]  # type: ignore[no-any-return]
        # integers below 2^24 are exact in float32, in which every torch operator exists
        found: list[QTensor] = []

        def moved(source: fx.Node) -> Any:
            for slot, operand in enumerate(op.operands):
                if operand is not None and operand.node is source:
                    if Edge(producer_name(self.graph, operand), name, slot) in self.plan.edges:
                        value = self._operand(operand, name, slot)
                        assert isinstance(value, QTensor)
                        found.append(value)
                        return value.q.float()
            return self._float(source)

        args = fx.map_arg(node.args, moved)
        kwargs = fx.map_arg(node.kwargs, moved)
        if op.kind == "pad":
            _, zero_point = self.plan.ties[tie].parameters()
            padded = torch.constant_pad_nd(found[0].q, list(op.attrs["pad"]), int(zero_point))
            return self._wrap(padded, tie)
        moved_values = self._call(node, args, kwargs)
        if isinstance(moved_values, list | tuple):
            return tuple(self._wrap(value.to(torch.int32), tie) for value in moved_values)
        return self._wrap(moved_values.to(torch.int32), tie)

    def _run_float(
        self, node: fx.Node, op: Op, operands: Sequence[QTensor | Coded | Tensor | None] | None = None
    ) -> Any:
        name = self.graph.name(node)
        if operands is None:
            operands = [
                None if o is None else self._operand(o, name, slot) for slot, o in enumerate(op.operands)
            ]
        floats = [o.dequantize() if isinstance(o, QTensor | Coded) else o for o in operands]
        custom = self.s.arithmetic.floats.get(op.kind)
        if custom is not None:
            return custom(op.attrs, *floats)
        by_node = {
            operand.node: value
            for operand, value in zip(op.operands, floats, strict=True)
            if operand is not None and operand.node is not None
        }

        def read(source: fx.Node) -> Any:
            value = by_node.get(source)
            return self._float(source) if value is None else value

        if node.op == "call_module" and any(o is not None and o.node is None for o in op.operands):
            return self._module(node, op, floats, read)
        return self._call(node, fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read))

    def _module(self, node: fx.Node, op: Op, floats: list[Any], read: Callable[[fx.Node], Any]) -> Any:
        """Call a module with its parameters replaced by their quantized values, where the plan quantizes them."""
        module = self.graph.gm.get_submodule(str(node.target))
        owned = {
            operand.tensor.rpartition(".")[2]: value
            for operand, value in zip(op.operands, floats, strict=True)
            if operand is not None and operand.node is None and operand.tensor is not None
        }
        args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
        return torch.func.functional_call(module, owned, args, kwargs, strict=False)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            return self.graph.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    # ------------------------------------------------------------------ values

    def _operand(
        self, operand: Operand, consumer: str, slot: int, coded: bool = False
    ) -> QTensor | Coded | Tensor | None:
        key = producer_name(self.graph, operand)
        tie = self.plan.edges.get(Edge(key, consumer, slot))
        if operand.tensor is not None:
            return (
                self.graph.tensor(operand.tensor).detach()
                if tie is None
                else self.s.constant(operand.tensor, tie, coded)
            )
        assert operand.node is not None
        value = self.values[operand.node]
        if isinstance(value, _Both):
            return value.integers if tie is not None else value.real
        if isinstance(value, QTensor) and tie is None:
            return value.dequantize()
        return value  # type: ignore[no-any-return]

    def _float(self, node: fx.Node) -> Any:
        value = self.values[node] if node.op != "get_attr" else self.graph.tensor(str(node.target)).detach()
        if isinstance(value, _Both):
            return value.real
        return value.dequantize() if isinstance(value, QTensor) else value

    def _output(self, node: fx.Node, index: int) -> Any:
        value = self.values.get(node)
        if isinstance(value, _Both) and Edge(self.graph.name(node), "output", index) in self.plan.edges:
            return value.integers.dequantize()
        return self._float(node)

    def _spec(self, tie: str) -> QSpec:
        scale, zero_point = self.plan.ties[tie].parameters()
        return QSpec(scale, zero_point, self.plan.ties[tie].format.low, self.plan.ties[tie].format.high)

    def _wrap(self, q: Tensor, tie: str) -> QTensor:
        spec = self._spec(tie)
        return QTensor(q, spec.scale, spec.zero_point, spec.low, spec.high)

    def _tapped(self, name: str, q: Tensor, tie: str) -> QTensor:
        return self._wrap(q if self.tap is None else self.tap(name, q), tie)


@dataclass(frozen=True)
class _Both:
    """A float producer's result: some readers take the float, some its integers."""

    real: Tensor
    integers: QTensor
