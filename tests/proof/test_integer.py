"""Which multiplications run in integers, which islands stay float, how many bytes are stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.flow import Net, Prepared, conv, images, prepare, ship, tokens
from torch import nn
from torch.nn import functional as F

from bitport.proof.integer import integer_record, layer_bytes, storage_record
from bitport.recipe.model import Override
from bitport.targets._base import Inspection


def test_the_integer_record_counts_multiplications_and_names_islands() -> None:
    prepared = prepare(Net(lambda m, x: m.b(F.gelu(m.a(x))), a=conv(), b=conv(8, 4)), [images(8)])
    inspection = ship(prepared, images(4)).inspection
    record = integer_record(prepared.work, prepared.plan, inspection, {"a": 300, "b": 100})
    assert record["mac_share"] == 1.0 and record["macs_integer"] == record["macs_total"] == 400
    assert record["kernels"] == {"QLinearConv": 2}
    assert record["float_ops"] == [
        {"name": "gelu", "op": "gelu", "reason": "ONNX Runtime has no integer GELU", "macs": 0}
    ]
    missed = replace(inspection, missed={"a": "it ran as Conv"})
    record = integer_record(prepared.work, prepared.plan, missed, {"a": 300, "b": 100})
    assert record["mac_share"] == 0.25
    assert {"name": "a", "op": "conv", "reason": "it ran as Conv", "macs": 300} in record["float_ops"]


def test_stored_bytes() -> None:
    prepared = prepare(Net(lambda m, x: m.a(x), a=conv()), [images(8)])
    before, after = layer_bytes(prepared.work, prepared.plan, "a")
    assert before == 4 * (3 * 8 * 9 + 8) and after == 3 * 8 * 9 + 4 * 8 + 4 * 8


# ------------------------------------------------------------------------------------------------ narrow weights

FLOAT = {"format": "float32"}
INSPECTED = Inspection({}, Counter(), integer=frozenset({"simulated"}))


def layers(**options: Any) -> Prepared:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(12, 8), b=nn.Linear(8, 5, bias=False))
    return prepare(net, [tokens(8)], "null", **options)


@pytest.mark.parametrize(
    ("weights", "bits", "size"),
    [
        # codes + scales + zero points, of 96 and of 40 values
        ({"format": "int4", "group": 4, "symmetric": False}, 4 + 32 / 4 + 4 / 4, 136),
        ({"format": "int4", "group": 4}, 4 + 32 / 4, 136),
        ({"format": "int4 group(4) scale(float16)"}, 4 + 16 / 4, 136),
        ({"format": "int8", "granularity": "tensor"}, 8 + 2 * 32 / 136, 136),
        ({"format": "int8"}, 8 + 13 * 32 / 136, 136),
        ({"format": "uint4", "symmetric": False}, 4 + 13 * (32 + 4) / 136, 136),
        ({"format": "int4 bits(8)"}, 8 + 13 * 32 / 136, 136),
        # groups of 5 of rows of 12 and 8: 3 and 2 of them
        ({"format": "int3", "group": 5}, 3 + (8 * 3 + 5 * 2) * 32 / 136, 136),
        ({"format": "mxfp4"}, 4 + 13 * 8 / 136, 136),
        ({"format": "nvfp4"}, 4 + (13 * 8 + 2 * 32) / 136, 136),
        ({"format": "codebook(16)"}, 4 + (13 * 32 + 2 * 16 * 32) / 136, 136),
        ({"format": "float16"}, 16, 136),
        ({"format": "sign", "granularity": "tensor"}, 1 + 2 * 32 / 136, 136),
    ],
    ids=lambda value: str(value),
)
def test_true_bits_of_a_value(weights: dict[str, Any], bits: float, size: int) -> None:
    prepared = layers(weights=weights, activations=FLOAT)
    (row,) = storage_record(prepared.work, prepared.plan, INSPECTED)
    assert row["bits_per_value"] == pytest.approx(bits) and row["bytes"] == -(-round(bits * size) // 8)
    assert row["values"] == size and row["tensors"] == 2 and row["computes_in"] == "float32"
    assert row["format"] == str(prepared.plan.ties["a.weight"].format)


def test_storage_tells_what_is_computed_in() -> None:
    overrides = [Override("b", weights={"format": "int4"}, activations=FLOAT)]
    prepared = layers(overrides=overrides)
    rows = {row["format"]: row for row in storage_record(prepared.work, prepared.plan, INSPECTED)}
    assert {name: row["computes_in"] for name, row in rows.items()} == {
        "int8 symmetric channel(0)": "int8", "int4 symmetric channel(0)": "float32",
    }  # fmt: skip
    assert rows["int8 symmetric channel(0)"]["values"] == 96
    named = replace(INSPECTED, computes={"decoded": "bfloat16"})
    rows = {row["format"]: row for row in storage_record(prepared.work, prepared.plan, named)}
    assert rows["int4 symmetric channel(0)"]["computes_in"] == "bfloat16"
    for weights, computes in (
        ({"format": "int12"}, "int16"),
        ({"format": "int4"}, "int8"),
        ({"format": "e4m3"}, "float32"),
    ):
        static = layers(weights=weights)
        assert {row["computes_in"] for row in storage_record(static.work, static.plan, INSPECTED)} == {
            computes
        }


@pytest.mark.parametrize(
    ("options", "share", "reason"),
    [
        ({}, 1.0, None),
        ({"activations": {"dynamic": True}}, 1.0, None),
        ({"weights": {"format": "int4", "group": 4}}, 1.0, None),
        ({"weights": {"format": "int4", "group": 4}, "activations": FLOAT}, 0.0, "(int4): it computes in float32"),
        # integers times small floats are no integer products
        ({"weights": {"format": "e4m3"}}, 0.0, "(e4m3): it computes in float32"),
        ({"weights": {"format": "nf4"}, "activations": {"dynamic": True}}, 0.0, "(nf4): it computes in float32"),
        ({"overrides": [Override("a", activations=FLOAT)]}, 0.25, "(int8): it computes in float32"),
        ({"overrides": [Override("a", weights=FLOAT)]}, 0.25, "kept in float by the recipe"),
    ],
    ids=str,
)  # fmt: skip
def test_a_product_counts_only_where_both_operands_are_integers(
    options: dict[str, Any], share: float, reason: str | None
) -> None:
    prepared = layers(**options)
    record = integer_record(prepared.work, prepared.plan, INSPECTED, {"a": 300, "b": 100})
    assert record["mac_share"] == share and record["macs_total"] == 400
    reasons = {row["name"]: row["reason"] for row in record["float_ops"]}
    if reason is None:
        assert reasons == {}
    else:
        assert reasons["a"].endswith(reason) and ("b" in reasons) == (share == 0.0)


def test_stored_bytes_of_narrow_weights() -> None:
    prepared = layers(weights={"format": "int4", "group": 4, "symmetric": False}, activations=FLOAT)
    before, after = layer_bytes(prepared.work, prepared.plan, "a")
    assert before == 4 * (96 + 8)
    assert after == 96 // 2 + 24 * 4 + 24 // 2 + 4 * 8  # codes, scales, zero points, a float bias
