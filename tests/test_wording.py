from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitport import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (5e15, "5000 TB")],
)
def test_size(value: float | None, text: str) -> None:
    assert wording.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "50 µs"), (0.76, "0.76 ms"), (12.34, "12.3 ms"), (999.6, "1.00 s"), (None, "–")],
)
def test_milliseconds(value: float | None, text: str) -> None:
    assert wording.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(812, "812"), (34_500, "34.5 k"), (999_600, "1.00 M"), (None, "–")]
)
def test_large(value: float | None, text: str) -> None:
    assert wording.large(value) == text


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (3512, "4,000"), (4000, "4,000"), (4001, "5,000")])
def test_about_rounds_up(value: float, text: str) -> None:
    assert wording.about(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.123, "12.3 %"), (0.99996, "99.996 %"), (None, "–")],
)
def test_percent(value: float | None, text: str) -> None:
    assert wording.percent(value) == text


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_part_is_never_all_or_nothing(share: float) -> None:
    assert wording.percent(share) not in ("0 %", "100 %")


@given(st.floats(0, 1e6, allow_subnormal=False), st.booleans())
def test_a_bound_is_never_below_the_number(value: float, binary: bool) -> None:
    shown = float(wording.bound(value, binary).replace("−", "-")) / (100 if binary else 1)
    assert shown >= value * (1 - 1e-6) - 1e-12


def test_change_has_a_real_minus_and_no_negative_zero() -> None:
    assert wording.change(-0.0012, True) == "−0.12"
    assert wording.change(-0.000001, True) == "0.00"
    assert wording.change(0.0123, False) == "0.0123"


def test_threads() -> None:
    assert (wording.threads(1), wording.threads(4), wording.threads(None)) == ("1 thread", "4 threads", "–")


def test_plain_shows_what_would_act() -> None:
    assert wording.plain("a\x1b[31mb\u202e\n\x00é") == "a\\u001b[31mb\\u202e\\u000a\\u0000é"


@given(st.text(), st.integers(5, 60))
def test_plain_is_printable_and_short(text: str, limit: int) -> None:
    found = wording.plain(text, limit)
    assert len(found) <= limit
    assert found.isprintable() or " " in found


def test_losses_are_words_and_no_signs() -> None:
    assert wording.loss(-0.0011, True, "points ") == "0.11 points better"
    assert wording.loss(0.0, True) == wording.loss(-1e-9, True) == "no change"
    assert wording.losses((-0.0071, 0.0042), True) == "between 0.71 better and 0.42 worse"


def test_of_a_long_name_the_end_is_kept() -> None:
    assert wording.tail("a.long.way.down.conv1", 10) == "down.conv1"
    assert wording.tail("conv1", 10) == "conv1"
    assert wording.tail("x.scaled_dot_product_attention", 11) == "scale…ntion"
