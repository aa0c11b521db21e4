"""Branches and loops: what they come to, where shapes and constants decide; the others are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from tests.flow import assert_exact, prepare, ship
from tests.frontends.onnx.made import exported, model
from torch import Tensor, nn

import bitport
from bitport.errors import LoadError
from bitport.frontends.onnx import load_proto
from bitport.frontends.onnx.control import MOST

STEPS, WIDTH = 5, 4
FLOAT, WHOLE, TRUTH = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def graph(
    nodes: list[Any], inputs: list[tuple[str, int, Any]], outputs: dict[str, int], **constants: Any
) -> Any:
    return helper.make_graph(
        nodes,
        "inner",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, name=f"{kind} {outputs[0]}", **attributes)


def agrees(proto: onnx.ModelProto, x: Tensor) -> Any:
    """The graph, whose outputs are those of ONNX Runtime."""
    made = load_proto(proto, x)
    compared(made, proto, x)
    return made


def compared(made: Any, proto: onnx.ModelProto, x: Tensor) -> None:
    proto.ir_version = 10  # which it reads
    (expected,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x.numpy()})
    assert np.allclose(made.run(x)[0].detach().numpy(), expected, atol=1e-6, rtol=1e-5)


def choice(condition: str, then: str = "Relu", other: str = "Neg") -> Any:
    branches = {
        f"{name}_branch": graph([node(kind, ["x"], [f"{name}_y"])], [], {f"{name}_y": FLOAT})
        for name, kind in (("then", then), ("else", other))
    }
    return node("If", [condition], ["y"], **branches)


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_that_a_constant_decides_is_taken(condition: bool) -> None:
    agrees(model([choice("c")], {"c": np.array(condition)}), torch.randn(2, 3, 8, 8))


def test_the_branch_that_is_not_taken_may_hold_what_cannot_be_imported() -> None:
    proto = model([choice("c", other="NoSuchOperator")], {"c": np.array(True)})
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_proto(proto, x).run(x)[0], torch.relu(x))


@pytest.mark.parametrize("width", [8, 9])
def test_a_branch_that_a_computed_shape_decides_is_taken(width: int) -> None:
    deciding = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "last"], ["length"]),
        node("Mod", ["length", "two"], ["rest"]),
        node("Equal", ["rest", "zero"], ["c"]),
    ]
    constants = {"last": np.array(3), "two": np.array(2), "zero": np.array(0)}
    proto = model([*deciding, choice("c")], constants, shape=("batch", 3, 8, width))
    agrees(proto, torch.randn(2, 3, 8, width))


def recurrent(rounds: Any, *, stacked: bool = True) -> onnx.ModelProto:
    """h ← tanh(x[t] W + h U + b), written as a Loop; W outside of it, U and b in it."""
    rng = np.random.default_rng(0)
    weight, hidden, bias = (
        rng.standard_normal(size).astype(np.float32) / 2 for size in [(WIDTH, WIDTH)] * 2 + [WIDTH]
    )
    body = graph(
        [
            node("Gather", ["x", "t"], ["now"], axis=1),
            node("MatMul", ["now", "W"], ["xw"]),
            node("MatMul", ["h", "U"], ["hu"]),
            node("Add", ["hu", "b"], ["hub"]),
            node("Add", ["xw", "hub"], ["sum"]),
            node("Tanh", ["sum"], ["h_next"]),
            node("Identity", ["h_next"], ["out"]),
            node("Identity", ["going"], ["still"]),
        ],
        [("t", WHOLE, []), ("going", TRUTH, []), ("h", FLOAT, ["batch", WIDTH])],
        {"still": TRUTH, "h_next": FLOAT, "out": FLOAT},
        U=hidden,
        b=bias,
    )  # fmt: skip
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "from", "to"], ["batch"]),
        node("Concat", ["batch", "width"], ["state"], axis=0),
        node("ConstantOfShape", ["state"], ["h0"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Loop", ["length" if rounds is None else "rounds", "", "h0"], ["last", "every"], body=body),
        node("Identity", ["every" if stacked else "last"], ["y"]),
    ]
    constants = {"W": weight, "from": np.array([0]), "to": np.array([1]), "width": np.array([WIDTH]),
                 "one": np.array(1), "rounds": np.array(rounds or 1)}  # fmt: skip
    return model(nodes, constants, shape=("batch", STEPS, WIDTH))


@pytest.mark.parametrize("stacked", [True, False], ids=["every state", "the last state"])
@pytest.mark.parametrize("rounds", [None, 3], ids=["as many as there are samples", "three"])
def test_a_loop_is_written_out(rounds: Any, stacked: bool) -> None:
    made = agrees(recurrent(rounds, stacked=stacked), torch.randn(2, STEPS, WIDTH))
    compared(made, recurrent(rounds, stacked=stacked), torch.randn(7, STEPS, WIDTH))  # its batch stays open


def test_weights_that_every_iteration_reads_are_there_once_and_can_be_trained() -> None:
    made = load_proto(recurrent(None), torch.randn(2, STEPS, WIDTH))
    shapes = sorted(tuple(parameter.shape) for parameter in made.gm.parameters())
    assert shapes == [(WIDTH,), (WIDTH, WIDTH), (WIDTH, WIDTH)]
    made.run(torch.randn(2, STEPS, WIDTH))[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.gm.parameters())


def test_a_network_with_a_loop_arrives_in_integers() -> None:
    batches = [torch.randn(16, STEPS, WIDTH) for _ in range(2)]
    prepared = prepare(load_proto(recurrent(None, stacked=False), batches[0][:2]), batches)
    assert_exact(ship(prepared, *batches))


def test_a_loop_that_counts_down_ends() -> None:
    body = graph(
        [
            node("Sub", ["left", "one"], ["less"]),
            node("Greater", ["less", "zero"], ["still"]),
            node("Add", ["value", "value"], ["double"]),
        ],
        [("t", WHOLE, []), ("going", TRUTH, []), ("left", WHOLE, []), ("value", FLOAT, None)],
        {"still": TRUTH, "less": WHOLE, "double": FLOAT},
    )
    constants = {"one": np.array(1), "zero": np.array(0), "four": np.array(4), "yes": np.array(True)}
    nodes = [node("Loop", ["", "yes", "four", "x"], ["rest", "y"], body=body)]
    made = agrees(model(nodes, constants), torch.randn(2, 3, 8, 8))
    assert torch.equal(made.run(torch.ones(1, 3, 8, 8))[0], torch.full((1, 3, 8, 8), 16.0))


@pytest.mark.parametrize("back", [0, 1])
def test_a_scan_is_written_out(back: int) -> None:
    body = graph(
        [node("Add", ["sum", "now"], ["more"]), node("Identity", ["more"], ["out"])],
        [("sum", FLOAT, [2, 8, 8]), ("now", FLOAT, [2, 8, 8])],
        {"more": FLOAT, "out": FLOAT},
    )
    nodes = [
        node("Scan", ["zeros", "x"], ["last", "y"], body=body, num_scan_inputs=1, scan_input_axes=[1],
             scan_input_directions=[back], scan_output_axes=[1], scan_output_directions=[back]),
    ]  # fmt: skip
    proto = model(nodes, {"zeros": np.zeros((2, 8, 8), np.float32)}, shape=(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = x.flip(1).cumsum(1).flip(1) if back else x.cumsum(1)
    assert torch.allclose(load_proto(proto, x, dynamic_shapes=None).run(x)[0], expected, atol=1e-6)


def test_a_loop_within_a_loop_is_written_out() -> None:
    head = [("t", WHOLE, []), ("going", TRUTH, [])]
    within = graph(
        [node("Add", ["inner", "x"], ["inner_more"]), node("Identity", ["going2"], ["still2"])],
        [("t2", WHOLE, []), ("going2", TRUTH, []), ("inner", FLOAT, None)],
        {"still2": TRUTH, "inner_more": FLOAT},
    )
    body = graph(
        [node("Loop", ["two", "", "value"], ["more"], body=within), node("Identity", ["going"], ["still"])],
        [*head, ("value", FLOAT, None)],
        {"still": TRUTH, "more": FLOAT},
    )
    constants = {"two": np.array(2), "three": np.array(3)}
    made = agrees(
        model([node("Loop", ["three", "", "x"], ["y"], body=body)], constants), torch.randn(2, 3, 8, 8)
    )
    assert torch.equal(made.run(torch.ones(1, 3, 8, 8))[0], torch.full((1, 3, 8, 8), 7.0))


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x[:, 0])
        for at in range(x.shape[1]):
            y = torch.tanh(y + x[:, at])
        return y


def counted(rounds: Any, nodes: list[Any] | None = None) -> onnx.ModelProto:
    body = graph(
        [node("Neg", ["value"], ["less"]), node("Identity", ["going"], ["still"])],
        [("t", WHOLE, []), ("going", TRUTH, []), ("value", FLOAT, None)],
        {"still": TRUTH, "less": FLOAT, "value": FLOAT},
    )
    loop = node("Loop", ["rounds", "", "x"], ["y", "every"], body=body)
    return model([*(nodes or []), loop], {} if rounds is None else {"rounds": np.array(rounds)})


def test_a_loop_of_millions_of_iterations_is_refused() -> None:
    with pytest.raises(LoadError, match=rf"node 'Loop y' \(Loop, opset 21\).*more than {MOST} iterations"):
        load_proto(counted(2**40), torch.randn(2, 3, 8, 8))


def test_a_loop_without_iterations_cannot_tell_what_it_stacks() -> None:
    with pytest.raises(LoadError, match="no iterations"):
        load_proto(counted(0), torch.randn(2, 3, 8, 8))


def test_what_data_decides_is_refused_with_the_remedy() -> None:
    x = torch.randn(2, 3, 8, 8)
    summed = node("ReduceSum", ["x"], ["sum"], keepdims=0)
    proto = model(
        [summed, node("Greater", ["sum", "zero"], ["c"]), choice("c")], {"zero": np.array(0, np.float32)}
    )
    with pytest.raises(
        LoadError, match=r"node 'If y' \(If, opset 21\).*condition depends on data.*dynamo=True"
    ):
        load_proto(proto, x)
    with pytest.raises(LoadError, match=r"node 'Loop y' \(Loop.*iterations depend on data"):
        load_proto(counted(None, [summed, node("Cast", ["sum"], ["rounds"], to=WHOLE)]), x)


def test_an_input_that_decides_is_fixed_at_its_example() -> None:
    proto = model([choice("c")])
    proto.graph.input.append(helper.make_tensor_value_info("c", TRUTH, []))
    x = torch.randn(2, 3, 8, 8)
    made = load_proto(proto, {"x": x, "c": torch.tensor(True)})
    assert torch.equal(made.run(x)[0], torch.relu(x))
    assert any("'c' is fixed at True" in note for note in made.notes)


def test_a_loop_of_an_exporter_gives_what_the_network_gives(tmp_path: Path) -> None:
    x = torch.randn(3, STEPS, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there still are files that were made so
        path = exported(torch.jit.script(Summed()), x, tmp_path / "net.onnx", dynamo=False)
    assert any(item.op_type == "Loop" for item in onnx.load(path).graph.node)
    assert torch.allclose(bitport.load(path, x).run(x)[0], Summed()(x), atol=1e-6)


def test_a_damaged_graph_within_is_refused() -> None:
    ends = graph([node("Relu", ["nowhere"], ["z"])], [], {"z": FLOAT})
    with pytest.raises(LoadError, match="'nowhere', which nothing before it gives"):
        load_proto(
            model([node("If", ["c"], ["y"], then_branch=ends, else_branch=ends)], {"c": np.array(True)})
        )
    lone = node("If", ["c"], ["y"])
    with pytest.raises(LoadError, match=r"node 'If y' \(If\) can't be imported"):
        load_proto(model([lone], {"c": np.array(True)}), torch.randn(2, 3, 8, 8))
