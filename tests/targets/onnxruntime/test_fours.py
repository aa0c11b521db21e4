"""Convolutions of few channels: faster with channels of zeros, the same integers, the same network read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from tests.flow import Net, assert_exact, conv, images, prepare, ship
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.targets.onnxruntime import export
from bitport.targets.onnxruntime.fours import missing_channels

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    # name: a first layer, the shape of what it reads, the channels that it lacks
    "RGB": (conv(3), (3, 8, 8), 1),
    "RGB in strides": (conv(3, stride=2), (3, 8, 8), 1),
    "an odd padding": (conv(2, padding=0), (2, 8, 8), 2),
    "grey": (conv(1), (1, 8, 8), 3),
    "speech": (nn.Conv1d(5, 8, 3), (5, 20), 3),
    "pointwise": (conv(10, kernel=1), (10, 4, 4), 2),
    "grey in strides": (conv(1, stride=2), (1, 8, 8), 0),
    "four channels": (conv(4), (4, 8, 8), 0),
    "patches of 4": (conv(3, kernel=4, stride=4, padding=0), (3, 8, 8), 0),
    "a long window": (conv(3, kernel=7), (3, 8, 8), 0),
    "depthwise": (conv(6, 6, groups=6), (6, 8, 8), 0),
}


def file_of(layer: nn.Module, shape: tuple[int, ...], out: Path, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    net = Net(lambda m, x: F.relu(m.a(x)), a=layer)
    prepared = prepare(net, [torch.randn(8, *shape) + 0.5], **options)
    sent = ship(prepared, torch.randn(16, *shape) + 0.5, torch.randn(1, *shape))
    prepared.target.export(prepared.work, prepared.plan, out)
    return prepared, sent, onnx.load(out / "model.onnx")


@pytest.mark.parametrize("name", LAYERS)
def test_what_lacks_channels_gets_them_and_its_integers_stay(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    layer, shape, missing = LAYERS[name]
    prepared, sent, file = file_of(layer, shape, tmp_path)
    assert_exact(sent)
    pads = [node for node in file.graph.node if node.op_type == "Pad"]
    assert [node.name for node in pads] == (["a/input/pad", "a/weight/pad"] if missing else [])
    constants = {value.name: numpy_helper.to_array(value) for value in file.graph.initializer}
    for node in pads:
        assert constants[node.input[1]].sum() == constants[node.input[1]][len(shape) + 2] == missing
    weight = constants["a.weight/q"]
    assert weight.shape[1] == shape[0] or name == "depthwise"  # as large as it was
    # without: the same integers
    monkeypatch.setattr(export, "pad_channels", lambda *_: None)
    (tmp_path / "plain").mkdir()
    prepared.target.export(prepared.work, prepared.plan, tmp_path / "plain")
    assert not any(node.op_type == "Pad" for node in onnx.load(tmp_path / "plain/model.onnx").graph.node)
    x = torch.randn(4, *shape).numpy()
    first, second = (
        ort.InferenceSession(folder / "model.onnx").run(None, {"x": x})[0]
        for folder in (tmp_path, tmp_path / "plain")
    )
    assert np.array_equal(first, second)


def test_the_kernel_is_that_of_integers_and_the_weights_are_padded_at_load(tmp_path: Path) -> None:
    prepared, _, _ = file_of(conv(3), (3, 8, 8), tmp_path)
    found = prepared.target.inspect(tmp_path, prepared.plan)
    assert not found.missed
    assert found.counts["QLinearConv"] == 1 and found.counts["Pad"] == 1
    assert not found.counts["Conv"]


def test_what_stays_float_is_not_padded(tmp_path: Path) -> None:
    *_, file = file_of(conv(3), (3, 8, 8), tmp_path, activations={"format": "float32"})
    assert not any(node.op_type == "Pad" for node in file.graph.node)


def test_one_input_of_two_convolutions(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=conv(3, kernel=1))
    prepared = prepare(net, [images(8)])
    assert_exact(ship(prepared, images(16), images(1)))


@pytest.mark.parametrize(
    ("channels", "window", "strided", "wanted"),
    [
        (3, (3, 3), False, 1),
        (3, (3, 3), True, 1),
        (5, (1, 1), False, 3),
        (1, (3, 3), False, 3),
        (1, (3, 3), True, 0),
        (2, (2,), False, 0),  # four values
        (3, (7, 7), True, 0),
        (33, (3, 3), False, 0),
    ],
)
def test_which_gain_by_it(channels: int, window: tuple[int, ...], strided: bool, wanted: int) -> None:
    assert missing_channels(channels, *window, strided=strided) == wanted


def test_the_network_comes_back_without_them(tmp_path: Path) -> None:
    prepared, _, _ = file_of(conv(3), (3, 8, 8), tmp_path)
    again = bitport.load(tmp_path / "model.onnx")
    assert [again.op(node).kind for node in again.nodes()] == ["conv", "relu"]
    weight = again.op(again.node("a")).operands[1]
    assert weight is not None and weight.tensor is not None
    assert again.tensor(weight.tensor).shape == (8, 3, 3, 3)
    x = images(4) + 0.5
    wanted, found = prepared.graph.run(x)[0].detach(), again.run(x)[0].detach()
    assert float((wanted - found).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("what", ["another number", "in front", "another axis", "one operand", "read twice"])
def test_what_else_is_padded_keeps_its_meaning(what: str, tmp_path: Path) -> None:
    *_, file = file_of(conv(3), (3, 8, 8), tmp_path)
    x = images(4) + 0.5
    nodes = {node.name: node for node in file.graph.node}
    constants = {value.name: value for value in file.graph.initializer}
    pads = constants[nodes["a/input/pad"].input[1]]
    if what == "another number":  # of channels that meet zeros: still the same
        constants["one"] = numpy_helper.from_array(np.uint8(1), "one")
        file.graph.initializer.append(constants["one"])
        nodes["a/input/pad"].input[2] = "one"
    elif what == "in front":
        pads.CopyFrom(numpy_helper.from_array(np.array([0, 1, 0, 0, 0, 0, 0, 0]), pads.name))
    elif what == "another axis":
        file.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 1, 1, 1]), "more"))
        nodes["a/input/pad"].input[1] = "more"
    elif what == "one operand":
        weight = constants["a.weight/q"]
        wide = np.pad(numpy_helper.to_array(weight), ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=5)
        weight.CopyFrom(numpy_helper.from_array(wide, weight.name))
        decode = next(node for node in file.graph.node if "a/weight/padded" in node.input)
        decode.input[0] = weight.name
        file.graph.node.remove(nodes["a/weight/pad"])
    else:
        file.graph.output.append(onnx.helper.make_tensor_value_info("a/input/padded", 2, None))
    onnx.save(file, tmp_path / "other.onnx")
    session = ort.InferenceSession(tmp_path / "other.onnx")
    wanted = session.run(None, {"x": x.numpy()})
    found = bitport.load(tmp_path / "other.onnx").run(x)
    for theirs, ours in zip(wanted, found, strict=True):
        assert ours.shape == theirs.shape
        step = 1 if theirs.dtype == np.uint8 else 0
        apart = np.abs(ours.detach().numpy().astype(np.float32) - theirs.astype(np.float32))
        assert apart.max() <= 0.02 * np.abs(theirs).max() + step
