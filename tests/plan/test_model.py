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
    fmt = Format.parse(draw(formats))
    return TensorPlan(
        fmt,
        source,
        range=draw(st.sampled_from(["minmax", {"use": "percentile", "percent": 99.5}]))
        if source in ("measured", "weight")
        else "minmax",
        members=tuple(draw(st.lists(names, max_size=3))),
        of=("x",) if source == "scaled" else (),
        factor=draw(st.floats(1e-3, 1e3)) if source == "scaled" else 1.0,
        bounds=(0.0, 1.0) if source == "fixed" else None,
        scale=scale if known else None,
        zero_point=torch.full_like(scale, max(fmt.low, -3), dtype=torch.int32) if known else None,
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


# ------------------------------------------------------------------------------------------------ scales of groups


def groups(text: str, scale: torch.Tensor, zero_point: torch.Tensor, **more: object) -> TensorPlan:
    return TensorPlan(
        Format.parse(text), "weight", members=("w",), scale=scale, zero_point=zero_point, **more
    )  # type: ignore[arg-type]


@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([0, 7, -128, 128, 30000]),
    st.integers(0, 2**32 - 1),
)
def test_arrays_come_back_to_the_bit(channels: int, count: int, largest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-126, 126, (channels, count), generator=generator)
    scale = torch.ldexp(torch.rand(channels, count, generator=generator) + 1, exponents)
    zero_point = (torch.randint(0, 2, (channels, count), generator=generator) * largest).to(torch.int32)
    tie = groups("int16 group(4,0)", scale, zero_point)
    record = json.loads(json.dumps(Plan("t", {}, {"w": tie}, {}).to_record()))
    small = bool(((zero_point >= -128) & (zero_point <= 127)).all()) and zero_point.numel() > 0
    assert record["ties"]["w"]["zero_point"]["type"] == ("i1" if small else "i4")
    back = Plan.from_record(record).ties["w"]
    assert back.scale is not None and back.zero_point is not None
    assert torch.equal(back.scale, scale) and back.scale.dtype == torch.float32
    assert torch.equal(back.zero_point, zero_point) and back.zero_point.dtype == torch.int32


def test_the_table_of_a_codebook_comes_back() -> None:
    table = torch.tensor([-1.0, -0.1, 0.0, 0.7])
    tie = groups("codebook(4)", torch.tensor(0.3), torch.tensor(0, dtype=torch.int32), table=table)
    back = Plan.from_record(json.loads(json.dumps(Plan("t", {}, {"w": tie}, {}).to_record()))).ties["w"]
    assert back.table is not None and torch.equal(back.table, table)


ARRAY = {"type": "f4", "shape": [2, 1], "base64": "AACAPwAAAEA="}
ZEROS = {"type": "i1", "shape": [2, 1], "base64": "AAA="}
GROUPED = {
    "format": "int4 group(4,0)",
    "source": "weight",
    "members": ["w"],
    "scale": ARRAY,
    "zero_point": ZEROS,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": {**ARRAY, "shape": [1, 2]}}, "scales .* and zero points"),
        ({"scale": {**ARRAY, "shape": [3, 1]}}, "ValueError"),
        ({"scale": {**ARRAY, "shape": [2]}}, "is no tensor of parameters"),
        ({"scale": {**ARRAY, "shape": [-2, -1]}}, "is no tensor of parameters"),
        ({"scale": {**ARRAY, "shape": [2**40, 2**40]}}, "ValueError"),
        ({"scale": {**ARRAY, "type": "O"}}, "'O' of shape .* is no tensor of parameters"),
        ({"scale": {**ARRAY, "type": "f8"}}, "is no tensor of parameters"),
        ({"scale": {**ARRAY, "base64": "AACAPwAAAEA"}}, "padding"),
        ({"scale": {**ARRAY, "base64": "AACAPw!AAEA="}}, "Error"),
        ({"scale": {**ARRAY, "base64": "AACAPw=="}}, "ValueError"),
        ({"scale": {**ARRAY, "base64": "AADAfwAAAEA="}}, "not a finite positive number"),  # NaN
        ({"scale": {**ARRAY, "base64": "AACAfwAAAEA="}}, "not a finite positive number"),  # infinite
        ({"scale": {**ARRAY, "base64": "AACAvwAAAEA="}}, "not a finite positive number"),  # −1
        ({"scale": {"type": "f4", "shape": [2, 1]}}, "KeyError"),
        ({"zero_point": {**ZEROS, "shape": [1, 2]}}, "scales .* and zero points"),
        ({"zero_point": {**ZEROS, "base64": 3}}, "TypeError"),
        ({"zero_point": {**ZEROS, "base64": "B38="}}, "zero point.* outside"),  # 127 in 4 bits
        ({"format": "int4 channel(0)"}, "scales .* and zero points"),
        ({"scale": [[1.0], [2.0]], "zero_point": [[0.5], [0]], "format": "int4"}, "scales .* and zero points"),
        ({"table": [1.0, 2.0]}, "a table of values that doesn't fit"),
        ({"format": "codebook(4) group(4,0)"}, "a table of values that doesn't fit"),
        ({"format": "codebook(2) group(4,0)", "table": [1.0]}, "a table of values that doesn't fit"),
        ({"format": "codebook(2) group(4,0)", "table": [1.0, float("nan")]}, "a table of values"),
        ({"format": "codebook(2) group(4,0)", "table": [[1.0], [2.0]]}, "a table of values"),
    ],
)  # fmt: skip
def test_forged_arrays_are_refused(change: dict[str, object], said: str) -> None:
    record = {"target": "null", "edges": [], "ties": {"w": GROUPED}, "nodes": {}}
    assert Plan.from_record(record).ties["w"].parameters()[0].tolist() == [[1.0], [2.0]]
    with pytest.raises(ArtifactError, match=rf"the plan is malformed \(.*{said}.*\): make it again"):
        Plan.from_record({**record, "ties": {"w": {**GROUPED, **change}}})
