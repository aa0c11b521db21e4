"""The step `choose_ranges`: min-max where what was asked for loses more, told; what was asked for elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, context, conv, images, prepare
from torch import Tensor, nn

from bitport.errors import GraphError
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.steps._base import Context, make
from bitport.steps._judge import Judge
from bitport.steps.quantize import fit_weights


def chosen(
    net: nn.Module, x: Tensor, weights: dict[str, Any], activations: dict[str, Any]
) -> tuple[Plan, Plan, Context, Graph]:
    """(plan as asked, plan found, context, graph)."""
    prepared = prepare(net, list(x.split(16)), "null", weights=weights, activations=activations)
    settings = context(prepared.graph, prepared.target, list(x.split(16)))
    graph, plan = make("choose_ranges", {})(prepared.reference.clone(), prepared.plan, settings)
    assert graph.digest() == prepared.reference.digest()
    return prepared.plan, plan, settings, prepared.reference


def chain() -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_a_range_that_clips_too_much_gives_way(what: str) -> None:
    bad = {"format": "int8", "range": {"use": "percentile", "q": 60.0}}
    settings = {"weights": {"format": "int8"}, "activations": {"format": "int8"}, what: bad}
    asked, found, told, graph = chosen(chain(), images(64), settings["weights"], settings["activations"])
    (row,) = [row for row in told.tried if row["what"] == f"min-max for {what}"]
    assert row["outcome"] == "kept"
    source = {"weights": "weight", "activations": "measured"}[what]
    assert {tie.range for tie in found.ties.values() if tie.source == source} == {"minmax"}
    batches = [(images(16),)]
    arithmetic = told.arithmetic
    errors = [Judge(graph, arithmetic, batches).error(graph, plan) for plan in (asked, found)]
    assert errors[1] < 0.5 * errors[0]
    words = row["reason"].replace(",", "").split()
    before, after = (float(word) for word in words if "." in word or "e-" in word)
    assert after < before


def test_a_good_range_stays_and_that_is_told() -> None:
    x = images(64)
    x[0, 0, 0, 0] = 100.0  # an outlier that min-max would follow
    asked, found, told, _ = chosen(chain(), x, {"format": "int4"}, {"format": "int4", "range": "mse"})
    assert found.measured() == asked.measured()
    assert [row["outcome"] for row in told.tried if row["what"].startswith("min-max")] == ["left out"]


def test_min_max_of_narrow_weights_gives_way_to_the_smallest_error() -> None:
    x = images(64)
    asked, found, told, graph = chosen(chain(), x, {"format": "int2"}, {"format": "int8", "range": "minmax"})
    (row,) = told.tried
    assert row["what"] == "squared error for weights" and row["outcome"] == "kept"
    errors = [Judge(graph, told.arithmetic, [(x[:16],)]).error(graph, plan) for plan in (asked, found)]
    assert errors[1] < errors[0]
    assert {tie.range for tie in found.measured().values()} == {"minmax"}  # which nothing is tried against


def test_what_is_near_already_is_left_alone() -> None:
    asked, found, told, _ = chosen(
        chain(), images(64), {"format": "int8"}, {"format": "int8", "range": "mse"}
    )
    assert found is asked and not told.tried


def test_before_calibration_it_says_so() -> None:
    prepared = prepare(chain(), [images(16)], "null", activations={"range": "mse"})
    unmeasured = make("quantize", {"activations": {"range": "mse"}})(
        prepared.reference.clone(), Plan.empty("null"), context(prepared.graph, prepared.target, [images(16)])
    )[1]
    with pytest.raises(GraphError, match="calibrate first"):
        make("choose_ranges", {})(
            prepared.reference, unmeasured, context(prepared.graph, prepared.target, [images(16)])
        )


def test_a_range_given_in_numbers_stays() -> None:
    given = {"format": "int8", "range": {"use": "fixed", "low": 0.0, "high": 0.05}}
    asked, found, told, _ = chosen(chain(), images(64), {"format": "int8", "range": "mse"}, given)
    assert found.measured() == asked.measured()
    assert [row["what"] for row in told.tried] == ["min-max for weights"]


def test_what_was_told_of_ranges_that_are_gone_is_taken_back() -> None:
    net = chain()
    with torch.no_grad():
        net.a.weight[0, 0, 0, 0] = 50.0
    clipping = {"format": "int8", "range": {"use": "percentile", "q": 90.0}}
    x = images(64)
    prepared = prepare(net, list(x.split(16)), "null", weights=clipping)
    settings = context(prepared.graph, prepared.target, list(x.split(16)))
    settings.notes += ["an older note", *told_of_weights(prepared)]
    assert any("are clipped" in note for note in settings.notes)
    _, plan = make("choose_ranges", {})(prepared.reference.clone(), prepared.plan, settings)
    assert plan.ties["a.weight"].range in ("minmax", "mse")  # not the one that clips
    assert "an older note" in settings.notes and not any("are clipped" in note for note in settings.notes)


def told_of_weights(prepared: Prepared) -> list[str]:
    settings = context(prepared.graph, prepared.target, [images(16)])
    fit_weights(prepared.reference, prepared.plan, settings)
    return settings.notes
