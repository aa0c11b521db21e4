"""Odd networks and odd users (sections A, C and D of docs/faults.md): exact, or a typed error with the remedy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from tests import small
from tests.flow import Net, assert_exact, prepare, ship, tokens
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import bitport
from bitport import Metric, Recipe
from bitport.cli import cli
from bitport.errors import BitportError, GateFailed, LoadError, MetricError, RecipeError
from bitport.graph import Edge
from bitport.plan.constants import constant_codes
from bitport.plan.options import resolve
from bitport.proof import doubts
from bitport.recipe import Override

X = torch.zeros(4, 1, 8, 8)
Linear = nn.Linear


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


# ------------------------------------------------------------------------------------- 16: hostile texts


@pytest.mark.parametrize("pattern", ["*a" * 2000 + "b", "[" * 5000, "?" * 100_000, "(a+)+$" * 500, "\0*/../"])
def test_hostile_layer_patterns_take_no_time(pattern: str) -> None:
    graph = bitport.load(small.tiny(), X)
    rules = bitport.artifact.make_target("null").rules()
    options = bitport.steps.quantize
    started = time.process_time()
    with pytest.raises(RecipeError, match="matches no operator"):
        resolve(graph, rules, options.WEIGHTS, options.ACTIVATIONS, [Override(match=pattern, weights={})])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000, "[a" + ".a" * 100_000 + "]", 'name = "\\ud800"', "x = nan\n",
        '[[steps]]\nuse = "fold"\nx = inf', "[[steps]]\nuse = '../../etc/passwd'", "effort = '" + "a" * 70_000 + "'",
    ],
)  # fmt: skip
def test_hostile_recipes_are_refused_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(BitportError):
        Recipe.parse(text)
    assert time.process_time() - started < 2


# ------------------------------------------------------------------------------------- 37, 38, 43: structure

EMPTY = {
    "empty buffer": lambda m, x: torch.cat([m.a(x), m.e.expand(x.shape[0], 6, 0)], -1),
    "scalar parameter": lambda m, x: m.a(x) * m.s,
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_tensors_and_scalars_are_exact(kind: str) -> None:
    net = Net(
        lambda m, x: m.b(F.relu(EMPTY[kind](m, x))),
        a=Linear(12, 8), b=Linear(8, 4), e=torch.zeros(1, 6, 0), s=nn.Parameter(torch.tensor(0.7)),
    )  # fmt: skip
    prepared = prepare(net, [tokens(8)])
    assert_exact(ship(prepared, tokens(4), tokens(0)))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Linear(12, 8), Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def test_calibration_batches_of_differing_shapes(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = Sequence().eval()
    shapes = ({0: Dim("batch"), 1: Dim("length")},)
    graph = bitport.load(model, torch.randn(2, 5, 12), dynamic_shapes=shapes)
    assert graph.inputs[0].shape == ("batch", "length", 12)
    data = [torch.randn(*size, 12) for size in ((8, 5), (3, 17), (1, 1), (9, 2))]
    artifact, again = (
        bitport.compress(
            graph, "int8", target="null", data=given, metric="mse", out=tmp_path / name, effort="plain"
        )
        for name, given in (("out", data), ("again", data[::-1]))
    )
    assert artifact.measurements["parity.exact_share"] == 1.0
    # as many values, cut otherwise, give the same ranges
    assert (artifact.path / "plan.json").read_bytes() == (again.path / "plan.json").read_bytes()
    x = torch.randn(2, 30, 12)
    found, real = artifact.predict(x), model(x).detach()
    assert isinstance(found, Tensor)
    assert float((found - real).abs().max()) < 0.1 * float(real.abs().max())


def test_a_module_that_never_runs_is_left_out(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.a(x), a=Linear(12, 8), unused=Linear(300, 300))
    prepared = prepare(net, [tokens(8)])
    assert_exact(ship(prepared, tokens(4)))
    assert [name for name in prepared.plan.ties if "unused" in name] == []


# ------------------------------------------------------------------------------------- 40: tied tables

ROWS, WIDTH = 1000, 32
FLOATS = {"weights": {"format": "float32"}, "activations": {"format": "float32"}}
INT4 = {"weights": {"format": "int4"}}
# preset, overrides → bytes of the table in the model file, scales aside
TIED: dict[str, tuple[str, list[Override], int]] = {
    "both read one grid": ("int8-weights", [], ROWS * WIDTH),
    "narrow": ("int4-weights", [], ROWS * WIDTH // 2),
    "an override of both": ("int8-weights", [Override("*", **INT4)], ROWS * WIDTH // 2),
    "an override of each": ("int8-weights", [Override("tok", **INT4), Override("head", **INT4)], ROWS * WIDTH // 2),
    "both in float": ("int8", [Override("tok", **FLOATS), Override("head", **FLOATS)], 4 * ROWS * WIDTH),
    "integers move by another grid than they multiply": ("int8", [], 2 * ROWS * WIDTH),
    "the head in float": ("int8", [Override("head", **FLOATS)], 5 * ROWS * WIDTH),
    "the table in float": ("int8", [Override("tok", **FLOATS)], 5 * ROWS * WIDTH),
}  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.mid, self.head = nn.Embedding(ROWS, WIDTH), Linear(WIDTH, WIDTH), Linear(WIDTH, ROWS)
        self.head.weight = self.tok.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(self.tok(ids))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_table_is_stored_once_where_its_readers_want_the_same(kind: str, tmp_path: Path) -> None:
    preset, overrides, size = TIED[kind]
    torch.manual_seed(0)
    model = Tied().eval()
    data = [torch.randint(0, ROWS, (16, 6))]
    graph = bitport.load(model, data[0][:1])
    recipe = replace(Recipe.preset(preset), overrides=tuple(overrides))
    artifact = bitport.compress(
        graph, recipe, target="onnxruntime", data=data, metric="mse", out=tmp_path / "out"
    )
    stored = onnx.load(artifact.path / "model.onnx").graph.initializer
    # nothing else in this network is as large as half a byte for each entry
    assert sum(len(t.raw_data) for t in stored if len(t.raw_data) >= ROWS * WIDTH // 2) == size
    # each reader's numbers are rounded once, from the float ones, or not at all
    for name in ("tok", "head"):
        tie = artifact.plan.edges.get(Edge(f"{name}.weight", name, 1))
        if tie is None:
            assert torch.equal(artifact.graph.tensor(f"{name}.weight"), graph.tensor(f"{name}.weight"))
            continue
        codes = [
            constant_codes(g, artifact.plan, f"{name}.weight", tie).codes for g in (graph, artifact.graph)
        ]
        assert torch.equal(*codes)


def test_nothing_to_quantize_is_said_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_gelu.py").write_text(
        "import torch\n"
        "def net(): return torch.nn.GELU(), torch.zeros(2, 4)\n"
        "def data(): return [torch.ones(2, 4)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["compress", "only_gelu:net", "--data", "only_gelu:data", "--target", "null", "--recipe", "int8"]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: nothing to do: no operator of this network can run in integers")
    assert not (tmp_path / "out").exists()


def test_control_flow_that_capture_keeps_is_refused() -> None:
    class Branch(Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: self.a(-y), (x,))

    with pytest.raises(LoadError, match=r"chooses between sub-graphs by its data \(cond\): write it as one"):
        bitport.load(Branch(), torch.randn(2, 12))


# ------------------------------------------------------------------------------------- 47, 48: layouts, types, modes


def plan_of(model: nn.Module, x: Tensor = X) -> dict[str, Any]:
    data = [batch.to(memory_format=torch.channels_last) for batch in small.calibration()]
    prepared = prepare(model, data, "null")
    return prepared.plan.to_record()


def test_layouts_change_nothing() -> None:
    def strided(model: small.Tiny) -> nn.Module:
        for layer in (model.body, model.fc):
            turned = layer.weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
            assert not turned.is_contiguous()
            layer.weight = nn.Parameter(turned)
        return model

    usual = plan_of(small.tiny())
    assert plan_of(strided(small.tiny())) == usual
    last = small.tiny().to(memory_format=torch.channels_last)
    assert plan_of(last) == usual


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused_with_the_remedy(tmp_path: Path, dtype: torch.dtype) -> None:
    graph = bitport.load(small.tiny().to(dtype), X.to(dtype))
    data = [batch.to(dtype) for batch in small.calibration()]
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(LoadError, match=rf"'\S+' is {name}: .*call model\.float\(\)"):
        bitport.compress(graph, "int8", target="null", data=data, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_complex_weights_and_inputs_are_refused() -> None:
    model = small.tiny()
    model.fc.bias = nn.Parameter(model.fc.bias.detach().to(torch.complex64))
    with pytest.raises(LoadError, match=r"fc\.bias is complex"):
        bitport.load(model, X)
    with pytest.raises(LoadError, match="is complex"):
        bitport.load(small.tiny(), X.to(torch.complex64))


def test_train_mode_gives_the_plan_of_eval_mode() -> None:
    class Dropped(small.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    models = [Dropped() for _ in range(2)]
    for model in models:
        model.load_state_dict(small.tiny().state_dict())
    work = [bitport.load(model.train(mode), X) for model, mode in zip(models, (True, False), strict=True)]
    x = small.patterns(8)[0]
    with torch.no_grad():
        first, second = (graph.run(x)[0] for graph in work)
    assert torch.equal(first, second)
    assert models[0].training


# ------------------------------------------------------------------------------------- 49, 50: doubtful data


@pytest.mark.parametrize(
    ("data", "distinct"),
    [
        ([small.patterns(1)[0]], "1 distinct sample: in each tensor about 100 % of new samples go beyond"),
        ([torch.zeros(16, 1, 8, 8)] * 3, "1 distinct sample: in each tensor about 100 %"),
        ([small.patterns(15)[0]] * 2, "15 distinct samples: in each tensor about 12 % of new samples"),
        ([small.patterns(16)[0]], None),
    ],
)
def test_thin_calibration_data_is_told(data: list[Tensor], distinct: str | None) -> None:
    source = bitport.data.Source(data, role="calibration", names=["x"], labels="ignored")
    told = [note for note in doubts.of_data(source, source, True) if "distinct" in note]
    assert len(told) == (distinct is not None)
    if distinct:
        assert f"the calibration data has only {distinct}" in told[0]


@pytest.mark.slow
def test_a_float_network_that_guesses_is_told(tmp_path: Path) -> None:
    wrong = [(x, (y + 1) % 3) for x, y in small.evaluation()]  # another order of classes than in training
    notes = small.compressed(tmp_path / "wrong", evaluation=wrong).measurements["notes"]
    (note,) = [note for note in notes if "guessing" in note]
    assert "no better than guessing among 3 classes: check the preprocessing, the labels" in note
    notes = small.compressed(tmp_path / "right").measurements["notes"]
    assert [note for note in notes if "guessing" in note] == []


@pytest.mark.slow
def test_a_limit_above_all_that_can_be_lost_is_told(tmp_path: Path) -> None:
    (note,) = told(small.compressed(tmp_path / "out", max_drop=2), "max_drop = 2 allows any loss")
    assert "top1 is a share from 0 to 1, and one point of it is 0.01" in note
    assert told(small.compressed(tmp_path / "out", max_drop=1), "allows any loss") == []


def told(artifact: bitport.Artifact, words: str) -> list[str]:
    return [note for note in artifact.measurements["notes"] if words in note]


@pytest.mark.slow
def test_data_on_another_scale_than_the_example_is_told(tmp_path: Path) -> None:
    example = small.patterns(4)[0].clamp(0, 1)
    graph = bitport.load(small.tiny(), example)
    bytes_, pixels = [[scale * x for x in small.calibration()] for scale in (255, 1)]

    def run(data: list[Tensor], judged: list[Tensor], out: str) -> bitport.Artifact:
        given = {"data": data, "evaluation": judged, "metric": "mse"}
        try:
            return bitport.compress(graph, "int8", target="null", out=tmp_path / out, **given)
        except GateFailed as failed:  # ranges of pixels clip bytes
            return bitport.Artifact.load(failed.path)

    both = told(run(bytes_, bytes_, "both"), "spans")
    assert [note.partition(" spans")[0] for note in both] == [
        f"input 'x' of the {role} data" for role in ("evaluation", "calibration")
    ]
    assert "that of the example inputs 0 … 1: check that both are preprocessed as in training" in both[0]
    (one,) = told(run(pixels, bytes_, "one"), "spans")
    assert one.startswith("input 'x' of the evaluation data")
    right = run(pixels, pixels, "right")
    assert told(right, "spans") == []
    # an artifact remembers by its golden sample
    for data, words in ((bytes_, ["that of the artifact's golden sample"]), (pixels, [])):
        notes = bitport.verify(right.path, data=data).record["notes"]
        found = [note for note in notes if "spans" in note]
        assert len(found) == len(words) and all(word in note for word, note in zip(words, found, strict=True))


ORDINARY = {
    "normal example, pixels": (torch.randn(1, 1, 8, 8), torch.rand(8, 1, 8, 8)),
    "pixels, normalized data": (torch.rand(1, 1, 8, 8), 2.6 * torch.randn(8, 1, 8, 8)),
    "zeros, bytes": (torch.zeros(1, 1, 8, 8), 255 * torch.rand(8, 1, 8, 8)),
    "ones, bytes": (torch.ones(1, 1, 8, 8), 255 * torch.rand(8, 1, 8, 8)),
    "normal example, black data": (torch.randn(1, 1, 8, 8), torch.zeros(8, 1, 8, 8)),
    "bytes, bytes": (255 * torch.rand(1, 1, 8, 8), 255 * torch.rand(8, 1, 8, 8)),
    "bytes of a dark picture": (255 * torch.rand(1, 1, 8, 8), 30 * torch.rand(8, 1, 8, 8)),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_data_raises_no_doubt_about_its_scale(kind: str) -> None:
    example, data = ORDINARY[kind]
    graph = bitport.load(small.tiny(), example)
    source = bitport.data.Source([data], role="calibration", names=["x"], labels="ignored")
    assert doubts.of_scale(source, graph.examples, "the example inputs") == []


@pytest.mark.parametrize("scale", [255.0, 1 / 255])
def test_both_directions_and_infinite_values(scale: float) -> None:
    graph = bitport.load(small.tiny(), torch.rand(2, 1, 8, 8))
    data = scale * torch.rand(8, 1, 8, 8)
    data[0, 0, 0, 0] = -float("inf")
    source = bitport.data.Source([data, -data.abs()], role="calibration", names=["x"], labels="ignored")
    assert len(doubts.of_scale(source, graph.examples, "the example inputs")) == 1
    assert graph.clone().examples == graph.examples


@pytest.mark.slow
def test_one_class_for_everything_is_told_where_agreement_is_all_there_is(tmp_path: Path) -> None:
    biased = small.tiny()
    with torch.no_grad():
        biased.fc.bias[1] = 1e3
    graph = bitport.load(biased, X)
    judged = [x for x, _ in small.evaluation()]
    given = {"target": "null", "data": small.calibration()}
    (note,) = told(
        bitport.compress(graph, "int8", evaluation=judged, out=tmp_path / "a", **given), "one class"
    )
    assert note.startswith("the float network puts all 64 samples into one class (number 1 of 3), so that")
    # few samples, several classes, labels, and other metrics are no reason
    assert doubts.of_classes("agreement", 19, {1}, 3) == []
    assert doubts.of_classes("agreement", 64, {0, 1}, 3) == []
    assert doubts.of_classes("top1", 64, {1}, 3) == []
    usual = small.compressed(tmp_path / "b", evaluation=judged)
    assert usual.measurements["task.metric"] == "agreement"
    assert told(usual, "one class") == []


# ------------------------------------------------------------------------------------- 52: metrics

UNSTEADY: dict[str, Callable[[], Metric]] = {
    "per sample": lambda: Metric("mine", True, per_sample=lambda outputs, labels: torch.rand(len(outputs))),
    "data set": lambda: Metric("mine", True, dataset=lambda outputs, labels: random.random()),
}


@pytest.mark.parametrize("kind", UNSTEADY)
def test_a_metric_that_changes_its_mind_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(MetricError, match="metric 'mine' gives different scores for the same outputs"):
        small.compressed(tmp_path / "out", metric=UNSTEADY[kind]())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_without_a_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(MetricError, match="'mine'"):
        small.compressed(tmp_path / "out", metric=Metric("mine", True, dataset=lambda *_: value))
    assert list(tmp_path.iterdir()) == []
