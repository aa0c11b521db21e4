"""What the contest has found, small enough to lie beside the code: who was right on which sample.

One file for each trained network, `NETWORK-SEED.json`: {network, cpu, reference, results}. `network` is a digest of its
weights, `reference` holds the float network's scores, `results` those of each entrant in each cell, with seconds,
versions and what the run depended on (`key`). A run of all seeds takes hours; so seeds may be run one by one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .judge import Scores

Result = dict[str, Any]


@dataclass
class Record:
    """What everybody did with one trained network. results: by entrant and cell."""

    network: str
    cpu: str
    reference: str
    results: dict[str, Result] = field(default_factory=dict)


def place(folder: Path, network: str, seed: int) -> Path:
    return folder / f"{network}-{seed}.json"


def read(path: Path) -> Record | None:
    return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=0, sort_keys=True) + "\n", encoding="utf-8")


def pack(scores: Scores) -> str:
    """Scores as text: a bit each where all are 0 or 1, else float32."""
    binary = bool(np.isin(scores, (0, 1)).all())
    raw = np.packbits(scores.astype(bool)).tobytes() if binary else scores.astype(np.float32).tobytes()
    return (
        f"{'bits' if binary else 'float32'} {len(scores)} {base64.b85encode(zlib.compress(raw, 9)).decode()}"
    )


def unpack(text: str) -> Scores:
    kind, count, coded = text.split(" ")
    raw = zlib.decompress(base64.b85decode(coded))
    if kind == "bits":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=int(count)).astype(np.float64)
    return np.frombuffer(raw, np.float32).astype(np.float64)


def digest(state: Path) -> str:
    """Of a state dict's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(torch.load(state, weights_only=True).items()):
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]
