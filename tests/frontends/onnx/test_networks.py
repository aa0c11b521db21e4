"""Networks from PyTorch's exporters: the same outputs, names and weights as the network itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bench import subjects
from onnx import helper
from tests.frontends.onnx.made import exported, model
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.errors import LoadError, WeightsError
from bitport.frontends.onnx import load_proto


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(32, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(self.lstm(x)[0])[0][:, -1])
        return y


NETS = {
    "thin residual CNN with BatchNorm": (subjects.ThinNet, lambda n: torch.rand(n, 1, 16, 16)),
    "depthwise, squeeze-excite, hardswish": (subjects.MobileNet, lambda n: torch.rand(n, 1, 16, 16)),
    "vision transformer": (subjects.VisionTransformer, lambda n: torch.rand(n, 1, 16, 16)),
    "GPT": (subjects.ByteGpt, lambda n: torch.randint(0, 256, (n, subjects.CONTEXT))),
    "LSTM and GRU": (Recurrent, lambda n: torch.randn(n, 10, 8)),
}


def settled(make: type[nn.Module]) -> nn.Module:
    """A network whose BatchNorms have seen something."""
    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
    return net.eval()


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "script"])
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_network_for_any_batch(name: str, dynamo: bool, tmp_path: Path) -> None:
    make, inputs = NETS[name]
    net = settled(make)
    graph = bitport.load(exported(net, inputs(3), tmp_path / "net.onnx", dynamo=dynamo))
    for count in (2, 5):
        x = inputs(count)
        wanted = net(x).detach()
        found = graph.run(x)[0].detach()
        assert float((found - wanted).abs().max()) <= 1e-4 * max(1.0, float(wanted.abs().max()))
    assert graph.inputs[0].shape[0] == "batch"


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "script"])
def test_layers_are_called_by_the_paths_of_their_modules(dynamo: bool, tmp_path: Path) -> None:
    net = settled(subjects.ThinNet)
    graph = bitport.load(exported(net, torch.rand(3, 1, 16, 16), tmp_path / "net.onnx", dynamo=dynamo))
    layers = {graph.name(node) for node in graph.nodes() if graph.op(node).kind in ("conv", "linear")}
    modules = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert layers == modules
    assert {block.name for block in graph.blocks()} >= {"layers.0", "layers.1", "layers.2"}


def test_what_is_read_can_be_trained(tmp_path: Path) -> None:
    x, wanted = torch.rand(8, 1, 16, 16), torch.arange(8)
    graph = bitport.load(exported(settled(subjects.VisionTransformer), x, tmp_path / "net.onnx", dynamo=True))
    net = graph.module()
    tuned = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(5):
        losses.append(F.cross_entropy(net(x), wanted))
        tuned.zero_grad()
        losses[-1].backward()
        tuned.step()
    assert float(losses[-1].detach()) < 0.9 * float(losses[0].detach())
    assert len(list(net.parameters())) == len(list(subjects.VisionTransformer().parameters()))


@pytest.mark.slow
def test_an_onnx_file_is_compressed_as_the_module_is(tmp_path: Path) -> None:
    net, data = settled(subjects.ThinNet), [torch.rand(16, 1, 16, 16) for _ in range(2)]
    graphs = [
        bitport.load(exported(net, data[0], tmp_path / "net.onnx", dynamo=False)),
        bitport.load(net, data[0]),
    ]
    made = [
        bitport.compress(
            graph, "int8", target="onnxruntime", data=data, out=tmp_path / str(index), effort="plain"
        )
        for index, graph in enumerate(graphs)
    ]
    for key in ("integer.mac_share", "parity.exact_share", "size.ratio"):
        assert made[0].measurements[key] == pytest.approx(made[1].measurements[key], rel=0.02)
    first, second = (np.asarray(artifact.predict(data[0])[0]) for artifact in made)
    assert np.abs(first - second).max() < 0.05 * np.abs(second).max()


# --------------------------------------------------------------------------- examples


def relu(shape: object) -> object:
    return model([helper.make_node("Relu", ["x"], ["y"], name="act")], shape=shape)


def test_shapes_that_are_declared_need_no_example() -> None:
    graph = load_proto(relu(("n", 3, 8, 8)))
    assert graph.inputs[0].shape == ("batch", 3, 8, 8) and graph.inputs[0].name == "x"


def test_an_open_axis_asks_for_an_example() -> None:
    with pytest.raises(LoadError, match=r"axis 2 of input 'x' is open \(height\): give example_inputs"):
        load_proto(relu(("n", 3, "height", 8)))
    graph = load_proto(relu(("n", 3, "height", 8)), {"x": torch.rand(2, 3, 6, 8)})
    assert graph.run(torch.rand(4, 3, 6, 8))[0].shape == (4, 3, 6, 8)


def test_examples_are_told_apart_by_name() -> None:
    with pytest.raises(LoadError, match=r"no input 'z': it has 'x'"):
        load_proto(relu(("n", 3, 8, 8)), {"z": torch.rand(2, 3, 8, 8)})
    with pytest.raises(LoadError, match=r"example_inputs lacks 'x'"):
        load_proto(relu(("n", 3, 8, 8)), ())


def test_an_example_that_would_fill_the_memory_is_not_made_up() -> None:
    with pytest.raises(LoadError, match="too large to be made up"):
        load_proto(relu(("n", 2**20, 2**20)))


def test_an_input_that_decides_shapes_is_fixed_and_that_is_told() -> None:
    proto = model([helper.make_node("Reshape", ["x", "shape"], ["y"])])
    proto.graph.input.append(helper.make_tensor_value_info("shape", 7, [2]))
    x, shape = torch.rand(2, 3, 8, 8), torch.tensor([0, -1])
    graph = load_proto(proto, {"x": x, "shape": shape})
    assert torch.equal(graph.run(x)[0], x.flatten(1))
    assert any("'shape' is fixed at [0, -1]" in note for note in graph.notes)
    with pytest.raises(LoadError, match="'shape' decides shapes: give its value"):
        load_proto(proto)


def test_an_input_that_decides_shapes_is_of_a_type_that_is_known_without_data() -> None:
    proto = model([helper.make_node("Range", ["x", "x", "x"], ["y"])], shape=())
    with pytest.raises(LoadError, match=r"'x' decides shapes and is torch.bfloat16"):
        load_proto(proto, torch.tensor(1.0, dtype=torch.bfloat16))


def test_a_shape_that_depends_on_data_is_refused_by_node() -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["most"], axis=1, keepdims=0),
        helper.make_node("Cast", ["most"], ["wide"], to=7),
        helper.make_node("Range", ["wide", "wide", "wide"], ["y"], name="counted"),
    ]
    with pytest.raises(LoadError, match=r"node 'counted' \(Range, opset 21\).*depend on data"):
        load_proto(model(nodes, shape=("n", 3)))


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = np.full((4, 3, 1, 1), np.nan, dtype=np.float32)
    with pytest.raises(WeightsError, match="NaN"):
        load_proto(model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight}))


def test_equal_weights_told_by_identity_stay_apart() -> None:
    weight = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["w"], ["v"]),
        helper.make_node("Conv", ["x", "w"], ["h"], name="/first/Conv"),
        helper.make_node("Conv", ["h", "v"], ["y"], name="/second/Conv"),
    ]
    graph = load_proto(model(nodes, {"w": weight}))
    assert [graph.name(node) for node in graph.nodes()] == ["first", "second"]
    first, second = (graph.tensor(f"{name}.weight") for name in ("first", "second"))
    assert torch.equal(first, second) and first is not second


def test_an_old_opset_is_converted_and_that_is_told() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=1)]
    x = torch.randn(2, 6)
    graph = load_proto(model(nodes, shape=(2, 6), opset=6), x)
    assert torch.allclose(graph.run(x)[0], torch.softmax(torch.relu(x), 1))
    assert any("converted from opset 6" in note for note in graph.notes)


def test_scopes_may_be_called_like_words_of_python() -> None:
    nodes = [helper.make_node("Conv", ["x", "lambda.weight"], ["c"], name="/net/while/Conv"),
             helper.make_node("Relu", ["c"], ["y"], name="/net/while/class/Relu")]  # fmt: skip
    graph = load_proto(model(nodes, {"lambda.weight": np.ones((4, 3, 1, 1), np.float32)}))
    assert [name for name, _ in graph.gm.named_parameters()] == ["lambda_.weight"]
    assert graph.run(torch.ones(2, 3, 8, 8))[0].unique().tolist() == [3.0]
