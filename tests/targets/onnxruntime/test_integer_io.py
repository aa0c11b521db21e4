"""`io = "integer"`: the file takes and gives u8, the numbers are those of the network with float ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tests.flow import Inputs, Net, Net2, assert_exact, conv, flat, images, prepare, ship, tokens
from torch import nn
from torch.nn import functional as F

from bitport.artifact import make_target
from bitport.errors import RecipeError

Linear = nn.Linear
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "convolutions": (lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), images),
    "logits": (lambda: Net(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(), b=Linear(8, 3)), images),
    "float at both ends": (
        lambda: Net(lambda m, x: m.b(m.n(x)).softmax(-1), n=nn.LayerNorm(12), b=Linear(12, 5)), tokens,
    ),
    "one tensor, several readers": (
        lambda: Net(lambda m, x: m.a(x) + m.b(F.gelu(x)), a=conv(3, 8), b=conv(3, 8)), images,
    ),
    "one tensor, two outputs": (
        lambda: Net(lambda m, x: (lambda y: {"a": y, "b": (y, m.b(y))})(F.relu(m.a(x))), a=conv(), b=conv(8, 4)),
        images,
    ),
    "its shape is read": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x - x.mean((2, 3), keepdim=True) + x.new_ones(x.shape)))),
                    a=conv(), b=conv(8, 4)), images,
    ),
    "an input passed through": (lambda: Net(lambda m, x: (x, m.a(x)), a=conv()), images),
    "token ids stay what they are": (
        lambda: Net2(lambda m, x, i: m.b(m.a(x) + m.e(i)), a=Linear(12, 8), e=nn.Embedding(9, 8), b=Linear(8, 4)),
        lambda n: (tokens(n), torch.randint(0, 9, (n, 6))),
    ),
    "only moved": (lambda: Net(lambda m, x: m.a(x).flatten(1)[:, 3:], a=conv()), images),
}  # fmt: skip


def shipped(name: str, tmp_path: Any) -> tuple[Any, Any, Any, tuple[torch.Tensor, ...]]:
    build, data = NETWORKS[name]
    prepared = prepare(build(), [data(8)], make_target("onnxruntime", {"io": "integer"}))
    test = data(8)
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    return prepared, ship(prepared, test, data(1)), ort.InferenceSession(tmp_path / "model.onnx"), flat(test)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_takes_and_gives_integers_and_they_are_the_simulators(name: str, tmp_path: Any) -> None:
    prepared, sent, session, test = shipped(name, tmp_path)
    assert_exact(sent)
    types = {v.name: v.type for v in (*session.get_inputs(), *session.get_outputs())}
    assert set(types.values()) <= {"tensor(uint8)", "tensor(int64)"}, types
    assert types["x"] == "tensor(uint8)"
    for ours, theirs in zip(prepared.simulator().run(test), sent.outputs, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        for real, found in zip(prepared.graph.run(*test), sent.outputs, strict=True):
            assert real.shape == found.shape
            assert float((real - found).norm() / real.norm()) < 0.2


def test_a_device_can_feed_it_from_the_files_own_metadata(tmp_path: Any) -> None:
    import json

    prepared, sent, session, test = shipped("logits", tmp_path)
    ends = json.loads(session.get_modelmeta().custom_metadata_map["bitport.io"])
    x, y = ends["x"], ends["output"]
    q = np.clip(np.rint(test[0].numpy() / np.float32(x["scale"])) + x["zero_point"], 0, 255).astype(np.uint8)
    (out,) = session.run(None, {"x": q})
    real = (out.astype(np.int32) - y["zero_point"]).astype(np.float32) * np.float32(y["scale"])
    assert np.array_equal(real, sent.outputs[0].numpy())
    # the target's own session takes such integers as they are
    again = prepared.target.open(tmp_path).run((torch.from_numpy(q),))
    assert torch.equal(again[0], sent.outputs[0])


def test_the_float_reference_keeps_float_ends(tmp_path: Any) -> None:
    from bitport.plan import Plan

    build, data = NETWORKS["logits"]
    prepared = prepare(build(), [data(8)], make_target("onnxruntime", {"io": "integer"}))
    prepared.target.export(prepared.graph, Plan.empty("onnxruntime"), tmp_path)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    assert {v.type for v in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float)"}


def test_other_words_are_refused() -> None:
    with pytest.raises(RecipeError, match="expected 'float' or 'integer'"):
        make_target("onnxruntime", {"io": "int"})


def test_an_artifact_with_integer_ends_from_compress_to_a_device(tmp_path: Any, monkeypatch: Any) -> None:
    from tests import small

    import bitport

    small.quick(monkeypatch)
    recipe = bitport.Recipe.of("int8")
    recipe = dataclasses.replace(recipe, target={"io": "integer"})
    made = small.compressed(tmp_path / "out", target="onnxruntime", recipe=recipe)
    assert made.measurements["parity.exact_share"] == 1.0
    (given,), (taken,) = made.manifest["inputs"], made.manifest["outputs"]
    with np.load(tmp_path / "out/sample.npz") as arrays:
        sample = {name: arrays[name] for name in arrays.files}
    assert {array.dtype.name for array in sample.values()} == {"uint8"}
    # what a device does: feed the golden integers, keep the integers that come out
    session = ort.InferenceSession(tmp_path / "out/model.onnx")
    (out,) = session.run(None, {given["name"]: sample[f"input.{given['name']}"]})
    record = bitport.verify(tmp_path / "out", outputs={f"output.{taken['name']}": out})
    assert record["verdict"]["passed"] and record["outputs"][0]["verdict"] == "equal"
    # and the floats that the manifest's numbers make of them are what predict gives
    x = small.patterns(3)[0]
    stored, back = given["stored"], taken["stored"]
    q = np.clip(np.rint(x.numpy() / np.float32(stored["scale"])) + stored["zero_point"], 0, 255).astype(
        np.uint8
    )
    (out,) = session.run(None, {given["name"]: q})
    real = (out.astype(np.int32) - back["zero_point"]).astype(np.float32) * np.float32(back["scale"])
    predicted = made.predict(x)
    assert np.array_equal(real, predicted.numpy() if isinstance(predicted, torch.Tensor) else predicted)
    again = bitport.verify(tmp_path / "out")
    assert again["golden"]["max_difference"] == 0
