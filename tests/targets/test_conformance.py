"""`bitport.testing` on the built-in targets, and that it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from bitport import testing
from bitport.numerics.arithmetic import Call
from bitport.rules import Ruleset
from bitport.simulate import Arithmetic
from bitport.targets._base import Target
from bitport.targets.onnxruntime import OnnxRuntime
from bitport.testing import Case, check_target, target_cases, uncovered

# A case of ExecuTorch takes two exports of seconds each: those that are run early have ties and different kernels.
EARLY = ("conv-depthwise-ties", "add-relu-ties")
# What LiteRT's other kernels compute otherwise; what they move stays as it is.
MEASURED = ("conv", "linear", "matmul", "add", "mul")
REFERENCE = ("matmul", "add", "mul", "global_avg_pool")


def is_early(case: Case) -> bool:
    """Ties tell all rounding rules apart; most scales as measured wait for `make test-slow`."""
    if case.target == "executorch":
        return case.id in EARLY
    if case.options and case.kind not in REFERENCE:
        return False
    measured = case.target == "null" or (case.target == "onnxruntime" and case.kind in MEASURED)
    return case.power_of_two or case.mode != "static" or measured


CASES = [
    pytest.param(case, marks=() if is_early(case) else pytest.mark.slow)
    for case in (
        *target_cases("onnxruntime"),
        *target_cases("openvino"),
        *target_cases("litert"),
        *target_cases("litert", {"kernels": "reference"}),
        *target_cases("executorch"),
        # `null` has no rounding of its own that ties could tell apart
        *(case for case in target_cases("null") if not case.power_of_two),
    )
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join([case.target, *case.options.values(), case.id])
)
def test_every_row_of_every_target(case: Case) -> None:
    case.run()


@pytest.mark.parametrize("target", ["null", "onnxruntime", "openvino", "litert", "executorch"])
def test_every_row_has_a_tiny_network(target: str) -> None:
    assert uncovered(target) == set()


class OffByOne(OnnxRuntime):
    def arithmetic(self) -> Arithmetic:
        right = super().arithmetic()

        def wrong(call: Call) -> torch.Tensor:
            result = right.kernels["conv"](call)
            result.flatten()[0] += 1
            return result

        return replace(right, kernels={**right.kernels, "conv": wrong})


class RoundsAway(OnnxRuntime):
    """An add that rounds apart from its zero point, half away from zero: equal except on ties."""

    def arithmetic(self) -> Arithmetic:
        right = super().arithmetic()

        def quantize(values: torch.Tensor, out: Any) -> torch.Tensor:
            scaled = values / out.scale
            away = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
            return (away + out.zero_point).clamp(out.low, out.high).to(torch.int32)

        return replace(
            right, kernels={k: v for k, v in right.kernels.items() if k != "add"}, quantize=quantize
        )


class OtherKernel(OnnxRuntime):
    def rules(self) -> Ruleset:
        right = super().rules()
        return replace(right, rows=tuple(replace(row, kernel="QLinearNothing") for row in right.rows))


def use(monkeypatch: pytest.MonkeyPatch, target: type[Target]) -> None:
    def make(name: str, options: Mapping[str, Any] | None = None) -> Target:
        return target(options)

    monkeypatch.setattr(testing, "make_target", make)


def test_a_wrong_integer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OffByOne)
    with pytest.raises(AssertionError, match=r"conv-plain-measured: .*max_steps"):
        Case("onnxruntime", "conv", "plain", False).run()
    Case("onnxruntime", "linear", "rows", False).run()


def test_power_of_two_scales_tell_rounding_rules_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, RoundsAway)
    Case("onnxruntime", "add", "residual", False).run()  # measured scales let the wrong rule pass
    with pytest.raises(AssertionError, match="max_steps"):
        Case("onnxruntime", "add", "residual", True).run()


def test_a_kernel_that_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OtherKernel)
    with pytest.raises(AssertionError, match="did not fuse it into QLinearNothing: it ran as QLinearConv"):
        Case("onnxruntime", "conv", "plain", False).run()


def test_all_failures_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, OtherKernel)
    plain = {"plain": testing.SPECIMENS["conv"]["plain"]}
    monkeypatch.setattr(testing, "SPECIMENS", {"conv": plain})
    with pytest.raises(AssertionError) as caught:
        check_target("onnxruntime")
    message = str(caught.value)
    assert message.startswith("4 failures in 3 cases of 'onnxruntime'")
    assert "no tiny network for: " in message and "embedding" in message
    for case in ("conv-plain-measured", "conv-plain-ties", "conv-plain-QLinearNothing"):
        assert case in message  # the last one is the row of weights alone
