"""The picture of the network: places in the drawing, what is folded and grouped, hostile and broken records."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import fixtures_measurements as fixtures

from bitport.page.layout import columns
from bitport.page.network import MOST_MODULES, picture

WIDTH, GAP = 150.0, 14.0
Edges = list[tuple[int, int]]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, Edges]:
    count = draw(st.integers(1, 50))
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    found = draw(st.sets(pair.filter(lambda p: p[0] < p[1]), max_size=80)) if count > 1 else set()
    return count, sorted(found)


@given(graphs(), st.integers(1, 12))
def test_every_node_and_edge_has_a_place_and_nothing_overlaps(graph: tuple[int, Edges], longest: int) -> None:
    count, edges = graph
    parts = columns(count, edges, WIDTH, GAP, longest)
    home = {node: i for i, part in enumerate(parts) for node in part.rank}
    assert sorted(home) == list(range(count))
    for part in parts:
        assert 1 <= part.ranks <= longest
        assert sorted(set(part.rank.values())) == list(range(part.ranks))
        for row in range(part.ranks):
            places = sorted(part.x[node] for node in part.rank if part.rank[node] == row)
            assert all(b - a >= WIDTH + GAP - 1e-6 for a, b in pairwise(places))
            assert places[0] >= WIDTH / 2 - 1e-6 and places[-1] <= part.width - WIDTH / 2 + 1e-6
    for a, b in edges:
        assert (home[a], parts[home[a]].rank[a]) < (home[b], parts[home[b]].rank[b])
    drawn = sum(len(part.lines) for part in parts)
    assert drawn + sum(len(part.leaves) for part in parts) == len(edges)
    assert sorted(e for part in parts for e in part.enters) == sorted(
        e for part in parts for e in part.leaves
    )


def test_a_chain_is_straight_and_a_skip_bends_around_it() -> None:
    (part,) = columns(4, [(0, 1), (1, 2), (2, 3)], WIDTH, GAP, 12)
    assert len({round(x, 3) for x in part.x.values()}) == 1
    (part,) = columns(4, [(0, 1), (0, 3), (1, 2), (2, 3)], WIDTH, GAP, 12)
    (skip,) = (line for line in part.lines if len(line) == 4)
    for node in (1, 2):
        x, row = skip[part.rank[node]]
        assert row == part.rank[node] and abs(x - part.x[node]) >= WIDTH / 2


def test_a_long_network_is_cut_where_one_edge_crosses() -> None:
    blocks: Edges = []
    for i in range(0, 24, 3):  # three operators in a row, and a skip around them
        blocks += [(i, i + 1), (i + 1, i + 2), (i + 2, i + 3), (i, i + 3)]
    first, second = columns(25, blocks, WIDTH, GAP, 14)
    assert {source for source, _ in second.enters} == {max(first.rank, key=lambda n: first.rank[n])}


# ------------------------------------------------------------------------------------------------ the picture


def boxes(drawing: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", drawing)


def test_fused_operators_are_drawn_with_their_kernel_and_reasons_are_told() -> None:
    made = picture(fixtures.network())
    assert made is not None
    told = boxes(made.drawing)
    assert len(told) == len(fixtures.layers()) + 2
    assert any("layer1.conv1.relu: relu, done by the same kernel" in text for text in told)
    assert "se.gelu: gelu, computed in float: onnxruntime has no integer kernel for Gelu" in told
    assert "layer1.conv2: conv, computed in int8 by QLinearConv" in told
    assert "conv + relu · int8" in made.drawing
    assert made.legend == [("int", "int8", 18), ("float", "float", 1)]
    assert made.modules == []


def test_a_large_network_is_drawn_as_modules_and_each_kind_once() -> None:
    made = picture(nested(12))
    assert made is not None
    assert 12 < len(boxes(made.drawing)) <= MOST_MODULES
    told = boxes(made.drawing)
    assert any(
        re.match(r"net\.layer\.3\.\w+: \d+ operators; in float: net\.layer\.3\.attention\.softmax", text)
        for text in told
    )
    alike = {module.name: module.alike for module in made.modules}
    assert max(alike.values()) == 11
    assert made.left_out == 0
    inner = next(module for module in made.modules if module.alike == 11)
    assert "softmax" in inner.drawing


PARTS = (
    ("attention.query", "linear"),
    ("attention.softmax", "softmax"),
    ("attention.output", "linear"),
    ("attention.view", "view"),
    ("mlp.up", "linear"),
    ("mlp.gelu", "gelu"),
    ("mlp.down", "linear"),
)


def nested(layers: int) -> dict[str, Any]:
    nodes, edges = [fixtures._node("x", "input", "input", "int8")], []
    for i in range(layers):
        for part, op in PARTS:
            name = f"net.layer.{i}.{part}"
            inside = op in ("linear", "view")
            role = "move" if op == "view" else "compute"
            nodes.append(
                fixtures._node(
                    name, op, role, "int8" if inside else "float", None, None if inside else "no kernel"
                )
            )
            edges.append([len(nodes) - 2, len(nodes) - 1])
    return {"nodes": nodes, "edges": edges}


@pytest.mark.parametrize("count", [80, 400, 1500])
def test_flat_networks_of_any_size_stay_readable_and_small(count: int) -> None:
    rng = random.Random(count)
    nodes = [
        fixtures._node(f"op_{i}", rng.choice(["conv", "add"]), "compute", "int8", "K") for i in range(count)
    ]
    edges = [[i - 1, i] for i in range(1, count)] + [[i - 9, i] for i in range(9, count, 7)]
    made = picture({"nodes": nodes, "edges": edges})
    assert made is not None
    assert len(boxes(made.drawing)) <= MOST_MODULES
    assert len(made.drawing) + sum(len(module.drawing) for module in made.modules) < 400_000


def test_precisions_have_colours_of_their_own() -> None:
    nodes = [
        fixtures._node("a", "conv", "compute", "int8", "K"), fixtures._node("b", "conv", "compute", "int16", "K"),
        fixtures._node("c", "view", "move", "int[-7,7]"), fixtures._node("d", "gt", "index", "bool"),
        fixtures._node("e", "softmax", "compute", "float", None, "why"),
    ]  # fmt: skip
    made = picture({"nodes": nodes, "edges": []})
    assert made is not None
    assert [(name, words, number) for name, words, number in made.legend] == [
        ("int", "int8, int[-7,7]", 1), ("wide", "int16", 1), ("float", "float", 1), ("other", "indices and masks", 1),
    ]  # fmt: skip
    for shade in ("int", "wide", "float", "other"):
        assert f'class="box {shade}"' in made.drawing


def test_hostile_names_are_escaped_and_short() -> None:
    name = "<script>\x1b[31m\"'&" + "very_long." * 50
    nodes = [fixtures._node(name + str(i), "<b>", "compute", "float", None, "<i>\x00") for i in range(200)]
    made = picture({"nodes": nodes, "edges": [[i, i + 1] for i in range(199)]})
    assert made is not None
    whole = made.drawing + "".join(module.drawing for module in made.modules)
    assert not re.search(r"<(script|b|i)>", whole)
    assert "\x1b" not in whole and "\x00" not in whole
    assert max(map(len, boxes(whole))) < 5_000


@pytest.mark.parametrize("network", [None, {}, {"nodes": []}, "text"])
def test_records_without_a_network_have_no_picture(network: object) -> None:
    assert picture(network) is None


def test_edges_that_lead_nowhere_are_left_out() -> None:
    nodes = [fixtures._node(f"n{i}", "add", "compute", "int8", "K") for i in range(3)]
    made = picture({"nodes": nodes, "edges": [[0, 1], [1, 9], [2, 1], [-1, 2], [1, 1]]})
    assert made is not None and made.drawing.count("<path") == 1


def test_narrow_weights_have_a_colour_and_words_of_their_own() -> None:
    def node(name: str, **facts: object) -> dict[str, object]:
        return {"name": name, "op": "linear", "role": "compute", "module": "", "into": None, **facts}

    nodes = [
        node("a", precision="float", weights="int4", kernel="MatMul", reason="its weights alone are narrow"),
        node("b", precision="int8", weights="int4", kernel="MatMulNBits"),
        node("c", precision="int8", weights="int8", kernel="MatMulInteger"),
        node("d", precision="float", weights=None),
    ]
    made = picture({"nodes": nodes, "edges": [[0, 1], [1, 2], [2, 3]]})
    assert made is not None
    assert ("stored", "narrow weights, computed in float", 1) in made.legend
    assert {(name, count) for name, _, count in made.legend} == {("stored", 1), ("int", 2), ("float", 1)}
    for words in ("linear · float × int4", "linear · int8 × int4", "linear · int8<", "linear · float<"):
        assert words in made.drawing
    assert "a: linear, computed in float × int4 by MatMul: its weights alone are narrow" in made.drawing
