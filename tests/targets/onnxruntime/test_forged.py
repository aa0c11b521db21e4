"""Files whose names or metadata somebody else has written: refused by an error that names them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from torch.nn import functional as F

from bitport.artifact import make_target
from bitport.errors import TargetError
from bitport.targets.onnxruntime.decode import KEY as STORED
from bitport.targets.onnxruntime.ends import KEY as ENDS
from bitport.targets.onnxruntime.ends import noted, read_ends

END = {"producer": "x", "scale": 0.5, "zero_point": 3, "dtype": "uint8"}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    torch.manual_seed(0)
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    return prepare(net, [images(4)], make_target("onnxruntime", {"io": "integer"}))


@contextmanager
def forged(prepared: Prepared, folder: Path) -> Iterator[onnx.ModelProto]:
    """The file to be changed, written again behind the context."""
    prepared.target.export(prepared.work, prepared.plan, folder)
    model = onnx.load(folder / "model.onnx")
    yield model
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_an_honest_file_is_read(prepared: Prepared, tmp_path: Path) -> None:
    with forged(prepared, tmp_path) as model:
        assert {item.key for item in model.metadata_props} >= {ENDS}
    assert not prepared.target.inspect(tmp_path, prepared.plan).missed
    assert prepared.target.open(tmp_path).run((images(2),))[0].shape == (2, 4, 8, 8)


def as_bytes(path: Path, name: str) -> None:
    """A letter of a name that is no UTF-8."""
    content, old = path.read_bytes(), name.encode()
    assert old in content
    path.write_bytes(content.replace(old, b"\xff" + old[1:]))


def test_a_name_that_is_no_text(prepared: Prepared, tmp_path: Path) -> None:
    with forged(prepared, tmp_path) as model:
        node = next(node.name for node in model.graph.node if node.name)
    as_bytes(tmp_path / "model.onnx", node)
    with pytest.raises(TargetError, match=r"model\.onnx|optimized\.onnx"):
        prepared.target.inspect(tmp_path, prepared.plan)


def test_an_input_whose_name_is_no_text(prepared: Prepared, tmp_path: Path) -> None:
    with forged(prepared, tmp_path) as model:
        old = model.graph.input[0].name
        model.graph.input[0].name = "input_of_the_file"
        for node in model.graph.node:
            node.input[:] = ["input_of_the_file" if name == old else name for name in node.input]
    prepared.target.open(tmp_path)
    as_bytes(tmp_path / "model.onnx", "input_of_the_file")
    with pytest.raises(
        TargetError, match=r"model\.onnx holds a name that is no text: make the artifact again"
    ):
        prepared.target.open(tmp_path)


@pytest.mark.parametrize(
    "text", ["no JSON", "[]", "3", "null", "[" * 100_000, '{"w": 3}', '{"w": {}}', '{"w": {"shape": [-1]}}',
             '{"w": {"shape": ["a"]}}', '{"w": {"shape": 3}}'],
)  # fmt: skip
def test_metadata_of_weights(text: str, prepared: Prepared, tmp_path: Path) -> None:
    with forged(prepared, tmp_path) as model:
        model.metadata_props.append(onnx.StringStringEntryProto(key=STORED, value=text))
    with pytest.raises(TargetError, match=rf"metadata '{STORED}' .*: make the artifact again"):
        prepared.target.inspect(tmp_path, prepared.plan)


@pytest.mark.parametrize(
    "end",
    [3, {}, {**END, "more": 1}, {**END, "scale": "1"}, {**END, "zero_point": 1.5}, {**END, "dtype": "float32"},
     {**END, "dtype": "rm"}, {**END, "scale": 0.0}, {**END, "scale": float("nan")}, {**END, "producer": None}],
)  # fmt: skip
def test_metadata_of_ends(end: Any) -> None:
    assert read_ends({ENDS: json.dumps({"x": END})})["x"].zero_point == 3
    with pytest.raises(
        TargetError, match=rf"metadata '{ENDS}' describe|metadata '{ENDS}' don't describe 'x'"
    ):
        read_ends({ENDS: json.dumps({"x": end})})


@pytest.mark.parametrize("text", ["no JSON", "[]", "", b"\xff"])
def test_metadata_that_are_no_object(text: Any) -> None:
    assert noted({}, ENDS) == {}
    with pytest.raises(TargetError, match=rf"metadata '{ENDS}' .*: make the artifact again"):
        noted({ENDS: text}, ENDS)
