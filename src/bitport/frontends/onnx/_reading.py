"""An `.onnx` file as nodes and constants; nothing outside its folder is read, nothing that doesn't fit is believed.

External data (tensors that lie in files of their own) must lie in the model's folder, under a plain relative path
without links, and hold what its tensor says.
"""

from __future__ import annotations

import ast
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ...errors import LoadError, UnsafeFile, first_line
from ._calls import Array

OLDEST, NEWEST = 7, 28  # opsets that are read as they are; older ones are converted
CONVERTED = 13
KEYS = {"location", "offset", "length", "checksum", "basepath"}
BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
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


@dataclass
class Model:
    """What an ONNX file says."""

    inputs: list[Port]
    outputs: list[str]
    nodes: list[Node]
    constants: dict[str, Array]
    opset: int
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Model:
    """Raises LoadError where it is no ONNX model, UnsafeFile where it wants data from outside its folder."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise LoadError(f"{path.name} can't be read: {first_line(error)}") from error
    except DecodeError as error:
        raise LoadError(f"{path.name} is no ONNX model, or is cut off: {first_line(error)}") from error
    if not proto.graph.output:
        raise LoadError(f"{path.name} holds no network: its graph has no outputs")
    for tensor in _tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _fetch(tensor, path.parent)
    return from_proto(proto, path.name)


def from_proto(proto: Any, name: str = "the model") -> Model:
    """The same of a `ModelProto` whose data is all in it."""
    import onnx
    import onnx.inliner
    import onnx.version_converter

    notes = []
    opset = next((item.version for item in proto.opset_import if item.domain in DOMAINS), 0)
    if not opset:
        raise LoadError(f"{name} doesn't say which opset it is written in: export it again")
    if opset > NEWEST:
        raise LoadError(
            f"{name} is written in opset {opset}, and operators are known up to {NEWEST}: export it in an older one"
        )
    if opset < OLDEST:
        try:
            proto = onnx.version_converter.convert_version(proto, CONVERTED)
        except RuntimeError as error:  # what its C++ raises
            raise LoadError(
                f"{name} is written in opset {opset}, which can't be converted to {CONVERTED}: {first_line(error)}; "
                "export it again in a newer one"
            ) from error
        notes.append(f"converted from opset {opset} to {CONVERTED}")
        opset = CONVERTED
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    constants = {tensor.name: _array(tensor) for tensor in graph.initializer}
    if graph.sparse_initializer:
        raise LoadError(
            f"{name} holds sparse weights ({graph.sparse_initializer[0].values.name!r}): make them dense"
        )
    inputs = [_port(item, name) for item in graph.input if item.name not in constants]
    if len({port.name for port in inputs}) < len(inputs):
        raise LoadError(f"{name}: two inputs have one name")
    nodes = [_node(item, index) for index, item in enumerate(graph.node)]
    _name_apart(nodes)
    model = Model(inputs, [item.name for item in graph.output], nodes, constants, opset, notes)
    _check_order(model, name)
    return model


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


def _node(item: Any, index: int) -> Node:
    from onnx import AttributeProto, helper

    attrs: dict[str, Any] = {}
    for attribute in item.attribute:
        if attribute.type == AttributeProto.TENSOR:
            attrs[attribute.name] = _array(attribute.t)
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
        list(item.input),
        outputs,
        attrs,
        _scope(item),
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


def _array(tensor: Any) -> Array:
    """Raises LoadError where the numbers aren't as many as its shape says, or of a type that has no tensors here."""
    from onnx import numpy_helper

    count, size = math.prod(tensor.dims), BYTES.get(tensor.data_type)
    if any(length < 0 for length in tensor.dims):
        raise LoadError(f"tensor {tensor.name!r} has an axis of negative length: the file is damaged")
    if size is not None and tensor.HasField("raw_data") and len(tensor.raw_data) != count * size:
        raise LoadError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} has {len(tensor.raw_data)} bytes of data, not "
            f"{count * size}: the file is damaged"
        )
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"tensor {tensor.name!r} can't be read: {first_line(error)}") from error


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph, those in attributes and in the graphs of its nodes among them."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(inner)


# --------------------------------------------------------------------------- external data


def _fetch(tensor: Any, folder: Path) -> None:
    """Put a tensor's external data into it. Raises UnsafeFile, LoadError."""
    told: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in KEYS or entry.key in told:
            raise UnsafeFile(
                f"tensor {tensor.name!r} has external data with {entry.key[:50]!r}, which isn't ONNX"
            )
        told[entry.key] = entry.value
    parts = _plain_path(tensor.name, told.get("location", ""))
    size = BYTES.get(tensor.data_type)
    if size is None or any(length < 0 for length in tensor.dims):
        raise LoadError(
            f"tensor {tensor.name!r} of data type {tensor.data_type} can't be read from external data"
        )
    wanted = math.prod(tensor.dims) * size
    offset, length = (_number(tensor.name, key, told.get(key)) for key in ("offset", "length"))
    if length not in (None, wanted):
        raise LoadError(f"tensor {tensor.name!r} takes {wanted} bytes; its external data has {length}")
    tensor.raw_data = _bytes(tensor.name, folder, parts, offset or 0, wanted)
    tensor.data_location = 0
    del tensor.external_data[:]


def _plain_path(name: str, location: str) -> tuple[str, ...]:
    windows, parts = PureWindowsPath(location), PurePosixPath(location).parts
    odd = (
        not parts or location.startswith(("/", "\\")) or windows.drive or "\\" in location or "\0" in location
    )
    if odd or any(part in ("..", ".") for part in parts):
        raise UnsafeFile(
            f"tensor {name!r} wants data from {location[:200]!r}: only files in the model's folder are read"
        )
    return parts


def _number(name: str, key: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise LoadError(
            f"tensor {name!r} has external data with {key} {value[:50]!r}: it must be a whole number"
        )
    return int(value)


def _bytes(name: str, folder: Path, parts: tuple[str, ...], offset: int, length: int) -> bytes:
    """A stretch of a file in a folder, opened step by step so that no link is followed, not even one made meanwhile."""
    follow_no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    where = "/".join(parts)
    handles: list[int] = []
    try:
        if os.open in os.supports_dir_fd:
            handles.append(os.open(folder, os.O_RDONLY))
            for part in parts[:-1]:
                handles.append(
                    os.open(part, os.O_RDONLY | os.O_DIRECTORY | follow_no_link, dir_fd=handles[-1])
                )
            handles.append(os.open(parts[-1], os.O_RDONLY | follow_no_link, dir_fd=handles[-1]))
        else:
            place = folder
            for part in parts:
                place = place / part
                if place.is_symlink():
                    raise UnsafeFile(f"tensor {name!r} wants data from {where!r}, which is a link")
            handles.append(os.open(place, os.O_RDONLY | follow_no_link))
        found = os.fstat(handles[-1])
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UnsafeFile(f"tensor {name!r} wants data from {where!r}, which is no plain file of its own")
        if offset + length > found.st_size:
            raise LoadError(
                f"tensor {name!r} wants {length} bytes at {offset} of {where!r}, which has {found.st_size}"
            )
        with os.fdopen(handles.pop(), "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise UnsafeFile(
            f"tensor {name!r} wants data from {where!r}, which can't be opened without following links: "
            f"{error.strerror}"
        ) from error
    finally:
        for handle in handles:
            os.close(handle)
    if len(data) != length:
        raise LoadError(f"tensor {name!r}: {where!r} ended while it was read")
    return data
