"""A refactor proves that it changed nothing. Regenerate on purpose: `python -m tests.regenerate_golden`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.flow import prepare
from tests.regenerate_golden import COUNTED, GOLDEN, HASHED, AnyHost, counts, hashes
from torch import nn

REMEDY = "if that is intended: python -m tests.regenerate_golden"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())  # type: ignore[no-any-return]


def test_the_golden_file_is_about_these_networks(golden: dict[str, Any]) -> None:
    assert set(golden["hashes"]) == set(HASHED) and set(golden["operators"]) == set(COUNTED)


@pytest.mark.parametrize("name", HASHED)
def test_plan_and_file_are_the_same_bytes(name: str, golden: dict[str, Any]) -> None:
    found = hashes(name)
    assert found["plan"] == golden["hashes"][name]["plan"], f"the plan of {name!r} changed; {REMEDY}"
    assert found["model"] == golden["hashes"][name]["model"], f"the file of {name!r} changed; {REMEDY}"


@pytest.mark.parametrize("name", COUNTED)
def test_operators_of_the_optimized_file(name: str, golden: dict[str, Any]) -> None:
    assert counts(name) == golden["operators"][name], f"other operators run for {name!r}; {REMEDY}"


@pytest.mark.parametrize("build", HASHED.values())
def test_golden_numbers_are_exact_in_any_order(build: Any) -> None:
    # what makes the hashes independent of the processor: float32 and float64 give the very same ranges
    model: nn.Module
    data: torch.Tensor
    model, data = build()
    single = prepare(model, [data], AnyHost(), activations={"range": "minmax"}).reference
    double = single.clone()
    double.gm.double()
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        single.run(data, on_value=lambda node, value: values.__setitem__(single.name(node), value))
        double.run(
            data.double() if data.is_floating_point() else data,
            on_value=lambda node, value: values.__setitem__(f"{double.name(node)} in float64", value),
        )
    compared = 0
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and f"{name} in float64" in values:
            assert torch.equal(value.double(), values[f"{name} in float64"].double()), name
            compared += 1
    assert compared > 8
