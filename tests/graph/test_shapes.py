"""Alignment of shapes, as properties; shapes of what an edit puts in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.frontends.pytorch import load_module
from bitport.graph import shapes
from bitport.graph.shapes import segments
from bitport.graph.simplify import split_attention


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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


def test_an_edit_gives_its_own_operators_shapes_and_they_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = load_module(Attention().eval(), torch.randn(2, 5, 8))
    with monkeypatch.context() as patched:
        patched.setattr(shapes, "propagate", lambda *given: pytest.fail("all shapes were computed again"))
        split_attention(graph)
    assert any(graph.op(node).kind == "softmax" for node in graph.nodes())
    found = [graph.shape(node) for node in graph.nodes()]
    outputs = graph.outputs
    graph.propagate()
    assert [graph.shape(node) for node in graph.nodes()] == found and graph.outputs == outputs
    assert all(shape is None or shape[0] == "batch" for shape in found)


@pytest.mark.parametrize("spoil", ["inputs", "before", "elsewhere"])
def test_where_shapes_around_an_edit_are_missing_all_are_computed(spoil: str) -> None:
    graph = load_module(Attention().eval(), torch.randn(2, 5, 8))
    first, *_, last = graph.nodes()
    del last.meta["val"]
    if spoil == "inputs":
        for node in graph.gm.graph.find_nodes(op="placeholder"):
            del node.meta["val"]
    elif spoil == "before":
        for node in last.all_input_nodes:
            node.meta.pop("val")
        first.meta.pop("val", None)
    else:
        other = load_module(Attention().eval(), torch.randn(2, 5, 8))
        for node, twin in zip(graph.nodes()[:-1], other.nodes(), strict=False):
            node.meta["val"] = twin.meta["val"]
    graph.complete()
    assert graph.shape(last) == ("batch", 5, 8) and graph.shape(graph.nodes()[0]) is not None
