"""How fast and how frugal the quantization of weights is: ranges and int8 codes of one tensor, one thread."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import torch

from bitport.formats import Format
from bitport.numerics.codes import encode, fit
from bitport.proof.cost import peak_memory

ROUNDS = 9


def bandwidth(text: str = "int8 symmetric channel(0)", side: int = 4096) -> float:
    """Time of `w.clone()` over the time of fit and encode, float32 [side, side], medians of interleaved rounds.

    1 means as fast as a plain copy. Both sides allocate what they return.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        w, fmt = _weights(side), Format.parse(text)
        copies, quantized = [], []
        for _ in range(ROUNDS):
            copies.append(_seconds(lambda: w.clone()))
            quantized.append(_seconds(lambda: encode(w, fit(w, fmt), torch.int8)))
    finally:
        torch.set_num_threads(threads)
    return sorted(copies)[ROUNDS // 2] / sorted(quantized)[ROUNDS // 2]


def memory(text: str = "int8 symmetric channel(0)", side: int = 4096) -> float:
    """Peak memory of fit and encode above the tensor itself, in sizes of the tensor; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.quantizing", text, str(side)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _weights(side: int) -> torch.Tensor:
    return torch.randn(side, side, generator=torch.Generator().manual_seed(0))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Print the peak for the format and side that are given."""
    torch.set_num_threads(1)
    text, side = sys.argv[1], int(sys.argv[2])
    fmt, small, w = Format.parse(text), _weights(64), _weights(side)
    dtype = torch.int8 if fmt.is_int else torch.uint8
    encode(small, fit(small, fmt), dtype)  # what only the first call loads
    with peak_memory() as peak:
        encode(w, fit(w, fmt), dtype)
    sys.stdout.write(f"{peak.bytes / (4 * w.numel()):.3f}\n")


if __name__ == "__main__":
    main()
