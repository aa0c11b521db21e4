"""Nodes and constants as an `nn.Module` that PyTorch's own front end captures."""

from __future__ import annotations

import inspect
import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.traceback import annotate

from ...errors import BitportError, LoadError, first_line
from ...graph.program import MARK
from . import control, layers
from ._calls import OPERATORS, Array, Call, Operator, Unsupported, Value, is_known, tensor
from ._reading import DOMAINS, Model, Node

# what Python and torch raise where a node's values don't fit its operator, as in a damaged file
UNFIT = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
# imported so that their operators are in the table, as control's and layers' are
for _name in (
    "attention",
    "elementwise",
    "indexing",
    "quantized",
    "recurrent",
    "reducing",
    "sampling",
    "shaping",
):
    import_module(f".{_name}", __package__)
# operators whose constants may have been learnt: they become parameters where there are several numbers
LEARNT = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "MatMul",
    "Gather",
    "Concat",
    "Where",
    "Expand",
    "Einsum",
    "Gemm",
    "Conv",
}


class Scope(nn.Module):
    """A part of the names of what is in it. Operators without weights run in it, so that they are called by it."""

    def forward(self, run: Callable[..., Any], *values: Value) -> Any:
        return run(*values)


class Step:
    """One node: its operator and the constants that it reads, by input slot."""

    def __init__(self, call: Call, operator: Operator) -> None:
        self.call, self.operator = call, operator
        self.constants: dict[int, Array | Tensor] = {}

    def __call__(self, *values: Value) -> Any:
        given = self.filled(values)
        if self.operator.known is not None and all(is_known(value) for value in given):
            return self.operator.known(self.call, *given)
        while given and given[-1] is None:
            given.pop()
        return self.operator.run(self.call, *given)

    def filled(self, values: Sequence[Value]) -> list[Value]:
        """All values that the operator takes."""
        given = list(values)
        for slot, value in self.constants.items():
            given[slot] = value
        return given


class Layer(nn.Module):
    """A step that owns weights."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.slots: dict[int, str] = {}  # names of parameters and buffers by input slot

    def forward(self, *values: Value) -> Any:
        given = list(values)
        for slot, name in self.slots.items():
            given[slot] = getattr(self, name)
        return self.step(*given)


class Controlled(nn.Module):
    """A step that runs graphs of its own."""

    def __init__(self, step: Step, bodies: Mapping[str, Network], budget: control.Budget) -> None:
        super().__init__()
        self.step, self.budget = step, budget
        for name, body in bodies.items():
            self.add_module(name, body)

    def forward(self, *values: Value) -> Any:
        bodies = dict(self.named_children())
        return self.step.operator.run(self.step.call, bodies, self.budget, *self.step.filled(values))


class Network(Scope):
    """All nodes in order. Called with the network's inputs by name, gives its output, or a dict of several."""

    def __init__(
        self, model: Model, fixed: Mapping[str, Array], budget: control.Budget | None = None
    ) -> None:
        """budget: of the network whose node has this one as its own graph."""
        super().__init__()
        self.budget = control.Budget() if budget is None else budget
        # (path of the layer or scope, node, what runs in a scope, names of what it gives)
        self.steps: list[tuple[str, Node, Step | None, list[str]]] = []
        self.inputs, self.outputs = [port.name for port in model.inputs], list(model.outputs)
        self.captured = model.captured
        self.fixed = dict(fixed)
        self.marked = set(model.given)
        constants = model.constants
        shared: dict[str, nn.Parameter] = {}
        biases = _biases(model)
        merged = {bias.name for bias in biases.values()}
        waiting = Counter(name for node in model.nodes for name in node.inputs)
        for node in model.nodes:
            if node.name not in merged:
                with _told(node):
                    self._add(node, model.opset, biases.get(node.name), constants, shared)
            waiting.subtract(node.inputs)
            for name in node.inputs:
                if not waiting[name] and name not in self.outputs:
                    constants.pop(name, None)  # it may be as large as the network
        self.passed = {name: constants[name] for name in self.outputs if name in constants}

    def _add(
        self, node: Node, opset: int, bias: Node | None, constants: dict[str, Array], shared: dict[str, nn.Parameter]
    ) -> None:  # fmt: skip
        known = {slot: constants[name] for slot, name in enumerate(node.inputs) if name in constants}
        step = Step(Call(node.kind, node.name, node.attrs, opset, len(node.outputs)), _row(node, opset))
        if node.kind in ("Constant", "Identity") and len(known) == len(node.inputs):
            constants[node.outputs[0]] = step(*known.values())  # exporters tell equal weights so
            return
        outputs = node.outputs
        if bias is not None:
            known[layers.BIAS] = next(constants[name] for name in bias.inputs if name in constants)
            outputs = bias.outputs
        layer = None if step.operator.layer is None else step.operator.layer(step.call, known)
        if step.operator.controls:
            layer = self._controlled(node, step, known)
        layer = _layer(node, step, known, shared) if layer is None else layer
        if layer is None:
            self.steps.append((self._scope(_scope(node)), node, step, outputs))
            return
        owned = [node.inputs[slot] for slot in known if slot < len(node.inputs)]
        path = self._place(_path(node, owned), layer, re.sub(r"\W", "_", node.name))
        self.steps.append((path, node, None, outputs))

    def _controlled(self, node: Node, step: Step, known: Mapping[int, Array]) -> nn.Module:
        """The layer of a node with graphs of its own, which take what is known of the graph around them."""
        bodies: dict[str, Network] = {}
        for name, body in control.reachable(step.call, node.bodies, known).items():
            around = len(node.inputs) - body.captured
            for at, port in enumerate(body.inputs[body.own :], around):
                if at in known:
                    body.constants[port.name] = known[at]
            step.constants = {slot: value for slot, value in known.items() if slot < around}
            bodies[name] = Network(body, {}, self.budget)
        return Controlled(step, bodies, self.budget)

    def _scope(self, path: Sequence[str]) -> str:
        """The innermost scope of a path; there from now on."""
        at: nn.Module = self
        names: list[str] = []
        for part in map(_attribute, path):
            if part not in at._modules:
                if hasattr(at, part):
                    break
                at.add_module(part, Scope())
            inner = at.get_submodule(part)
            if not isinstance(inner, Scope):
                break
            at = inner
            names.append(part)
        return ".".join(names)

    def _place(self, path: Sequence[str], layer: nn.Module, inside: str) -> str:
        """Put a layer under a path, under its own name in the scope that is there, or near a layer that is there."""
        scope = self._scope(path[:-1])
        at, last = self.get_submodule(scope), _attribute(path[-1])
        if isinstance(at._modules.get(last), Scope):
            scope, at, last = self._scope(path), at.get_submodule(last), inside
        name, number = last, 1
        while name in at._modules or hasattr(at, name):
            name, number = f"{last}_{number}", number + 1
        at.add_module(name, layer)
        return f"{scope}.{name}" if scope else name

    def compute(self, inputs: Mapping[str, Tensor]) -> Any:
        self.budget.renew()
        values = self._values({n: inputs[identifier(n)] for n in self.inputs if n not in self.fixed})
        given = {identifier(name): tensor(values[name]) for name in self.outputs}
        return given if len(given) > 1 else next(iter(given.values()))

    def run(self, given: Sequence[Value]) -> list[Value]:
        """The same of values, in the order of its inputs; its outputs as they are."""
        values = self._values(dict(zip(self.inputs, given, strict=True)))
        return [values[name] for name in self.outputs]

    def _values(self, given: Mapping[str, Value]) -> dict[str, Value]:
        values: dict[str, Value] = {**given, **self.fixed, **self.passed}
        for path, node, step, outputs in self.steps:
            read = [values.get(name) for name in node.inputs]
            marked = annotate({MARK: outputs[0]}) if outputs[0] in self.marked else nullcontext()
            with _told(node), marked:
                if step is None:
                    found = self.get_submodule(path)(*read)
                else:
                    found = self.get_submodule(path)(step, *read) if path else step(*read)
            every = found if isinstance(found, tuple | list) else (found,)
            values.update({name: value for name, value in zip(outputs, every, strict=False) if name})
        return values


@contextmanager
def _told(node: Node) -> Iterator[None]:
    """What goes wrong in a node is told with its name."""
    try:
        yield
    except BitportError:
        raise
    except UNFIT as error:
        raise LoadError(f"node {node.name!r} ({node.kind}) can't be imported: {first_line(error)}") from error


def network(model: Model, fixed: Mapping[str, Array]) -> nn.Module:
    """The module; its `forward` names its inputs, so that a capture does as well. Uses up the model's constants."""
    names = [identifier(port.name) for port in model.inputs if port.name not in fixed]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def forward(self: Network, *values: Tensor, **named: Tensor) -> Any:
        return self.compute({**dict(zip(names, values, strict=False)), **named})

    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    named: type[Network] = type("Network", (Network,), {"forward": forward})
    return named(model, fixed)


def identifier(name: str) -> str:
    """A name that Python takes."""
    found = re.sub(r"\W", "_", name) or "_"
    found = f"_{found}" if found[0].isdigit() else found
    return f"{found}_" if found == "self" else _attribute(found)


def _attribute(name: str) -> str:
    """A part of a path that can stand in the code that torch writes: TensorFlow calls scopes `while`."""
    return f"{name}_" if keyword.iskeyword(name) else name


def _row(node: Node, opset: int) -> Operator:
    """Raises Unsupported where nothing computes it."""
    found = OPERATORS.get(node.kind) if node.domain in DOMAINS else None
    if found is None:
        where = f" of {node.domain}" if node.domain not in DOMAINS else ""
        raise Unsupported(
            f"node {node.name!r} is {node.kind}{where} (opset {opset}), which can't be imported; "
            f"{len(OPERATORS)} operators can"
        )
    return found


def _layer(
    node: Node, step: Step, known: Mapping[int, Array], shared: dict[str, nn.Parameter]
) -> Layer | None:
    """A layer with those of the constants that may have been learnt; None where there are none."""
    layer = Layer(step)
    for slot, array in known.items():
        name = step.operator.params.get(slot)
        learnt = node.kind in LEARNT and array.size > 1
        if array.dtype not in (np.float32, np.float64, np.float16) or not (name or learnt):
            step.constants[slot] = array
            continue
        label = layer.slots[slot] = name or f"value{slot}"
        if label.startswith("running_"):
            layer.register_buffer(label, torch.from_numpy(np.array(array)))
        else:
            # exporters store equal gains and biases once; only matrices are tied on purpose
            key = node.inputs[slot] if array.ndim > 1 else f"{node.name} {slot}"
            if key not in shared:
                shared[key] = nn.Parameter(torch.from_numpy(np.array(array)))
            layer.register_parameter(label, shared[key])
    return layer if layer.slots else None


def _biases(model: Model) -> dict[str, Node]:
    """Product → the sum behind it that is its bias: MatMul with known weights [K, N], Add with [N] known numbers."""
    readers = Counter(name for node in model.nodes for name in node.inputs)
    readers.update(model.outputs)
    made = {node.outputs[0]: node for node in model.nodes if node.kind == "MatMul" and node.domain in DOMAINS}
    found: dict[str, Node] = {}
    for node in model.nodes:
        if node.kind != "Add" or node.domain not in DOMAINS or len(node.inputs) != 2:
            continue
        for product, added in (node.inputs, node.inputs[::-1]):
            source, bias = made.get(product), model.constants.get(added)
            if source is None or bias is None or readers[product] != 1 or source.name in found:
                continue
            weight = model.constants.get(source.inputs[1])
            fits = weight is not None and weight.ndim == 2 and bias.shape == weight.shape[1:]
            if fits and weight is not None and bias.dtype == weight.dtype:
                found[source.name] = node
                break
    return found


def _scope(node: Node) -> list[str]:
    """The module that a node was exported from, where that is told."""
    if node.scope is not None:
        return [part for part in node.scope.split(".") if part]
    return _parts(node.name)[:-1] if "/" in node.name else []


def _parts(name: str) -> list[str]:
    """A node's name as a path: `/layer1/layer1.0/conv1/Conv` → layer1, 0, conv1, Conv."""
    found: list[str] = []
    before = ""
    for part in name.split("/"):
        own = part.removeprefix(f"{before}.") if before else part
        found += [re.sub(r"\W", "_", piece) for piece in own.split(".") if piece]
        before = part
    return found


def _path(node: Node, owned: Sequence[str]) -> list[str]:
    """Where a node's layer lies: by the name of its weights, by its module, or by its own name."""
    for name in owned:
        stem, _, last = name.rpartition(".")
        if last.startswith(("weight", "bias")) and re.fullmatch(r"\w+(\.\w+)*", stem):
            return stem.split(".")
    if node.scope:
        return node.scope.split(".")
    parts = _parts(node.name)
    if len(parts) > 1 and re.fullmatch(rf"{node.kind}(_\d+)?", parts[-1]):
        parts.pop()
    return parts or [node.kind]
