"""What runtimes get wrong, on the runtimes: where one does no longer, what works around it can go."""

from __future__ import annotations

import pytest

from bitport.targets._base import KnownGap
from bitport.targets.executorch import ExecuTorch
from bitport.targets.onnxruntime import OnnxRuntime
from bitport.targets.openvino import OpenVino

GAPS = [
    pytest.param(gap, id=f"{target.name}: {gap.what}")
    for target in (OnnxRuntime, OpenVino, ExecuTorch)
    for gap in target.known_gaps
]


@pytest.mark.parametrize("gap", GAPS)
def test_a_known_gap_is_open(gap: KnownGap) -> None:
    assert gap.link.startswith("https://github.com/")
    found = gap.is_open()
    if found is None:
        pytest.skip("this processor can't show it")
    assert found, f"closed: take out what works around it ({gap.what})"
