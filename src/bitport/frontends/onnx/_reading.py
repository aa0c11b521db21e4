"""An `.onnx` file as nodes and constants; nothing outside its folder is read, nothing that doesn't fit is believed.

`_external` reads the tensors that lie in files of their own, `_functions` takes a file's own operators apart.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import LoadError, NotEnoughMemory, first_line
from ...graph import GivenScale
from . import _external, _functions
from ._calls import Array

OLDEST, NEWEST = 7, 28  # opsets that are read as they are; older ones are converted
CONVERTED = 13
LONGEST = 1000  # of a name
FREE = ("doc_string", "value")  # texts that are no names, of any length
LARGEST = 2**31 - 1  # bytes that protobuf takes
DOMAINS = ("", "ai.onnx")
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass
class Port:
    """An input of the network: its name, its axes (a length, a name, or None where neither is said), its data type."""

    name: str
    shape: list[int | str | None] | None
    kind: int


@dataclass
class Node:
    kind: str
    domain: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: Mapping[str, Any]
    scope: str | None = None  # the path of the module that it was exported from
    bodies: Mapping[str, Model] = field(default_factory=dict)  # its own graphs; all read inputs alone


@dataclass
class Model:
    """What an ONNX file says."""

    inputs: list[Port]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Array]
    opset: int
    notes: list[str] = field(default_factory=list)
    given: dict[str, GivenScale] = field(default_factory=dict)  # of tensors whose roundings were taken out
    captured: int = 0  # so many of its inputs, the last ones, are values of the graph around it

    @property
    def own(self) -> int:
        """How many inputs it has that it doesn't capture."""
        return len(self.inputs) - self.captured


def read(path: Path) -> Model:
    """Raises LoadError where it is no ONNX model, UnsafeFile where it wants data from outside its folder."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if not path.is_file():
            raise LoadError(f"{path.name} is no file: give an .onnx file")
        if path.stat().st_size > LARGEST:
            raise LoadError(f"{path.name} is larger than 2 GB: save the model again, with external data")
        proto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path.name} can't be read: {first_line(error)}") from error
    except DecodeError as error:
        raise LoadError(f"{path.name} is no ONNX model, or is cut off: {first_line(error)}") from error
    if not proto.graph.output:
        raise LoadError(f"{path.name} holds no network: its graph has no outputs")
    try:
        return from_proto(proto, path.name, path.parent)
    except MemoryError as error:
        raise NotEnoughMemory(f"{path.name} doesn't fit into memory: load it where there is more") from error


def from_proto(proto: Any, name: str = "the model", folder: Path | None = None) -> Model:
    """The same of a `ModelProto`. folder: of its external data; None: its data is all in it."""
    _check_text(proto, name)
    notes = []
    opset = next((item.version for item in proto.opset_import if item.domain in DOMAINS), 0)
    if opset < 1:
        raise LoadError(f"{name} doesn't say which opset it is written in: export it again")
    if opset > NEWEST:
        raise LoadError(
            f"{name} is written in opset {opset}, and operators are known up to {NEWEST}: export it in an older one"
        )
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    size = _external.check(_tensors(proto.graph.initializer, *bodies), folder)
    if opset < OLDEST:
        proto = _converted(proto, name, opset, size, folder)
        notes.append(f"converted from opset {opset} to {CONVERTED}")
        opset = CONVERTED
    graph = proto.graph
    if graph.sparse_initializer:
        raise LoadError(
            f"{name} holds sparse weights ({graph.sparse_initializer[0].values.name!r}): make them dense"
        )
    constants = {tensor.name: _array(tensor, folder) for tensor in graph.initializer}
    if len(constants) < len(graph.initializer):
        raise LoadError(f"{name}: two of its weights have one name")
    if proto.functions:
        graph = _functions.inlined(proto, name).graph
    inputs = [_port(item, name) for item in graph.input if item.name not in constants]
    if len({port.name for port in inputs}) < len(inputs):
        raise LoadError(f"{name}: two inputs have one name")
    nodes = _nodes(graph, opset, folder)
    model = Model(inputs, [item.name for item in graph.output], nodes, constants, opset, notes)
    _check_order(model, name)
    return model


def _check_text(message: Any, name: str) -> None:
    """Names that are no text come out of protobuf as bytes, of which nothing here would know."""
    if message.DESCRIPTOR.name == "TensorProto":  # its numbers may be large
        values = [
            message.name,
            *(word for entry in message.external_data for word in (entry.key, entry.value)),
        ]
    else:
        values = []
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                for inner in value if hasattr(value, "append") else [value]:
                    _check_text(inner, name)
            elif field.type == field.TYPE_STRING and field.name not in FREE:
                values += [value] if isinstance(value, str | bytes) else value
    for value in values:
        if not isinstance(value, str):
            raise LoadError(f"{name} holds a name that is no text ({value[:50]!r}): the file is damaged")
        if len(value) > LONGEST:
            raise LoadError(
                f"{name}: {value[:50]!r}… is a name of {len(value)} characters: the file is damaged"
            )


def _converted(proto: Any, name: str, opset: int, size: int, folder: Path | None) -> Any:
    """A model of an old opset in a newer one. size: bytes of its external data."""
    import onnx
    import onnx.version_converter

    if size > LARGEST:
        raise LoadError(
            f"{name} is written in opset {opset} and larger than 2 GB: export it again in a newer one"
        )
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)  # the converter sees only what is in it
    for tensor in _tensors(whole.graph.initializer, whole.graph.node):
        if folder is not None and _external.is_external(tensor):
            tensor.raw_data = _external.data_of(tensor, folder)
            tensor.data_location = tensor.DEFAULT
            del tensor.external_data[:]
    open_ports = [item for item in whole.graph.output if not item.type.tensor_type.HasField("shape")]
    for item in open_ports:
        item.type.tensor_type.shape.SetInParent()  # the checker alone asks for one
    try:
        onnx.checker.check_model(whole)  # the converter takes for granted that it is one
        for item in open_ports:
            item.type.tensor_type.ClearField("shape")
        return onnx.version_converter.convert_version(whole, CONVERTED)
    except (
        RuntimeError,
        ValueError,
        LookupError,
        onnx.checker.ValidationError,
    ) as error:  # what its C++ raises
        raise LoadError(
            f"{name} is written in opset {opset}, which can't be converted to {CONVERTED}: {first_line(error)}; "
            "export it again in a newer one"
        ) from error


def _port(item: Any, name: str) -> Port:
    if not item.type.HasField("tensor_type"):
        raise LoadError(
            f"{name}: input {item.name!r} is no tensor: sequences and optional values can't be taken"
        )
    found = item.type.tensor_type
    if not found.HasField("shape"):
        return Port(item.name, None, found.elem_type)
    shape = [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in found.shape.dim
    ]
    return Port(item.name, shape, found.elem_type)


def _nodes(graph: Any, opset: int, folder: Path | None) -> list[Node]:
    nodes = [_node(item, index, opset, folder) for index, item in enumerate(graph.node)]
    _name_apart(nodes)
    return nodes


def _body(graph: Any, opset: int, folder: Path | None) -> Model:
    """A node's own graph, whose inputs are its own and, behind those, what it reads of the graph around it."""
    own = [item.name for item in graph.input]
    constants = {tensor.name: _array(tensor, folder) for tensor in graph.initializer}
    nodes, outputs = _nodes(graph, opset, folder), [item.name for item in graph.output]
    known, read = {"", *constants, *own}, []
    for node in nodes:
        read += [name for name in node.inputs if name not in known]
        known.update(node.outputs)
    captured = list(dict.fromkeys([*read, *(name for name in outputs if name not in known)]))
    ports = [Port(name, None, 0) for name in (*own, *captured)]
    model = Model(ports, outputs, nodes, constants, opset, captured=len(captured))
    _check_order(model, f"graph {graph.name!r}")
    return model


def _closed(inputs: list[str], bodies: Mapping[str, Model]) -> list[str]:
    """A node's inputs with all that its graphs capture, which all of them get."""
    captured = list(
        {port.name: port for body in bodies.values() for port in body.inputs[body.own :]}.values()
    )
    for body in bodies.values():
        body.inputs, body.captured = [*body.inputs[: body.own], *captured], len(captured)
    missing = max((body.own for body in bodies.values()), default=0) - len(inputs)
    return [*inputs, *[""] * missing, *(port.name for port in captured)]


def _node(item: Any, index: int, opset: int, folder: Path | None) -> Node:
    from onnx import AttributeProto, helper

    attrs: dict[str, Any] = {}
    bodies: dict[str, Model] = {}
    for attribute in item.attribute:
        if attribute.type == AttributeProto.GRAPH:
            bodies[attribute.name] = _body(attribute.g, opset, folder)
            continue
        if attribute.type == AttributeProto.TENSOR:
            attrs[attribute.name] = _array(attribute.t, folder)
            continue
        try:
            attrs[attribute.name] = _text(helper.get_attribute_value(attribute))
        except (ValueError, TypeError) as error:
            raise LoadError(
                f"node {item.name!r} has an attribute that can't be read: {first_line(error)}"
            ) from error
    outputs = list(item.output)
    while outputs and not outputs[-1]:
        outputs.pop()
    return Node(
        item.op_type,
        item.domain,
        item.name or f"{item.op_type}_{index}",
        _closed(list(item.input), bodies),
        outputs,
        attrs,
        _scope(item),
        bodies,
    )


def _text(value: Any) -> Any:
    """An attribute whose bytes are text. Raises UnicodeDecodeError, a ValueError."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def _name_apart(nodes: list[Node]) -> None:
    """ONNX leaves names of nodes free: several may have one."""
    taken: set[str] = set()
    for index, node in enumerate(nodes):
        if node.name in taken:
            node.name = f"{node.name}_{index}"
        taken.add(node.name)


def _scope(item: Any) -> str | None:
    """The module's path, as PyTorch's exporter notes it: modules from outside in, then the node's own name."""
    for entry in item.metadata_props:
        if entry.key == SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None
            plain = (
                isinstance(scopes, list) and all(isinstance(part, str) for part in scopes) and len(scopes) > 1
            )
            return scopes[-2] if plain and re.fullmatch(r"(\w+(\.\w+)*)?", scopes[-2]) else None
    return None


def _check_order(model: Model, name: str) -> None:
    """Every node reads what is there before it, so that there are no circles; every name is given once."""
    known = {port.name for port in model.inputs} | set(model.constants) | {""}
    for node in model.nodes:
        missing = [item for item in node.inputs if item not in known]
        if missing:
            raise LoadError(
                f"{name}: node {node.name!r} reads {missing[0]!r}, which nothing before it gives: the graph has a "
                "circle, isn't sorted or lacks a part"
            )
        again = [item for item in node.outputs if item and item in known]
        if again:
            raise LoadError(f"{name}: {again[0]!r} is given twice, the second time by node {node.name!r}")
        known.update(node.outputs)
    absent = [item for item in model.outputs if item not in known]
    if absent:
        raise LoadError(f"{name}: nothing gives its output {absent[0]!r}")


def _array(tensor: Any, folder: Path | None) -> Array:
    """Raises LoadError where the numbers aren't as many as its shape says, or of a type that has no tensors here."""
    from onnx import helper, numpy_helper

    count, size = math.prod(tensor.dims), _external.BYTES.get(tensor.data_type)
    if tensor.data_type == tensor.STRING:
        raise LoadError(
            f"tensor {tensor.name!r} is text, which can't be imported: only numbers are tensors here"
        )
    if any(length < 0 for length in tensor.dims):
        raise LoadError(f"tensor {tensor.name!r} has an axis of negative length: the file is damaged")
    if size is not None and tensor.HasField("raw_data") and len(tensor.raw_data) != count * size:
        raise LoadError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {len(tensor.raw_data)} bytes of data, not "
            f"{count * size}: the file is damaged"
        )
    try:
        if _external.is_external(tensor) and folder is not None:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            dtype = dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype
            return np.frombuffer(_external.data_of(tensor, folder), dtype).reshape(tensor.dims)
        return np.asarray(numpy_helper.to_array(tensor))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"tensor {tensor.name!r} can't be read: {first_line(error)}") from error


def _tensors(*parts: Any) -> Iterator[Any]:
    """Every tensor of lists of tensors and nodes, those in attributes and in the graphs of nodes among them."""
    for item in itertools.chain(*parts):
        if not hasattr(item, "attribute"):
            yield item
            continue
        for attribute in item.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _tensors(inner.initializer, inner.node)
