from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import small

import bitport
from bitport.errors import DataError, MetricError
from bitport.metrics import Metric, get
from bitport.numerics.intervals import paired_binary
from bitport.proof.task import TaskAccumulator, task_record

CLASSES = 5


def logits_for(predicted: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] whose argmax is `predicted`."""
    return torch.nn.functional.one_hot(predicted, CLASSES).float() * 4


def three(
    samples: int, float_wrong: int, runtime_wrong: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels, float outputs, runtime outputs). Each network errs on its number of first samples, so only
    the difference of the two numbers is discordant."""
    labels = torch.arange(samples) % CLASSES
    ours, run = labels.clone(), labels.clone()
    ours[:float_wrong] = (ours[:float_wrong] + 1) % CLASSES
    run[:runtime_wrong] = (run[:runtime_wrong] + 1) % CLASSES
    return labels, logits_for(ours), logits_for(run)


def test_top1_is_counted_and_its_interval_is_the_paired_one() -> None:
    labels, ours, run = three(200, 10, 14)
    found = task_record(get("top1", True), ours, run, run, labels, 0.1)
    assert found["float"] == pytest.approx(0.95)
    assert found["runtime"] == found["simulated"] == pytest.approx(0.93)
    assert found["drop"] == pytest.approx(0.02)
    right = torch.arange(200)
    interval = paired_binary(right >= 10, right >= 14)
    assert found["ci95"] == [interval.low, interval.high]
    assert found["binary"] is True
    assert found["labels"] is True
    assert found["samples"] == 200
    json.dumps(found, allow_nan=False)


def test_batches_give_what_one_batch_gives() -> None:
    labels, ours, run = three(200, 10, 14)
    accumulator = TaskAccumulator(get("top1", True), 0.1)
    for part in torch.split(torch.arange(200), 33):
        accumulator.update(ours[part], run[part], run[part], labels[part])
    assert accumulator.record() == task_record(get("top1", True), ours, run, run, labels, 0.1)


@pytest.mark.parametrize(
    ("runtime_wrong", "max_drop", "expected"),
    [(10, 0.02, "holds"), (60, 0.02, "fails"), (20, 0.02, "undecided")],
)
def test_verdict(runtime_wrong: int, max_drop: float, expected: str) -> None:
    labels, ours, run = three(400, 10, runtime_wrong)
    found = task_record(get("top1", True), ours, None, run, labels, max_drop)
    assert found["verdict"] == expected
    assert found["max_drop"] == max_drop
    if expected == "undecided":
        assert found["samples_needed"] > 400
    else:
        assert found["samples_needed"] is None


def test_equal_answers_still_leave_room_for_a_loss() -> None:
    labels, ours, _ = three(300, 10, 0)
    found = task_record(get("top1", True), ours, ours, ours, labels, 0.005)
    assert found["drop"] == 0
    assert found["ci95"][1] == pytest.approx(3 / 300, rel=0.02)
    assert found["verdict"] == "undecided"


def test_lower_is_better_flips_the_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(64, 3, generator=generator)
    ours = labels + 0.1 * torch.randn(64, 3, generator=generator)
    worse = labels + 0.5 * torch.randn(64, 3, generator=generator)
    lost = task_record(get("mse", True), ours, worse, worse, labels, 0.01)
    assert lost["higher_is_better"] is False
    assert lost["binary"] is False
    assert lost["runtime"] > lost["float"]
    assert lost["drop"] == pytest.approx(lost["runtime"] - lost["float"])
    assert 0 < lost["ci95"][0] < lost["drop"] < lost["ci95"][1]
    assert lost["verdict"] == "fails"
    won = task_record(get("mse", True), worse, ours, ours, labels, 0.01)
    assert won["drop"] == pytest.approx(-lost["drop"])
    assert won["ci95"] == pytest.approx([-lost["ci95"][1], -lost["ci95"][0]])
    assert won["verdict"] == "holds"


def test_without_labels_the_float_network_is_the_judge() -> None:
    _, ours, run = three(200, 0, 6)
    found = task_record(get(None, False), ours, run, run, None, 0.2)
    assert found["metric"] == "agreement"
    assert found["labels"] is False
    assert found["float"] == 1.0
    assert found["runtime"] == pytest.approx(0.97)
    assert found["drop"] == pytest.approx(0.03)
    assert found["verdict"] == "holds"


def test_dataset_metric_keeps_the_outputs_and_is_bootstrapped() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, CLASSES, (90,), generator=generator)
    ours = 3 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(90, CLASSES, generator=generator)
    run = ours + 0.8 * torch.randn(90, CLASSES, generator=generator)
    metric = get("aligned_perplexity", True)
    accumulator = TaskAccumulator(metric, 0.5)
    for part in torch.split(torch.arange(90), 40):
        accumulator.update(ours[part], ours[part], run[part], labels[part])
    found = accumulator.record()
    assert found["float"] == pytest.approx(metric.value(ours, labels))
    assert found["simulated"] == found["float"]
    assert found["drop"] == pytest.approx(metric.value(run, labels) - metric.value(ours, labels))
    assert found["ci95"][0] < found["drop"] < found["ci95"][1]
    assert found["samples"] == 90


def test_dataset_metric_against_the_float_network() -> None:
    metric = Metric("spread", False, dataset=lambda out, ref: (out - ref).abs().max(), against="float")
    ours = torch.linspace(0, 1, 40).reshape(40, 1)
    found = task_record(metric, ours, None, ours + 0.25, None, 1.0)
    assert found["float"] == 0
    assert found["runtime"] == pytest.approx(0.25)
    assert found["drop"] == pytest.approx(0.25)


def test_several_outputs_reach_the_metric_by_name() -> None:
    metric = Metric(
        "head", True, per_sample=lambda out, y: (out["a"].argmax(-1) == y["y"]).double(), binary=True
    )
    labels, ours, run = three(50, 0, 5)
    accumulator = TaskAccumulator(metric, None)
    for part in torch.split(torch.arange(50), 20):
        outputs = [{"a": side[part], "b": side[part] * 0} for side in (ours, run)]
        accumulator.update(outputs[0], None, outputs[1], {"y": labels[part]})
    assert accumulator.record()["drop"] == pytest.approx(0.1)


def test_what_is_missing_has_a_reason() -> None:
    labels, ours, run = three(50, 0, 5)
    found = task_record(get("top1", True), ours, None, run, labels, None)
    assert found["simulated"] is None
    assert found["simulated_reason"]
    assert found["verdict"] is None
    assert "max_drop" in found["verdict_reason"]


def test_a_partly_simulated_data_set_has_no_simulated_value() -> None:
    labels, ours, run = three(50, 0, 5)
    accumulator = TaskAccumulator(get("top1", True), None)
    accumulator.update(ours, ours, run, labels)
    accumulator.update(ours, None, run, labels)
    assert accumulator.record()["simulated"] is None


@pytest.mark.parametrize("labelled_first", [True, False])
def test_labels_on_some_batches_only(labelled_first: bool) -> None:
    labels, ours, run = three(20, 0, 1)
    order: list[Any] = [labels, None] if labelled_first else [None, labels]
    accumulator = TaskAccumulator(get("agreement", True), None)
    accumulator.update(ours, None, run, order[0])
    with pytest.raises(DataError, match="batch 1") as caught:
        accumulator.update(ours, None, run, order[1])
    assert caught.value.batch == 1


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples"):
        TaskAccumulator(get("top1", True), 0.1).record()


def test_nan_outputs_are_refused() -> None:
    labels, ours, run = three(20, 0, 1)
    run[3] = torch.nan
    with pytest.raises(MetricError, match="sample 3"):
        task_record(get("top1", True), ours, None, run, labels, 0.1)


def test_a_metric_that_does_not_fit_is_told_before_the_long_work(tmp_path: Path) -> None:
    def never() -> Iterator[torch.Tensor]:
        raise AssertionError("calibration has begun")
        yield

    graph = bitport.load(small.two_inputs(), (torch.zeros(2, 6), torch.zeros(2, 4)))
    labelled = [bitport.Batch(batch.inputs, torch.zeros(16, dtype=torch.long)) for batch in small.pairs()]
    with pytest.raises(MetricError, match="several outputs"):
        bitport.compress(graph, "int8", target="null", data=never, evaluation=labelled, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
