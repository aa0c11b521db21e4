"""Networks in many opsets, against ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bench import subjects
from onnx import helper
from tests.frontends.onnx.made import model
from tests.frontends.onnx.test_networks import Recurrent, settled
from torch import Tensor, nn

import bitport

NETS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "cnn": (subjects.ThinNet, torch.rand(3, 1, 16, 16)),
    "transformer": (subjects.VisionTransformer, torch.rand(3, 1, 16, 16)),
    "recurrent": (Recurrent, torch.randn(3, 10, 8)),
}


def agree(path: Path, x: Tensor) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    found = bitport.load(path, x).run(x)[0].detach().numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))


EARLY = (9, 17, 23)


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        pytest.param(name, opset, marks=() if opset in EARLY else pytest.mark.slow)
        for name in NETS
        for opset in (9, 11, 13, 17, 20, 21, 23)
        if name != "transformer" or opset > 13  # torch's exporter writes attention from opset 14 on
    ],
)
def test_a_network_is_the_same_in_every_opset(name: str, opset: int, tmp_path: Path) -> None:
    make, x = NETS[name]
    path, dynamo = tmp_path / "net.onnx", opset > 20
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options: dict[str, Any] = {"external_data": False} if dynamo else {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(settled(make), (x,), path, dynamo=dynamo, opset_version=opset, **options)
    assert onnx.load(path).opset_import[0].version == opset
    agree(path, x)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 13, 17, 21, 23])
def test_a_network_by_hand_is_the_same_in_every_opset(opset: int, tmp_path: Path) -> None:
    node, rng = helper.make_node, np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    constants = {
        "w": weight(4, 3, 3, 3), "g": weight(4), "v": np.abs(weight(4)), "d": weight(64, 5), "e": weight(5),
        "to": np.array([-1, 64]),
    }  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "g", "g", "v"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "to"], ["f"]),
        node("Gemm", ["f", "d", "e"], ["s"]),
        node("Softmax", ["s"], ["y"], axis=1),
    ]
    proto = model(nodes, constants, opset=opset)
    proto.ir_version = 8
    onnx.save(proto, tmp_path / "net.onnx")
    agree(tmp_path / "net.onnx", torch.randn(2, 3, 8, 8))
