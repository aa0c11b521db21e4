"""ONNX's own node tests through each runtime as float files: right numbers, or an error that is meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.frontends.onnx.test_nodes import Case, cases, opened, passes

from bitport.artifact import make_target
from bitport.errors import BitportError
from bitport.frontends.onnx import load_model, operators
from bitport.plan import Plan
from bitport.targets._base import Target

EACH = 2  # of the tests of one operator
# Doubles are computed as floats, and rows of a softmax that are masked altogether are zeros there.
OTHERWISE = {
    "openvino": ("fullymasked", "mask_nan", "negative_offset", "local_window", "DOUBLE", "mode3", "dynamicq")
}
HALF = ("fp16", "float16", "FLOAT16")  # numbers that are rounded to 11 bits on the way


def chosen(target: str) -> list[Case]:
    known, seen, found = set(operators()), Counter[str](), []
    for case in cases():
        kinds = sorted(case.kinds)
        unlike = any(word in case.name for word in (*OTHERWISE.get(target, ()), *HALF))
        seen["+".join(kinds)] += 1
        if case.kinds <= known and seen["+".join(kinds)] <= EACH and not unlike and passes(case, whole=True):
            found.append(case)
    return found


def arrives(case: Case, target: Target, folder: Path) -> bool | None:
    """Whether the numbers are right; None: refused, with a reason."""
    read, values, _, free = opened(case, case.data[0][0])
    with torch.no_grad():
        graph = load_model(read, values, None)
        wanted = graph.run(*free)
        try:
            target.export(graph, Plan.empty(target.name), folder)
            found = target.open(folder).run(free)
        except BitportError:
            return None
    return all(
        y.shape == x.shape and np.allclose(y.double(), x.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for y, x in zip(found, wanted, strict=True)
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "least"), [("onnxruntime", 0.9), ("openvino", 0.8), ("litert", 0.6)])
def test_numbers_are_right_or_refused(name: str, least: float, tmp_path: Path) -> None:
    target, told = make_target(name, {}), {}
    for index, case in enumerate(chosen(name)):
        (folder := tmp_path / str(index)).mkdir()
        told[case.name] = arrives(case, target, folder)
    wrong = [case for case, right in told.items() if right is False]
    assert not wrong
    assert len(told) > 250
    assert sum(map(bool, told.values())) >= least * len(told)
