"""A TFLite file in the making: tensors, constants and operators, written with the schema that the runtime ships.

Nothing but the network decides the bytes: no time, no version of a tool, no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ExportError, MissingDependency

Array = np.ndarray[Any, Any]
IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
LARGEST = 2**31 - 1  # offsets in a flatbuffer are signed and of 32 bits
ALIGNED = 16  # bytes; kernels read constants in vectors
SIGNATURE = "serving_default"
CHANNELS_LAST = "bitport.channels_last"  # metadata: names of integer tensors that are stored so (JSON)
AGAIN = "~"  # before the number of a further tensor of the same name
# operator → the first version of it that takes 8-bit integers, where that isn't the first of all
VERSIONS = {
    "ADD": 2, "AVERAGE_POOL_2D": 2, "BATCH_MATMUL": 2, "CONCATENATION": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3,
    "DEQUANTIZE": 2, "FULLY_CONNECTED": 4, "GATHER": 2, "LEAKY_RELU": 2, "LOGISTIC": 2, "MAX_POOL_2D": 2,
    "MAXIMUM": 2, "MEAN": 2, "MINIMUM": 2, "MUL": 2, "PACK": 2, "PAD": 2, "PADV2": 2, "RESHAPE": 1, "SLICE": 2,
    "SOFTMAX": 2, "SPLIT": 2, "SPLIT_V": 2, "STRIDED_SLICE": 2, "TRANSPOSE": 2, "TRANSPOSE_CONV": 3,
}  # fmt: skip
FLOAT16_FROM = {"DEQUANTIZE": 3}
FIRST = {"BROADCAST_TO": 2}  # the runtime has no earlier one
LAST_PLACEHOLDER = 127  # operators with higher codes have them in a field of their own
BITS = {
    "BOOL": 8, "INT2": 2, "INT4": 4, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16, "FLOAT16": 16, "BFLOAT16": 16,
    "INT32": 32, "UINT32": 32, "FLOAT32": 32, "INT64": 64, "UINT64": 64, "FLOAT64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Quant:
    """How a tensor's integers are meant: real = scale · (integer − zero_point).

    scale: float32, 0-d or [C] along `axis`. zero_point: int, alike. low, high: the integers that occur.
    """

    scale: Array
    zero_point: Array
    low: int = -128
    high: int = 127
    axis: int | None = None

    def same(self, other: Quant | None) -> bool:
        """Whether integers mean the same under both."""
        return (
            other is not None
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


def schema() -> Any:
    """The Python classes of the file format. Raises MissingDependency."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingDependency("the target litert", "ai_edge_litert", "litert") from error
    return schema_py_generated


class File:
    """Tensors and operators in the order in which they are added."""

    def __init__(self) -> None:
        self.s = schema()
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[tuple[str, int]] = []
        self.buffers: list[_Buffer] = [_Buffer(None)]  # the first one is empty by the format's rules
        self.known: dict[tuple[str, bytes], int] = {}
        self.names: dict[str, int] = {}
        self.turned: list[str] = []  # names of tensors that are stored with the channels last

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        *,
        dynamic: Sequence[int] = (),
        quant: Quant | None = None,
        data: Array | None = None,
    ) -> int:
        """Add a tensor; its index.

        Args:
            dtype: as the schema calls it in upper case, e.g. INT8.
            dynamic: axes whose sizes may change.
            data: of a constant, in the bytes of the file (4-bit codes packed).
        """
        made = self.s.TensorT()
        made.name = self._unique(name)
        made.shape = [int(size) for size in shape]
        made.type = getattr(self.s.TensorType, dtype)
        made.hasRank = True
        if dynamic:
            made.shapeSignature = [-1 if axis in dynamic else int(size) for axis, size in enumerate(shape)]
        if quant is not None:
            made.quantization = self._parameters(quant)
        if data is not None:
            made.buffer = self._buffer(data)
        self.tensors.append(made)
        return len(self.tensors) - 1

    def operator(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an operator. kind: as the schema calls it, e.g. CONV_2D. options: of its options table, −1: no input."""
        made = self.s.OperatorT()
        code = (kind, self._version(kind, [*inputs, *outputs]))
        if code not in self.codes:
            self.codes.append(code)
        made.opcodeIndex = self.codes.index(code)
        made.inputs, made.outputs = list(inputs), list(outputs)
        if options is not None:
            table = dict(options)
            called = f"{table.pop('table')}Options"
            made.builtinOptionsType = getattr(self.s.BuiltinOptions, called)
            made.builtinOptions = getattr(self.s, f"{called}T")()
            for key, value in table.items():
                setattr(made.builtinOptions, key, value)
        self.operators.append(made)

    def content(self, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> bytes:
        """The file. inputs, outputs: (name in the signature, tensor). Raises ExportError above 2 GiB."""
        import flatbuffers

        size = sum(buffer.size for buffer in self.buffers)
        if size > LARGEST - (1 << 24):
            raise ExportError(
                f"a .tflite file ends at 2 GiB, and the weights of this network take {size} bytes"
            )
        s = self.s
        graph, model, signature = s.SubGraphT(), s.ModelT(), s.SignatureDefT()
        graph.name = "main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = ([index for _, index in ends] for ends in (inputs, outputs))
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs, signature.outputs = (
            [self._end(name, index) for name, index in ends] for ends in (inputs, outputs)
        )
        model.version, model.description = SCHEMA_VERSION, "bitport"
        model.subgraphs, model.signatureDefs, model.buffers = [graph], [signature], self.buffers
        layouts, note = json.dumps(self.turned).encode(), s.MetadataT()
        note.name, note.buffer = CHANNELS_LAST, self._buffer(np.frombuffer(layouts, np.uint8))
        model.metadata = [note]
        model.operatorCodes = [self._code(kind, version) for kind, version in self.codes]
        builder = flatbuffers.Builder(size + 4096)
        builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
        return bytes(builder.Output())

    def _unique(self, name: str) -> str:
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}{AGAIN}{self.names[name]}"

    def _parameters(self, quant: Quant) -> Any:
        made = self.s.QuantizationParametersT()
        made.scale = np.atleast_1d(quant.scale).astype(np.float32)
        made.zeroPoint = np.atleast_1d(quant.zero_point).astype(np.int64)
        made.quantizedDimension = quant.axis or 0
        return made

    def _buffer(self, data: Array) -> int:
        content = np.ascontiguousarray(data)
        key = (content.dtype.str, content.tobytes())
        if key not in self.known:
            self.known[key] = len(self.buffers)
            self.buffers.append(_Buffer(content))
        return self.known[key]

    def _version(self, kind: str, tensors: Sequence[int]) -> int:
        types = {self.tensors[index].type for index in tensors if index >= 0}
        if self.s.TensorType.FLOAT16 in types:
            return FLOAT16_FROM.get(kind, 1)
        first = FIRST.get(kind, 1)
        return VERSIONS.get(kind, first) if self.s.TensorType.INT8 in types else first

    def _code(self, kind: str, version: int) -> Any:
        made = self.s.OperatorCodeT()
        made.builtinCode = getattr(self.s.BuiltinOperator, kind)
        made.deprecatedBuiltinCode = min(made.builtinCode, LAST_PLACEHOLDER)
        made.version = version
        return made

    def _end(self, name: str, index: int) -> Any:
        made = self.s.TensorMapT()
        made.name, made.tensorIndex = name, index
        return made


class _Buffer:
    """The bytes of a constant, where vector instructions may read them; the schema's own class doesn't align."""

    def __init__(self, content: Array | None) -> None:
        self.content = content
        self.size = 0 if content is None else content.nbytes + ALIGNED

    def Pack(self, builder: Any) -> int:  # the name that the schema's classes call
        s = schema()
        if self.content is None:
            s.BufferStart(builder)
            return int(s.BufferEnd(builder))
        raw = self.content.tobytes()
        builder.StartVector(1, len(raw), ALIGNED)
        head = builder.Head() - len(raw)
        builder.head = head
        builder.Bytes[head : head + len(raw)] = raw
        place = builder.EndVector()
        s.BufferStart(builder)
        s.BufferAddData(builder, place)
        return int(s.BufferEnd(builder))
