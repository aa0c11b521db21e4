"""Which multiplications run in integers, which islands stay float, how many bytes are stored."""

from __future__ import annotations

from dataclasses import replace

from tests.flow import Net, conv, images, prepare, ship
from torch.nn import functional as F

from bitport.proof.integer import integer_record, layer_bytes


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
