"""A .tflite file read back with the schema that the runtime ships; nothing in it is trusted."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from ...errors import TargetError
from ._flatbuffer import BITS, CHANNELS_LAST, IDENTIFIER, schema

LARGEST = 2**31  # bytes of one activation: LiteRT counts them in 32 bits
MOST_AXES = 8
KEEPING = ("QUANTIZE", "DEQUANTIZE", "TRANSPOSE", "RESHAPE")
# What zero points of a type can be.
INTEGERS = {
    "INT2": (-2, 1),
    "INT4": (-8, 7),
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (0, 0),
    "INT32": (0, 0),
}


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
    """What the runtime takes for granted, and ends the process without: places that exist, sizes that fit, numbers that
    a type holds. Raises ValueError.
    """
    if not model.subgraphs or not model.buffers or not model.operatorCodes:
        raise ValueError("a file without a network")
    for graph in model.subgraphs:
        count = len(graph.tensors)
        for tensor in graph.tensors:
            if not 0 <= tensor.buffer < len(model.buffers):
                raise ValueError("a tensor without its numbers")
            _check_tensor(tensor, model.buffers[tensor.buffer].data)
        for step in graph.operators or []:
            if not 0 <= step.opcodeIndex < len(model.operatorCodes):
                raise ValueError("an operator of no kind")
            if not _list(step.inputs) or not _list(step.outputs):
                raise ValueError("an operator that takes or gives nothing")
            for index in [*_list(step.inputs), *_list(step.outputs)]:
                if not -1 <= index < count:
                    raise ValueError("an operator that reads nothing")
        _check_steps(model, graph)
        for index in [*_list(graph.inputs), *_list(graph.outputs)]:
            if not 0 <= index < count:
                raise ValueError("an end that is no tensor")


def kind_of(model: Any, step: Any) -> str:
    """The operator's name in the schema. Raises KeyError where there is none."""
    kinds: dict[int, str] = {
        value: name for name, value in vars(schema().BuiltinOperator).items() if isinstance(value, int)
    }
    code = model.operatorCodes[step.opcodeIndex]
    return kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]


def _check_steps(model: Any, graph: Any) -> None:
    """Operators that only change how numbers are said or lie give as many as they take. Raises ValueError, KeyError."""
    for step in graph.operators or []:
        if kind_of(model, step) in KEEPING:
            taken, given = (graph.tensors[indices[0]] for indices in (step.inputs, step.outputs))
            if math.prod(_list(taken.shape)) != math.prod(_list(given.shape)):
                raise ValueError("an operator that gives more or fewer numbers than it takes")


def _check_tensor(tensor: Any, data: Any) -> None:
    """Raises ValueError, KeyError."""
    tensor.name.decode()
    kinds = {value: name for name, value in vars(schema().TensorType).items() if isinstance(value, int)}
    kind, shape = kinds[tensor.type], _list(tensor.shape)
    if any(size < 0 for size in shape) or len(shape) > MOST_AXES:
        raise ValueError("a tensor of no shape")
    size = -(-math.prod(shape) * BITS[kind] // 8)
    if data is not None and len(data) != size:
        raise ValueError("a tensor with more or fewer numbers than it has room for")
    if size > LARGEST:
        raise ValueError("a tensor that LiteRT can't hold")
    _check_meaning(tensor.quantization, kind, shape)


def _check_meaning(quantization: Any, kind: str, shape: list[int]) -> None:
    scales = [] if quantization is None or quantization.scale is None else quantization.scale.tolist()
    if not scales:
        return
    zeros, axis = _list(quantization.zeroPoint), int(quantization.quantizedDimension)
    channels = shape[axis] if 0 <= axis < len(shape) else 1
    if len(scales) not in (1, channels) or len(zeros) != len(scales) or kind not in INTEGERS:
        raise ValueError("scales that belong to nothing")
    low, high = INTEGERS[kind]
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError("a scale that is no positive number")
    if not all(low <= zero <= high for zero in zeros):
        raise ValueError("a zero point that its type doesn't hold")


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
