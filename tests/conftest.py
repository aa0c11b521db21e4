"""Shared fixtures. One thread per worker: tests run in parallel, and integer results must not depend on it."""

from __future__ import annotations

import functools
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

from bitport.proof import cost

settings.register_profile(
    "bitport", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bitport")


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _costs_are_measured_briefly() -> None:
    """Of the tiny networks of tests nobody wants the speed to the percent, or processes that tell what memory they
    take; `small.with_memory` measures that."""
    defaults: Any = cost.latency.__kwdefaults__
    defaults["seconds"], defaults["rounds"] = 0.2, 8
    cost.run_memory = lambda *_, **__: 1


@pytest.fixture(autouse=True, scope="session")
def _exporter_reads_its_operators_once() -> None:
    """`torch.onnx.export` parses the source of its thousand operators anew for each file, a second that a user pays
    twice and the suite a thousand times. Each export gets a copy of what was read once."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry
    read = functools.cache(registry.from_torchlib.__func__)

    def from_torchlib(cls: Any, opset_version: int = _registration._constants.TORCHLIB_OPSET) -> Any:
        made, copy = read(cls, opset_version), cls()
        copy._opset_version = made._opset_version
        copy.functions = {name: list(found) for name, found in made.functions.items()}
        return copy

    registry.from_torchlib = classmethod(from_torchlib)
