"""A file is tried in a process of its own: LiteRT trusts what it reads, and a hostile file ends the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import TargetError, first_line
from ._load import opened


def probe(path: str, kernels: str) -> None:
    """Run the file once on zeros. Raises TargetError where LiteRT says that it can't."""
    try:
        interpreter = opened(Path(path).read_bytes(), 1, kernels)
        for end in interpreter.get_input_details():
            interpreter.set_tensor(end["index"], np.zeros(end["shape"], end["dtype"]))
        interpreter.invoke()
        for end in interpreter.get_output_details():
            interpreter.get_tensor(end["index"])
    except (RuntimeError, ValueError) as error:
        raise TargetError(f"LiteRT can't load {Path(path).name}: {first_line(error)}") from error
