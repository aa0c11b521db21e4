"""The report of formats of any width: how weights are stored, what computes them, and what plain rounding gives."""

from __future__ import annotations

import re
from typing import Any

from tests import fixtures_measurements as fixtures
from tests.test_page import BASE, HOSTILE, Page

from bitport.page.page import to_html
from bitport.page.ranges import ranges
from bitport.page.summary import comparison

STORAGE = [
    {
        "format": "int4 group(32,0)",
        "computes_in": "int8, in blocks",
        "tensors": 4,
        "values": 90_000,
        "bytes": 59_062,
        "bits_per_value": 5.25,
    },
    {
        "format": "int4 group(32,0)",
        "computes_in": "float32",
        "tensors": 2,
        "values": 10_000,
        "bytes": 7_500,
        "bits_per_value": 6.0,
    },
]
WHY = "no activation is stored as integers: only float outputs can be compared"
FOLLOWS = {
    "exact_share": None,
    "exact_share_reason": WHY,
    "max_steps": None,
    "outputs_db": 131.25,
    "samples": 64,
    "edges": 0,
}


def weight_only(**changes: Any) -> dict[str, Any]:
    integer = {**BASE["integer"], "mac_share": 0.0, "macs_integer": 0, "kernels": {}}
    return {"storage": STORAGE, "parity": FOLLOWS, "integer": integer, **changes}


def words(**changes: Any) -> str:
    html = re.sub(r"(</(?:td|th|p|span|div|strong)>)", r"\1 ", to_html(fixtures.record(**changes)))
    return " ".join(Page(html).text.split())


def test_storage_and_compute_width_are_told_apart() -> None:
    rows = {row.label: row for row in comparison(fixtures.record(storage=STORAGE))}
    assert (rows["weights"].float, rows["weights"].runtime) == ("400 kB", "66.6 kB")
    assert (
        rows["weights"].change == "5.32 bits a value; computed in int8, in blocks (90 %) and float32 (10 %)"
    )
    text = words(storage=STORAGE)
    assert "int4 group(32,0) int8, in blocks 4 90,000 5.25 59.1 kB" in text
    assert "int4 group(32,0) float32 2 10,000 6.00 7.50 kB" in text


def test_a_record_without_storage_says_nothing_of_it() -> None:
    assert "weights" not in {row.label for row in comparison(fixtures.record())}
    assert "stored and computed" not in words()


def test_cards_of_weights_alone() -> None:
    text = words(**weight_only())
    assert "5.32 bits a weight computed in floats as before" in text
    assert f"131.2 dB outputs against the simulation {WHY}" in text
    assert (
        "Signal-to-noise ratio of the runtime's outputs against the simulated ones: 131.2 dB, on 64 samples"
        in text
    )
    assert "of the MACs in integers" not in text.partition("Before and after")[0]
    equal = words(**weight_only(parity={**FOLLOWS, "outputs_db": None}))
    assert "The outputs are equal, on 64 samples" in equal


def test_where_some_layers_compute_in_integers_their_share_is_told() -> None:
    integer = {**BASE["integer"], "mac_share": 0.618}
    assert "61.8 % of the MACs in integers" in words(**weight_only(integer=integer))


def test_plain_rounding_stands_beside_the_error() -> None:
    plain = {"samples": 64, "sqnr_db": 23.7, "plain_sqnr_db": 25.9, "holds": True}
    text = words(plain=plain)
    assert "At the outputs: 23.7 dB. Plain rounding" in text and "would give 25.9 dB" in text
    for lacking in ({**plain, "plain_sqnr_db": None}, {**plain, "sqnr_db": None}, None):
        assert "Plain rounding" not in words(plain=lacking)


def test_shares_of_the_loss_stand_in_the_table_where_they_were_measured() -> None:
    rows = [{**row, "loss_share": 0.625 if index == 1 else None} for index, row in enumerate(BASE["layers"])]
    text = words(layers=rows)
    assert "of the loss" in text and "62.5 %" in text and "bitport doctor" in text
    assert "of the loss" not in words() and "bitport doctor" not in words()


def test_a_requantized_artifact_says_what_it_comes_from() -> None:
    origin = {
        "recipe": "int8",
        "target": "null",
        "formats": ["int8 symmetric channel(0)"],
        "metric": "top1",
        "drop": 0.012,
    }
    text = words(origin=origin)
    assert (
        "Made from the artifact int8 on null (int8 symmetric channel(0)); its own loss of top-1: 0.012 worse."
        in text
    )
    assert "its own loss" not in words(origin={**origin, "drop": None})
    assert HOSTILE not in to_html(fixtures.record(origin={**origin, "recipe": HOSTILE}))


def test_groups_have_their_scales_and_nothing_to_draw_has_a_reason() -> None:
    row = {**BASE["distributions"][0], "granularity": "group"}
    made = ranges(fixtures.record(distributions=[row]))
    assert made is not None
    assert "a scale per group" in [*made.weights, *made.activations][0].text
    text = words(distributions=None, distributions_reason="nothing is stored as integers")
    assert "nothing is stored as integers" in text
