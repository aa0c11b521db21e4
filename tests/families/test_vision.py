"""Vision networks of Hugging Face: values, gradients, and integers on ONNX Runtime."""

from __future__ import annotations

import pytest
from tests.families import VISION
from tests.families.check import in_turn, on_the_runtime, values_and_gradients

EARLY = ("resnet", "mobilenet_v1", "mobilenet_v2", "efficientnet", "convnext", "vit", "deit", "swin", "beit")


@pytest.mark.parametrize("name", in_turn(VISION, EARLY))
def test_values_and_gradients_are_the_originals(name: str) -> None:
    values_and_gradients(name, 3)


@pytest.mark.parametrize("name", in_turn(VISION, ("resnet", "vit", "siglip_vision")))
def test_its_integers_arrive_on_the_runtime(name: str) -> None:
    result = on_the_runtime(name)
    assert result.share() > 0.9
    assert result.prepared.real_error(result.example) < 0.25
