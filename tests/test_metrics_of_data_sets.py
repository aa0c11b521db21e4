"""Metrics of whole data sets against independent formulas, from both sides; what is kept of a sample is small."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor
from torch.nn import functional as F

from bitport import metrics
from bitport.errors import MetricError
from bitport.metrics import Metric, Ragged, word_error_rate
from bitport.metrics._sequences import distance
from bitport.proof.task import TaskAccumulator, task_record


def value(name: str, outputs: Any, labels: Any) -> float:
    return metrics.get(name, True).value(outputs, labels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPerplexity:
    def test_is_the_exponential_of_the_shifted_cross_entropy(self) -> None:
        logits = torch.randn(4, 9, 11, generator=generator())
        tokens = torch.randint(11, (4, 9), generator=generator(1))
        tokens[0, 5:] = -100
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
        assert value("perplexity", logits, tokens) == pytest.approx(float(expected), rel=1e-6)
        # a network that says the next token is perfect, one that repeats the current token is not
        ahead = F.one_hot(tokens.clamp(min=0).roll(-1, 1), 11).float() * 50
        assert value("perplexity", ahead, tokens) == pytest.approx(1)
        assert value("perplexity", F.one_hot(tokens.clamp(min=0), 11).float() * 50, tokens) > 1000
        assert value("perplexity", torch.zeros(2, 5, 11), tokens[1:3, :5]) == pytest.approx(11)

    def test_vocabulary_as_long_as_the_sequence_is_no_riddle(self) -> None:
        logits, tokens = torch.randn(2, 6, 6, generator=generator()), torch.arange(6).expand(2, 6)
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp()
        assert value("perplexity", logits, tokens) == pytest.approx(float(expected), rel=1e-6)

    def test_weighs_tokens_not_samples(self) -> None:
        logits = torch.zeros(2, 5, 4)
        logits[0, 0, 2] = 9.0
        tokens = torch.tensor([[1, 2, -100, -100, -100], [1, 2, 3, 0, 1]])
        nats = [math.log(3 + math.exp(9)) - 9, *[math.log(4)] * 4]
        assert value("perplexity", logits, tokens) == pytest.approx(math.exp(sum(nats) / 5), rel=1e-9)

    def test_many_rows_are_taken_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, tokens = torch.randn(3, 7, 5), torch.randint(5, (3, 7))
        whole = value("perplexity", logits, tokens)
        monkeypatch.setattr("bitport.metrics._classes._BLOCK", 12)
        assert value("perplexity", logits, tokens) == pytest.approx(whole, rel=1e-12)

    def test_interval_is_of_the_ratio_of_sums(self) -> None:
        """Long samples weigh more, so the drop is that of all tokens and its bootstrap covers it."""
        ours = torch.randn(60, 12, 8, generator=generator(2))
        run = ours + 0.3 * torch.randn(60, 12, 8, generator=generator(3))
        tokens = torch.randint(8, (60, 12), generator=generator(4))
        for row, length in zip(tokens, itertools.cycle((2, 5, 12)), strict=False):
            row[length:] = -100

        def exact(logits: Tensor) -> float:
            return float(
                F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()).exp()
            )

        found = task_record(metrics.get("perplexity", True), ours, ours, run, tokens, 100.0)
        assert found["drop"] == pytest.approx(exact(run) - exact(ours), rel=1e-6)
        low, high = found["ci95"]
        assert low < found["drop"] < high
        assert (found["verdict"], found["simulated"]) == ("holds", found["float"])

    @pytest.mark.parametrize(
        ("logits", "tokens", "message"),
        [
            (torch.zeros(3, 8), torch.zeros(3, dtype=torch.long), "no next-token task.*aligned_perplexity"),
            (torch.zeros(2, 5, 8), torch.zeros(2, 4, dtype=torch.long), r"\[2, 5, 8\].*\[2, 4\]"),
            (torch.zeros(2, 1, 8), torch.zeros(2, 1, dtype=torch.long), "no next token"),
            (torch.zeros(2, 5, 8), torch.full((2, 5), 8), "label 8, outside"),
            (torch.zeros(2, 5, 8), torch.full((2, 5), -100), "ignored"),
            (torch.full((2, 5, 8), math.nan), torch.zeros(2, 5, dtype=torch.long), "NaN"),
        ],
    )
    def test_refuses(self, logits: Tensor, tokens: Tensor, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            value("perplexity", logits, tokens)


class TestF1:
    @pytest.mark.parametrize("seed", range(3))
    def test_is_scikit_learns(self, seed: int) -> None:
        logits = torch.randn(80, 5, generator=generator(seed))
        logits[:, 4] = -9  # a class that is never predicted
        labels = torch.randint(5, (80,), generator=generator(9))
        expected = sklearn.metrics.f1_score(labels, logits.argmax(1), average="macro")
        assert value("f1_macro", logits, labels) == pytest.approx(expected, rel=1e-12)
        binary = labels % 2
        expected = sklearn.metrics.f1_score(binary, logits[:, :2].argmax(1))
        assert value("f1", logits[:, :2], binary) == pytest.approx(expected, rel=1e-12)
        one = logits[:, 0]
        expected = sklearn.metrics.f1_score(binary, one > 0)
        for outputs, target in (
            (one, binary),
            (one[:, None], binary),
            (one[:, None], binary[:, None].float()),
        ):
            assert value("f1", outputs, target) == pytest.approx(expected, rel=1e-12)

    def test_of_tokens_with_ignored_labels(self) -> None:
        logits = torch.randn(6, 7, 4, generator=generator())
        labels = torch.randint(4, (6, 7), generator=generator(1))
        labels[:, 5:] = -100
        expected = sklearn.metrics.f1_score(
            labels[:, :5].flatten(), logits.argmax(-1)[:, :5].flatten(), average="macro"
        )
        assert value("f1_macro", logits, labels) == pytest.approx(expected, rel=1e-12)

    def test_nothing_positive_is_no_score(self) -> None:
        with pytest.raises(MetricError, match="class 1 is neither"):
            value("f1", torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        assert value("f1", torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == 0

    @pytest.mark.parametrize(
        ("outputs", "labels", "message"),
        [
            (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), "f1_macro"),
            (torch.zeros(4, 1), torch.tensor([0, 1, 2, 0]), "0 or 1"),
            (torch.zeros(4), torch.zeros(3), "don't match"),
        ],
    )
    def test_refuses(self, outputs: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            value("f1", outputs, labels)


class TestMeanIou:
    def test_by_hand(self) -> None:
        predicted = torch.tensor([[[0, 0], [1, 1]]])
        labels = torch.tensor([[[0, 1], [1, 255]]])
        logits = F.one_hot(predicted, 4).movedim(-1, 1).float()
        assert value("miou", logits, labels) == pytest.approx((1 / 2 + 1 / 2) / 2)  # classes 2, 3: unseen

    def test_by_brute_force(self) -> None:
        logits = torch.randn(5, 6, 8, 7, generator=generator())
        labels = torch.randint(5, (5, 8, 7), generator=generator(1))  # class 5 is never labelled
        labels[torch.rand(labels.shape, generator=generator(2)) < 0.2] = 255
        predicted, valid = logits.argmax(1), labels != 255
        shares = []
        for label in range(6):
            ours, theirs = (predicted == label) & valid, labels == label
            shares.append(float((ours & theirs).sum() / (ours | theirs).sum()))
        assert value("miou", logits, labels) == pytest.approx(np.mean(shares), rel=1e-6)
        better = logits + 3 * F.one_hot(labels.clamp(max=5), 6).movedim(-1, 1)
        assert np.mean(shares) < value("miou", better, labels) < 1
        perfect = F.one_hot(labels.clamp(max=4), 6).movedim(-1, 1).float()
        assert value("miou", perfect, labels) == 1

    def test_255_is_a_class_of_a_network_that_has_it(self) -> None:
        logits = torch.zeros(1, 300, 2, 2)
        logits[:, 255] = 1
        assert value("miou", logits, torch.full((1, 2, 2), 255)) == 1
        with pytest.raises(MetricError, match="every label is ignored"):
            value("miou", logits[:, :20], torch.full((1, 2, 2), 255))

    def test_masks_of_another_size_are_refused(self) -> None:
        with pytest.raises(MetricError, match=r"\[1, 3, 4, 4\].*\[1, 8, 8\]"):
            value("miou", torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))


class TestRegression:
    def test_are_scikit_learns(self) -> None:
        y = torch.randn(40, 3, generator=generator()).double()
        x = y + 0.4 * torch.randn(40, 3, generator=generator(1)).double()
        ours, theirs = x.numpy(), y.numpy()
        assert value("mae", x, y) == pytest.approx(sklearn.metrics.mean_absolute_error(theirs, ours))
        assert value("mse", x, y) == pytest.approx(sklearn.metrics.mean_squared_error(theirs, ours))
        assert value("rmse", x, y) == pytest.approx(
            math.sqrt(sklearn.metrics.mean_squared_error(theirs, ours))
        )
        assert value("r2", x, y) == pytest.approx(sklearn.metrics.r2_score(theirs, ours))
        assert value("r2", y, y) == 1
        assert value("r2", y.mean(0).expand(40, 3), y) == pytest.approx(0)
        assert value("r2", -y, y) < 0

    def test_a_column_and_several_outputs(self) -> None:
        x, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 4.0])
        assert value("mae", x, y) == pytest.approx(1 / 3)
        assert value("r2", x, y) == pytest.approx(sklearn.metrics.r2_score(y, x[:, 0]))
        both = {"a": x, "b": x + 1}
        assert value("mae", both, {"a": x, "b": x}) == pytest.approx(0.5)
        assert value("r2", both, {"a": x, "b": x + 1}) == 1

    @pytest.mark.parametrize("name", ["mse", "mae", "rmse"])
    def test_without_labels_against_the_float_network(self, name: str) -> None:
        metric = metrics.get(name, False)
        ours = torch.randn(20, 4, generator=generator())
        found = task_record(metric, ours, ours, ours + 0.5, None, 1.0)
        assert (found["float"], found["runtime"]) == (0, pytest.approx(0.25 if name == "mse" else 0.5))

    def test_refuses(self) -> None:
        with pytest.raises(MetricError, match="no variance"):
            value("r2", torch.randn(4, 1), torch.ones(4, 1))
        with pytest.raises(MetricError, match="labels of sample 1 are NaN"):
            value("mae", torch.zeros(2, 1), torch.tensor([[0.0], [math.nan]]))


class TestWordErrorRate:
    def test_published_example(self) -> None:
        """Sunday / Saturday and kitten / sitting: distances 3 (Wagner & Fischer 1974)."""
        for a, b in (("sunday", "saturday"), ("kitten", "sitting")):
            assert distance(list(a), list(b)) == distance(list(b), list(a)) == 3
        labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
        outputs = torch.tensor([[1, 9, 3, -1, -1], [5, 6, 7, -1, -1]])  # substitution + deletion; insertion
        assert value("wer", outputs, labels) == pytest.approx(3 / 6)
        assert value("wer", labels, labels) == 0

    def test_distance_by_brute_force(self) -> None:
        def slow(a: tuple[int, ...], b: tuple[int, ...]) -> int:
            if not a or not b:
                return len(a) + len(b)
            return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

        random = np.random.default_rng(0)
        for _ in range(60):
            a, b = (tuple(random.integers(0, 3, random.integers(0, 6)).tolist()) for _ in range(2))
            assert distance(list(a), list(b)) == slow(a, b), (a, b)

    def test_ctc_is_decoded_greedily(self) -> None:
        path = torch.tensor([[0, 3, 3, 0, 3, 5, 5, 0], [2, 2, 2, 2, 0, 0, 0, 0]])  # 3 3 5 and 2
        logits = F.one_hot(path, 6).float()
        assert value("wer", logits, torch.tensor([[3, 3, 5], [2, -100, -100]])) == 0
        assert value("wer", logits, torch.tensor([[3, 5, -100], [2, -100, -100]])) == pytest.approx(1 / 3)
        # another blank: the zeros become tokens
        last = word_error_rate(blank=5)
        assert last.value(logits[:1], torch.tensor([[0, 3, 0, 3, 0]])) == 0

    def test_words_of_characters(self) -> None:
        metric = word_error_rate(separator=1)
        labels = torch.tensor([[7, 8, 1, 9, 1, 1, 7]])  # "ab c  a": three words
        assert metric.value(torch.tensor([[7, 8, 1, 9, 1, 7, -1]]), labels) == 0
        assert metric.value(torch.tensor([[7, 8, 9, 1, 7, -1, -1]]), labels) == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("outputs", "labels", "message"),
        [
            (torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.long), "CTC logits"),
            (torch.zeros(2, 5, 4), torch.zeros(2, 3), "token ids"),
            (torch.zeros(2, 5, 4), torch.full((2, 3), -100), "no words"),
            (torch.full((2, 5, 4), math.nan), torch.zeros(2, 3, dtype=torch.long), "NaN"),
        ],
    )
    def test_refuses(self, outputs: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            value("wer", outputs, labels)


# ------------------------------------------------------------------------------------------------ the machinery


class TestCollect:
    def test_ragged_rows_are_taken_by_sample(self) -> None:
        rows = [np.arange(2 * n).reshape(n, 2) + 100 * n for n in (2, 0, 3, 1)]
        ragged = Ragged.joined([Ragged.of(rows[:2], 2), Ragged.of(rows[2:], 2)])
        assert len(ragged) == 4
        chosen = ragged[np.array([2, 2, 1, 0])]
        assert chosen.counts.tolist() == [3, 3, 0, 2]
        assert chosen.values.tolist() == np.concatenate([rows[2], rows[2], rows[1], rows[0]]).tolist()

    def test_custom(self) -> None:
        metric = Metric(
            "spread",
            False,
            dataset=lambda kept, _: kept.max() - kept.min(),
            collect=lambda o, y: (o - y).amax(1),
        )
        ours, labels = torch.randn(30, 4, generator=generator()), torch.zeros(30, 4)
        found = task_record(metric, ours, ours, ours * 2, labels, 100.0)
        assert found["runtime"] == pytest.approx(2 * found["float"])

    @pytest.mark.parametrize("returned", [torch.zeros(3), 1.0, {}])
    def test_speaks_of_every_sample(self, returned: Any) -> None:
        metric = Metric("mine", True, dataset=lambda kept, _: 0.0, collect=lambda o, y: returned)
        with pytest.raises(MetricError, match="one entry per sample, 4"):
            metric.value(torch.zeros(4, 2), torch.zeros(4))

    def test_goes_with_dataset(self) -> None:
        with pytest.raises(MetricError, match="goes with dataset"):
            Metric("mine", True, per_sample=lambda o, y: o, collect=lambda o, y: o)

    def test_labels_missing(self) -> None:
        with pytest.raises(Exception, match="needs labels"):
            metrics.get("miou", True).value(torch.zeros(1, 3, 2, 2), None)


class TestChance:
    """A metric that throws dice would report them as a loss."""

    @pytest.mark.parametrize("kind", ["per_sample", "dataset"])
    def test_is_refused(self, kind: str) -> None:
        random = np.random.default_rng(0)
        functions: dict[str, Any] = {
            "per_sample": lambda o, y: random.random(len(o)),
            "dataset": lambda o, y: random.random(),
        }
        metric = Metric("dice", True, **{kind: functions[kind]})
        outputs = torch.zeros(5, 2)
        with pytest.raises(MetricError, match="'dice' gives different scores for the same outputs"):
            task_record(metric, outputs, outputs, outputs, torch.zeros(5), None)

    def test_a_first_batch_that_is_too_small_is_none(self) -> None:
        accumulator = TaskAccumulator(metrics.get("r2", True), 1.0)
        for y in (torch.zeros(1, 1), torch.randn(20, 1, generator=generator())):
            accumulator.update(y, y, y + 0.1, y)
        assert accumulator.record()["float"] == 1


class TestOneOutputOfSeveral:
    OUTPUTS: ClassVar = {"mask": torch.eye(3)[:, :, None], "other": torch.zeros(3, 2)}

    def test_is_named_behind_a_colon(self) -> None:
        labels = torch.tensor([[0], [1], [1]])
        for name in ("top1", "miou", "f1_macro", "nll"):
            metric = metrics.get(f"{name}:mask", True)
            assert metric.name == f"{name}:mask"
            assert metric.value(self.OUTPUTS, labels) == value(name, self.OUTPUTS["mask"], labels)
            assert metric.value(self.OUTPUTS["mask"], labels) == value(name, self.OUTPUTS["mask"], labels)

    def test_without_labels(self) -> None:
        changed = {**self.OUTPUTS, "other": self.OUTPUTS["other"] + 2}
        assert metrics.get("mse:other", False).value(changed, self.OUTPUTS) == 4
        assert metrics.get("mse:mask", False).value(changed, self.OUTPUTS) == 0
        assert metrics.get("rmse:other", False).value(changed, self.OUTPUTS) == 2
        assert metrics.get("agreement:other", False).value(changed, self.OUTPUTS) == 1

    def test_wrong_names_are_told(self) -> None:
        with pytest.raises(MetricError, match="no output 'masks'; it has mask, other"):
            metrics.get("top1:masks", True).value(self.OUTPUTS, torch.zeros(3, 1, dtype=torch.long))
        with pytest.raises(MetricError, match="as 'top1:mask'"):
            value("top1", self.OUTPUTS, torch.zeros(3, 1, dtype=torch.long))
        with pytest.raises(Exception, match="unknown metric 'top2:mask'"):
            metrics.get("top2:mask", True)
