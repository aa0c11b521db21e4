"""Built-in metrics against independent formulas; custom ones are held to their promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitport import metrics
from bitport.errors import DataError, MetricError, UnknownName
from bitport.metrics import Metric

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, -1.0]])
LABELS = torch.tensor([0, 2, 0, 0])


def built_in(name: str, has_labels: bool = True) -> Metric:
    return metrics.get(name, has_labels)


class TestTop1:
    def test_is_the_fraction_of_right_classes(self) -> None:
        top1 = built_in("top1")
        assert top1.scores(LOGITS, LABELS).tolist() == [1.0, 1.0, 0.0, 1.0]
        assert top1.value(LOGITS, LABELS) == 0.75
        assert top1.higher_is_better

    @pytest.mark.parametrize(
        "labels", [LABELS.int(), LABELS.numpy(), LABELS.tolist(), LABELS[:, None], LABELS.byte()]
    )
    def test_takes_integers_of_any_make(self, labels: Any) -> None:
        assert built_in("top1").value(LOGITS, labels) == 0.75

    def test_classes_on_the_last_axis(self) -> None:
        logits = torch.eye(3).expand(2, 3, 3)[:, :2]  # [N=2, T=2, C=3]: positions say 0, 1
        assert built_in("top1").scores(logits, torch.tensor([[0, 1], [0, 2]])).tolist() == [1.0, 0.5]

    def test_classes_on_axis_1(self) -> None:
        logits = torch.zeros(1, 3, 2, 5)
        logits[:, 1] = 1.0
        labels = torch.ones(1, 2, 5, dtype=torch.long)
        labels[0, 0, 0] = 2
        assert built_in("top1").scores(logits, labels).tolist() == [pytest.approx(0.9)]

    def test_refuses_to_guess_between_the_two(self) -> None:
        with pytest.raises(MetricError, match="axis 1 or on the last"):
            built_in("top1").scores(torch.zeros(1, 4, 4), torch.zeros(1, 4, dtype=torch.long))

    def test_ignored_labels_count_nowhere(self) -> None:
        logits = torch.eye(4)[None, :3]
        assert built_in("top1").scores(logits, torch.tensor([[0, -100, 1]]))[0] == 0.5

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0, 2, 3, 0]), r"sample 2 has the label 3, outside 0…2"),
            (torch.tensor([0, -1, 0, 0]), r"sample 1 has the label -1"),
            (torch.tensor([0.0, 1.0, 0.0, 0.0]), r"float32.*integers"),
            (torch.tensor([0, 1, 2]), r"outputs \[4, 3\] and labels \[3\] don't match"),
        ],
    )
    def test_refuses_labels_that_would_be_scored_silently(self, labels: Tensor, message: str) -> None:
        with pytest.raises(MetricError, match=f"'top1'.*{message}"):
            built_in("top1").scores(LOGITS, labels)

    def test_nan_outputs_are_not_a_class(self) -> None:
        outputs = LOGITS.clone()
        outputs[2, 1] = math.nan
        with pytest.raises(MetricError, match=r"'top1'.*sample 2 are NaN"):
            built_in("top1").scores(outputs, LABELS)


class TestAgreement:
    def test_needs_no_labels_but_the_float_outputs(self) -> None:
        agreement = built_in("agreement", has_labels=False)
        other = LOGITS.clone()
        other[3] = torch.tensor([0.0, 9.0, 0.0])
        assert agreement.scores(other, LOGITS).tolist() == [1.0, 1.0, 1.0, 0.0]
        assert not agreement.needs_labels

    def test_dense_outputs_agree_by_position(self) -> None:
        tokens, images = torch.randn(2, 6, 5), torch.randn(2, 3, 4, 4)
        changed = tokens.clone()
        changed[1, 2] = -changed[1, 2] * 5
        assert built_in("agreement").scores(changed, tokens).tolist() == [1.0, pytest.approx(5 / 6)]
        flipped = images.clone()
        flipped[0, :, 0, 0] *= -1
        assert built_in("agreement").scores(flipped, images).tolist() == [pytest.approx(15 / 16), 1.0]

    def test_several_outputs_are_averaged(self) -> None:
        ours = {"a": LOGITS, "b": -LOGITS}
        assert built_in("agreement").scores(ours, {"a": LOGITS, "b": LOGITS}).tolist() == [0.5] * 4

    @pytest.mark.parametrize("outputs", [torch.randn(4, 1), torch.randn(4)])
    def test_one_value_per_sample_is_refused_as_always_equal(self, outputs: Tensor) -> None:
        with pytest.raises(MetricError, match=r"no classes.*'mse'"):
            built_in("agreement").scores(outputs, outputs + 1)

    def test_nan_outputs_agree_with_nothing(self) -> None:
        outputs = LOGITS.clone()
        outputs[1] = math.nan
        with pytest.raises(MetricError, match=r"'agreement'.*sample 1 are NaN"):
            built_in("agreement").scores(outputs, outputs)

    def test_outputs_without_classes_are_left_out(self) -> None:
        ours = {"a": LOGITS, "value": torch.randn(4, 1)}
        other = {"a": LOGITS, "value": torch.randn(4, 1)}
        assert built_in("agreement").scores(ours, other).tolist() == [1.0] * 4

    def test_other_output_names_are_refused(self) -> None:
        with pytest.raises(MetricError, match=r"\['a'\].*\['b'\]"):
            built_in("agreement").scores({"a": LOGITS}, {"b": LOGITS})


class TestMse:
    def test_against_labels_and_against_the_float_outputs(self) -> None:
        x, y = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
        expected = ((x - y) ** 2).mean((1, 2)).double()
        torch.testing.assert_close(built_in("mse").scores(x, y), expected)
        assert built_in("mse").needs_labels
        assert not built_in("mse", has_labels=False).needs_labels
        assert not built_in("mse").higher_is_better

    def test_a_column_against_a_vector_is_not_broadcast(self) -> None:
        x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])
        assert built_in("mse").scores(x, y).tolist() == [0.0, 4.0]
        assert built_in("mse").scores(x[:, 0], y).tolist() == [0.0, 4.0]
        with pytest.raises(MetricError, match=r"\[2, 1\].*\[3\]"):
            built_in("mse").scores(x, torch.zeros(3))

    def test_several_outputs(self) -> None:
        ours, theirs = (
            {"a": torch.ones(2, 3), "b": torch.zeros(2)},
            {"a": torch.zeros(2, 3), "b": torch.zeros(2)},
        )
        assert built_in("mse", has_labels=False).scores(ours, theirs).tolist() == [0.5, 0.5]
        with pytest.raises(MetricError, match="several outputs"):
            built_in("mse").scores(ours, torch.zeros(2))


class TestLikelihood:
    def test_nll_is_cross_entropy_in_nats(self) -> None:
        expected = F.cross_entropy(LOGITS, LABELS, reduction="none").double()
        torch.testing.assert_close(built_in("nll").scores(LOGITS, LABELS), expected)
        assert built_in("nll").value(torch.zeros(5, 8), torch.arange(5)) == pytest.approx(math.log(8))

    def test_nll_and_perplexity_of_sequences(self) -> None:
        logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
        labels[0, 3:] = -100
        per_label = F.cross_entropy(
            logits.movedim(-1, 1), labels, reduction="none", ignore_index=-100
        ).double()
        nll = built_in("nll").scores(logits, labels)
        torch.testing.assert_close(nll, per_label.sum(1) / torch.tensor([3, 5, 5]))
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp()
        assert built_in("aligned_perplexity").value(logits, labels) == pytest.approx(
            float(expected), rel=1e-6
        )

    def test_an_impossible_label_is_an_error_with_its_sample(self) -> None:
        logits = LOGITS.clone()
        logits[1, 2] = -math.inf
        with pytest.raises(MetricError, match=r"'nll' scored sample 1 as inf"):
            built_in("nll").scores(logits, LABELS)

    def test_nothing_but_ignored_labels(self) -> None:
        labels = torch.full((4,), -100)
        with pytest.raises(MetricError, match="sample 0 as nan"):
            built_in("nll").scores(LOGITS, labels)
        with pytest.raises(MetricError, match="ignored"):
            built_in("aligned_perplexity").value(LOGITS, labels)

    def test_perplexity_has_no_scores(self) -> None:
        with pytest.raises(MetricError, match=r"value\(…\)"):
            built_in("perplexity").scores(LOGITS, LABELS)


class TestCustom:
    def test_exactly_one_function(self) -> None:
        with pytest.raises(MetricError, match="exactly one"):
            Metric("m", True)
        with pytest.raises(MetricError, match="exactly one"):
            Metric("m", True, per_sample=lambda o, y: o, dataset=lambda o, y: 0.0)
        with pytest.raises(MetricError, match="binary"):
            Metric("m", True, dataset=lambda o, y: 0.0, binary=True)
        with pytest.raises(MetricError, match="'labels' or 'float'"):
            Metric("m", True, per_sample=lambda o, y: o, against="it")

    def test_scores_of_any_make(self) -> None:
        for returned in (LABELS == 0, (LABELS == 0).numpy(), [True, False, True, True]):
            metric = Metric("m", True, per_sample=lambda o, y, returned=returned: returned)
            assert metric.scores(LOGITS, LABELS).tolist() == [1.0, 0.0, 1.0, 1.0]
        metric = Metric("m", True, dataset=lambda o, y: np.float32(0.5))
        assert metric.value({"a": LOGITS}, LABELS) == 0.5

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (torch.tensor([1.0, math.nan, 1.0, math.nan]), "'mine' scored sample 1 as nan.*2 of 4"),
            (torch.tensor([1.0, 1.0, 1.0, math.inf]), "sample 3 as inf"),
            (torch.zeros(3), r"shape \[3\] for 4 samples"),
            (torch.zeros(4, 1), r"shape \[4, 1\]"),
            (1.0, r"shape \[\]"),
            ("text", "returned str"),
        ],
    )
    def test_bad_scores_are_named(self, returned: Any, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            Metric("mine", True, per_sample=lambda o, y: returned).scores(LOGITS, LABELS)

    @pytest.mark.parametrize(
        ("returned", "message"), [(math.nan, "'mine' is nan over 4"), (None, "returned NoneType")]
    )
    def test_bad_values_are_named(self, returned: Any, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            Metric("mine", True, dataset=lambda o, y: returned).value(LOGITS, LABELS)

    def test_a_failing_function_is_the_cause(self) -> None:
        def broken(outputs: Tensor, labels: Tensor) -> Tensor:
            raise KeyError("boxes")

        with pytest.raises(MetricError, match="'mine' raised KeyError: 'boxes'") as info:
            Metric("mine", True, per_sample=broken).scores(LOGITS, LABELS)
        assert isinstance(info.value.__cause__, KeyError)

    def test_binary_is_about_the_scores_at_hand(self) -> None:
        top1 = built_in("top1")
        assert top1.is_binary(torch.tensor([0.0, 1.0]), torch.ones(2))
        assert not top1.is_binary(torch.tensor([0.0, 0.5]))
        assert not built_in("mse").is_binary(torch.tensor([0.0, 1.0]))


class TestGet:
    def test_defaults(self) -> None:
        assert metrics.get(None, True).name == "top1"
        assert metrics.get(None, True, LABELS).name == "top1"
        assert metrics.get(None, True, LABELS.float()).name == "mse"
        assert metrics.get(None, True, [{"boxes": 1}]).name == "mse"
        assert metrics.get(None, False).name == "agreement"
        assert metrics.get(None, False, None, [("batch", 1), ("batch", 7)]).name == "agreement"
        regression = metrics.get(None, False, None, [("batch", 1), ("batch",)])
        assert (regression.name, regression.against) == ("mse", "float")

    def test_a_metric_passes_through(self) -> None:
        mine = Metric("mse", True, per_sample=lambda o, y: o)
        assert metrics.get(mine, True) is mine

    @pytest.mark.parametrize(
        "metric", ["top1", "nll", "perplexity", Metric("mine", True, per_sample=lambda o, y: o)]
    )
    def test_missing_labels(self, metric: str | Metric) -> None:
        with pytest.raises(DataError, match="needs labels"):
            metrics.get(metric, False)

    def test_labels_missing_at_the_time_of_scoring(self) -> None:
        with pytest.raises(DataError, match="needs labels"):
            built_in("top1").scores(LOGITS, None)

    def test_unknown(self) -> None:
        with pytest.raises(UnknownName, match="top1"):
            metrics.get("top-1", True)

    def test_every_built_in_is_described(self) -> None:
        known = metrics.known()
        assert list(known) == sorted(
            [
                *(
                    "agreement",
                    "aligned_perplexity",
                    "f1",
                    "f1_macro",
                    "mae",
                    "map",
                    "map50",
                    "miou",
                    "mse",
                    "nll",
                ),
                *("perplexity", "r2", "rmse", "top1", "wer"),
            ]
        )
        assert all(len(line) > 20 for line in known.values())

    def test_top1_of_several_outputs_is_refused(self) -> None:
        assert built_in("top1").value({"logits": LOGITS}, LABELS) == 0.75
        with pytest.raises(MetricError, match="a, b"):
            built_in("top1").scores({"a": LOGITS, "b": LOGITS}, LABELS)
