"""What is compared: networks, cells of bits, seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import subjects

SEEDS = (0, 1, 2)
CALIBRATED, TESTED = 256, 10_000  # images
TEXTS, TESTED_TEXTS = 64, 96  # stretches
GPT_STEPS = 500


@dataclass(frozen=True)
class Cell:
    """Bits of weights and activations (None: float); group: weights that share a scale, None: a channel's."""

    name: str
    weights: int
    activations: int | None = None
    group: int | None = None
    per_tensor: bool = False


STATIC = (Cell("W8A8", 8, 8), Cell("W4A8", 4, 8), Cell("W4A4", 4, 4), Cell("W2A8", 2, 8))
PER_TENSOR = Cell("W8A8 per tensor", 8, 8, per_tensor=True)
GROUPS = tuple(
    Cell(f"W{bits}, groups of {group}", bits, None, group) for bits in (4, 3, 2) for group in (32, 128)
)
CELLS: Mapping[str, tuple[Cell, ...]] = {
    "thin": STATIC,
    "thin-twin": (PER_TENSOR, *STATIC[2:]),
    "mobile": STATIC,
    "mobile-twin": (PER_TENSOR, *STATIC),
    "vit": STATIC,
    "gpt": GROUPS,
}
TITLES = {
    "thin": "thin residual CNN",
    "thin-twin": "its rescaled twin",
    "mobile": "depthwise + SE",
    "mobile-twin": "its rescaled twin (depthwise)",
    "vit": "vision transformer",
    "gpt": "byte GPT",
}
TRAINED: Mapping[str, Callable[[int], nn.Module]] = {
    "thin": lambda seed: subjects.trained(subjects.ThinNet, seed, rate=3e-3, epochs=8),
    "mobile": lambda seed: subjects.trained(subjects.MobileNet, seed, rate=3e-3, epochs=8),
    "vit": lambda seed: subjects.trained(subjects.VisionTransformer, seed, rate=1.5e-3, epochs=14),
    "gpt": lambda seed: subjects.trained_gpt(seed, GPT_STEPS),
}


def state_of(network: str, seed: int, folder: Path) -> Path:
    """The file with the trained network's weights; trained first where it isn't there. The twin has its original's."""
    base = network.removesuffix("-twin")
    path = folder / "networks" / f"{base}-{seed}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = path.with_suffix(".new")
        torch.save(TRAINED[base](seed).state_dict(), waiting)
        waiting.rename(path)
    return path


def data_of(network: str, seed: int, folder: Path) -> dict[str, Path]:
    """calibration, test and labels as .npy files; what is calibrated on differs with the seed, the test doesn't."""
    kind = "text" if network == "gpt" else "images"
    place = folder / "data"
    found = {
        "calibration": place / f"{kind}-{seed}.npy",
        "test": place / f"{kind}-test.npy",
        "labels": place / f"{kind}-labels.npy",
    }
    if not all(path.exists() for path in found.values()):
        place.mkdir(parents=True, exist_ok=True)
        for name, array in _made(kind, seed).items():
            np.save(found[name], array)
    return found


def _made(kind: str, seed: int) -> dict[str, Any]:
    if kind == "text":
        stretches = subjects.windows(TESTED_TEXTS, 4, test=True, length=subjects.CONTEXT + 1).numpy()
        calibration = subjects.windows(TEXTS, 3 + 10 * seed, test=False).numpy()
        return {
            "calibration": calibration,
            "test": stretches[:, :-1].copy(),
            "labels": stretches[:, 1:].copy(),
        }
    test, labels = subjects.digits(TESTED, 2, test=True)
    images, _ = subjects.digits(CALIBRATED, 9 + 10 * seed, test=False)
    return {"calibration": images.numpy(), "test": test.numpy(), "labels": labels.numpy()}
