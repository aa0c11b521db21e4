"""The ONNX front end: an `.onnx` file to a `Graph`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.traceback import preserve_node_meta

from ...errors import LoadError
from ...graph import GivenScale, Graph
from ...graph.program import MARK
from .. import pytorch
from ._calls import LARGEST, OPERATORS, SMALL_FLOATS, Array
from ._module import identifier, network
from ._reading import Model, Port, from_proto, read
from ._rounding import without_rounding
from .elementwise import DTYPES

BATCH = 2  # of an example that is made up
MOVED = ("transpose", "view", "squeeze", "unsqueeze")
MOST_AXES = 64  # that torch has
# inputs that must be known, by operator: what an example gives for them is kept
DECIDING: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Tile": (1,), "Pad": (1, 2, 3), "Unsqueeze": (1,),
    "Squeeze": (1,), "Split": (1,), "TopK": (1,), "Resize": (1, 2, 3), "Upsample": (1,), "ConstantOfShape": (0,),
    "Range": (0, 1, 2), "OneHot": (1,), "CumSum": (1,), "CumProd": (1,), "Trilu": (1,), "Compress": (1,),
    "CenterCropPad": (1,), "Col2Im": (1, 2), "AffineGrid": (1,), "Dropout": (1, 2), "HannWindow": (0,),
    "HammingWindow": (0,), "BlackmanWindow": (0,), "LSTM": (4,), "GRU": (4,), "RNN": (4,),
    "If": (0,), "Loop": (0, 1),
}  # fmt: skip


def load_onnx(
    path: str | Path,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """Reads a file and raises it.

    Args:
        example_inputs: a tensor, a tuple of them, or a dict by input name. None: random numbers of the shapes that the
            file declares, with a batch of two where its first axis is open.
        dynamic_shapes, nonfinite: as `pytorch.load_module` takes them.

    Raises:
        LoadError: it is damaged, an operator can't be imported (named with its node and opset), a shape isn't known.
        UnsafeFile: it wants data from outside its folder.
    """
    return load_model(read(Path(path)), example_inputs, dynamic_shapes, device, nonfinite)


def load_proto(proto: Any, example_inputs: Any = None, **options: Any) -> Graph:
    """The same of an `onnx.ModelProto`."""
    return load_model(from_proto(proto), example_inputs, **options)


def load_model(
    model: Model,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    device: str = "cpu",
    nonfinite: str = "refuse",
) -> Graph:
    """The same of what was read. A quantized file gives the float network that it was made of.

    It uses up the model's constants, which may be as large as the network.
    """
    model = without_rounding(model)
    examples = _examples(model, example_inputs)
    deciding = _deciding(model)
    fixed = {name: _known(name, examples) for name in deciding}
    module = network(model, fixed)
    inputs = {identifier(port.name): examples[port.name] for port in model.inputs if port.name not in fixed}
    with preserve_node_meta(bool(model.given)):
        graph = pytorch.load_module(module, inputs, dynamic_shapes, device, nonfinite, owned=True)
    graph.given = _given(graph, model)
    graph.notes += model.notes
    graph.notes += [
        f"input {name!r} is fixed at {value.tolist()}: it decides shapes" for name, value in fixed.items()
    ]
    return graph


def _given(graph: Graph, model: Model) -> dict[str, GivenScale]:
    """The scales of a quantized file by the names of the graph."""
    called = {port.name: identifier(port.name) for port in model.inputs}
    for node in graph.gm.graph.nodes:
        mark = node.meta.pop(MARK, None)
        if mark is not None:
            called[mark] = graph.name(node)  # the last of those that an operator became
    found = {called[name]: scale for name, scale in model.given.items() if name in called}
    for node in reversed(graph.nodes()):  # what is moved before it is rounded was as good as rounded before
        op, name = graph.op(node), graph.name(node)
        if (
            op.kind in MOVED
            and name in found
            and op.operands[0] is not None
            and op.operands[0].node is not None
        ):
            found.setdefault(graph.name(op.operands[0].node), found[name])
    return found


def _deciding(model: Model) -> list[str]:
    """Inputs of the network that shapes, axes and the like are computed from: numbers, or lists of them."""
    ports = {port.name: port for port in model.inputs}
    found = _decided(model, [{name} for name in ports])
    return [name for name, port in ports.items() if name in found and len(port.shape or ()) <= 1]


def _decided(model: Model, given: Sequence[set[str]]) -> set[str]:
    """Those inputs of the network that decide something. given: for each input of the graph, what it is made of."""
    made_of = {port.name: names for port, names in zip(model.inputs, given, strict=False)}
    found: set[str] = set()
    for node in model.nodes:
        slots = (1,) if node.kind.startswith("Reduce") else DECIDING.get(node.kind, ())
        read = [made_of.get(name, set()) for name in node.inputs]
        found |= set().union(*(read[slot] for slot in slots if slot < len(read)))
        for body in node.bodies.values():
            found |= _decided(body, [*read[: body.own], *read[len(read) - body.captured :]])
        sizes = node.kind in ("Shape", "Size")  # which are known without data
        made_of.update(dict.fromkeys(node.outputs, set() if sizes else set().union(*read)))
    return found


def _known(name: str, examples: Mapping[str, Tensor | None]) -> Array:
    value = examples[name]
    if value is None:
        raise LoadError(f"input {name!r} decides shapes: give its value in example_inputs")
    if value.dtype in SMALL_FLOATS.values():
        raise LoadError(
            f"input {name!r} decides shapes and is {value.dtype}: only integers and usual floats can"
        )
    return np.asarray(value.detach().cpu().numpy())


def _examples(model: Model, given: Any) -> dict[str, Any]:
    """A tensor for each input, by its name in the file."""
    names = [port.name for port in model.inputs]
    if given is None:
        deciding = _deciding(model)
        return {port.name: None if port.name in deciding else _made_up(port) for port in model.inputs}
    if isinstance(given, Mapping):
        known = {identifier(name): name for name in names} | {name: name for name in names}
        unknown = [key for key in given if key not in known]
        if unknown:
            raise LoadError(f"the network has no input {unknown[0]!r}: it has {', '.join(map(repr, names))}")
        found = {known[key]: value for key, value in given.items()}
    else:
        values = (given,) if isinstance(given, Tensor) else tuple(given)
        found = dict(zip(names, values, strict=False))
    missing = [name for name in names if name not in found]
    if missing:
        raise LoadError(f"example_inputs lacks {missing[0]!r}: give all of {', '.join(map(repr, names))}")
    return found


def _made_up(port: Port) -> Tensor:
    dtype = DTYPES.get(port.kind)
    if dtype is None:
        raise LoadError(f"input {port.name!r} has data type {port.kind}, of which there are no tensors here")
    if port.shape is None:
        raise LoadError(f"the file doesn't say the shape of {port.name!r}: give example_inputs")
    if len(port.shape) > MOST_AXES:
        raise LoadError(f"input {port.name!r} has {len(port.shape)} axes: the file is damaged")
    shape: list[int] = []
    for axis, length in enumerate(port.shape):
        if isinstance(length, int) and length > 0:
            shape.append(length)
        elif axis == 0:
            shape.append(BATCH)
        else:
            raise LoadError(
                f"axis {axis} of input {port.name!r} is open ({length or 'without a name'}): give example_inputs, "
                "with a length for it"
            )
    if math.prod(shape) > LARGEST:
        raise LoadError(
            f"input {port.name!r} of shape {shape} is too large to be made up: give example_inputs"
        )
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def operators() -> tuple[str, ...]:
    """The names of all operators that can be imported."""
    return tuple(sorted(OPERATORS))
