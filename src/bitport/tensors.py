"""Named tensors in a .safetensors file, with notes that say what they are. Nothing in such a file can run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .errors import ArtifactError, first_line

NOTES = "notes"  # the entry of the file's header


def write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """The same bytes for the same tensors and notes. Raises OSError."""
    # one entry: the order of several in the file's header would be another one each time
    path.write_bytes(save(dict(tensors), {NOTES: json.dumps(dict(notes))}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, notes). Raises ArtifactError."""
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get(NOTES, "{}"))
        if not isinstance(notes, dict):
            raise ValueError("its notes are no table")
        return load_file(path), notes
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path.name} can't be read ({first_line(error)}): make the artifact again"
        ) from error
