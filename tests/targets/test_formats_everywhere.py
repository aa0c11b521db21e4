"""Weights and activations of any width and range, on every runtime: computed as planned, or refused beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, conv, images, prepare, ship
from torch import nn
from torch.nn import functional as F

from bitport.errors import TargetError

FLOAT = {"format": "float32"}
MODES: dict[str, dict[str, Any]] = {"static": {}, "dynamic": {"dynamic": True}, "weights": FLOAT}
WITHOUT = {("openvino", "dynamic"), ("executorch", "weights")}  # modes that a runtime hasn't
OFTEN = ("int3", "int5", "uint4")
RARELY = ("int2", "int4", "int6", "int7", "int8", "int4n", "int8n", "ternary", "int[-3,12]",
          "uint2", "uint5", "uint7", "int[0,9]")  # fmt: skip
AS_WRITTEN = 60.0  # dB, more than sums of floats in another order lose
CASES = [
    pytest.param(target, mode, name, marks=[pytest.mark.slow] * (name in RARELY or target == "executorch"))
    for target in ("onnxruntime", "litert", "openvino", "executorch")
    for mode in MODES
    for name in (*OFTEN, *RARELY)
    if (target, mode) not in WITHOUT
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))).flatten(1)),
        a=conv(), b=conv(8, 8, groups=8), c=nn.Linear(8 * 64, 16),
    )  # fmt: skip


@pytest.mark.parametrize(("target", "mode", "name"), CASES)
def test_weights_of_any_format(target: str, mode: str, name: str) -> None:
    x = images(4)
    shipped = ship(prepare(net(), [x], target, weights={"format": name}, activations=MODES[mode]), x)
    assert not shipped.inspection.missed
    assert shipped.record["exact_share"] in (None, 1.0)  # None: nothing is integers
    assert shipped.record["outputs_db"] is None or shipped.record["outputs_db"] > AS_WRITTEN


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=[pytest.mark.slow] * (name in RARELY or target == "executorch"))
        for target in ("onnxruntime", "litert", "openvino", "executorch")
        for name in (*OFTEN, *RARELY, "int8 symmetric")
    ],
)
def test_activations_of_any_format(target: str, name: str) -> None:
    x = images(4)
    shipped = ship(prepare(net(), [x], target, activations={"format": name, "elsewhere": name}), x)
    assert not shipped.inspection.missed
    assert shipped.record["exact_share"] == 1.0
    assert shipped.record["outputs_db"] is None or shipped.record["outputs_db"] > AS_WRITTEN


@pytest.mark.parametrize("target", ["onnxruntime", "litert", "openvino"])
@pytest.mark.parametrize("mode", ["static", "weights"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_one_scale_for_a_layer_or_for_all(target: str, mode: str, granularity: str) -> None:
    x = images(4)
    weights = {"format": "int4", "granularity": granularity}
    shipped = ship(prepare(net(), [x], target, weights=weights, activations=MODES[mode]), x)
    assert not shipped.inspection.missed and shipped.record["exact_share"] in (None, 1.0)
    assert shipped.record["outputs_db"] is None or shipped.record["outputs_db"] > AS_WRITTEN


@pytest.mark.parametrize("target", ["onnxruntime", "litert", "openvino", "executorch"])
def test_what_no_byte_holds_around_0_is_refused_before_any_work(target: str) -> None:
    with pytest.raises(TargetError, match=r"no kernels for uint8 weights .* exceeds the integers -128 … 127"):
        prepare(net(), [images(4)], target, weights={"format": "uint8"})
