"""Scales moved before rounding: far nearer outputs where channels are spread, nothing at all where they aren't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, assert_exact, context, conv, images, prepare, ship
from tests.spread import Separable, Transformer, plant_outliers, rescale
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.data import Source
from bitport.errors import FormatError, GraphError, RecipeError
from bitport.graph import Graph
from bitport.numerics.error import ErrorStats
from bitport.plan import Plan
from bitport.plan.constants import on_grid
from bitport.plan.rescaled import counterpart
from bitport.recipe import Recipe
from bitport.simulate import Simulator
from bitport.steps import _rewritten, equalize
from bitport.steps._base import Context, make

TENSOR = {"weights": {"granularity": "tensor"}}
W4A4 = {"weights": {"format": "int4"}, "activations": {"format": "int4"}}
W4 = {
    "weights": {"format": "int4", "granularity": "group", "group": 32},
    "activations": {"format": "float32"},
}


def batches(count: int = 4) -> list[Tensor]:
    return [images(8) for _ in range(count)]


def sequences(count: int = 4) -> list[Tensor]:
    return [torch.randn(4, 9, 32) for _ in range(count)]


def decibels(prepared: Prepared, x: Tensor) -> float:
    stats = ErrorStats()
    with torch.no_grad():
        stats.update(prepared.graph.run(x)[0], prepared.simulator().run((x,))[0])
    return stats.sqnr_db


def equalized(prepared: Prepared, data: Sequence[Tensor], **options: Any) -> tuple[Prepared, Context]:
    """The same network behind the step."""
    settings = context(prepared.graph, prepared.target, data)
    work, plan = make("equalize", options)(prepared.reference.clone(), prepared.plan, settings)
    reference = work.clone()
    on_grid(work, plan)
    return replace(prepared, reference=reference, work=work, plan=plan), settings


def outcomes(settings: Context) -> dict[str, str]:
    return {row["what"]: row["outcome"] for row in settings.tried if row["outcome"] != "measured"}


def only_reason(settings: Context) -> str:
    (row,) = settings.tried
    assert row["outcome"] == "left out"
    return row["reason"]


# ------------------------------------------------------------------------------------------------ what gains


@pytest.mark.parametrize(
    ("target", "options", "gain"),
    [("onnxruntime", TENSOR, 25), ("onnxruntime", {}, 20), ("null", W4A4, 8), ("onnxruntime", W4, 15)],
    ids=["int8 per tensor", "int8 per channel", "w4a4", "int4 weights"],
)
def test_channels_a_hundred_times_apart_round_like_even_ones(
    target: str, options: dict[str, Any], gain: float
) -> None:
    even, data, x = Separable().eval(), batches(), images(16)
    twin = Separable().eval()
    twin.load_state_dict(even.state_dict())
    rescale(twin)
    torch.testing.assert_close(twin(x), even(x), rtol=1e-4, atol=1e-5)
    prepared = prepare(twin, data, target, **options)
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.LAYERS: "kept"}
    before, after = decibels(prepared, x), decibels(found, x)
    assert after > before + gain
    assert after > decibels(prepare(even, data, target, **options), x) - 4
    with torch.no_grad():
        torch.testing.assert_close(found.reference.run(x)[0], twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dynamic"), [("onnxruntime", False), ("onnxruntime", True), ("null", False)]
)
def test_outliers_of_norms_move_into_the_weights(target: str, dynamic: bool) -> None:
    model, data, x = plant_outliers(Transformer()).eval(), sequences(), torch.randn(16, 9, 32)
    prepared = prepare(model, data, target, activations={"dynamic": True} if dynamic else None)
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.NORMS: "kept"}
    assert sorted(found.plan.rescaled) == [f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    assert decibels(found, x) > decibels(prepared, x) + 12
    with torch.no_grad():
        torch.testing.assert_close(found.reference.run(x)[0], model(x), rtol=1e-3, atol=1e-4)
    off, told = equalized(prepared, data, smooth=False)
    assert off.plan is prepared.plan and "no scale can move" in only_reason(told)


def test_outliers_that_only_the_data_has_are_seen_in_the_measured_range() -> None:
    width = 256
    net = Net(
        lambda m, x: m.b(m.n(x)), n=nn.LayerNorm(width), b=nn.Linear(width, 8)
    )  # fmt: skip
    data = [torch.randn(4, 5, width) for _ in range(4)]
    for part in data:
        part[..., 7] *= 300
    with torch.no_grad():
        net.b.weight[:, 7] *= 0.05
    prepared = prepare(net, data, activations={"range": "minmax"})
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.NORMS: "kept"}
    assert decibels(found, data[0]) > decibels(prepared, data[0]) + 10


def test_a_network_with_both_gets_both() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.n(x)
        made: Tensor = m.c(F.relu(m.b(y)))
        return made

    net = Net(forward, n=nn.LayerNorm(32), b=nn.Linear(32, 24), c=nn.Linear(24, 8))
    size = torch.logspace(-1, 1, 24)
    with torch.no_grad():
        net.n.weight[5] *= 80
        net.b.weight[:, 5] /= 80
        net.b.weight.mul_(size[:, None])
        net.b.bias.mul_(size)
        net.c.weight.div_(size)
    data = sequences()
    prepared = prepare(net, data)
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.LAYERS: "kept", equalize.NORMS: "kept"}
    assert sorted(found.plan.rescaled) == ["b", "n"]
    assert decibels(found, data[0]) > decibels(prepared, data[0]) + 10
    rebuilt = counterpart(prepared.reference, found.plan)
    for name, value in found.reference.gm.state_dict().items():
        torch.testing.assert_close(rebuilt.gm.state_dict()[name], value, rtol=1e-6, atol=0)
    again, settings = equalized(found, data)
    assert again.plan is found.plan and set(outcomes(settings).values()) == {"left out"}, "once is enough"


# ------------------------------------------------------------------------------------------------ what doesn't


class Counted:
    """Batches, and how often they were read."""

    def __init__(self, data: list[Tensor]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.data)


@pytest.mark.parametrize(
    ("build", "data"), [(Separable, batches()), (Transformer, sequences())], ids=["layers", "norms"]
)
def test_where_ranges_are_alike_nothing_runs(build: Callable[[], nn.Module], data: list[Tensor]) -> None:
    prepared, counted = prepare(build(), data), Counted(data)
    settings = context(prepared.graph, prepared.target, [])
    settings.calibration = Source(counted, role="calibration", names=["x"], labels="ignored")
    work = prepared.reference.clone()
    assert make("equalize", {})(work, prepared.plan, settings) == (work, prepared.plan)
    assert counted.passes == 0 and settings.notes == []
    assert "ranges are alike" in only_reason(settings)


@pytest.mark.parametrize(
    ("activation", "why"),
    [(nn.ReLU6, "each would need a bound of its own"), (nn.Hardswish, "doesn't keep a scale per channel")],
)
def test_activations_that_see_the_scale_are_left_alone(activation: type[nn.Module], why: str) -> None:
    data = batches(2)
    prepared = prepare(rescale(Separable(activation)), data)
    found, settings = equalized(prepared, data)
    assert found.plan is prepared.plan and not found.plan.rescaled
    reason = only_reason(settings)
    assert "no scale can move" in reason and "'stem'" in reason
    assert why in reason or "pw2" in reason


def test_shared_weights_are_left_alone() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=conv(3, 3), b=conv(3, 4))
    with torch.no_grad():
        net.a.weight[0] *= 1000
    data = batches(2)
    prepared = prepare(net, data)
    found, settings = equalized(prepared, data)
    assert found.plan is prepared.plan and "is shared" in only_reason(settings)


def test_a_residual_stream_keeps_its_scales() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        made: Tensor = m.head(F.relu(m.b(F.relu(m.a(x))) + x))
        return made

    net = Net(forward, stem=conv(), a=conv(8, 8), b=conv(8, 8), head=conv(8, 4))
    size = torch.logspace(-1, 1, 8)
    with torch.no_grad():
        net.a.weight.mul_(size.view(-1, 1, 1, 1))
        net.a.bias.mul_(size)
        net.b.weight.div_(size.view(1, -1, 1, 1))
    data = batches()
    found, settings = equalized(prepare(net, data, **TENSOR), data)
    assert outcomes(settings) == {equalize.LAYERS: "kept"} and list(found.plan.rescaled) == ["a"]


def test_dead_channels_stay_and_the_others_move() -> None:
    model = rescale(Separable()).eval()
    with torch.no_grad():
        model.stem.weight[2] = 0
        model.stem.bias[2] = 0
        model.pw1.weight[:, 5] = 0
        model.dw2.weight[7] = 0
    data, x = batches(), images(16)
    prepared = prepare(model, data, **TENSOR)
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.LAYERS: "kept"}
    assert float(found.plan.rescaled["stem"][2]) == 1 and float(found.plan.rescaled["dw1"][5]) == 1
    assert all(bool(torch.isfinite(scales).all()) for scales in found.plan.rescaled.values())
    assert decibels(found, x) > decibels(prepared, x) + 20


# ------------------------------------------------------------------------------------------------ the choice


def test_a_candidate_that_errs_more_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    prepared = prepare(rescale(Separable()), data, weights={"format": "int2"})
    errors = iter([0.1, 0.2])
    monkeypatch.setattr(_rewritten.Judge, "error", lambda *_: next(errors))
    settings = context(prepared.graph, prepared.target, data)
    settings.notes.append("an older note")
    work = prepared.reference.clone()
    assert make("equalize", {})(work, prepared.plan, settings) == (work, prepared.plan)
    assert settings.notes == ["an older note"]
    assert only_reason(settings).startswith("error of the simulated outputs 0.1 without, 0.2 with it")


def test_what_was_said_of_weights_that_are_gone_is_taken_back() -> None:
    data = batches()
    model = Separable()
    with torch.no_grad():
        model.stem.weight[0] *= 1e4
        model.stem.bias[0] *= 1e4
        model.dw1.weight[0] /= 1e4
    prepared = prepare(model, data, **TENSOR)
    settings = context(prepared.graph, prepared.target, data)
    work, plan = prepared.reference.clone(), Plan.empty("onnxruntime")
    for step, options in (("quantize", TENSOR), ("calibrate", {})):
        work, plan = make(step, options)(work, plan, settings)
    lost = [note for note in settings.notes if "become 0" in note]
    assert len(lost) == 1, settings.notes
    tried = list(settings.tried)
    make("equalize", {})(work, plan, settings)
    assert outcomes(settings) == {equalize.LAYERS: "kept"}
    assert not any("become 0" in note for note in settings.notes)
    assert any("lowered the output error" in note for note in settings.notes)
    measured = [row for row in settings.tried if row["outcome"] == "measured"]
    assert measured == [row for row in tried if row["outcome"] == "measured"], "told once"


def test_formats_and_ties_stay_as_planned() -> None:
    data = batches()
    auto = {"activations": {"symmetric": "auto"}, "weights": {"granularity": "tensor"}}
    prepared = prepare(rescale(Separable()), data, **auto)
    found, _ = equalized(prepared, data)
    assert found.plan.edges == prepared.plan.edges and found.plan.nodes == prepared.plan.nodes
    for name, tie in prepared.plan.ties.items():
        assert found.plan.ties[name].format == tie.format, name
    changed = [
        n for n, tie in prepared.plan.ties.items() if not torch.equal(tie.scale, found.plan.ties[n].scale)
    ]
    assert len(changed) > len(prepared.plan.ties) / 2


def test_a_change_of_the_float_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    prepared = prepare(rescale(Separable()), data)

    def wrong(graph: Graph, scales: dict[str, Tensor]) -> None:
        graph.set_tensor("stem.weight", 2 * graph.tensor("stem.weight").detach())

    monkeypatch.setattr(equalize, "move_all", wrong)
    found, settings = equalized(prepared, data)
    assert found.plan is prepared.plan
    assert "float32 can't hold it: outputs would change by " in only_reason(settings)


def test_weights_that_no_longer_fit_their_format_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    prepared = prepare(rescale(Separable()), data)

    def full(*_: object) -> Plan:
        raise FormatError("no room")

    monkeypatch.setattr(_rewritten, "fit_weights", full)
    found, settings = equalized(prepared, data)
    assert found.plan is prepared.plan and "can't be stored: no room" in only_reason(settings)


@pytest.mark.slow
def test_norms_scales_come_from_batches_that_dont_judge() -> None:
    model, data = plant_outliers(Transformer()).eval(), sequences(4)
    plain, _ = equalized(prepare(model, data), data)
    loud = [*data[:3], 50 * data[3]]
    prepared = prepare(model, data)
    found, _ = equalized(prepared, loud)
    for name, scales in plain.plan.rescaled.items():
        if name == "layers.0.norm1":
            torch.testing.assert_close(found.plan.rescaled[name], scales)


# ------------------------------------------------------------------------------------------------ its place


def test_nothing_quantized_and_nothing_calibrated() -> None:
    data = batches(1)
    prepared = prepare(Separable(), data)
    settings = context(prepared.graph, prepared.target, data)
    work, empty = prepared.reference.clone(), Plan.empty("onnxruntime")
    assert make("equalize", {})(work, empty, settings) == (work, empty)
    assert only_reason(settings) == "nothing is quantized"
    _, raw = make("quantize", {})(work, empty, settings)
    with pytest.raises(GraphError, match="calibrate first"):
        make("equalize", {})(work, raw, settings)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_impossible_alpha_is_told_while_the_recipe_is_read(alpha: float) -> None:
    text = f'[[steps]]\nuse = "quantize"\n[[steps]]\nuse = "equalize"\nalpha = {alpha}\n'
    with pytest.raises(RecipeError, match=rf"steps\[1\]: alpha is {alpha}; expected a number from 0 to 1"):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "options", [TENSOR, {}, {"weights": {"format": "int4"}}], ids=["tensor", "channel", "w4a8"]
)
def test_the_runtime_computes_the_equalized_integers(options: dict[str, Any]) -> None:
    data, x = batches(2), images(16)
    found, settings = equalized(prepare(rescale(Separable()), data, **options), data)
    assert outcomes(settings) == {equalize.LAYERS: "kept"}
    shipped = ship(found, x, images(3))
    assert_exact(shipped)
    for name, layer in shipped.parity.layers.items():
        assert layer.simulated.sqnr_db > 12, name


class Gated(nn.Module):
    """A feed-forward layer behind an RMSNorm that is spelled out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down, self.head = nn.Linear(64, 32, bias=False), nn.Linear(32, 8)
        with torch.no_grad():
            self.gain[4] = 80
            self.gate.weight[:, 4] /= 80
            self.up.weight[:, 4] /= 80

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        made: Tensor = self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))
        return made


def test_the_gain_of_a_norm_that_is_spelled_out_is_exact_on_the_runtime_as_well() -> None:
    data = sequences()
    prepared = prepare(Gated(), data)
    found, settings = equalized(prepared, data)
    assert outcomes(settings) == {equalize.NORMS: "kept"} and len(found.plan.rescaled) == 1
    assert decibels(found, data[0]) > decibels(prepared, data[0]) + 15
    assert_exact(ship(found, *data[:2]))


def test_steps_behind_it_go_on_from_even_channels() -> None:
    data, x = batches(), images(16)
    prepared = prepare(rescale(Separable()), data, weights={"format": "int4"})
    found = {}
    for steps in ((), ("equalize",)):
        work, plan = prepared.reference.clone(), prepared.plan
        settings = context(prepared.graph, prepared.target, data)
        for step in (*steps, "gptq", "correct_bias"):
            work, plan = make(step, {})(work, plan, settings)
        found[steps] = decibels(replace(prepared, work=work, plan=plan), x)
        assert ("equalize" in steps) == bool(plan.rescaled)
    assert found["equalize",] > found[()] + 6


def test_the_simulated_network_is_the_equalized_one() -> None:
    data, x = batches(2), images(4)
    found, _ = equalized(prepare(rescale(Separable()), data, **TENSOR), data)
    loose = Simulator(found.reference, found.plan, found.target.arithmetic()).run((x,))[0]
    assert torch.equal(loose, found.simulator().run((x,))[0])
