"""Quantized files: the float network comes back, and can be quantized again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from tests.flow import Net, conv, images
from tests.frontends.onnx.made import model
from torch import nn
from torch.nn import functional as F

import bitport
from bitport.frontends.onnx import load_proto


def rounded(zero: Any, other: Any = None, source: str = "Neg") -> Any:
    """x → `source` → QuantizeLinear → DequantizeLinear → y, with zero points that may differ."""
    constants = {"s": np.float32(0.02), "z": zero, "o": zero if other is None else other}
    nodes = [
        helper.make_node(source, ["x"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "o"], ["y"]),
    ]
    return model(nodes, constants)


@pytest.mark.slow
def test_a_file_of_our_own_gives_its_network_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + 1).mean((2, 3))),
        a=conv(),
        b=conv(8, 8),
        c=nn.Linear(8, 4),
    )
    data = [images(16) for _ in range(2)]
    graph = bitport.load(net, data[0])
    first = bitport.compress(
        graph, "int8", target="onnxruntime", data=data, out=tmp_path / "first", effort="plain"
    )
    again = bitport.load(first.path / "model.onnx")
    assert any("the file is quantized" in note for note in again.notes)
    x = images(8)
    wanted, found = graph.run(x)[0].detach(), again.run(x)[0].detach()
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    layers = [again.name(node) for node in again.nodes() if again.op(node).kind in ("conv", "linear")]
    assert layers == ["a", "b", "c"]
    second = bitport.compress(
        again, "int8", target="onnxruntime", data=data, out=tmp_path / "second", effort="plain"
    )
    assert second.measurements["integer.mac_share"] == first.measurements["integer.mac_share"] == 1.0
    assert second.measurements["parity.exact_share"] == 1.0


@pytest.mark.parametrize(
    ("zero", "source", "wanted"),
    [
        (np.uint8(0), "Neg", torch.relu),  # its codes begin at zero: it has cut
        (np.int8(-128), "Neg", torch.relu),
        (np.uint8(128), "Neg", lambda x: x),
        (np.int8(0), "Neg", lambda x: x),
        (np.uint8(0), "Sigmoid", lambda x: x),  # never negative: nothing to cut
    ],
)
def test_roundings_go_and_what_they_have_cut_stays_cut(zero: Any, source: str, wanted: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    graph = load_proto(rounded(zero, source=source), x)
    real = torch.sigmoid(x) if source == "Sigmoid" else -x
    assert torch.equal(graph.run(x)[0], wanted(real))
    assert not any("quantize" in str(node.target) for node in graph.nodes())


def test_outputs_keep_their_names() -> None:
    proto = rounded(np.uint8(128))
    proto.graph.output.append(helper.make_tensor_value_info("z2", 1, None))
    proto.graph.node.append(helper.make_node("Neg", ["y"], ["z2"]))
    x = torch.randn(2, 3, 8, 8)
    graph = load_proto(proto, x)
    assert [spec.name for spec in graph.outputs] == ["y", "z2"]
    first, second = graph.run(x)
    assert torch.equal(first, -x) and torch.equal(second, x)


def test_a_pair_that_decodes_otherwise_than_it_encodes_stays() -> None:
    x = torch.rand(2, 3, 8, 8)
    graph = load_proto(rounded(np.uint8(10), np.uint8(20)), -x)
    q = (torch.round(x / 0.02) + 10).clamp(0, 255)
    assert torch.allclose(graph.run(-x)[0], (q - 20) * 0.02, atol=1e-5)
    assert not graph.notes


def test_what_moves_codes_moves_floats_instead() -> None:
    constants = {"s": np.float32(0.02), "z": np.uint8(128), "shape": np.array([0, -1], np.int64)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["t", "shape"], ["f"]),
        helper.make_node("DequantizeLinear", ["f", "s", "z"], ["d"]),
        helper.make_node("Neg", ["d"], ["y"]),
    ]
    x = torch.randn(2, 3, 8, 8)
    graph = load_proto(model(nodes, constants), x)
    assert torch.equal(graph.run(x)[0], -x.permute(0, 2, 3, 1).flatten(1))
    assert any("1 roundings" in note for note in graph.notes)


def test_moved_codes_that_something_else_reads_stay() -> None:
    constants = {"s": np.float32(0.02), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["d"]),
        helper.make_node("Cast", ["t"], ["c"], to=1),
        helper.make_node("Add", ["d", "c"], ["y"]),
    ]
    x = torch.rand(2, 3, 8, 8)
    codes = (torch.round(x / 0.02) + 128).clamp(0, 255).permute(0, 2, 3, 1)
    found = load_proto(model(nodes, constants), x).run(x)[0]
    assert torch.allclose(found, codes + (codes - 128) * 0.02, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_decoded_by_channel(bits: int) -> None:
    dice = np.random.default_rng(0)
    codes = dice.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 3, 1, 1)).astype(np.int8)
    scales = dice.random(5).astype(np.float32) + 0.1
    if bits == 4:
        import ml_dtypes

        codes = codes.astype(ml_dtypes.int4)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        helper.make_node("Conv", ["x", "d"], ["y"], name="conv"),
    ]
    zeros = np.zeros(5, codes.dtype)
    graph = load_proto(model(nodes, {"w": codes, "s": scales, "z": zeros}))
    wanted = codes.astype(np.float32) * scales.reshape(-1, 1, 1, 1)
    assert np.allclose(graph.tensor("conv.weight").detach().numpy(), wanted)
    assert graph.tensor("conv.weight").requires_grad
