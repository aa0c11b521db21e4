"""What inspection says of narrow weights: read from the optimized graph and from the bytes of the written file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from tests.flow import Net, Prepared, conv, flat, images, prepare, ship
from torch import nn
from torch.nn import functional as F

from bitport.artifact import make_target
from bitport.errors import RecipeError
from bitport.numerics.packing import packed_bytes
from bitport.targets._base import Inspection
from bitport.targets.onnxruntime.inspect import rounds_activations

FLOAT = {"format": "float32"}
CHANNEL = {"granularity": "channel"}
GROUPS = {"granularity": "group", "group": 16}
STATIC = {"QLinearConv", "QGemm", "QLinearGlobalAveragePool"}
# weights, activations, options of the target; which kernels multiply integers
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]] = {
    "w4a8": ({"format": "int4", **CHANNEL}, {}, {}, STATIC),
    "w3a8": ({"format": "int[-3,3]", **CHANNEL}, {}, {}, STATIC),
    "w2a4": ({"format": "int2", **CHANNEL}, {"format": "int4"}, {}, STATIC),
    "dynamic": ({"format": "int8", **CHANNEL}, {"dynamic": True}, {}, {"DynamicQuantizeMatMul"}),
    "blockwise": ({"format": "int4", **GROUPS}, FLOAT, {}, {"MatMulNBits"}),
    "blockwise 2 bits": ({"format": "int2", **GROUPS}, FLOAT, {}, {"MatMulNBits"}),
    "blockwise of floats": ({"format": "int4", **GROUPS}, FLOAT, {"accuracy_level": 0}, set()),
    "table": ({"format": "nf4", **GROUPS}, FLOAT, {}, set()),
    "small floats": ({"format": "e4m3", **CHANNEL}, FLOAT, {}, set()),
    "half": ({"format": "float16"}, FLOAT, {}, set()),
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": conv(3, 8), "b": nn.Linear(8, 33), "c": nn.Linear(33, 5)}
    return Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)).mean((2, 3))))), **layers)


def prepared(form: str) -> Prepared:
    weights, activations, options, _ = FORMS[form]
    target = make_target("onnxruntime", options)
    return prepare(network(), [images(8)], target, weights=weights, activations=activations)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_as_planned_and_as_simulated(form: str) -> None:
    made = prepared(form)
    test = images(4)
    sent = ship(made, test, images(1))
    assert not sent.inspection.missed, sent.inspection.missed
    assert sent.inspection.integer == FORMS[form][3]
    simulated = made.simulator().run(flat(test))
    for ours, theirs, plain in zip(simulated, sent.outputs, sent.as_written, strict=True):
        size = float(ours.abs().max())
        assert float((ours - theirs).abs().max()) <= 2e-6 * size
        assert float((theirs - plain).abs().max()) <= 0.05 * size
    if FORMS[form][1] != FLOAT and form != "dynamic":
        assert sent.record["exact_share"] == 1.0


def inspection(made: Prepared, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Inspection:
    made.target.export(made.work, made.plan, folder)
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    return made.target.inspect(folder, made.plan)


def test_a_weight_that_is_wider_in_the_file_than_planned_is_missed(tmp_path: Path) -> None:
    def widen(model: onnx.ModelProto) -> None:
        """An int4 weight as int8: what a careless exporter writes."""
        (stored,) = [
            i for i in model.graph.initializer if i.name.startswith("b.weight") and i.name.endswith("/q")
        ]
        assert len(stored.raw_data) == packed_bytes(8 * 33, 4)
        wide = numpy_helper.to_array(stored).astype("int8")
        stored.CopyFrom(numpy_helper.from_array(wide, stored.name))

    found = inspection(prepared("w4a8"), tmp_path, widen)
    assert set(found.missed) == {"b"}
    assert "takes 264 bytes in the file where 4 bits take 132" in found.missed["b"]


def test_a_weight_that_is_not_in_the_file_is_missed(tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        (stored,) = [
            i for i in model.graph.initializer if i.name.startswith("c.weight") and i.name.endswith("/q")
        ]
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == stored.name:
                    node.input[index] = "elsewhere"
        stored.name = "elsewhere"
        del model.metadata_props[:]

    found = inspection(prepared("table"), tmp_path, rename)
    assert "c" in found.missed and "is not in the file" in found.missed["c"]


def test_a_weight_that_is_decoded_whenever_the_network_runs_is_missed(tmp_path: Path) -> None:
    def feed(model: onnx.ModelProto) -> None:
        """The scales of one layer become an input with a default: ONNX Runtime can't fold them any more."""
        (scale,) = [
            i for i in model.graph.initializer if i.name.startswith("c.weight") and i.name.endswith("/scale")
        ]
        model.graph.input.append(onnx.helper.make_tensor_value_info(scale.name, scale.data_type, scale.dims))

    found = inspection(prepared("table"), tmp_path, feed)
    assert set(found.missed) == {"c"} and "decodes its weights whenever it runs" in found.missed["c"]


def test_whether_activations_are_rounded_is_measured() -> None:
    """At level 4 it depends on the kernel that there is, and ONNX Runtime doesn't say which."""
    for bits, blocks in ((2, (32, 64, 128)), (4, (16, 32, 64, 128, 256)), (8, (16, 32, 64, 128, 256))):
        assert all(rounds_activations(bits, block, 4) for block in blocks), bits
    assert not rounds_activations(4, 32, 0)
    assert not rounds_activations(2, 16, 4), "there is a kernel now: let `layout` use it"


def test_another_accuracy_level_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"accuracy_level = 2: expected 0 or 1"):
        make_target("onnxruntime", {"accuracy_level": 2})
