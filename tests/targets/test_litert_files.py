"""A .tflite file whose parts don't belong together: LiteRT takes that for granted, and ends the process without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from tests.flow import Net, conv, images, prepare

from bitport.errors import TargetError
from bitport.targets.litert._flatbuffer import IDENTIFIER
from bitport.targets.litert.reading import channels_last, kind_of, read_model, with_outputs

FULL = 2**31


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A convolution in integers, between a QUANTIZE and a DEQUANTIZE."""
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    prepared = prepare(Net(lambda m, x: m.a(x), a=conv()), [images(4)], "litert")
    prepared.target.export(prepared.work, prepared.plan, folder)
    return (folder / "model.tflite").read_bytes()


def packed(model: Any) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def convolution(model: Any) -> Any:
    (graph,) = model.subgraphs
    (step,) = [step for step in graph.operators if kind_of(model, step) == "CONV_2D"]
    return step


def weight(model: Any) -> Any:
    """The tensor of the convolution's integers."""
    return model.subgraphs[0].tensors[convolution(model).inputs[1]]


def wide(model: Any) -> None:
    """As many numbers everywhere, more than can be counted in bytes as floats."""
    for tensor in model.subgraphs[0].tensors:
        if model.buffers[tensor.buffer].data is None:
            tensor.shape = [1, FULL - 1]


def scaled(model: Any, **parts: Any) -> None:
    for name, value in parts.items():
        setattr(weight(model).quantization, name, value)


def keeping(model: Any) -> None:
    """The last operator, which says integers as numbers, gives twice as many."""
    (graph,) = model.subgraphs
    made = graph.tensors[graph.operators[-1].outputs[0]]
    made.shape = [*made.shape[:-1], 2 * made.shape[-1]]


DAMAGE: dict[str, Callable[[Any], None]] = {
    "no network": lambda m: setattr(m, "subgraphs", []),
    "no buffers": lambda m: setattr(m, "buffers", []),
    "a buffer that isn't there": lambda m: setattr(weight(m), "buffer", 9_999),
    "an operator of no kind": lambda m: setattr(m.subgraphs[0].operators[0], "opcodeIndex", 9_999),
    "an operator that nobody knows": lambda m: setattr(m.operatorCodes[0], "builtinCode", 9_999),
    "an operator that gives nothing": lambda m: setattr(m.subgraphs[0].operators[0], "outputs", []),
    "an operator that reads beyond": lambda m: setattr(convolution(m), "inputs", [9_999]),
    "an output beyond": lambda m: setattr(m.subgraphs[0], "outputs", [9_999]),
    "an axis below 0": lambda m: setattr(weight(m), "shape", [-3, 3, 3, 3]),
    "sizes whose product wraps": lambda m: setattr(weight(m), "shape", [2**30, 2**30, 2**30, 3]),
    "more numbers than there are": lambda m: setattr(weight(m), "shape", [8, 3, 3, 300]),
    "a tensor too large": wide,
    "a type that isn't": lambda m: setattr(weight(m), "type", 99),
    "more numbers out than in": keeping,
    "a scale of 0": lambda m: scaled(m, scale=np.zeros(8, np.float32)),
    "a scale that is none": lambda m: scaled(m, scale=np.full(8, np.nan, np.float32)),
    "a zero point beyond its type": lambda m: scaled(m, zeroPoint=np.full(8, 1_000)),
    "fewer scales than channels": lambda m: scaled(
        m, scale=np.ones(3, np.float32), zeroPoint=np.zeros(3, np.int64)
    ),
    "scales of floats": lambda m: setattr(m.subgraphs[0].tensors[0], "quantization", weight(m).quantization),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_parts_that_do_not_belong_together(kind: str, content: bytes) -> None:
    model = read_model(content, "model.tflite")
    assert read_model(packed(model), "model.tflite").subgraphs  # whole until it is damaged
    DAMAGE[kind](model)
    with pytest.raises(TargetError, match=r"model\.tflite is damaged .*make the artifact again"):
        read_model(packed(model), "model.tflite")


def test_another_mark_is_no_file_of_ours(content: bytes) -> None:
    with pytest.raises(TargetError, match=r"no TFLite file"):
        read_model(content[:4] + b"TFL4" + content[8:], "model.tflite")


@pytest.mark.parametrize("note", [b"[", b"7", b"\xff"])
def test_a_note_of_layouts_that_says_nothing(note: bytes, content: bytes) -> None:
    model = read_model(content, "model.tflite")
    (written,) = [item for item in model.metadata if item.name == b"bitport.channels_last"]
    model.buffers[written.buffer].data = np.frombuffer(note, np.uint8)
    with pytest.raises(TargetError, match=r"note bitport\.channels_last is damaged"):
        channels_last(model)


def test_taps_leave_the_operators_as_they_are(content: bytes) -> None:
    model = read_model(content, "model.tflite")
    kinds = [kind_of(model, step) for step in model.subgraphs[0].operators]
    changed, names = with_outputs(model, "")
    again = read_model(changed, "model.tflite")
    assert names and len(again.subgraphs[0].outputs) == len(names) + 1
    assert [kind_of(again, step) for step in again.subgraphs[0].operators] == kinds
