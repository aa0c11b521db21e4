"""The Plan as data."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitport.errors import ArtifactError, GraphError
from bitport.formats import Format
from bitport.graph import Edge
from bitport.plan import NodePlan, Plan, TensorPlan
from bitport.plan.constants import settle

scales = st.floats(min_value=2.0**-100, max_value=2.0**100, width=32)
names = st.text("abc.#0/", min_size=1, max_size=6)
formats = st.sampled_from(["int8", "int8n symmetric", "int4 symmetric channel(0)", "uint8", "int16"])


@st.composite
def ties(draw: st.DrawFn) -> TensorPlan:
    source = draw(st.sampled_from(["measured", "weight", "fixed", "scaled"]))
    count = draw(st.integers(0, 3))
    values = draw(st.lists(scales, min_size=count, max_size=count)) if count else draw(scales)
    scale = torch.tensor(values, dtype=torch.float32)
    known = draw(st.booleans())
    return TensorPlan(
        Format.parse(draw(formats)),
        source,
        range=draw(st.sampled_from(["minmax", {"use": "percentile", "percent": 99.5}]))
        if source in ("measured", "weight")
        else "minmax",
        members=tuple(draw(st.lists(names, max_size=3))),
        of=("x",) if source == "scaled" else (),
        factor=draw(st.floats(1e-3, 1e3)) if source == "scaled" else 1.0,
        bounds=(0.0, 1.0) if source == "fixed" else None,
        scale=scale if known else None,
        zero_point=torch.zeros_like(scale, dtype=torch.int32) - 3 if known else None,
    )


@given(st.dictionaries(names, ties(), max_size=4), st.data())
def test_a_record_gives_the_same_plan_back(known: dict[str, TensorPlan], data: st.DataObject) -> None:
    edges = {}
    if any(tie.of for tie in known.values()):
        known["x"] = TensorPlan(Format.parse("int8"), "measured")  # what those follow from
    if known:
        for slot in range(data.draw(st.integers(0, 4))):
            edges[Edge(data.draw(names), data.draw(names), slot)] = data.draw(st.sampled_from(sorted(known)))
    nodes = {"n": NodePlan("QGemm", None, "compute", "relu"), "relu": NodePlan(absorbed_by="n")}
    plan = Plan("t", edges, known, nodes)
    back = Plan.from_record(json.loads(json.dumps(plan.to_record())))
    assert back.edges == plan.edges and back.nodes == plan.nodes and list(back.ties) == list(plan.ties)
    for name, tie in plan.ties.items():
        other = back.ties[name]
        for key, value in vars(tie).items():
            found = getattr(other, key)
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value) and found.dtype == value.dtype and found.shape == value.shape
            else:
                assert found == value, key


def test_the_empty_plan_quantizes_nothing() -> None:
    plan = Plan.empty("null")
    assert (
        not plan.quantized
        and plan.tie_of("x") is None
        and plan.node("x") == NodePlan()
        and not plan.measured()
    )
    assert Plan.from_record(plan.to_record()).to_record() == plan.to_record()
    assert settle(plan).to_record() == plan.to_record()


def test_an_unmeasured_tie_says_what_to_do() -> None:
    tie = TensorPlan(Format.parse("int8"), "measured", members=("conv1",))
    with pytest.raises(GraphError, match="conv1 was never measured: calibrate first"):
        tie.parameters()
    with pytest.raises(GraphError, match="calibrate first"):
        settle(Plan("t", {}, {"conv1": tie}, {}))


def test_derived_ties_are_settled_from_what_they_follow() -> None:
    x = TensorPlan(
        Format.parse("int8"),
        "measured",
        scale=torch.tensor(0.5),
        zero_point=torch.tensor(3, dtype=torch.int32),
    )
    w = TensorPlan(Format.parse("int8 symmetric channel(0)"), "weight", scale=torch.tensor([0.25, 2.0]),
                   zero_point=torch.zeros(2, dtype=torch.int32))  # fmt: skip
    bias = TensorPlan(Format.parse("int32 symmetric channel(0)"), "bias", of=("half", "w"))
    half = TensorPlan(Format.parse("int8"), "scaled", of=("x",), factor=0.5)
    unit = TensorPlan(Format.parse("int8"), "fixed", bounds=(0.0, 1.0))
    # derived ones first: the order of the table must not matter
    done = settle(Plan("t", {}, {"bias": bias, "half": half, "unit": unit, "x": x, "w": w}, {})).ties
    assert float(done["half"].parameters()[0]) == 0.25 and int(done["half"].parameters()[1]) == 3
    assert done["bias"].parameters()[0].tolist() == [0.0625, 0.5]
    assert (float(done["unit"].parameters()[0]), int(done["unit"].parameters()[1])) == (1 / 256, -128)


TIE = {"format": "int8", "source": "measured", "scale": 0.5, "zero_point": 0}
EDGE = {"producer": "x", "consumer": "a", "slot": 0, "tie": "x"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edges": [{**EDGE, "tie": "y"}]}, "tie 'y' is not among the ties"),
        ({"edges": [{**EDGE, "producer": 3}]}, "3 is no name"),
        ({"ties": {"x": {**TIE, "source": "guess"}}}, "'guess' is no source"),
        ({"ties": {"x": {**TIE, "scale": -1.0}}}, "not a finite positive number"),
        ({"ties": {"x": {**TIE, "scale": [1.0, 2.0]}}}, r"scales \[2\] and zero points \[\]"),
        ({"ties": {"x": {**TIE, "zero_point": None}}}, "a scale without a zero point"),
        ({"ties": {"x": {**TIE, "of": ["z"]}}}, "tie 'z' is not among the ties"),
        ({"nodes": {"a": {"kernel": 3}}}, "something else than text"),
        ({"nodes": {"a": None}}, "TypeError"),
        ({"ties": None}, "AttributeError"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_told(change: dict[str, object], said: str) -> None:
    record = {"target": "null", "edges": [EDGE], "ties": {"x": TIE}, "nodes": {}}
    assert Plan.from_record(record).quantized
    with pytest.raises(ArtifactError, match=rf"the plan is malformed \(.*{said}.*\): make it again"):
        Plan.from_record({**record, **change})


def test_a_plan_whose_integers_nobody_carries_is_refused() -> None:
    tie = {"x": TensorPlan(Format.parse("int8"), "measured")}
    conv, move = NodePlan("QLinearConv", role="compute"), NodePlan("", role="move")
    whole = Plan("t", {Edge("x", "a", 0): "x", Edge("m", "a", 1): "x"}, tie, {"a": conv, "m": move})
    assert whole.checked() is whole
    for edges in ({}, {Edge("x", "a", 0): "x"}, {Edge("m", "b", 0): "x"}):
        with pytest.raises(GraphError, match="no edge carries"):
            Plan("t", edges, tie, {"a": conv, "m": move}).checked()
