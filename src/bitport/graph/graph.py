"""The hub: a trainable raised graph with named edges, blocks and laws."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bitport.errors import GraphError, LoadError
from bitport.graph import blocks as _blocks
from bitport.graph import names, shapes, spec
from bitport.graph.match import Op, classify, is_shape, op_name
from bitport.graph.shapes import Shape, execute, fetch, read_shape

META = "bitport"  # key of what a raised module carries in `gm.meta`
_RANDOM = frozenset(
    ["rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "multinomial", "normal", "randperm"]
)


class Edge(NamedTuple):
    """One use of a tensor: who makes it, who reads it, in which slot of `Op.operands` (output: flat
    index)."""

    producer: str
    consumer: str
    slot: int


class GivenScale(NamedTuple):
    """How an already quantized file stored an activation: (q − zero_point) · scale, low ≤ q ≤ high."""

    scale: float
    zero_point: int
    low: int
    high: int

    def checked(self, name: str) -> GivenScale:
        """The scale itself. Raises LoadError where no numbers can be stored so."""
        if math.isfinite(self.scale) and self.scale > 0 and self.low <= self.zero_point <= self.high:
            return self
        raise LoadError(f"{name!r} is quantized by {tuple(self)}, which is no scale: write the file again")


@dataclass(frozen=True)
class InputSpec:
    """One flat input; symbolic axes by name: `("batch", 3, 32, 32)`."""

    name: str
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class OutputSpec:
    """One flat output tensor; symbolic axes by name."""

    name: str
    shape: Shape
    dtype: torch.dtype


class Graph:
    """A network: a raised `fx.GraphModule` with names, specs of its inputs and outputs, and laws.

    Build one with `bitport.load` (or `frontends.pytorch.load_module`), not by hand.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[InputSpec],
        notes: Sequence[str] = (),
        stage: str = "float",
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.gm = gm
        self.inputs = tuple(inputs)
        self.notes = list(notes)
        # what it was made from, for the record, where it isn't the trained float network itself
        self.origin: dict[str, Any] = {}
        self.stage = stage
        self.sizes = dict(sizes or {})  # axis name -> the length it had in the example
        # input name -> lowest and highest value of its example, where one was given; no part of what the network is
        self.examples: dict[str, tuple[float, float]] = {}
        # input or node -> the scale that it came with; a graph whose activations are other ones has none
        self.given: dict[str, GivenScale] = {}
        self.entries: dict[str, tuple[InputSpec, ...]] = {"forward": self.inputs}
        self._ops: dict[fx.Node, tuple[Any, Op]] = {}
        self._symbols: dict[str, str] = {}
        self.outputs: tuple[OutputSpec, ...] = ()
        self.propagate()

    # --- nodes and names
    # ------------------------------------------------------------------------------------------

    def nodes(self) -> list[fx.Node]:
        """Operator nodes (no placeholder, get_attr or output) in topological order."""
        return [n for n in self.gm.graph.nodes if n.op in ("call_function", "call_module")]

    def name(self, node: fx.Node) -> str:
        """The stable user-facing name of a node; a node inserted by an edit gets one when first asked."""
        if node.op == "placeholder":
            return str(node.meta.get("bitport_name", node.target))
        if node.op == "get_attr":
            return str(node.target)
        if "bitport_name" not in node.meta and node.op != "output":
            node.meta.setdefault("bitport_path", _blocks.path_of(node))
            taken = {n.meta["bitport_name"] for n in self.gm.graph.nodes if "bitport_name" in n.meta}
            node.meta["bitport_name"] = names.unique(
                names.base_name(node), taken | {i.name for i in self.inputs}
            )
        return str(node.meta.get("bitport_name", node.name))

    def node(self, name: str) -> fx.Node:
        """The placeholder or operator node called `name`.

        Raises:
            GraphError: there is none; lists near names.
        """
        found = {self.name(n): n for n in (*self.gm.graph.find_nodes(op="placeholder"), *self.nodes())}
        if name in found:
            node: fx.Node = found[name]
            return node
        near = get_close_matches(name, found, n=5, cutoff=0.4)
        raise GraphError(f"no node is called {name!r}; near: {', '.join(near) or 'none'}")

    def op(self, node: fx.Node) -> Op:
        """The canonical reading of an operator node, cached until the node's arguments change."""
        key = (node.target, repr(node.args), repr(node.kwargs), id(node.meta.get("val")))
        if node not in self._ops or self._ops[node][0] != key:
            self._ops[node] = (key, classify(self.gm, node))
        return self._ops[node][1]

    def changed(self, node: fx.Node) -> None:
        """Parameters of a node's module came or went: what was read of the node is forgotten."""
        self._ops.pop(node, None)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node's value is the same for every input's data (it may depend on the inputs' sizes)."""
        todo, seen = [node], {node}
        while todo:
            at = todo.pop()
            if at.op == "placeholder" or (at.op == "call_function" and op_name(at) in _RANDOM):
                return False
            if at.op == "call_function" and is_shape(at):
                continue
            fresh = [n for n in at.all_input_nodes if n not in seen]
            seen.update(fresh)
            todo += fresh
        return True

    def edges(self) -> list[Edge]:
        """Every use of an activation, parameter or buffer as a tensor operand, and every flat output."""
        found: list[Edge] = []
        for node in self.nodes():
            name = self.name(node)
            for slot, operand in enumerate(self.op(node).operands):
                if operand is not None:
                    producer = operand.tensor or self.name(operand.node)  # type: ignore[arg-type]
                    found.append(Edge(producer, name, slot))
        return found + [Edge(self.name(n), "output", i) for i, n in enumerate(self.output_nodes())]

    def output_nodes(self) -> list[fx.Node]:
        """The nodes whose tensors are the flat outputs, in order."""
        flat = pytree.tree_leaves(self.gm.graph.output_node().args[0])
        return [n for n in flat if isinstance(n, fx.Node)]

    def tensor(self, dotted: str) -> Tensor:
        """The parameter or buffer at a dotted name.

        Raises:
            GraphError: there is none; lists near names.
        """
        try:
            value = fetch(self.gm, dotted)
        except AttributeError:
            value = None
        if not isinstance(value, Tensor):
            known = [n for n, _ in (*self.gm.named_parameters(), *self.gm.named_buffers())]
            near = get_close_matches(dotted, known, n=5, cutoff=0.4)
            raise GraphError(
                f"no parameter or buffer is called {dotted!r}; near: {', '.join(near) or 'none'}"
            )
        return value

    def set_tensor(self, dotted: str, value: Tensor) -> None:
        """Replaces a parameter or buffer, under every name it is tied to; the shape may change."""
        old = self.tensor(dotted)
        new: Tensor = value.detach()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
        for module in self.gm.modules():
            for kind in (module._parameters, module._buffers):
                for name in [n for n, t in kind.items() if t is old]:
                    setattr(
                        module, name, new
                    )  # setattr, so that recurrent modules refresh their flat weights

    def blocks(self) -> list[_blocks.Block]:
        """Callable sub-graphs by the user's module tree; see `graph.blocks`."""
        return _blocks.blocks(self)

    # --- laws, copies, shapes
    # -------------------------------------------------------------------------------------

    def check(self, stage: str | None = None) -> None:
        """Checks the laws of a stage (default: the graph's own). Raises GraphError naming node and law."""
        spec.check(self, stage or self.stage)

    def clone(self, *, sharing: bool = False) -> Graph:
        """A deep copy that shares nothing with this graph; or its tensors, until either graph is given other ones."""
        tensors = (*self.gm.parameters(), *self.gm.buffers()) if sharing else ()
        known = {id(tensor): tensor for tensor in tensors}
        twin = copy.copy(self)  # nodes bring their shapes along: nothing is propagated
        twin.gm = copy.deepcopy(self.gm, known)
        twin.notes, twin.sizes = list(self.notes), dict(self.sizes)
        twin.origin, twin.examples, twin.given = dict(self.origin), dict(self.examples), dict(self.given)
        twin.entries, twin._symbols, twin._ops = dict(self.entries), dict(self._symbols), {}
        return twin

    def to(self, device: str | torch.device) -> Graph:
        """A clone on another device, tensors made while running included."""
        moved = self.clone()
        moved.gm.to(device)
        for node in moved.gm.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": torch.device(device)}
        moved.gm.recompile()
        return moved

    def on_cpu(self) -> Graph:
        """The graph itself, or its copy where it lives elsewhere: exporters and simulators want it on the CPU."""
        tensors = (*self.gm.parameters(), *self.gm.buffers())
        return self if all(tensor.device.type == "cpu" for tensor in tensors) else self.to("cpu")

    def propagate(self) -> None:
        """Recomputes the shapes of all nodes, and `outputs`; call it after a structural edit.

        Raises:
            GraphError: an operator refuses the shapes; names the node.
        """
        self._symbols = shapes.propagate(
            self.gm, [i.shape for i in self.inputs], [i.dtype for i in self.inputs], self.sizes
        )
        self._ops.clear()
        found = []
        for label, node in zip(self._output_names(), self.output_nodes(), strict=True):
            value = node.meta.get("val")
            assert isinstance(value, Tensor), f"output {label} is no tensor"
            found.append(OutputSpec(label, read_shape(value, self._symbols) or (), value.dtype))
        self.outputs = tuple(found)

    def complete(self) -> None:
        """Computes the shapes of nodes that an edit has put in, where it changes no other shape.

        Raises:
            GraphError: an operator refuses the shapes; names the node.
        """
        if all("val" in node.meta for node in self.nodes()):
            return
        if shapes.complete(self.gm):
            self._ops.clear()
        else:
            self.propagate()

    def _output_names(self) -> list[str]:
        flat = pytree.tree_leaves(self.gm.graph.output_node().args[0])
        tree = getattr(self.gm, "_out_spec", None)
        if tree is None:
            labels = [str(i) for i in range(len(flat))]
        else:
            paths = pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(len(flat))), tree))
            labels = [".".join(_key(k) for k in path) for path, _ in paths]
        kept = [label for label, node in zip(labels, flat, strict=True) if isinstance(node, fx.Node)]
        if len(kept) == 1 and (kept[0].isdigit() or not kept[0]):
            return ["output"]
        return [f"output_{label.replace('.', '_')}" if label[:1].isdigit() else label for label in kept]

    def shape(self, node: fx.Node) -> Shape | None:
        """The symbolic shape of a node's tensor value; None when it has none (tuples, sizes)."""
        return read_shape(node.meta.get("val"), self._symbols)

    # --- running
    # --------------------------------------------------------------------------------------------------

    def flat_args(self, inputs: Any) -> tuple[Tensor, ...]:
        """A tensor, tuple or dict of inputs as positional flat tensors in the order of `inputs`.

        Raises:
            GraphError: naming the input whose count, shape or dtype is wrong.
        """
        if isinstance(inputs, Mapping):
            inputs = self._by_name(inputs)
        flat = pytree.tree_leaves(inputs)
        if len(flat) != len(self.inputs):
            known = ", ".join(i.name for i in self.inputs)
            raise GraphError(f"{len(flat)} inputs were given, {len(self.inputs)} are needed: {known}")
        axes: dict[str, int] = {}
        for item, value in zip(self.inputs, flat, strict=True):
            _fits(item, value, axes)
        return tuple(flat)

    def _by_name(self, inputs: Mapping[str, Any]) -> list[Any]:
        info = getattr(self.gm.graph._codegen, "pytree_info", None)
        arguments = list(info.orig_args) if info is not None else [i.name for i in self.inputs]
        for order in (arguments, [i.name for i in self.inputs]):
            if set(order) == set(inputs):
                return [inputs[name] for name in order]
        missing, extra = sorted(set(arguments) - set(inputs)), sorted(set(inputs) - set(arguments))
        raise GraphError(f"inputs by name do not match: missing {missing}, unexpected {extra}")

    def run(
        self, *flat_inputs: Tensor, on_value: Callable[[fx.Node, Any], Any] | None = None
    ) -> tuple[Tensor, ...]:
        """Runs the graph node by node on flat inputs and returns the flat output tensors.

        Values are freed as soon as their last user ran. `on_value(node, value)` sees every placeholder's and
        operator's value; what it returns, unless None, is used instead.
        """
        result = execute(self.gm, flat_inputs, on_value)
        return tuple(v for v in pytree.tree_leaves(result) if isinstance(v, Tensor))

    def module(self) -> nn.Module:
        """A deep copy as an ordinary `nn.Module`: the user's call signature, output structure and state
        dict."""
        copied = copy.deepcopy(self.gm)
        copied.meta[META] = {
            "inputs": [(i.name, i.shape, i.dtype) for i in self.inputs],
            "notes": list(self.notes),
            "stage": self.stage,
            "sizes": dict(self.sizes),
            "given": dict(self.given),
        }
        return copied

    def export(self) -> torch.export.ExportedProgram:
        """Re-exports in eval mode with the same dynamic axes; holds no stack traces or paths of this
        machine."""
        from bitport.graph.export import export_graph

        return export_graph(self)

    def digest(self) -> str:
        """SHA-256 over structure, names and tensor bytes; the same in every process."""
        state = hashlib.sha256()
        index: dict[fx.Node, str] = {}
        for i, node in enumerate(self.gm.graph.nodes):
            index[node] = f"%{i}"
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Ref(index[n]))
            line = [node.op, str(node.target), repr(args), self.name(node) if node.op != "output" else ""]
            if node.op == "call_module":
                module = self.gm.get_submodule(str(node.target))
                line.append(f"{type(module).__name__}({module.extra_repr()})")
            state.update("\x1f".join(line).encode())
        state.update(
            repr([list(map(astuple, self.inputs)), list(map(astuple, self.outputs)), self.stage]).encode()
        )
        if self.given:  # of which a plan may be made
            state.update(repr(sorted(self.given.items())).encode())
        tensors = [
            *self.gm.named_parameters(remove_duplicate=False),
            *self.gm.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            data = tensor.detach().cpu().contiguous()
            state.update(f"{name}:{data.dtype}:{tuple(data.shape)}".encode())
            state.update(data.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()


class _Ref(str):
    """A node's place in the order, without quotes in `repr`."""

    def __repr__(self) -> str:
        return str(self)


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _fits(item: InputSpec, value: Any, axes: dict[str, int]) -> None:
    if not isinstance(value, Tensor):
        raise GraphError(f"input {item.name!r} must be a tensor, not {type(value).__name__}")
    if value.dtype != item.dtype:
        raise GraphError(f"input {item.name!r} has dtype {value.dtype}, needs {item.dtype}")
    if value.dim() != len(item.shape):
        raise GraphError(f"input {item.name!r} has shape {tuple(value.shape)}, needs {item.shape}")
    for want, have in zip(item.shape, value.shape, strict=True):
        wanted = axes.setdefault(want, have) if isinstance(want, str) else want
        if wanted != have:
            raise GraphError(f"input {item.name!r} has shape {tuple(value.shape)}, needs {item.shape}")
