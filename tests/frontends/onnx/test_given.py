"""Files that were quantized elsewhere: their scales become a plan, and their integers arrive on another runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from onnxruntime.quantization import (
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from tests.flow import Net, assert_exact, context, conv, images, prepare, ship
from tests.frontends.onnx.made import exported, model
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.errors import LoadError
from bitport.frontends.onnx import load_proto
from bitport.graph import GivenScale, Graph
from bitport.graph.archive import load_pt2, save_pt2
from bitport.graph.simplify import fold_batch_norms
from bitport.proof.plain import plain_record
from bitport.steps._base import make

GIVEN = {"weights": {"granularity": "channel", "range": "given"}, "activations": {"range": "given"}}
FORMATS = (QuantFormat.QDQ, QuantFormat.QOperator)


class Reader:
    """What ONNX Runtime's quantizer calibrates on: it asks for `get_next` alone."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.batches = iter([{"x": images(16).numpy()} for _ in range(40)])

    def get_next(self) -> Any:
        return next(self.batches, None)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.d(F.max_pool2d(F.relu(m.b(F.relu(m.a(x))) + m.c(x)), 2).flatten(1)),
        a=conv(3, 8, stride=2), b=conv(8, 8, groups=8), c=conv(3, 8, 1, stride=2), d=nn.Linear(32, 4),
    )  # fmt: skip


def quantized(folder: Path, **options: Any) -> Path:
    """The network, by ONNX Runtime's own quantizer."""
    source = exported(network(), images(2), folder / "f.onnx", dynamo=False)
    quantize_static(source, folder / "q.onnx", Reader(), weight_type=QuantType.QInt8, **options)
    return folder / "q.onnx"


def run(path: Path, x: Tensor) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert isinstance(found, np.ndarray)
    return found


def close(graph: Graph, path: Path, x: Tensor) -> bool:
    wanted = run(path, x)
    return bool(np.abs(graph.run(x)[0].detach().numpy() - wanted).max() < 0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("activations", [QuantType.QUInt8, QuantType.QInt8], ids=lambda kind: kind.name)
def test_its_integers_arrive_elsewhere(form: Any, activations: Any, tmp_path: Path) -> None:
    per_channel = activations == QuantType.QUInt8
    path = quantized(
        tmp_path, quant_format=form, activation_type=activations, per_channel=per_channel,
        reduce_range=per_channel,  # its own products of u8 and s8 saturate where the processor has no VNNI
    )  # fmt: skip
    graph = bitport.load(path)
    assert {graph.inputs[0].name, "relu", "b", "c", "relu#2", "d"} <= set(graph.given)
    prepared = prepare(graph, [images(16)], "litert", **GIVEN)
    scales = {name: tie.parameters()[0] for name, tie in prepared.plan.measured().items()}
    assert all(float(scales[name]) == graph.given[name].scale for name in ("relu", "b", "c", "d"))
    x = images(64)
    shipped = ship(prepared, x)
    assert_exact(shipped)
    # every operator of this network has integers there that are ONNX Runtime's, and the ends are equal to the bit
    assert np.array_equal(shipped.outputs[0].numpy(), run(path, x))


def test_the_recipe_asks_for_them(tmp_path: Path) -> None:
    graph = bitport.load(quantized(tmp_path, quant_format=FORMATS[0]))
    artifact = bitport.compress(
        graph, "int8-given", target="onnxruntime", data=[images(16)], out=tmp_path / "out"
    )
    relu = artifact.plan.measured()["relu"]
    assert float(relu.parameters()[0]) == graph.given["relu"].scale
    assert artifact.original.given == graph.given


def test_plain_rounding_is_on_the_same_scales(tmp_path: Path) -> None:
    """Methods are held against it, not scales that were asked for: these clip nearly all of a tensor."""
    graph = bitport.load(quantized(tmp_path, quant_format=FORMATS[0]))
    graph.given["relu#2"] = graph.given["relu#2"]._replace(scale=graph.given["relu#2"].scale / 100)
    prepared, x = prepare(graph, [images(16)], **GIVEN), images(16)
    without = prepared.reference.clone()
    without.given = {}
    found, other = (
        plain_record(reference, prepared.work, prepared.plan, prepared.target.arithmetic(), [(x,)])
        for reference in (prepared.reference, without)
    )
    assert found["holds"] and found["sqnr_db"] == pytest.approx(found["plain_sqnr_db"], abs=0.5)
    assert not other["holds"] and other["sqnr_db"] == found["sqnr_db"]


def test_without_scales_of_its_own_a_network_is_measured() -> None:
    graph, data = bitport.load(network(), images(2)), [images(16)]
    assert not graph.given
    asked, plain = (
        prepare(graph, data, weights={"range": name}, activations={"range": name}).plan.measured()
        for name in ("given", "minmax")
    )
    assert asked.keys() == plain.keys()
    for name, tie in plain.items():
        assert asked[name].parameters() == tie.parameters()


def test_scales_outlive_files_copies_and_modules(tmp_path: Path) -> None:
    graph = bitport.load(quantized(tmp_path, quant_format=FORMATS[0]))
    save_pt2(graph, tmp_path / "graph.pt2")
    assert load_pt2(tmp_path / "graph.pt2").given == graph.clone().given == graph.given
    assert bitport.load(graph.module(), images(2)).given == graph.given
    other = graph.clone()
    other.given.pop("relu")
    assert other.digest() != graph.digest()  # a checkpoint of the one is none of the other


@pytest.mark.parametrize("scale", [[-1.0, 0, -128, 127], [float("nan"), 0, -128, 127], [1.0, 300, 0, 255]])
def test_scales_that_are_none_are_refused(scale: list[Any]) -> None:
    with pytest.raises(LoadError, match=r"'relu' is quantized by .* which is no scale"):
        GivenScale(*scale).checked("relu")


def test_the_scale_behind_a_norm_is_that_of_the_layer_that_it_goes_into() -> None:
    net = Net(lambda m, x: F.relu(m.norm(m.a(x))) + 1, a=conv(), norm=nn.BatchNorm2d(8)).eval()
    graph = bitport.load(net, images(2))
    given = GivenScale(0.5, 0, -128, 127)
    graph.given = {"a": GivenScale(0.25, 0, -128, 127), "norm": given}
    fold_batch_norms(graph)
    assert graph.given == {"a": given}


def test_a_rewritten_network_has_other_activations() -> None:
    """Equalization moves scales between layers: what a file said of the activations between them holds no longer."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))), a=conv(), b=conv(8, 8), c=nn.Linear(8, 4)
    )
    with torch.no_grad():
        net.get_parameter("a.weight")[0] *= 100
        net.get_parameter("b.weight")[:, 0] /= 100
    plain = prepare(net, [images(16) for _ in range(4)], weights={"granularity": "tensor"})
    start = plain.reference.clone()
    start.given = {"relu": GivenScale(0.5, 0, -128, 127)}
    settings = context(plain.graph, plain.target, [images(16) for _ in range(4)])
    moved, _ = make("equalize", {})(start, plain.plan, settings)
    assert any(row["outcome"] == "kept" for row in settings.tried), settings.tried
    assert not moved.given


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dynamically_quantized_files_give_their_floats(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        net, x = (
            Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(12, 16), b=nn.Linear(16, 4)),
            torch.randn(8, 12),
        )
    else:
        net, x = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), images(8)
    source = exported(net, x, tmp_path / "f.onnx", dynamo=False)
    path, per_channel = tmp_path / "q.onnx", kind == "linear"
    quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=per_channel, reduce_range=True)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert kinds & {"MatMulInteger", "ConvInteger"}
    graph = bitport.load(path)
    assert [graph.op(node).kind for node in graph.nodes()].count(kind) == 2
    assert any("taken while running" in note for note in graph.notes)
    assert close(graph, path, x)


def operator_of_integers(change: Callable[[Any], Any] = lambda parts: parts) -> Any:
    """A QLinearConv whose bias has a scale for each channel; `change` spoils its constants."""
    parts = {
        "xs": np.float32(0.1), "xz": np.uint8(3), "w": np.ones((4, 3, 3, 3), np.int8),
        "ws": np.full(4, 0.02, np.float32), "wz": np.zeros(4, np.int8), "b": np.arange(4, dtype=np.int32),
        "ys": np.float32(0.2), "yz": np.uint8(9),
    }  # fmt: skip
    constants = change(parts)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["c"], name="c"),
        helper.make_node("DequantizeLinear", ["c", "ys", "yz"], ["y"]),
    ]
    return model(nodes, constants)


def test_operators_of_integers_become_layers() -> None:
    graph = load_proto(operator_of_integers(), images(2))
    assert [graph.op(node).kind for node in graph.nodes()] == ["conv"]
    assert graph.given["x"] == (pytest.approx(0.1), 3, 0, 255) and len(graph.given) == 2
    bias = next(value for name, value in graph.gm.named_parameters() if name.endswith("bias"))
    torch.testing.assert_close(bias.detach(), torch.arange(4) * 0.002)


def test_an_operator_of_integers_that_does_not_fit_is_none() -> None:
    """Scales for other channels than there are; they are read as what they would compute, or refused as that."""
    proto = operator_of_integers(lambda parts: {**parts, "ws": np.full(3, 0.02, np.float32)})
    with pytest.raises(LoadError, match="'c' \\(QLinearConv\\) can't be imported"):
        load_proto(proto, images(2))
