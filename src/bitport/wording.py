"""Quantities as people read them: bytes, times, counts, scores. A leaf; the verdict, the report and the
terminal say the same number in the same words because all three ask here.

Names of layers come from strangers' files, so `plain` takes out what could disturb a terminal or a page.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

ABSENT = "–"


def size(count: float | None) -> str:
    """Bytes in decimal units: 812 B, 34.5 kB, 1.2 MB."""
    if count is None:
        return ABSENT
    value, unit = _scaled(float(count), ("B", "kB", "MB", "GB", "TB"))
    return f"{value:.0f} B" if unit == "B" else f"{_three(value)} {unit}"


def milliseconds(ms: float | None) -> str:
    """A time given in milliseconds: 85 µs, 0.76 ms, 12.3 ms, 1.24 s."""
    if ms is None:
        return ABSENT
    if ms < 0.0995:
        return f"{ms * 1000:.0f} µs"
    return f"{_three(ms)} ms" if ms < 999.5 else f"{_three(ms / 1000)} s"


def count(number: float | None) -> str:
    """A whole number with separators: 1,234,567."""
    return ABSENT if number is None else f"{round(number):,}"


def large(number: float | None) -> str:
    """A large count in three digits: 812, 34.5 k, 1.23 M, 4.56 G."""
    if number is None:
        return ABSENT
    value, unit = _scaled(float(number), ("", "k", "M", "G", "T"))
    return f"{_three(value)} {unit}" if unit else f"{value:.0f}"


def about(number: float) -> str:
    """A number nobody knows better than to one digit, rounded up: 3,512 → 4,000."""
    if number <= 10:
        return count(math.ceil(number))
    step = 10 ** math.floor(math.log10(number))
    return count(math.ceil(number / step) * step)


def percent(share: float | None, digits: int = 1) -> str:
    """A share 0–1 as a percentage; what is not everything never rounds up to 100 %, nor something to 0 %."""
    if share is None:
        return ABSENT
    text = f"{share * 100:.{digits}f}"
    if (share < 1 and float(text) >= 100) or (share > 0 and float(text) <= 0):
        if digits < 6:
            return percent(share, digits + 1)
        return "99.9999 %" if share > 0.5 else "0.0001 %"
    return f"{text.removesuffix('.0')} %"


def times(ratio: float | None) -> str:
    """A ratio with two or three digits: 0.29×, 2.3×, 12×."""
    if ratio is None:
        return ABSENT
    return f"{ratio:.2f}×" if ratio < 1.995 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def score(value: float | None, binary: bool) -> str:
    """A metric's value: a percentage where each sample is right or wrong, else four significant digits."""
    if value is None:
        return ABSENT
    return f"{value * 100:.2f} %" if binary else f"{value:.4g}"


def change(value: float | None, binary: bool) -> str:
    """A difference of two metric values: percentage points where each sample is right or wrong."""
    if value is None:
        return ABSENT
    text = f"{value * 100:.2f}" if binary else f"{value:.3g}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def loss(value: float, binary: bool, unit: str = "") -> str:
    """A loss in words, because nobody knows which way the sign of a drop points: 0.11 points worse."""
    text = change(abs(value), binary)
    if not text.strip("0."):
        return "no change"
    return f"{text} {unit}{'worse' if value > 0 else 'better'}"


def losses(interval: Sequence[float], binary: bool) -> str:
    """An interval of losses in words: between 0.71 better and 0.42 worse."""
    low, high = interval
    return f"between {loss(low, binary)} and {loss(high, binary)}"


def bound(value: float, binary: bool) -> str:
    """An upper bound of a loss, rounded up: the words never promise more than the number. At least 0."""
    scale = 1e4 if binary else 10.0 ** (2 - math.floor(math.log10(value))) if value > 0 else 1.0
    # the small allowance undoes binary rounding: 0.002 is 20.000000000000004 of 1e-4
    return change(max(0.0, math.ceil(value * scale - 1e-9) / scale), binary)


def decibel(value: float | None) -> str:
    """A signal-to-noise ratio in dB."""
    return ABSENT if value is None else f"{value:.1f} dB"


def threads(number: int | None) -> str:
    """1 thread, 4 threads."""
    return ABSENT if number is None else f"{number} thread" + ("" if number == 1 else "s")


def plain(text: object, limit: int = 200) -> str:
    """`text` on one line without control, bidirectional or other invisible characters (shown as \\u001b …),
    cut in the middle to `limit` characters, so that a hostile name can neither move the cursor nor hide."""
    out = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _escape(c) for c in str(text))
    return out if len(out) <= limit else f"{out[: limit // 2]}…{out[-(limit - limit // 2 - 1) :]}"


def tail(name: str, limit: int) -> str:
    """The end of a dotted name, because it tells more than the beginning: as many of its last parts as fit."""
    parts = name.split(".")
    short = parts.pop()
    while parts and len(parts[-1]) + 1 + len(short) <= limit:
        short = f"{parts.pop()}.{short}"
    return short if len(short) <= limit else f"{short[: limit // 2]}…{short[-(limit - limit // 2 - 1) :]}"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _scaled(value: float, units: Sequence[str]) -> tuple[float, str]:
    """(value in the unit that leaves at most three digits before the point, that unit)"""
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return value, units[power]


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
