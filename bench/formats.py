"""What number formats give on ONNX Runtime: the size of files, the speed of dense layers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitport import api
from bitport.recipe import Recipe
from bitport.recipe.model import StepSpec
from bitport.records import Measurement

from . import quantizing
from .nets import Dense, Mlp, seeded
from .table import Row

# (bits, group) → the share of the float file that is wanted
_FILES: Mapping[tuple[int, int], float] = {
    (4, 128): 0.14,
    (4, 32): 0.18,
    (3, 32): 0.145,
    (2, 128): 0.08,
    (2, 32): 0.11,
}


def files() -> list[Row]:
    """Size of the ONNX file against float, weights alone in groups, of a network of Linear layers."""
    count = sum(p.numel() for p in seeded(Mlp).parameters())
    rows = []
    for (bits, group), wanted in _FILES.items():
        ratio = _record(Mlp, _weights(bits, group))["size.ratio"]
        what = f"file, int{bits} in groups of {group} (Linear layers, {count / 1e6:.1f} M parameters)"
        rows.append(Row(what, f"{ratio:.4f}×", f"≤ {wanted:g}×"))
    return rows


def speeds() -> list[Row]:
    """Time of one Linear of 1024 × 1024 against float, batch 1, one thread."""
    asked: list[tuple[str, str | Recipe, str]] = [
        ("dynamic int8", "int8-dynamic", "≥ 2×"),
        ("int4 weights in groups of 32", "int4-weights", "≥ 2.5×"),
        ("int4 weights in groups of 128", _weights(4, 128), ""),
        ("int8 weights in groups of 32", "int8-weights", ""),
        ("int2 weights in groups of 32", "int2-weights", ""),
    ]
    rows = []
    for name, recipe, wanted in asked:
        record = _record(Dense, recipe)
        low, high = record["latency.ci95"]
        value = f"{record['latency.speedup']:.2f}× ({low:.2f}–{high:.2f}), {1000 * record['latency.float_ms']:.0f} µs"
        value += f" → {1000 * record['latency.compressed_ms']:.0f} µs"
        rows.append(Row(f"{name} against float, Linear 1024×1024, batch 1", value, wanted))
    return rows


def weights() -> list[Row]:
    """What it takes to quantize weights without data."""
    tensor = "int8 per channel, 4096×4096"
    return [
        Row(
            f"speed of quantizing weights against a plain copy ({tensor})",
            f"{quantizing.bandwidth():.0%}",
            "≥ 30 %",
        ),
        Row(
            f"its peak memory beside the weights ({tensor})",
            f"{quantizing.memory():.2f}× the tensor",
            "≤ 2×",
        ),
    ]


def _weights(bits: int, group: int) -> Recipe:
    stored: dict[str, Any] = {
        "format": f"int{bits}",
        "granularity": "group",
        "group": group,
        "symmetric": False,
    }
    step = StepSpec("quantize", {"weights": stored, "activations": {"format": "float32"}})
    return Recipe(steps=(step,), name=f"int{bits} group({group})")


def _record(make: type[torch.nn.Module], recipe: str | Recipe) -> Measurement:
    data = [torch.randn(16, 1024, generator=torch.Generator().manual_seed(1))]
    graph = api.load(seeded(make), data[0][:1])
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "a"
        return api.compress(graph, recipe, target="onnxruntime", data=data, out=out).measurements
