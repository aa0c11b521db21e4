from __future__ import annotations

from typing import Any

import pytest
from tests.fixtures_measurements import record

from bitport.proof.verdict import judge, subject

BASE = record()


def task(**changes: Any) -> dict[str, Any]:
    return record(task={**BASE["task"], **changes})


def latency(**changes: Any) -> dict[str, Any]:
    return record(latency={**BASE["latency"], **changes})


def test_a_result_that_holds() -> None:
    found = judge(record())
    assert found["passed"] is True
    assert found["sentence"] == (
        "int8 on onnxruntime keeps top-1 within 0.41 points of the float network (95 % sure); "
        "its file is 0.26× the size, and it runs 2.3× as fast on 1 thread."
    )
    assert found["gates"] == [{"name": "accuracy", "value": 0.00111, "limit": 0.005, "verdict": "holds"}]
    assert BASE["verdict"] == found


def test_the_bound_is_rounded_up() -> None:
    assert "within 0.41 points" in judge(task(ci95=[-0.001, 0.004001]))["sentence"]
    assert "within 0.40 points" in judge(task(ci95=[-0.001, 0.004]))["sentence"]
    assert "within 0.00 points" in judge(task(ci95=[-0.003, -0.001]))["sentence"]


def test_rejected_comes_first() -> None:
    found = judge(task(verdict="fails", drop=0.031, ci95=[0.024, 0.038]))
    assert found["passed"] is False
    assert found["sentence"].startswith("rejected: int8 on onnxruntime loses 3.10 points of top-1")
    assert "more than the 0.50 points allowed" in found["sentence"]


def test_undecided_says_how_many_samples_would_decide() -> None:
    found = judge(task(verdict="undecided", drop=0.004, ci95=[-0.001, 0.013], samples_needed=3512))
    assert found["passed"] is False
    assert found["sentence"].startswith("undecided: ")
    assert "about 4,000 samples would decide" in found["sentence"]


def test_undecided_for_good() -> None:
    found = judge(task(verdict="undecided", drop=0.004, ci95=[-0.001, 0.013], samples_needed=None))
    assert "would decide" not in found["sentence"]


def test_no_limit_is_no_gate() -> None:
    found = judge(task(verdict=None, max_drop=None))
    assert found["passed"] is True
    assert found["gates"] == []
    assert "no limit was set" in found["sentence"]


def test_a_metric_that_is_no_share_has_no_points() -> None:
    found = judge(task(metric="nll", binary=False, drop=0.01, ci95=[0.0, 0.0213], higher_is_better=False))
    assert "keeps nll within 0.0213 of the float network (95 % sure)" in found["sentence"]


def test_without_evaluation_the_reason_is_said() -> None:
    found = judge(record(task=None, task_reason="no labels came with the data"))
    assert found["passed"] is True
    assert "accuracy not measured (no labels came with the data)" in found["sentence"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "not faster", "speedup": 1.01}, "not faster than float (1.01× its speed on 1 thread)"),
        (
            {"verdict": "slower", "speedup": 0.61, "threads": 4},
            "slower than float (0.61× its speed on 4 threads)",
        ),
        ({"speedup": None}, "its speed was not measured"),
    ],
)
def test_speed_is_never_flattered(changes: dict[str, Any], words: str) -> None:
    assert words in judge(latency(**changes))["sentence"]


@pytest.mark.parametrize(("verdict", "head"), [("fails", "rejected: "), ("undecided", "undecided: ")])
def test_further_gates(verdict: str, head: str) -> None:
    gate = {"name": "latency_ms", "value": 3.0, "limit": 2.0, "verdict": verdict}
    found = judge(record(), [gate])
    assert found["passed"] is False
    assert found["gates"][1] == gate
    assert found["sentence"].startswith(head)
    assert "latency_ms" in found["sentence"]


def test_hostile_names_stay_on_their_line() -> None:
    assert "\x1b" not in subject({"recipe": "a\x1b[31mb\nc", "target": "t"})
    assert "\n" not in judge(record(recipe={"name": "x\ny"}))["sentence"]


def test_weights_alone_compute_in_floats() -> None:
    stored = [{"format": "nf4 group(64,0)", "computes_in": "float32"}]
    inside = {**BASE["integer"], "mac_share": 0.0}
    found = judge(record(storage=stored, integer=inside))["sentence"]
    assert found.endswith(
        "its file is 0.26× the size, it computes in floats as before, and it runs 2.3× as fast on 1 thread."
    )
    assert "in floats" not in judge(record(storage=stored))["sentence"]
    assert "in floats" not in judge(record(integer=inside))["sentence"]
