"""16-bit activations of chosen layers: stored in 16 bits, computed in float, said so, and equal to the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from tests.flow import Inputs, Net, Shipped, conv, flat, images, prepare, ship, tokens
from torch import nn
from torch.nn import functional as F

from bitport.artifact import make_target
from bitport.recipe.model import Override

WIDE = {"format": "int16"}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs], str]] = {
    "a convolution and its relu": (
        lambda: Net(lambda m, x: m.c(m.b(F.relu(m.a(x)))), a=conv(), b=conv(8, 8), c=conv(8, 4)), images, "a",
    ),
    "a residual": (
        lambda: Net(lambda m, x: (lambda y: m.c(m.b(y) + y))(m.a(x)), a=conv(), b=conv(8, 8), c=conv(8, 4)),
        images, "add",
    ),
    "the last layer": (
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), images, "b",
    ),
    "a norm": (
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(12, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 4)),
        tokens, "a",
    ),
    "a move behind it": (
        lambda: Net(lambda m, x: m.b(m.a(x).transpose(1, 2).flatten(1)), a=nn.Linear(12, 8), b=nn.Linear(48, 4)),
        tokens, "a",
    ),
}  # fmt: skip


def shipped(name: str, options: dict[str, Any] | None = None, wide: bool = True) -> tuple[Any, Any, Any]:
    build, data, match = NETWORKS[name]
    overrides = [Override(match=match, activations=WIDE)] if wide else []
    prepared = prepare(build(), [data(8)], make_target("onnxruntime", options), overrides=overrides)
    test = data(8)
    return prepared, ship(prepared, test, data(1)), test


def assert_nearly(sent: Shipped) -> None:
    """The float sums in front of a 16-bit rounding differ in their last bits: by a step of 65,536 at most."""
    assert not sent.inspection.missed
    for layer in sent.parity.layers.values():
        assert layer.local.worst <= 1
        assert layer.local.exact_share > 0.99


@pytest.mark.parametrize("name", ["int16 symmetric", "int[-32768,32767]"])
def test_another_spelling_is_stored_alike(name: str) -> None:
    prepared = prepare(Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4)), [images(8)],
                       activations={"format": name})  # fmt: skip
    assert not any(todo.kernel for todo in prepared.plan.nodes.values())
    assert_nearly(ship(prepared, images(8)))


@pytest.mark.parametrize("name", NETWORKS)
def test_its_integers_are_the_simulators_and_its_reason_is_said(name: str, tmp_path: Any) -> None:
    prepared, sent, _ = shipped(name)
    assert_nearly(sent)
    match = NETWORKS[name][2]
    reasons = [todo.reason for todo in prepared.plan.nodes.values() if todo.reason]
    assert any("int16" in reason and "float" in reason for reason in reasons), reasons
    wide = [tie for tie in prepared.plan.ties.values() if str(tie.format).startswith("int16")]
    assert len(wide) == 1
    assert float(wide[0].parameters()[0]) > 0
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    types = {i.name: i.data_type for i in model.graph.initializer}
    assert onnx.TensorProto.INT16 in types.values(), f"{match}: nothing is stored in 16 bits"
    assert model.opset_import[0].version >= 21


def test_it_is_nearer_to_float_than_eight_bits() -> None:
    name = "a residual"
    errors = [
        prepared.real_error(flat(test)) for prepared, _, test in (shipped(name), shipped(name, wide=False))
    ]
    assert errors[0] < errors[1]


def test_its_output_may_be_integers_too() -> None:
    prepared, sent, test = shipped("the last layer", {"io": "integer"})
    assert_nearly(sent)
    assert prepared.real_error(flat(test)) < 0.1
