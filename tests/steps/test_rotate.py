"""Residual streams rotated before rounding: nearer outputs where channels stick out, nothing at all where none can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, Stepped, assert_exact, context, conv, images, prepare, ship
from tests.spread import Embedded, Transformer, plant_loud, plant_outliers
from torch import Tensor, nn

from bitport.errors import FormatError, GraphError
from bitport.graph import Graph
from bitport.graph.streams import Stream
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.plan.rescaled import counterpart
from bitport.recipe.model import Override
from bitport.steps import _rewritten, rotate
from bitport.steps._base import Context, make

W4A4 = {"weights": {"format": "int4"}, "activations": {"format": "int4"}}
W4A8 = {"weights": {"format": "int4"}}
FIRST = "body.layers.0.norm1"


def sequences(count: int = 4) -> list[Tensor]:
    return [torch.randn(8, 9, 8) for _ in range(count)]


def outcome(tried: list[dict[str, str]]) -> tuple[str, str]:
    """(outcome, reason) of the one stream."""
    (row,) = [row for row in tried if row["what"].startswith(rotate.STREAMS)]
    return row["outcome"], row["reason"]


def behind(prepared: Prepared, data: Sequence[Tensor], *steps: str) -> tuple[float, Context]:
    """How far the network with some steps is from the float one; each knows what is ahead of it."""
    settings = context(prepared.graph, prepared.target, data)
    work, plan = prepared.reference.clone(), prepared.plan
    for index, step in enumerate(steps):
        settings.ahead = [(later, {}) for later in steps[index + 1 :]]
        work, plan = make(step, {})(work, plan, settings)
    on_grid(work, plan)
    torch.manual_seed(9)
    return replace(prepared, work=work, plan=plan).real_error(torch.randn(16, 9, 8)), settings


# ------------------------------------------------------------------------------------------------ what gains


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, pytest.param(nn.RMSNorm, marks=pytest.mark.slow)], ids=["layer norm", "rms norm"]
)
@pytest.mark.parametrize(
    ("target", "options", "gain"),
    [
        ("onnxruntime", {}, 2.0),
        pytest.param("null", {}, 2.0, marks=pytest.mark.slow),
        pytest.param("null", W4A4, 1.1, marks=pytest.mark.slow),
    ],
    ids=["int8", "null int8", "w4a4"],
)
def test_loud_channels_of_the_stream_are_spread(
    norm: type[nn.Module], target: str, options: dict[str, Any], gain: float
) -> None:
    model, data = plant_loud(Embedded(norm=norm)), sequences()
    found = Stepped("rotate", model, data, target, {}, **options)
    assert outcome(found.tried)[0] == "kept", found.tried
    assert list(found.plan.rotated) == [FIRST]
    x = torch.randn(16, 9, 8)
    assert found.plain.real_error(x) > gain * found.found.real_error(x)
    with torch.no_grad():
        torch.testing.assert_close(found.graph.run(x)[0], model(x), rtol=1e-3, atol=1e-4)
    assert any("lowered the output error" in note for note in found.context.notes)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer norm", "rms norm"])
def test_narrow_weights_are_judged_behind_the_steps_that_solve_for_them(norm: type[nn.Module]) -> None:
    data = sequences()
    prepared = prepare(plant_loud(Embedded(norm=norm)), data, "null", **W4A8)
    without, _ = behind(prepared, data, "gptq", "correct_bias")
    found, settings = behind(prepared, data, "rotate", "gptq", "correct_bias")
    assert outcome(settings.tried)[0] == "kept"
    assert "held back, behind gptq and correct_bias" in outcome(settings.tried)[1]
    assert without > 1.2 * found


def test_scales_that_were_moved_out_of_norms_are_forgotten_with_their_gains() -> None:
    model, data = Embedded(width=32), sequences()
    plant_outliers(model.body)
    prepared = prepare(model, data, "null")
    settings = context(prepared.graph, prepared.target, data)
    work, plan = make("equalize", {})(prepared.reference.clone(), prepared.plan, settings)
    assert FIRST in plan.rescaled
    with pytest.MonkeyPatch.context() as patch:
        errors = iter([1.0, 0.0])
        patch.setattr(_rewritten.Judge, "error", lambda *_: next(errors))
        work, plan = make("rotate", {})(work, plan, settings)
    assert plan.rotated and not plan.rescaled
    rebuilt = counterpart(prepared.reference, plan).gm.state_dict()
    for name, value in work.gm.state_dict().items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what doesn't


@pytest.mark.parametrize("options", [{}, W4A8, W4A4], ids=["int8", "w4a8", "w4a4"])
def test_without_outliers_nothing_is_worse(options: dict[str, Any]) -> None:
    data = sequences()
    found = Stepped("rotate", Embedded(), data, "null", {}, **options)
    x = torch.randn(32, 9, 8)
    if outcome(found.tried)[0] == "left out":
        assert found.plan is found.plain.plan and not found.plan.rotated
        assert found.found.real_error(x) == found.plain.real_error(x)
    assert found.found.real_error(x) <= 1.05 * found.plain.real_error(x)


def test_a_candidate_that_errs_more_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.1, 0.2])
    monkeypatch.setattr(_rewritten.Judge, "error", lambda *_: next(errors))
    found = Stepped("rotate", Embedded(), sequences(2), "null", {})
    assert found.plan is found.plain.plan
    assert outcome(found.tried)[0] == "left out"
    assert outcome(found.tried)[1].startswith("error of the simulated outputs 0.1 without, 0.2 with it")
    assert found.context.notes == []


def test_a_change_of_the_float_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Graph, stream: Stream, signs: Tensor) -> None:
        graph.set_tensor("body.head.weight", 2 * graph.tensor("body.head.weight").detach())

    monkeypatch.setattr(rotate, "turn", wrong)
    found = Stepped("rotate", plant_loud(Embedded()), sequences(2), "null", {})
    assert found.plan is found.plain.plan
    assert "float32 can't hold it: outputs would change by " in outcome(found.tried)[1]


def test_weights_that_no_longer_fit_their_format_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Plan:
        raise FormatError("no room")

    monkeypatch.setattr(_rewritten, "fit_weights", full)
    found = Stepped("rotate", plant_loud(Embedded()), sequences(2), "null", {})
    assert found.plan is found.plain.plan and "can't be stored: no room" in outcome(found.tried)[1]


@pytest.mark.parametrize(
    ("model", "data", "why"),
    [
        (Net(lambda m, x: m.a(x), a=conv()), [images(4)], "there is no norm over channels"),
        (
            Transformer(),
            [torch.randn(4, 9, 32)],
            "in front of 'layers.0.norm1': the network's input 'x' is part",
        ),
    ],
    ids=["no transformer", "input"],
)
def test_a_network_without_such_a_stream_is_left_alone(
    model: nn.Module, data: list[Tensor], why: str
) -> None:
    found = Stepped("rotate", model, data, "null", {})
    assert found.plan is found.plain.plan
    kind, reason = outcome(found.tried)
    assert kind == "left out" and reason.startswith("none can be rotated: ") and why in reason


def test_a_stream_whose_weights_all_stay_float_is_left_alone() -> None:
    keep = Override(match="*", op="linear", weights={"format": "float32"}, activations={"format": "float32"})
    found = Stepped("rotate", Embedded(), sequences(2), "null", {}, overrides=[keep])
    assert found.plan is found.plain.plan
    assert outcome(found.tried) == ("left out", "no weight around it is quantized")


def test_once_is_enough() -> None:
    data = sequences()
    found = Stepped("rotate", plant_loud(Embedded()), data, "null", {})
    settings = context(found.plain.graph, found.plain.target, data)
    work, plan = make("rotate", {})(found.graph, found.plan, settings)
    assert plan is found.plan and work is found.graph
    assert outcome(settings.tried) == ("left out", "it is rotated already")


def test_products_beside_layers_come_behind_it() -> None:
    data = sequences(1)
    prepared = prepare(Embedded(), data, "null")
    settings = context(prepared.graph, prepared.target, data)
    compensated = replace(prepared.plan, low_rank={"embed": 2})
    work = prepared.reference.clone()
    assert make("rotate", {})(work, compensated, settings) == (work, compensated)
    assert "put it in front of them" in outcome(settings.tried)[1]


def test_nothing_quantized_and_nothing_calibrated() -> None:
    data = sequences(1)
    prepared = prepare(Embedded(), data, "null")
    settings = context(prepared.graph, prepared.target, data)
    work, empty = prepared.reference.clone(), Plan.empty("null")
    assert make("rotate", {})(work, empty, settings) == (work, empty)
    assert outcome(settings.tried) == ("left out", "nothing is quantized")
    _, raw = make("quantize", {})(work, empty, settings)
    with pytest.raises(GraphError, match="calibrate first"):
        make("rotate", {})(work, raw, settings)


def test_the_seed_chooses_the_rotation() -> None:
    data = sequences()
    prepared = prepare(plant_loud(Embedded()), data, "null")
    signs = []
    for seed in (0, 0, 1):
        settings = replace(context(prepared.graph, prepared.target, data), seed=seed)
        signs.append(
            make("rotate", {})(prepared.reference.clone(), prepared.plan, settings)[1].rotated[FIRST]
        )
    assert torch.equal(signs[0], signs[1]) and not torch.equal(signs[0], signs[2])


# ------------------------------------------------------------------------------------------------ its place

OFTEN = ("int8layer norm", "w4a4rms norm")


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        pytest.param(
            norm, options, id=f"{name}-{kind}", marks=[pytest.mark.slow] * (name + kind not in OFTEN)
        )
        for kind, norm in (("layer norm", nn.LayerNorm), ("rms norm", nn.RMSNorm))
        for name, options in (("int8", {}), ("w4a8", W4A8), ("w4a4", W4A4))
    ],
)
def test_the_runtime_computes_the_rotated_integers(norm: type[nn.Module], options: dict[str, Any]) -> None:
    data = sequences()
    model = plant_loud(Embedded(norm=norm))
    with pytest.MonkeyPatch.context() as patch:
        errors = iter([1.0, 0.0])  # kept in any case: what runs is to be looked at, not whether it is better
        patch.setattr(_rewritten.Judge, "error", lambda *_: next(errors))
        found = Stepped("rotate", model, data, "onnxruntime", {}, **options).found
    assert found.plan.rotated
    shipped = ship(found, *data[:2])
    assert_exact(shipped)
    for name, layer in shipped.parity.layers.items():
        assert layer.simulated.sqnr_db > 3, name
