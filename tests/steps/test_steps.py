"""fold, quantize, calibrate, correct_bias: what each does to graph and plan, and what each refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, context, conv, images, prepare, tokens
from torch import nn
from torch.nn import functional as F

from bitport.errors import DataError, RecipeError, UnknownName
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.simulate import Simulator
from bitport.steps._base import make


def chain() -> nn.Module:
    return Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(), n=nn.BatchNorm2d(8), b=conv(8, 4))


def test_folding_makes_the_stage_and_leaves_the_original_alone() -> None:
    prepared = prepare(chain(), [images(8)])
    before = prepared.graph.digest()
    work, plan = make("fold", {})(
        prepared.graph.clone(), Plan.empty("null"), context(prepared.graph, prepared.target, [])
    )
    assert work.stage == "folded" and not plan.quantized
    assert prepared.graph.digest() == before and prepared.graph.stage == "float"


def test_quantizing_needs_no_data_for_weights_and_data_for_activations() -> None:
    prepared = prepare(chain(), [images(8)])
    settings = context(prepared.graph, prepared.target, [images(8)])
    _, plan = make("quantize", {})(prepared.reference.clone(), Plan.empty("onnxruntime"), settings)
    for tie in plan.ties.values():
        assert (tie.scale is not None) == (tie.source == "weight"), tie.source


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30])
def test_constant_activations_and_empty_channels_are_exact(value: float) -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(), b=conv(8, 4))
    with torch.no_grad():
        net.a.weight[2:4] = 0.0
        net.a.bias[3] = 0.0
        net.b.weight[1] = 0.0
    x = torch.full((4, 3, 8, 8), value)
    prepared = prepare(net, [x], activations={"range": "minmax"})
    for tie in prepared.plan.ties.values():
        scale = tie.parameters()[0]
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    seen: dict[str, torch.Tensor] = {}
    out = prepared.simulator().run((x,), tap=lambda name, q: seen.setdefault(name, q))[0]
    scale, zero_point = prepared.plan.ties["x"].parameters()
    assert torch.allclose((seen["x"] - zero_point) * scale, x, rtol=1e-6)
    step = float(prepared.plan.ties["b"].parameters()[0])
    assert float((out[:, 1] - net.b.bias[1].detach()).abs().max()) <= 0.5001 * step


def test_the_bias_of_an_all_zero_layer_is_kept() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(8, 4))
    with torch.no_grad():
        net.a.weight.zero_()
    x = 100 * images(8)  # a coarse input: its scale must not become the bias's
    assert prepare(net, [x], activations={"range": "minmax"}).real_error(x) < 0.02


def test_a_dead_relu_never_lets_negative_values_through() -> None:
    # calibration saw only 0 behind the relu: the range says nothing, the zero point has to
    net = Net(lambda m, x: m.b(F.relu(m.a(x) - 100)), a=conv(), b=conv(8, 4))
    prepared = prepare(net, [images(8)])
    assert int(prepared.plan.ties["relu"].parameters()[1]) == prepared.plan.ties["relu"].format.low
    assert prepared.real_error(images(8)) < 0.02


def test_calibration_may_use_the_first_batches_only() -> None:
    prepared = prepare(chain(), [images(8)])
    batches = [images(4), 100 * images(4)]
    settings = context(prepared.graph, prepared.target, batches)
    scales = []
    for count in (1, None):
        plan = prepared.plan
        _, plan = make("calibrate", {"batches": count})(prepared.reference.clone(), plan, settings)
        scales.append(float(plan.ties["x"].parameters()[0]))
    assert scales[1] > 10 * scales[0]


def test_activations_that_are_mostly_nan_are_refused_and_single_ones_noted() -> None:
    prepared = prepare(chain(), [images(8)])
    bad = images(8)
    bad[0] = float("nan")
    with pytest.raises(DataError):
        make("calibrate", {})(
            prepared.reference.clone(), prepared.plan, context(prepared.graph, prepared.target, [bad])
        )


def test_a_large_bias_on_tiny_weights_raises_the_weights_scale() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv(8, 4))
    with torch.no_grad():
        net.b.weight[0] *= 1e-9
        net.b.bias[0] = 50.0
    prepared = prepare(net, [images(8)])
    q = prepared.simulator().constant("b.bias", "b.bias").q
    assert abs(int(q[0])) < 2**31 - 1
    out = prepared.simulator().run((images(4),))[0]
    assert float((out[:, 0] - 50).abs().max()) < 0.5


def test_bias_correction_is_kept_only_where_it_helps() -> None:
    prepared = prepare(chain(), [images(8)], "null", weights={"format": "int3", "granularity": "tensor"})
    settings = context(prepared.graph, prepared.target, [images(8), images(8)])
    work = prepared.reference.clone()
    corrected, _ = make("correct_bias", {})(work, prepared.plan, settings)
    (note,) = settings.notes
    if "lowered" in note:
        before, after = (float(word) for word in note.split() if word[0].isdigit())
        assert after < before and corrected is not work
    else:
        assert corrected is work
    assert any("bias correction" in n for n in settings.notes)
    (tried,) = settings.tried
    assert (tried["what"], tried["outcome"] == "kept") == ("bias correction", "lowered" in note)
    assert "without" in tried["reason"]
    empty = Plan.empty("null")
    assert make("correct_bias", {})(work, empty, settings) == (work, empty)
    assert settings.tried[1]["reason"] == "nothing is quantized"


def test_biases_behind_weights_in_groups_are_corrected() -> None:
    weights = {"format": "int3", "granularity": "group", "group": 4, "symmetric": False}
    x = torch.rand(64, 6) + 1
    net = Net(lambda m, x: m.a(x), a=nn.Linear(6, 5))
    prepared = prepare(net, [x], weights=weights, activations={"format": "float32"})
    settings = context(prepared.graph, prepared.target, [x])
    corrected, plan = make("correct_bias", {})(prepared.reference, prepared.plan, settings)
    seen = x[:48]  # the rest only judges
    means = [graph.run(seen)[0].detach().mean(0) for graph in (prepared.graph, prepared.work)]
    on_grid(corrected, plan)
    assert float((corrected.run(seen)[0].detach().mean(0) - means[0]).abs().max()) < 1e-5
    assert float((means[1] - means[0]).abs().max()) > 1e-3


def test_calibration_tells_by_which_estimators_ranges_were_measured() -> None:
    prepared = prepare(chain(), [images(8)], "null", activations={"range": "minmax"})
    settings = context(prepared.graph, prepared.target, [images(8)])
    make("calibrate", {})(prepared.reference.clone(), prepared.plan, settings)
    number = len(prepared.plan.measured())
    assert settings.tried == [
        {
            "what": "ranges of activations",
            "outcome": "measured",
            "reason": f"{number} tensors by minmax, on calibration data",
        }
    ]


def test_unknown_steps_and_options() -> None:
    with pytest.raises(UnknownName, match="unknown step 'calibarte'"):
        make("calibarte", {})
    with pytest.raises(RecipeError, match=r"step 'calibrate'.*batch_count"):
        make("calibrate", {"batch_count": 3})


def test_an_error_names_its_step() -> None:
    net = Net(lambda m, x: F.gelu(x))
    with pytest.raises(RecipeError, match="nothing to do") as caught:
        prepare(net, [tokens(4)])
    notes: list[Any] = caught.value.__notes__
    assert notes == ["in step 'quantize'"]


def test_a_measured_correction_takes_back_what_rounded_activations_lose() -> None:
    torch.manual_seed(0)
    x = torch.rand(256, 6) + 0.3  # int2 activations shift every mean
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    prepared = prepare(net, list(x.split(32)), "null", activations={"format": "int2"})
    settings = context(prepared.graph, prepared.target, list(x.split(32)))
    corrected, plan = make("correct_bias", {})(prepared.reference.clone(), prepared.plan, settings)
    (row,) = [row for row in settings.tried if row["what"] == "bias correction"]
    assert row["outcome"] == "kept" and row["reason"].startswith("measured:")
    simulated = Simulator(corrected, plan, settings.arithmetic)
    plain = Simulator(prepared.reference, prepared.plan, settings.arithmetic)
    wanted = prepared.reference.run(x)[0].detach().mean(0)
    found, before = (s.run((x,))[0].mean(0) for s in (simulated, plain))
    assert float((found - wanted).abs().max()) < 0.3 * float((before - wanted).abs().max())


def test_what_a_step_has_made_of_weights_is_held_against_the_network_as_it_was_loaded() -> None:
    prepared = prepare(chain(), [images(8)], "null")
    settings = context(prepared.graph, prepared.target, [images(8)])
    work = prepared.reference.clone()
    name = next(name for name, _ in work.gm.named_parameters())
    work.set_tensor(name, 2 * work.tensor(name).detach())
    found = settings.original(work, prepared.plan)
    assert torch.equal(found.tensor(name), prepared.reference.tensor(name))
    assert settings.original(work, prepared.plan) is found  # folded once
    # behind a step that gave it other operators there is nothing to compare with
    other = prepare(Net(lambda m, x: m.a(x), a=conv(3, 5)), [images(8)], "null").reference
    assert settings.original(other, prepared.plan) is other
