"""Alignment of shapes, as properties."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from bitport.graph.shapes import segments


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_segments_cover_both_shapes_in_order_with_equal_products(
    before: list[int], data: st.DataObject
) -> None:
    primes = [p for size in before for p in _factors(size)]
    after: list[int] = []
    while primes:
        count = data.draw(st.integers(1, len(primes)))
        after.append(math.prod(primes[:count]))
        primes = primes[count:]
    found = segments(before, after or [1])
    assert [a for left, _ in found for a in left] == list(range(len(before)))
    assert [a for _, right in found for a in right] == list(range(len(after or [1])))
    for left, right in found:
        assert math.prod(before[a] for a in left) == math.prod((after or [1])[a] for a in right)


def _factors(number: int) -> list[int]:
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found
