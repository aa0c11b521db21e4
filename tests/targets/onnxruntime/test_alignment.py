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
from bitport.targets.onnxruntime.alignment import missing_channels

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
    joins = {node.name: node for node in file.graph.node if node.op_type == "Concat"}
    assert list(joins) == (["a/input/joined", "a/weight/joined"] if missing else [])
    constants = {value.name: numpy_helper.to_array(value) for value in file.graph.initializer}
    weight = constants["a.weight/q"]
    assert weight.shape[1] == shape[0] or name == "depthwise"  # as large as it was
    if missing:
        zeros = constants[joins["a/weight/joined"].input[1]]
        assert zeros.dtype == np.int8 and zeros.shape == (8, missing, *weight.shape[2:]) and not zeros.any()
    # without: the same integers
    monkeypatch.setattr(export, "align_channels", lambda *_: None)
    (tmp_path / "plain").mkdir()
    prepared.target.export(prepared.work, prepared.plan, tmp_path / "plain")
    assert not any(node.op_type == "Concat" for node in onnx.load(tmp_path / "plain/model.onnx").graph.node)
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
    assert found.counts["QLinearConv"] == 1 and found.counts["Concat"] == 1
    assert not found.counts["Conv"]


def test_what_stays_float_is_not_padded(tmp_path: Path) -> None:
    *_, file = file_of(conv(3), (3, 8, 8), tmp_path, activations={"format": "float32"})
    assert not any(node.op_type == "Concat" for node in file.graph.node)


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


@pytest.mark.parametrize("name", ["RGB", "an odd padding", "grey", "speech", "pointwise"])
def test_each_comes_back_without_them(name: str, tmp_path: Path) -> None:
    layer, shape, _ = LAYERS[name]
    prepared, _, _ = file_of(layer, shape, tmp_path)
    again = bitport.load(tmp_path / "model.onnx")
    assert [again.op(node).kind for node in again.nodes()] == ["conv", "relu"]
    x = torch.randn(4, *shape) + 0.5
    wanted, found = prepared.graph.run(x)[0].detach(), again.run(x)[0].detach()
    assert float((wanted - found).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "what", ["no zeros", "other channels", "two of them", "another axis", "another tensor", "read twice"]
)
def test_what_else_is_joined_keeps_its_meaning(what: str, tmp_path: Path) -> None:
    *_, file = file_of(conv(3), (3, 8, 8), tmp_path)
    x = images(4) + 0.5
    nodes = {node.name: node for node in file.graph.node}
    constants = {value.name: value for value in file.graph.initializer}

    def change(name: str, value: Any) -> None:
        constants[name].CopyFrom(numpy_helper.from_array(value, name))

    if what == "no zeros":
        change("a/weight/more", np.full((8, 1, 3, 3), 5, np.int8))
    elif what == "other channels":  # which still meet zeros
        change("a/first", np.array([1]))
        change("a/last", np.array([2]))
    elif what == "two of them":
        change("a/last", np.array([2]))
        change("a/weight/more", np.zeros((8, 2, 3, 3), np.int8))
    elif what == "another axis":  # a row more
        nodes["a/weight/joined"].input.pop()
        change("a/axis", np.array([2]))
        nodes["a/input/joined"].attribute[0].i = 2
    elif what == "another tensor":
        file.graph.node.remove(nodes["a/input/more"])
        wide = onnx.helper.make_node("Max", [nodes["x/q"].output[0]], ["other"])
        file.graph.node.insert(1, wide)
        cut = onnx.helper.make_node("Slice", ["other", "a/first", "a/last", "a/axis"], ["a/input/more/out"])
        file.graph.node.insert(2, cut)
    else:
        file.graph.output.append(onnx.helper.make_tensor_value_info("a/input/joined/out", 2, None))
    onnx.save(file, tmp_path / "other.onnx")
    session = ort.InferenceSession(tmp_path / "other.onnx")
    wanted = session.run(None, {"x": x.numpy()})
    found = bitport.load(tmp_path / "other.onnx").run(x)
    for theirs, ours in zip(wanted, found, strict=True):
        step = 1 if theirs.dtype == np.uint8 else 0
        apart = np.abs(ours.detach().numpy().astype(np.float32) - theirs.astype(np.float32))
        assert ours.shape == theirs.shape
        assert apart.max() <= 0.02 * np.abs(theirs).max() + step


@pytest.mark.parametrize("weights", ["int4", "ternary", "uint4", "uint4 tensor"])
def test_weights_of_other_formats_get_zeros_of_their_own(weights: str, tmp_path: Path) -> None:
    prepared, sent, file = file_of(conv(3), (3, 8, 8), tmp_path, weights={"format": weights})
    assert_exact(sent)
    assert any(node.name == "a/input/joined" for node in file.graph.node)
    assert not prepared.target.inspect(tmp_path, prepared.plan).missed
    x = images(4) + 0.5
    wanted = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})[0]
    found = bitport.load(tmp_path / "model.onnx").run(x)[0].detach().numpy()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
