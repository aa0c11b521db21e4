"""The PyTorch front end: an `nn.Module` to a `Graph`. (`.pt2` files are read by `graph.archive`.)"""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from bitport.errors import BitportError, LoadError, first_line
from bitport.frontends._training import decides, erased
from bitport.graph.export import quiet_export
from bitport.graph.graph import META, Graph, InputSpec
from bitport.graph.program import finish, from_program, spans
from bitport.graph.raise_ops import RaisedModule
from bitport.graph.weights import check_weights, settled


def load_module(
    model: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
    *,
    owned: bool = False,
) -> Graph:
    """Captures a module in eval mode and raises it. The module is not modified.

    Args:
        example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments. A batch of 1 is fine.
        dynamic_shapes: "batch" (axis 0 of every input that shares the first one's), None (all fixed), or a
        structure
            as `torch.export.export` takes it.
        nonfinite: "refuse" or "zero", as `graph.weights.settled` takes it.
        owned: nobody else holds the module: it becomes part of the graph, instead of a copy as large.

    Raises:
        LoadError: the model can't be captured; names the user's line for data-dependent control flow.
        WeightsError: a parameter holds NaN or infinite values.
        GraphError: writes in place that can't be made functional.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise LoadError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the eager model")
    if nonfinite == "refuse" and not owned:
        check_weights(model)  # before it is copied
    if isinstance(model, RaisedModule) and META in model.meta:
        again = _again(model, device, nonfinite)
        again.examples = spans(pytree.tree_leaves(example_inputs), [item.name for item in again.inputs])
        return again
    args, kwargs = _example(example_inputs, device)
    copied = (model if owned else _copy(model)).to(device).eval()
    zeroed = settled(copied, nonfinite)
    capture = _Capture(copied, args, kwargs)
    capture.notes += zeroed
    capture.run(dynamic_shapes)
    twin = _copy(copied) if decides(copied) else None
    graph = from_program(capture.program, copied, capture.axes(), capture.notes)
    graph.examples = spans(pytree.tree_leaves((args, kwargs)), [item.name for item in graph.inputs])
    if twin is not None:
        graph.notes.extend(erased(copied, twin, args, kwargs, graph))
    return graph


def _again(model: RaisedModule, device: str, nonfinite: str) -> Graph:
    """A module that `Graph.module` gave: the graph is still in it, with its names."""
    copied = copy.deepcopy(model).to(device).eval()
    known = copied.meta[META]
    inputs = [InputSpec(*item) for item in known["inputs"]]
    notes = [*known["notes"], *settled(copied, nonfinite)]
    graph = finish(copied, inputs, notes, known["stage"], known["sizes"])
    graph.given = dict(known["given"])
    return graph


def _copy(model: nn.Module) -> nn.Module:
    # weight_norm and spectral_norm (hook style) leave computed tensors in the module, which deepcopy refuses
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise LoadError(f"the model can't be copied ({error}): make it work with copy.deepcopy") from error


def _example(example: Any, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        raise LoadError("example_inputs is missing: pass a tensor, a tuple, or a dict of keyword arguments")
    args: tuple[Any, ...] = (example,)
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, tuple | list):
        args = tuple(example)
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        where = pytree.keystr(path[1:])
        if not isinstance(leaf, Tensor):
            raise LoadError(
                f"example input {where} is {type(leaf).__name__}, not a tensor: bind it in the model "
                f"(functools.partial or a wrapper module) before loading"
            )
        if leaf.is_complex():
            raise LoadError(
                f"example input {where} is complex ({leaf.dtype}): only real tensors can be compressed"
            )

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device)

    return pytree.tree_map(move, args), pytree.tree_map(move, kwargs)


class _Leaf(NamedTuple):
    name: str
    tensor: Tensor


class _Capture:
    """One capture of a model: which axes are dynamic, and what had to be fixed."""

    program: torch.export.ExportedProgram

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.notes: list[str] = []
        self.batched: set[int] = set()
        self.given: Any = None

    def run(self, dynamic: Any) -> None:
        if isinstance(dynamic, str):
            if dynamic != "batch":
                raise LoadError(
                    f"dynamic_shapes={dynamic!r} is unknown: use 'batch', None or a torch structure"
                )
            self._batch()
        else:
            self.given = dynamic
            self.program = self._export(self.args, self.kwargs, dynamic)
            self._say_fixed(dynamic)

    def _batch(self) -> None:
        flat, tree = pytree.tree_flatten((self.args, self.kwargs))
        size = flat[0].shape[0] if flat and flat[0].dim() else None
        if size == 0:
            raise LoadError("the example inputs hold no sample: give a batch of one at least")
        if size is None:
            self.program = self._export(self.args, self.kwargs, None)
            return
        self.batched = {i for i, t in enumerate(flat) if t.dim() and t.shape[0] == size}
        reason = ""
        while self.batched:
            wide = [torch.cat([t, t]) if i in self.batched and size == 1 else t for i, t in enumerate(flat)]
            args, kwargs = pytree.tree_unflatten(wide, tree)
            spec = [{0: Dim.AUTO} if i in self.batched else None for i in range(len(flat))]
            try:
                program = self._export(args, kwargs, self._structure(pytree.tree_unflatten(spec, tree)))
            except LoadError as error:
                reason = str(error)
                break
            fixed = {i for i in self.batched if _fixed(self._values(program)[i].shape[0])}
            if not fixed:
                self.program = program
                return
            reason = "the model works for this batch size only"
            if 0 in fixed:
                break
            self.batched -= fixed  # not a batch after all: it only happened to have the same length
        self.batched = set()
        self.program = self._export(self.args, self.kwargs, None)
        first = self._placeholders(self.program)[0]
        self.notes.append(f"axis 0 of {first!r} is fixed at {size}: {reason}")

    def _structure(self, spec: Any) -> Any:
        args, kwargs = spec
        return args if not kwargs else self._named(args, kwargs)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        import inspect

        names = list(inspect.signature(self.model.forward).parameters)
        return dict(zip(names, args, strict=False)) | kwargs

    def _export(self, args: Any, kwargs: Any, dynamic: Any) -> torch.export.ExportedProgram:
        try:
            with quiet_export(), torch.enable_grad():
                return torch.export.export(self.model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        except BitportError:
            raise
        except Exception as error:
            hint = _odd_bias(self.model) or _user_line(error)
            raise LoadError(f"the model can't be captured: {first_line(error)}{hint}") from error

    def _placeholders(self, program: torch.export.ExportedProgram) -> list[str]:
        return [str(name) for name in program.graph_signature.user_inputs]

    def _values(self, program: torch.export.ExportedProgram) -> list[Any]:
        found = {n.name: n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")}
        return [found[name] for name in self._placeholders(program)]

    def axes(self) -> dict[tuple[str, int], str]:
        """Names of dynamic axes by (input name, axis)."""
        labels = self._placeholders(self.program)
        if self.given is None:
            return {(labels[i], 0): "batch" for i in self.batched}
        found: dict[tuple[str, int], str] = {}
        for label, dims in zip(labels, self._dims(self.given), strict=False):
            for axis, dim in dims.items():
                name = getattr(dim, "__name__", None)
                if isinstance(name, str) and name.isidentifier() and not isinstance(dim, type(Dim.AUTO)):
                    found[label, axis] = name
        return found

    def _dims(self, dynamic: Any) -> list[dict[int, Any]]:
        """Per flat input {axis: what was asked}; empty where the structure can't be followed."""
        leaves = pytree.tree_leaves(dynamic, is_leaf=lambda value: value is None or _is_axes(value))
        return [_as_dict(leaf) for leaf in leaves]

    def _say_fixed(self, dynamic: Any) -> None:
        if dynamic is None:
            return
        labels, values = self._placeholders(self.program), self._values(self.program)
        for label, value, dims in zip(labels, values, self._dims(dynamic), strict=False):
            for axis, dim in dims.items():
                if dim is not None and not isinstance(dim, int) and _fixed(value.shape[axis]):
                    self.notes.append(
                        f"axis {axis} of {label!r} is fixed at {value.shape[axis]}: the model needs it"
                    )


def _odd_bias(model: nn.Module) -> str:
    """The first bias whose size doesn't fit its layer, which torch's own message doesn't name."""
    for name, module in model.named_modules():
        bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
        if not isinstance(bias, Tensor) or not isinstance(weight, Tensor) or not weight.dim():
            continue
        wanted = getattr(module, "out_channels", weight.shape[0])
        if isinstance(wanted, int) and bias.numel() != wanted and bias.shape != weight.shape:
            where = f"{name}.bias" if name else "bias"
            return f"; {where} has {bias.numel()} values, its layer takes {wanted}: give it {wanted}"
    return ""


def _fixed(size: Any) -> bool:
    """Whether tracing made a size a number: some stay symbols whose only value is known (after `len(x)`, say)."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def _is_axes(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, int) for k in value)
    known = (int, type(None), type(Dim.AUTO))
    return isinstance(value, tuple | list) and all(
        isinstance(v, known) or hasattr(v, "__name__") for v in value
    )


def _as_dict(value: Any) -> dict[int, Any]:
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, tuple | list) else {}


def _user_line(error: BaseException) -> str:
    """The innermost line of code that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        inside = (
            frame.filename.startswith(ours) or frame.filename.startswith("<") or "importlib" in frame.filename
        )
        if not inside and "contextlib" not in frame.filename:
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            found = f"; at {frame.filename}:{frame.lineno}: {line}"
    return found
