"""A .tflite file read back with the schema that the runtime ships; nothing in it is trusted."""

from __future__ import annotations

import json
import struct
from typing import Any

from ...errors import TargetError
from ._flatbuffer import CHANNELS_LAST, IDENTIFIER, schema


def read_model(content: bytes, name: str) -> Any:
    """The file as the schema's classes. Raises TargetError for one that isn't whole."""
    s = schema()
    if content[4:8] != IDENTIFIER:
        raise TargetError(f"{name} is no TFLite file, or is damaged: make the artifact again")
    try:
        model = s.ModelT.InitFromPackedBuf(content, 0)
        _check(model)
    except (
        struct.error,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise TargetError(f"{name} is damaged ({type(error).__name__}): make the artifact again") from error
    return model


def _check(model: Any) -> None:
    """Every number that names a place must name one that exists. Raises ValueError."""
    if not model.subgraphs or not model.buffers or not model.operatorCodes:
        raise ValueError("a file without a network")
    for graph in model.subgraphs:
        count = len(graph.tensors)
        for tensor in graph.tensors:
            if not 0 <= tensor.buffer < len(model.buffers):
                raise ValueError("a tensor without its numbers")
        for step in graph.operators or []:
            if not 0 <= step.opcodeIndex < len(model.operatorCodes):
                raise ValueError("an operator of no kind")
            for index in [*_list(step.inputs), *_list(step.outputs)]:
                if not -1 <= index < count:
                    raise ValueError("an operator that reads nothing")
        for index in [*_list(graph.inputs), *_list(graph.outputs)]:
            if not 0 <= index < count:
                raise ValueError("an end that is no tensor")


def _list(values: Any) -> list[int]:
    return [] if values is None else [int(value) for value in values]


def channels_last(model: Any) -> frozenset[str]:
    """Names of integer tensors that are stored so. Raises TargetError where the file tells it wrongly."""
    for note in model.metadata or []:
        if note.name == CHANNELS_LAST.encode() and 0 <= note.buffer < len(model.buffers):
            try:
                return frozenset(map(str, json.loads(bytes(model.buffers[note.buffer].data))))
            except (ValueError, TypeError) as error:
                raise TargetError(
                    f"the file's note {CHANNELS_LAST} is damaged: make the artifact again"
                ) from error
    return frozenset()


def with_outputs(model: Any, suffix: str) -> tuple[bytes, list[str]]:
    """The file with tensors whose names end so as further outputs, and their names.

    Integer outputs: the operators that make them stay as they are.
    """
    import flatbuffers

    (graph,) = model.subgraphs
    taken = {*_list(graph.inputs), *_list(graph.outputs)}
    names, extra = [], []
    for index, tensor in enumerate(graph.tensors):
        name = tensor.name.decode()
        constant = model.buffers[tensor.buffer].data is not None
        if name.endswith(suffix) and not constant and index not in taken:
            names.append(name)
            extra.append(index)
    graph.outputs = [*_list(graph.outputs), *extra]
    model.signatureDefs = None
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output()), names
