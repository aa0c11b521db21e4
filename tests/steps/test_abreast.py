"""How much of the data goes through two networks at once."""

from __future__ import annotations

import pytest
import torch
from tests.flow import Net, conv, prepare

from bitport.artifact import make_target
from bitport.steps import _abreast
from bitport.steps._abreast import ALIVE, Abreast, affordable


def test_fewer_batches_go_through_where_activations_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))
    batches = [(torch.full((2, 3, 8, 8), float(index)),) for index in range(10)]
    prepared = prepare(net, [batch[0] for batch in batches], "null")
    largest = 2 * 8 * 8 * 8 * 4  # bytes of what `a` makes
    assert affordable(prepared.reference, batches) == batches
    monkeypatch.setattr(_abreast, "MOST", 5 * ALIVE * largest)
    found = affordable(prepared.reference, batches)
    assert [int(batch[0].max()) for batch in found] == [0, 2, 4, 6, 8]
    monkeypatch.setattr(_abreast, "MOST", 1)
    assert len(affordable(prepared.reference, batches)) == 1
    monkeypatch.setattr(_abreast, "MOST", 3 * ALIVE * largest)
    real = prepared.reference
    assert len(Abreast(real, real, prepared.plan, make_target("null").arithmetic(), batches).runs) == 3
