"""Mean average precision of detections against a brute-force count, from both sides."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitport import metrics
from bitport.errors import MetricError
from bitport.proof.task import TaskAccumulator, task_record


def value(name: str, outputs: Any, labels: Any) -> float:
    return metrics.get(name, True).value(outputs, labels)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(
    seed: int, images: int = 12, noise: float = 3.0
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Labelled boxes of three classes, and predictions near them with misses, doubles and inventions."""
    random = generator(seed)
    outputs: dict[str, list[Tensor]] = {"boxes": [], "scores": [], "classes": []}
    labels = []
    for _ in range(images):
        count = int(torch.randint(0, 6, (1,), generator=random))
        corner = torch.rand(count, 2, generator=random) * 60
        boxes = torch.cat([corner, corner + 8 + 30 * torch.rand(count, 2, generator=random)], 1)
        classes = torch.randint(3, (count,), generator=random)
        labels.append({"boxes": boxes, "classes": classes})
        near = torch.cat([boxes, boxes, torch.rand(4, 4, generator=random) * 40])[:10]
        near = near + noise * torch.randn(near.shape, generator=random)
        near[len(boxes) * 2 :, 2:] += near[len(boxes) * 2 :, :2].abs()
        kinds = torch.cat([classes, classes, torch.randint(3, (4,), generator=random)])[:10]
        scores = torch.rand(len(near), generator=random)
        pad = 10 - len(near)
        outputs["boxes"].append(F.pad(near, (0, 0, 0, pad)))
        outputs["scores"].append(F.pad(scores, (0, pad)))
        outputs["classes"].append(F.pad(kinds, (0, pad)).float())
    return {name: torch.stack(parts) for name, parts in outputs.items()}, labels


def brute_force(outputs: dict[str, Tensor], labels: list[dict[str, Tensor]], limits: list[float]) -> float:
    """COCO's rules written as loops."""

    def iou(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = width * height
        area = [max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1]) for c in (a, b)]
        return both / (sum(area) - both) if both else 0.0

    found = []
    for limit, label in itertools.product(limits, range(3)):
        total = sum(int((sample["classes"] == label).sum()) for sample in labels)
        if total == 0:
            continue
        marks = []
        for i, sample in enumerate(labels):
            free = sample["boxes"][sample["classes"] == label].tolist()
            mine = [
                (float(outputs["scores"][i, j]), outputs["boxes"][i, j].tolist())
                for j in range(outputs["scores"].shape[1])
                if outputs["scores"][i, j] > 0 and int(outputs["classes"][i, j]) == label
            ]
            for score, box in sorted(mine, key=lambda pair: -pair[0])[:100]:
                overlaps = [iou(box, other) for other in free]
                best = max(range(len(free)), key=lambda k: overlaps[k], default=None)
                hit = best is not None and overlaps[best] >= limit - 1e-10
                if best is not None and hit:
                    del free[best]
                marks.append((score, hit))
        marks.sort(key=lambda pair: -pair[0])
        curve, hits = [], 0
        for rank, (_, hit) in enumerate(marks, 1):
            hits += hit
            curve.append((hits / total, hits / rank))
        points = [
            max((p for r, p in curve if r >= recall / 100 - 1e-12), default=0.0) for recall in range(101)
        ]
        found.append(sum(points) / 101)
    return float(np.mean(found))


LIMITS = [0.5 + 0.05 * i for i in range(10)]


class TestMeanPrecision:
    @pytest.mark.parametrize("seed", range(4))
    def test_by_brute_force(self, seed: int) -> None:
        outputs, labels = scene(seed)
        assert value("map", outputs, labels) == pytest.approx(brute_force(outputs, labels, LIMITS), rel=1e-9)
        assert value("map50", outputs, labels) == pytest.approx(brute_force(outputs, labels, [0.5]), rel=1e-9)

    def test_from_both_sides(self) -> None:
        found = [value("map", *scene(7, noise=noise)) for noise in (0.01, 1.0, 4.0, 30.0)]
        assert found == sorted(found, reverse=True) and found[0] > 2 * found[2] > found[3]
        _, labels = scene(7)
        perfect = {
            "boxes": torch.stack([F.pad(y["boxes"], (0, 0, 0, 5 - len(y["boxes"]))) for y in labels]),
            "scores": torch.stack([(torch.arange(5) < len(y["boxes"])).float() for y in labels]),
            "classes": torch.stack([F.pad(y["classes"], (0, 5 - len(y["classes"]))) for y in labels]),
        }
        assert value("map", perfect, labels) == value("map50", perfect, labels) == 1
        nothing = {**perfect, "scores": perfect["scores"] * 0}
        assert value("map", nothing, labels) == 0

    def test_by_hand(self) -> None:
        """Two labels; the best box hits one, the next misses, the third hits the other."""
        labels = [{"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "classes": [1, 1]}]
        outputs = {
            "boxes": torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]]),
            "scores": torch.tensor([[0.9, 0.8, 0.7]]),
            "classes": torch.ones(1, 3),
        }
        assert value("map50", outputs, labels) == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)

    def test_a_label_is_found_once(self) -> None:
        labels = {"boxes": torch.tensor([[[0.0, 0, 10, 10]]]), "classes": torch.tensor([[0]])}
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
        outputs = {"boxes": boxes, "scores": torch.tensor([[0.5, 0.9]]), "classes": torch.zeros(1, 2)}
        assert value("map", outputs, labels) == 1  # the double comes after full recall
        two = {
            "boxes": torch.tensor([[[0.0, 0, 10, 10], [90, 90, 99, 99]]]),
            "classes": torch.tensor([[0, 0]]),
        }
        assert value("map", outputs, two) == pytest.approx(51 / 101)

    def test_padding_of_labels(self) -> None:
        outputs, labels = scene(3)
        padded = {
            "boxes": torch.stack([F.pad(y["boxes"], (0, 0, 0, 6 - len(y["boxes"]))) for y in labels]),
            "classes": torch.stack(
                [F.pad(y["classes"], (0, 6 - len(y["classes"])), value=-1) for y in labels]
            ),
        }
        assert value("map", outputs, padded) == value("map", outputs, labels)

    def test_is_bootstrapped_on_the_same_samples(self) -> None:
        ours, labels = scene(1, 40, noise=1.0)
        run, _ = scene(1, 40, noise=1.3)
        whole = task_record(metrics.get("map", True), ours, ours, run, labels, 0.5)
        accumulator = TaskAccumulator(metrics.get("map", True), 0.5)
        for part in (slice(0, 15), slice(15, 40)):
            sides = [{name: tensor[part] for name, tensor in side.items()} for side in (ours, ours, run)]
            accumulator.update(*sides, labels[part])
        found = accumulator.record()
        assert found == whole
        assert found["drop"] == pytest.approx(value("map", ours, labels) - value("map", run, labels))
        assert found["ci95"][0] < found["drop"] < found["ci95"][1]
        assert not any(isinstance(kept, Tensor) for side in accumulator._sides.values() for kept in side)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda o, y: (o["boxes"], y), "one unnamed output"),
            (lambda o, y: ({"boxes": o["boxes"], "x": o["scores"]}, y), "boxes, x"),
            (lambda o, y: ({**o, "scores": o["scores"][:, :2]}, y), "don't match"),
            (lambda o, y: ({**o, "boxes": o["boxes"] * math.nan}, y), "boxes of sample 0 are NaN"),
            (lambda o, y: ({**o, "classes": o["classes"] - 9}, y), "class below 0"),
            (lambda o, y: (o, y[:3]), "3 samples"),
            (lambda o, y: (o, [{"boxes": [[5, 5, 3, 3]], "classes": [0]}] * 12), "width"),
            (lambda o, y: (o, [{"boxes": [[0, 0, 3, 3]], "classes": [0, 1]}] * 12), "1 boxes and 2"),
            (lambda o, y: (o, torch.zeros(12, 4)), "labels must be"),
            (lambda o, y: (o, {"boxes": torch.zeros(12, 1, 4), "classes": -torch.ones(12, 1)}), "no boxes"),
        ],
    )
    def test_refuses(self, change: Any, message: str) -> None:
        with pytest.raises(MetricError, match=message):
            value("map", *change(*scene(0)))
