"""The command line: `bitport inspect | compress | verify | diff | report | requantize | dequantize | doctor | list …`.

Exit codes: 0 holds · 1 error · 2 usage · 3 a gate failed or is undecided · 75 interrupted, run again.
"""

from __future__ import annotations

from . import difference, doctor, recovery  # their commands join the group
from .commands import cli, main

__all__ = ["cli", "difference", "doctor", "main", "recovery"]
