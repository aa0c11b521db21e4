"""The command line: `bitport inspect | compress | verify | report | requantize | dequantize | doctor | list | demo`.

Exit codes: 0 holds · 1 error · 2 usage · 3 a gate failed or is undecided · 75 interrupted, run again.
"""

from __future__ import annotations

from . import doctor, recovery  # their commands join the group
from .commands import cli, main

__all__ = ["cli", "doctor", "main", "recovery"]
