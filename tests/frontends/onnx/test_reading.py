"""Files that aren't what they should be: refused by name, nothing outside their folder is read."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tests.frontends.onnx.made import model

import bitport
from bitport.errors import BitportError, LoadError, UnsafeFile
from bitport.frontends.onnx import load_proto

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1)


def conv(**constants: Any) -> onnx.ModelProto:
    return model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], {"w": WEIGHT, **constants})


def external(path: Path, location: str, **told: Any) -> Path:
    """A model whose weight lies in a file of its own, or is said to."""
    proto = conv()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **told}.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, str(value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "w.bin").write_bytes(b"\0" * 8 + WEIGHT.tobytes())
    graph = bitport.load(external(tmp_path / "net.onnx", "parts/w.bin", offset=8, length=48))
    assert np.array_equal(graph.tensor("conv.weight").detach().numpy(), WEIGHT)


@pytest.mark.parametrize(
    "location",
    [
        "../w.bin",
        "parts/../../w.bin",
        "/etc/passwd",
        "\\\\host\\share\\w",
        "C:\\w.bin",
        "C:w.bin",
        "",
        ".",
        "a\0b",
    ],
)
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    with pytest.raises(UnsafeFile, match="only files in the model's folder are read"):
        bitport.load(external(inside / "net.onnx", location))


@pytest.mark.parametrize("kind", ["symlink", "folder", "hard link", "pipe"])
def test_links_and_what_is_no_file_are_refused(kind: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    location = "w.bin"
    if kind == "symlink":
        (inside / "w.bin").symlink_to(tmp_path / "w.bin")
    elif kind == "folder":
        (inside / "parts").symlink_to(tmp_path)
        location = "parts/w.bin"
    elif kind == "hard link":
        os.link(tmp_path / "w.bin", inside / "w.bin")
    else:
        (inside / "w.bin").mkdir()
    with pytest.raises(UnsafeFile, match="'w'"):
        bitport.load(external(inside / "net.onnx", location))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"offset": 8}, "wants 48 bytes at 8"),
        ({"offset": -1}, "must be a whole number"),
        ({"offset": 2**62}, "must be a whole number|wants 48 bytes"),
        ({"length": 2**62}, "must be a whole number|its external data has"),
        ({"length": 47}, "takes 48 bytes; its external data has 47"),
        ({"__class__": "x"}, "which isn't ONNX"),
    ],
)
def test_external_data_that_does_not_fit_is_refused(told: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    with pytest.raises(LoadError, match=said):
        bitport.load(external(tmp_path / "net.onnx", "w.bin", **told))


@pytest.mark.parametrize("kept", [0, 1, 20, 0.5, 0.98])
def test_a_file_that_is_cut_off_is_refused(kept: float, tmp_path: Path) -> None:
    whole = conv().SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(LoadError):
        bitport.load(path)


def test_damage_is_told_by_the_tensor() -> None:
    proto = conv()
    proto.graph.initializer[0].dims[0] = 2**40
    with pytest.raises(LoadError, match=r"tensor 'w' of shape .* has 48 bytes of data"):
        load_proto(proto)
    proto.graph.initializer[0].dims[0] = -4
    with pytest.raises(LoadError, match="negative length"):
        load_proto(proto)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            [("Relu", "b", "a"), ("Relu", "a", "b"), ("Relu", "x", "y")],
            "reads 'b', which nothing before it gives",
        ),
        ([("Relu", "x", "x")], "'x' is given twice"),
        ([("Relu", "x", "z")], "nothing gives its output 'y'"),
        ([("Nonsense", "x", "y")], r"node 'n0' is Nonsense \(opset 21\), which can't be imported"),
    ],
)
def test_graphs_that_are_none(nodes: list[tuple[str, str, str]], said: str) -> None:
    made = [helper.make_node(kind, [a], [b], name=f"n{i}") for i, (kind, a, b) in enumerate(nodes)]
    with pytest.raises(LoadError, match=said):
        load_proto(model(made))


@pytest.mark.parametrize(
    ("opset", "said"), [(None, "doesn't say which opset"), (29, "opset 29.*known up to 28")]
)
def test_an_opset_that_nobody_knows_is_refused(opset: int | None, said: str) -> None:
    proto = conv()
    del proto.opset_import[:]
    if opset is not None:
        proto.opset_import.append(helper.make_opsetid("", opset))
    with pytest.raises(LoadError, match=said):
        load_proto(proto)


def test_an_operator_of_another_domain_is_named() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="act", domain="com.microsoft")
    with pytest.raises(LoadError, match=r"node 'act' is Relu of com.microsoft"):
        load_proto(model([node]))


def test_a_function_of_the_file_is_taken_apart() -> None:
    function = helper.make_function(
        "mine",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 21)],
    )
    proto = model([helper.make_node("Twice", ["x"], ["y"], domain="mine")])
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_proto(proto, x).run(x)[0], 2 * x)


def test_what_goes_wrong_in_a_node_is_told_with_its_name() -> None:
    with pytest.raises(LoadError, match=r"node 'conv' \(Conv\) can't be imported"):
        load_proto(conv(), torch.rand(2, 5, 8, 8))


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    """Operators of a file's own domain one after another."""
    names = ["a", *(f"h{index}" for index in range(len(calls) - 1)), "b"]
    nodes = [
        helper.make_node(kind, [names[i]], [names[i + 1]], domain="mine" if kind[0] == "F" else "")
        for i, kind in enumerate(calls)
    ]
    return helper.make_function(
        "mine", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    )


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ({"F0": ["F0"]}, "functions may not call themselves"),
        ({"F0": ["F1"], "F1": ["F0"]}, "functions may not call themselves"),
        ({f"F{i}": [f"F{i + 1}"] * 2 if i < 40 else ["Relu"] for i in range(41)}, "make more than"),
        ({f"F{i}": [f"F{i + 1}"] if i < 20000 else ["Relu"] for i in range(20001)}, "100 calls deep"),
    ],
)
def test_functions_without_end_are_refused(functions: dict[str, list[str]], said: str) -> None:
    proto = model([helper.make_node("F0", ["x"], ["y"], domain="mine")])
    proto.functions.extend(function(name, calls) for name, calls in functions.items())
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    with pytest.raises(LoadError, match=said):
        load_proto(proto)


def test_external_data_in_a_function_is_held_to_the_same(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(WEIGHT, "secret")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../w.bin")
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    body = function("F0", ["Relu"])
    body.node.append(helper.make_node("Constant", [], ["c"], value=weight))
    proto = model([helper.make_node("F0", ["x"], ["y"], domain="mine")])
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    (inside / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeFile, match="only files in the model's folder"):
        bitport.load(inside / "net.onnx")
    with pytest.raises(LoadError, match="load the model by its path"):
        load_proto(proto)


@pytest.mark.parametrize(
    ("nodes", "constants", "said"),
    [
        ([("ConstantOfShape", ["s"], ["y"])], {"s": np.array([2**40])}, r"node 'n0' .*constant of 1099511627776"),
        ([("Range", ["a", "b", "c"], ["y"])], {"a": np.int64(0), "b": np.int64(2**40), "c": np.int64(1)}, "constant"),
        ([("Range", ["a", "b", "a"], ["y"])], {"a": np.int64(0), "b": np.int64(2**40)}, "step is 0"),
        ([("Relu", ["x"], ["h" * 5000]), ("Relu", ["h" * 5000], ["y"])], {}, "a name of 5000 characters"),
        ([("Add", ["x", "t"], ["y"])], {"t": np.array(["a"])}, "'t' is text"),
    ],
)  # fmt: skip
def test_what_no_honest_file_holds(nodes: Any, constants: dict[str, Any], said: str) -> None:
    made = [helper.make_node(kind, a, b, name=f"n{i}") for i, (kind, a, b) in enumerate(nodes)]
    with pytest.raises(LoadError, match=said):
        load_proto(model(made, constants))


def test_external_data_that_overlaps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes() * 2)
    path = external(tmp_path / "net.onnx", "w.bin", offset=0)
    proto = onnx.ModelProto.FromString(path.read_bytes())
    other = proto.graph.initializer.add()
    other.CopyFrom(proto.graph.initializer[0])
    other.name, other.external_data[1].value = "v", "8"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="the external data of tensors 'w' and 'v' overlap"):
        bitport.load(path)


def test_damaged_files_never_crash(tmp_path: Path) -> None:
    """Bytes changed, dropped and doubled at random: an error of bitport, or a network."""
    whole = model(
        [
            helper.make_node("Conv", ["x", "w"], ["h"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]),
            helper.make_node("Gemm", ["f", "g"], ["y"], transB=1),
        ],
        {"w": np.ones((2, 3, 3, 3), np.float32), "g": np.ones((2, 128), np.float32)},
    ).SerializeToString()
    dice, path, loaded = random.Random(0), tmp_path / "net.onnx", 0
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(damaged))
            what = dice.randrange(3)
            damaged[at : at + 1] = (bytes([dice.randrange(256)]), b"", damaged[at : at + 1] * 2)[what]
        path.write_bytes(bytes(damaged))
        try:
            bitport.load(path)
            loaded += 1
        except BitportError:
            pass
    assert 0 < loaded < 120, "some changes hit names, some hit what holds the file together"
