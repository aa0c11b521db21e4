"""A file is tried in a process of its own: what XNNPACK reads of it is trusted, and a hostile one ends the process."""

from __future__ import annotations

from pathlib import Path

import torch

from ._target import EtSession

# as the program numbers them
DTYPES = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16,
    6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip


def probe(path: str) -> None:
    """Run the file once on zeros. Raises TargetError where ExecuTorch says that it can't."""
    session = EtSession(Path(path), 1)
    meta = session.method.method_meta()
    given = []
    for index, (_, sizes, _) in enumerate(session.note["inputs"]):
        dtype = DTYPES[meta.input_tensor_meta(index).dtype()]
        given.append(torch.zeros([1 if size is None else size for size in sizes], dtype=dtype))
    session.run(given)
