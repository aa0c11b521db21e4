"""A Keras model as an `nn.Module` that PyTorch's own front end captures. Runs in a process of its own.

Every layer becomes a module at its path of names. One that owns weights and is in the table of `_layers` is written in
torch; any other runs Keras' own code, on parameters of its module.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitport.errors import FOREIGN, BitportError, LoadError, first_line
from bitport.frontends import pytorch
from bitport.frontends.keras._archive import check_weights, weights_of
from bitport.frontends.keras._layers import NATIVE, RECURRENT, Kept, Masked, Recurrent, step_by_step
from bitport.graph import Graph
from bitport.graph.layout import cancel_permutes
from bitport.graph.simplify import drop_identities

BATCH = 2  # of an example that is made up
LARGEST = 2**28  # numbers in it


class Plain(nn.Module):
    """A layer that runs as Keras has it. Its own variables are parameters and buffers here."""

    def __init__(self, layer: Any, inner: set[int]) -> None:
        super().__init__()
        self.run = Kept(layer.call)
        self.variables: list[tuple[Kept, str]] = []
        trained = {id(variable) for variable in layer.trainable_variables}
        for variable in layer.variables:
            value = variable.value.detach().clone()
            if id(variable) in inner or not value.is_floating_point():
                continue
            name = free(self, variable.name)
            if id(variable) in trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
            self.variables.append((Kept(variable), name))

    def forward(self, *values: Any, **options: Any) -> Any:
        return self.run(*values, **options)


class Router:
    """Which modules are running: those of the network, or of a copy of it."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}

    def take_over(self, layer: Any, path: str) -> None:
        """Calls of a layer go to the module at a path from now on."""

        def call(*values: Any, **options: Any) -> Any:
            module = self.modules[path]
            if isinstance(module, Plain | Recurrent):
                return module(*values, **options)
            return module(
                values[0] if values else next(iter(options.values()))
            )  # training and masks are Keras' own

        layer.call = call


class Network(nn.Module):
    """All layers by their names. Called with the model's inputs by name, gives what the model gives."""

    def __init__(self, model: Any, recurrent: bool) -> None:
        super().__init__()
        self.model, self.router = Kept(model), Kept(Router())
        self.names = [identifier(item.name) for item in model.inputs]
        self._own(model, self, "", set(), recurrent)

    def _own(self, layer: Any, at: nn.Module, path: str, seen: set[int], recurrent: bool) -> None:
        for inner in inside(layer):
            if id(inner) in seen:
                continue
            seen.add(id(inner))
            kind = type(inner).__name__
            known = kind in NATIVE and (recurrent or kind not in RECURRENT)
            module = NATIVE[kind](inner) if known else None
            own = {id(v) for part in inside(inner) for v in part.variables}
            native = module is not None
            module = Plain(inner, own) if module is None else module
            name = free(at, inner.name)
            at.add_module(name, module)
            where = f"{path}.{name}" if path else name
            if not native:
                self._own(inner, module, where, seen, recurrent)
            self.router.value.take_over(inner, where)
            if not native and hasattr(inner, "inner_loop"):
                inner.inner_loop = step_by_step(inner)

    def compute(self, inputs: Sequence[Tensor]) -> Any:
        import keras

        modules = dict(self.named_modules())
        state = [
            (variable.value, getattr(module, name))
            for module in modules.values()
            if isinstance(module, Plain)
            for variable, name in module.variables
        ]
        self.router.value.modules = modules
        with keras.StatelessScope(state):
            found = self.model(inputs[0] if len(inputs) == 1 else list(inputs), training=False)
        if isinstance(found, list | tuple):
            return dict(zip(self.model.value.output_names, found, strict=True))
        return found


def inside(layer: Any) -> Iterator[Any]:
    """The layers that a layer is made of, one level down."""
    yield from layer._flatten_layers(include_self=False, recursive=False)


def free(module: nn.Module, name: str) -> str:
    """A name that nothing in a module has."""
    label = re.sub(r"\W", "_", name) or "_"
    found, number = label, 1
    while hasattr(module, found):
        found, number = f"{label}_{number}", number + 1
    return found


def identifier(name: str) -> str:
    """A name that Python takes."""
    found = re.sub(r"\W", "_", name) or "_"
    return f"_{found}" if found[0].isdigit() or found in ("self", "lambda", "None") else found


def network(model: Any, recurrent: bool = True) -> nn.Module:
    """The module; its `forward` names its inputs. The model is taken over: it isn't to be used afterwards.

    recurrent: torch's own recurrent layers, which take no masks.
    """
    model.trainable = True
    for layer in _every(model):
        policy = layer.dtype_policy
        if getattr(layer, "quantization_mode", None):
            raise LoadError(f"layer {layer.name!r} is quantized already: save the float network")
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            raise LoadError(
                f"layer {layer.name!r} keeps its state between calls: build it with stateful=False"
            )
        if policy.compute_dtype != policy.variable_dtype:
            layer.dtype_policy = policy.variable_dtype
    found = Network(model, recurrent)
    names = found.names

    def forward(self: Network, *values: Tensor, **named: Tensor) -> Any:
        given = {**dict(zip(names, values, strict=False)), **named}
        return self.compute([given[name] for name in names])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    vars(forward)["__signature__"] = inspect.Signature(parameters)
    found.__class__ = type("Network", (Network,), {"forward": forward})
    return found


def _every(model: Any) -> Iterator[Any]:
    yield from model._flatten_layers()


def graph_of(read: Any, examples: Mapping[str, Tensor] | None, dynamic_shapes: Any, nonfinite: str) -> Graph:
    """The graph of the model that `read()` gives; it is read again where a mask reaches a recurrent layer."""
    for recurrent in (True, False):
        model = read()
        if not getattr(model, "inputs", None):
            raise LoadError(
                "the network doesn't say its inputs: build it with keras.Input before it is saved"
            )
        mixed = {layer.dtype_policy.name for layer in _every(model) if "mixed" in layer.dtype_policy.name}
        module = network(model, recurrent).eval()
        inputs = {
            identifier(item.name): _example(item, place, examples) for place, item in enumerate(model.inputs)
        }
        try:
            with torch.no_grad():
                module(**inputs)
        except Masked:
            continue
        except BitportError:
            raise
        except FOREIGN as error:
            raise LoadError(f"the network doesn't run on its example inputs: {first_line(error)}") from error
        graph = pytorch.load_module(module, inputs, dynamic_shapes, "cpu", nonfinite)
        drop_identities(graph, dropout=False)
        cancel_permutes(graph)
        if mixed:
            graph.notes.append(f"computed in float32, not in {', '.join(sorted(mixed))} as it was trained")
        if not recurrent:
            graph.notes.append("a mask reaches recurrent layers: they are spelled out step by step")
        return graph
    raise LoadError(
        "a mask reaches a layer that can't take it: build the network without mask_zero and Masking"
    )


def _example(item: Any, place: int, given: Mapping[str, Tensor] | None) -> Tensor:
    """What was given for an input, or random numbers of its shape."""
    dtype = getattr(torch, item.dtype if item.dtype != "string" else "", None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"input {item.name!r} is of {item.dtype}, of which there are no tensors here")
    if given is not None:
        for key in (item.name, identifier(item.name), str(place)):
            if key in given:
                return given[key].to(dtype)
        raise LoadError(f"example_inputs lacks {item.name!r}")
    shape = [BATCH if size is None and axis == 0 else size for axis, size in enumerate(item.shape)]
    if None in shape:
        raise LoadError(
            f"axis {shape.index(None)} of input {item.name!r} is open: give example_inputs, with a length for it"
        )
    if np.prod([float(size) for size in shape]) > LARGEST:
        raise LoadError(
            f"input {item.name!r} of shape {shape} is too large to be made up: give example_inputs"
        )
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def read_model(path: Path) -> Any:
    """The Keras model in a file that `_archive.checked` has looked through.

    Raises LoadError where its parts don't fit each other, UnsafeFile where its weights lie elsewhere.
    """
    import keras

    check_weights(weights_of(path), path.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*could not be loaded.*")
            return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (*FOREIGN, UserWarning) as error:
        raise LoadError(
            f"{path.name} can't be read by Keras {keras.__version__}: {first_line(error)}"
        ) from error


def convert(path: str, out: str, examples: str | None, dynamic: str | None, nonfinite: str) -> None:
    """Read a `.keras` file and write its graph as `.pt2`."""
    from bitport.graph.archive import save_pt2

    given = None
    if examples is not None:
        with np.load(examples, allow_pickle=False) as arrays:
            given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    save_pt2(graph_of(lambda: read_model(Path(path)), given, dynamic, nonfinite), out)
