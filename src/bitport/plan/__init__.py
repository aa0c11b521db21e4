"""rules × graph → Plan; Plan → quantize/dequantize operators."""

from __future__ import annotations

from .decide import decide
from .lower import Lowered, lower
from .model import GIVEN, NodePlan, Plan, TensorPlan
from .options import Override, TensorOptions

__all__ = [
    "GIVEN",
    "Lowered",
    "NodePlan",
    "Override",
    "Plan",
    "TensorOptions",
    "TensorPlan",
    "decide",
    "lower",
]
