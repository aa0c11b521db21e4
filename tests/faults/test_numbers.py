"""Hostile weights and activations (section B of docs/faults.md): exact, or told, never a silent collapse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tests import small
from tests.flow import Net, assert_exact, context, conv, images, prepare, ship, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.artifact import Artifact, make_target
from bitport.cli import cli
from bitport.errors import DataError, GateFailed, LoadError, WeightsError
from bitport.numerics.quantize import raise_weight_scale_for_bias
from bitport.plan import Plan
from bitport.steps._base import make

X = torch.zeros(4, 1, 8, 8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def edited(change: Callable[[small.Tiny], object]) -> small.Tiny:
    model = small.tiny()
    with torch.no_grad():
        change(model)
    return model


def run(model: nn.Module, out: Path, x: Tensor = X, target: str = "null", **options: Any) -> bitport.Artifact:
    given: dict[str, Any] = {"data": small.calibration(), "metric": "mse", **options}
    return bitport.compress(
        bitport.load(model, x), given.pop("recipe", "int8"), target=target, out=out, **given
    )


# ------------------------------------------------------------------------------------- 17: weights set to zero


def spoilt(m: small.Tiny) -> None:
    m.body.weight.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("nan")])
    m.fc.bias[1] = -float("inf")


def test_nonfinite_weights_become_zero_where_that_is_asked_for(tmp_path: Path) -> None:
    model = edited(spoilt)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = bitport.load(model, X, nonfinite="zero")
    for name in ("body.weight", "fc.bias"):
        wanted = before[name].nan_to_num(0.0, 0.0, 0.0)
        assert torch.equal(graph.tensor(name).detach(), wanted)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    artifact = bitport.compress(
        graph, "int8", target="null", data=small.calibration(), metric="mse", out=tmp_path / "out"
    )
    told = [note for note in artifact.measurements["notes"] if "were set to 0" in note]
    assert [note.partition(" were")[0] for note in told] == [
        "2 NaN and 1 infinite of 576 values of 'body.weight'",
        "0 NaN and 1 infinite of 3 values of 'fc.bias'",
    ]


def test_nonfinite_weights_of_a_file_become_zero_too(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(edited(spoilt), (X,)), tmp_path / "net.pt2")
    with pytest.raises(WeightsError, match=r'body\.weight holds 2 NaN and 1 infinite .*nonfinite = "zero"'):
        bitport.load(tmp_path / "net.pt2")
    graph = bitport.load(tmp_path / "net.pt2", nonfinite="zero")
    assert len([note for note in graph.notes if "were set to 0" in note]) == 2
    words = ["inspect", str(tmp_path / "net.pt2"), "--json"]
    refused, taken = (CliRunner().invoke(cli, [*words, *more]) for more in ([], ["--nonfinite", "zero"]))
    assert (refused.exit_code, taken.exit_code) == (1, 0)
    assert json.loads(taken.stdout)["notes"] == graph.notes


def test_healthy_weights_are_left_alone_and_masks_stay_infinite() -> None:
    assert bitport.load(small.tiny(), X, nonfinite="zero").notes == bitport.load(small.tiny(), X).notes
    net = Net(lambda m, x: m.a(x) + m.mask, a=nn.Linear(12, 8), mask=torch.full((8,), -float("inf")))
    graph = bitport.load(net, tokens(2), nonfinite="zero")
    assert bool(torch.isinf(graph.tensor("mask")).all())


def test_statistics_are_not_set_to_zero() -> None:
    model = edited(lambda m: m.bn.running_var[0].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"bn\.running_var holds 1 NaN.*train it again or repair it$"):
        bitport.load(model, X, nonfinite="zero")
    with pytest.raises(LoadError, match="nonfinite='drop' is unknown: use 'refuse' or 'zero'"):
        bitport.load(small.tiny(), X, nonfinite="drop")


# ------------------------------------------------------------------------------------- 19: NaN activations


class Root(nn.Module):
    """NaN behind the first convolution wherever an input is below -100."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.b = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * torch.sqrt(x.amin((1, 2, 3), keepdim=True) + 100))


def observed(bad: int, good: int) -> tuple[Any, Any]:
    prepared = prepare(Root(), [images(4)])
    batches = [images(2) for _ in range(good)] + [100 * images(2).clamp(max=-2) for _ in range(bad)]
    batches.insert(3, batches.pop())
    settings = context(prepared.graph, prepared.target, batches)
    _, plan = make("calibrate", {})(prepared.reference.clone(), prepared.plan, settings)
    return plan, settings


def test_a_batch_with_nan_activations_is_dropped_whole_and_counted() -> None:
    torch.manual_seed(1)
    plan, settings = observed(1, 100)
    (note,) = [note for note in settings.notes if "NaN" in note]
    assert note.startswith("1 of 101 calibration batches give NaN activations, first batch 3 in '")
    # its inputs are 100 times larger and would have widened every range
    assert float(plan.ties["x"].parameters()[0]) < 0.1
    assert float(plan.ties["a"].parameters()[0]) < 0.1


def test_more_than_a_hundredth_of_such_batches_is_an_error() -> None:
    with pytest.raises(DataError, match=r"2 of 100 calibration batches .* batch 3 in .*: check") as caught:
        observed(2, 98)
    assert caught.value.batch == 3


# ------------------------------------------------------------------------------------- 24: outliers


def outlier(value: float) -> small.Tiny:
    return edited(lambda m: m.body.weight[1, 0].fill_(0).view(-1)[:1].fill_(value))


def test_an_outlier_has_a_finite_scale_and_what_it_costs_is_told(tmp_path: Path) -> None:
    artifact = run(outlier(1e30), tmp_path / "out")
    scale = artifact.plan.ties["body.weight"].parameters()[0]
    assert bool(torch.isfinite(scale).all())
    (note,) = [note for note in artifact.measurements["notes"] if "become 0" in note]
    assert note.startswith("63 values of 'body.weight' in channel 1 become 0")
    assert 'range = "percentile"' in note


def test_a_clipped_outlier_is_counted_and_its_mass_fails_the_gate(tmp_path: Path) -> None:
    weights = {"range": {"use": "percentile", "q": 98}}
    recipe = bitport.Recipe(steps=(bitport.recipe.StepSpec("quantize", {"weights": weights}),))
    with pytest.raises(GateFailed, match="no worse than plain rounding") as caught:
        # with more effort the range would be held against min-max, and give way
        run(outlier(1e4), tmp_path / "out", recipe=recipe, effort="plain")
    scale = Artifact.load(caught.value.path).plan.ties["body.weight"].parameters()[0]
    assert float(scale[1]) < 1
    (body,) = [n for n in caught.value.measurements["notes"] if "'body.weight'" in n and "clipped" in n]
    assert body.startswith("1 of 576 values of 'body.weight' lie far outside its range and are clipped, 98.")
    assert body.endswith(" % of the sum of its magnitudes")


# ------------------------------------------------------------------------------------- 25, 26, 28: tiny weights


@pytest.mark.parametrize(("size", "target"), [(1e-6, "onnxruntime"), (1e-12, "null")])
def test_tiny_weights_and_ordinary_biases_do_not_overflow(tmp_path: Path, size: float, target: str) -> None:
    model = edited(lambda m: m.body.weight.mul_(size))
    artifact = run(model, tmp_path / "out", target=target)
    x = small.patterns(16, seed=3)[0]
    found, real = artifact.predict(x), model(x).detach()
    assert isinstance(found, Tensor)
    assert float((found - real).abs().max()) < 0.1 * float(real.abs().max())
    assert artifact.measurements["optimizer.max_steps"] <= 1


def test_tiny_weights_alone_keep_their_values(tmp_path: Path) -> None:
    model = edited(lambda m: (m.body.weight.mul_(1e-6), m.body.bias.zero_()))
    stored = run(model, tmp_path / "out").graph.tensor("body.weight").detach()
    real = model.body.weight.detach()
    assert float((stored - real).abs().max()) < 0.006 * float(real.abs().max())


def test_a_bias_leaves_room_for_the_sums_that_it_is_added_to() -> None:
    bias, x, w = torch.tensor([5.0]), torch.tensor(0.02), torch.tensor([1e-10])
    for sums in (0, 10**6, 2**29, 2**40):
        raised = raise_weight_scale_for_bias(bias, x, w, sums)
        steps = 5.0 / float(x * raised)
        assert steps + min(sums, 2**30) < 2**31
        assert steps > 0.99 * (2**31 - min(sums, 2**30))


@pytest.mark.parametrize("flush", [False, True])
def test_subnormal_weights_give_no_nan_whether_flushed_or_not(tmp_path: Path, flush: bool) -> None:
    model = edited(lambda m: m.body.weight.fill_(1e-40))
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor can't flush")
    try:
        artifact = run(model, tmp_path / "out")
        x = small.patterns(16, seed=3)[0]
        found, real = artifact.predict(x), model(x).detach()
    finally:
        torch.set_flush_denormal(False)
    assert isinstance(found, Tensor)
    assert bool(torch.isfinite(artifact.plan.ties["body.weight"].parameters()[0]).all())
    assert float((found - real).abs().max()) < 0.1 * float(real.abs().max())


# ------------------------------------------------------------------------------------- 29: odd biases

BIASES = {"0-d": torch.tensor(0.3), "[1]": torch.tensor([0.3]), "missing": None}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_of_any_rank(kind: str) -> None:
    value = BIASES[kind]
    net = Net(
        lambda m, x: F.linear(m.a(x), m.b.weight, None if value is None else m.v),
        a=nn.Linear(12, 8), b=nn.Linear(8, 4), v=nn.Parameter(torch.zeros(1) if value is None else value),
    )  # fmt: skip
    prepared = prepare(net, [tokens(8)])
    assert_exact(ship(prepared, tokens(4)))
    assert prepared.real_error(tokens(4)) < 0.05


SIZED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: nn.Linear(6, 4), torch.zeros(2, 6), 4),
    "conv": (lambda: nn.Conv2d(1, 4, 3), X, 4),
    "conv transposed": (lambda: nn.ConvTranspose2d(1, 4, 3), X, 4),
    "batch norm": (lambda: nn.BatchNorm1d(4), torch.zeros(2, 4), 4),
    "layer norm": (lambda: nn.LayerNorm(4), torch.zeros(2, 4), 4),
}


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("kind", SIZED)
def test_a_bias_of_another_size_is_refused_by_name(kind: str, size: int) -> None:
    make, x, wanted = SIZED[kind]
    model = nn.Sequential(nn.Identity(), make())
    model[1].bias = nn.Parameter(torch.full((size,), 0.3))
    said = rf"can't be captured: .*; 1\.bias has {size} values, its layer takes {wanted}: give it {wanted}"
    with pytest.raises(LoadError, match=said):
        bitport.load(model.eval(), x)


# ------------------------------------------------------------------------------------- 35: spread ranges


class Spread(nn.Module):
    """Depthwise channels of sizes from 1 to 10⁻⁴, which the next layer weighs alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.head = nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            sizes = torch.logspace(0, -4, 8)
            self.depth.weight.mul_(sizes.view(8, 1, 1, 1))
            self.head.weight.div_(sizes.view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(F.relu(self.stem(x))))


def test_weights_of_spread_channels_are_kept_and_the_gate_sees_their_activations(tmp_path: Path) -> None:
    model = Spread().eval()
    with pytest.raises(GateFailed) as caught:
        run(model, tmp_path / "out", max_drop=1e-4, effort="plain")
    assert not (tmp_path / "out").exists()
    stored = bitport.Artifact.load(caught.value.path).graph.tensor("depth.weight").detach()
    real = model.depth.weight.detach()
    assert bool(((stored - real).abs().amax((1, 2, 3)) < 0.005 * real.abs().amax((1, 2, 3))).all())


EQUALIZED = """
[[steps]]
use = "fold"
[[steps]]
use = "quantize"
[[steps]]
use = "calibrate"
[[steps]]
use = "equalize"
"""


@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_equalized_spread_channels_pass_the_gate(tmp_path: Path, target: str) -> None:
    recipe = tmp_path / "equalized.toml"
    recipe.write_text(EQUALIZED)
    model = Spread().eval()
    artifact = run(model, tmp_path / "out", target=target, recipe=recipe, max_drop=1e-4, effort="plain")
    kept = [row for row in artifact.measurements["tried"] if row["outcome"] == "kept"]
    assert [row["what"] for row in kept] == ["equalization across layers"]
    x = small.patterns(16, seed=3)[0]
    found, real = artifact.predict(x), model(x).detach()
    assert isinstance(found, Tensor)
    assert float((found - real).norm() / real.norm()) < 0.02


# ------------------------------------------------------------------------------------- 48: variances


def test_a_negative_variance_is_refused_and_zero_is_not(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"variance of -1 in channel 0.*re-estimate its statistics"):
        run(edited(lambda m: m.bn.running_var.fill_(-1.0)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    model = edited(lambda m: m.bn.running_var[0].zero_())
    work = bitport.load(model, X)
    make("fold", {})(work, Plan.empty("null"), context(work, make_target("null"), []))
    with torch.no_grad():
        torch.testing.assert_close(
            work.run(small.patterns(4)[0])[0], model(small.patterns(4)[0]), rtol=1e-4, atol=1e-3
        )
