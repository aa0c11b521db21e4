"""What ExecuTorch 1.5 lacks of what networks ask for."""

from __future__ import annotations

from .._base import KnownGap
from ._sdk import runtime


def _no_histogram() -> bool:
    return not any(name.startswith("aten::histc") for name in runtime()._get_operator_names())


KNOWN_GAPS = (
    KnownGap(
        "no histc, by which mixtures of experts count their tokens (1.5.1)",
        "https://github.com/pytorch/executorch/blob/main/kernels/portable/functions.yaml",
        _no_histogram,
    ),
)
