"""Batches to learn from and batches to judge by, and the error that is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.flow import Net, context, conv, images, prepare
from torch.nn import functional as F

from bitport.data import Source
from bitport.steps import _judge
from bitport.steps._judge import Judge, parted


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (3, 1), (4, 1), (8, 2), (15, 3), (16, 4)])
def test_the_last_quarter_of_the_batches_is_held_back(count: int, kept: int) -> None:
    graph = prepare(Net(lambda m, x: m.a(x), a=conv()), [images(2)]).graph
    data = [torch.full((2, 3, 8, 8), float(i)) for i in range(count)]
    source = Source(data, role="calibration", names=["x"], labels="ignored")
    learnt, judged = ([float(x.flatten()[0]) for (x,) in part] for part in parted(source, graph, 1000))
    assert learnt + judged == list(range(count)) and len(judged) == kept
    assert len(parted(source, graph, 4)[0]) == 1, "no more samples than are asked for"


def test_a_single_batch_is_cut() -> None:
    graph = prepare(Net(lambda m, x: m.a(x), a=conv()), [images(2)]).graph
    source = Source([images(8)], role="calibration", names=["x"], labels="ignored")
    (learnt,), (judged,) = parted(source, graph, 1000)
    assert (len(learnt[0]), len(judged[0])) == (6, 2)


def test_the_error_is_noise_against_signal_of_the_float_outputs() -> None:
    net = Net(lambda m, x: (m.b(F.relu(m.a(x))), x.argmax(1)), a=conv(), b=conv(8, 4))
    data = [images(4), images(2)]
    prepared = prepare(net, data, weights={"format": "int4"})
    settings = context(prepared.graph, prepared.target, data)
    found = Judge(prepared.graph, settings.arithmetic, [(x,) for x in data]).error(
        prepared.reference, prepared.plan
    )
    real = torch.cat([net(x)[0].detach().flatten() for x in data])
    out = torch.cat([prepared.simulator().run((x,))[0].flatten() for x in data])
    assert found == pytest.approx(float((real - out).square().sum() / real.square().sum()), rel=1e-5)
    assert found > 0


@pytest.mark.parametrize(("room", "runs"), [(2**20, 2), (4 * 4 * 8 * 8 * 4, 3), (0, 4)])
def test_what_the_float_network_makes_of_a_batch_is_kept_where_it_is_small(
    room: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(lambda m, x: m.a(x), a=conv(3, 4))
    data = [images(4), images(4)]
    prepared = prepare(net, data, weights={"format": "int4"})
    settings = context(prepared.graph, prepared.target, data)
    seen: list[Any] = []
    run = prepared.graph.run
    monkeypatch.setattr(_judge, "KEPT", room)
    monkeypatch.setattr(prepared.graph, "run", lambda *inputs: seen.append(inputs) or run(*inputs))
    judge = Judge(prepared.graph, settings.arithmetic, [(x,) for x in data])
    first, second = (judge.error(prepared.reference, prepared.plan) for _ in range(2))
    assert first == second > 0 and len(seen) == runs
