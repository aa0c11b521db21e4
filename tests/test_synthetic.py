"""Inputs that are made up: in range, the same for a seed, nearer to what BatchNorms know than noise, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import small
from tests.flow import Net, conv
from torch import Tensor, nn

import bitport
from bitport import synthetic
from bitport.errors import DataError


def trained() -> nn.Module:
    """BatchNorms that know data with means of 3 and small spreads."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    net.train()
    for _ in range(60):
        net(data(32))
    return net.eval()


def data(count: int) -> Tensor:
    return 3 + 0.5 * torch.randn(count, 3, 8, 8).cumsum(-1) / 3


def test_batch_norms_see_what_they_were_trained_on() -> None:
    net = trained()
    made = synthetic.inputs(bitport.load(net, 10 * torch.rand(2, 3, 8, 8)))
    assert [tuple(x.shape) for (x,) in made] == [(synthetic.BATCH, 3, 8, 8)] * 4
    norm = net[1]
    with torch.no_grad():
        noise = [(5 + 1.7 * torch.randn(16, 3, 8, 8),) for _ in range(4)]  # the example's range, as it is
        off = []
        for batches in (made, noise):
            seen = torch.cat([net[0](x) for (x,) in batches]).transpose(0, 1).flatten(1)
            off.append(float(((seen.mean(1) - norm.running_mean) / norm.running_var.sqrt()).abs().mean()))
    assert off[0] < 0.3 * off[1]


def test_the_same_seed_makes_the_same_inputs_and_another_others() -> None:
    graph = bitport.load(trained(), 6 * torch.rand(2, 3, 8, 8))
    first, again, other = (synthetic.inputs(graph, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert bool(torch.isfinite(first[0][0]).all())


def test_floats_stay_in_the_range_of_the_example() -> None:
    graph = bitport.load(trained(), torch.rand(2, 3, 8, 8))
    low, high = graph.examples[graph.inputs[0].name]
    for (x,) in synthetic.inputs(graph):
        assert low <= float(x.min()) and float(x.max()) <= high


def test_tokens_are_rows_of_their_embedding() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Embedding(11, 6), b=nn.Linear(6, 3))
    made = synthetic.inputs(bitport.load(net, torch.zeros(2, 5, dtype=torch.int64)))
    every = torch.cat([x for (x,) in made])
    assert every.dtype == torch.int64 and every.unique().tolist() == list(range(11))


def test_integers_of_which_nothing_is_known_are_refused() -> None:
    net = Net(lambda m, x: m.a(x.float()), a=nn.Linear(5, 3))
    graph = bitport.load(net, torch.zeros(2, 5, dtype=torch.int64))
    graph.examples.clear()
    with pytest.raises(DataError, match="nothing tells which integers input 'x' takes"):
        synthetic.inputs(graph)


def test_compression_without_data_comes_near_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    graph = bitport.load(trained(), 6 * torch.rand(2, 3, 8, 8))
    with pytest.raises(DataError, match="max_drop can't be judged on synthetic data"):
        bitport.compress(
            graph, "int8", target="onnxruntime", data="synthetic", max_drop=0.1, out=tmp_path / "refused"
        )
    made = bitport.compress(graph, "int8", target="onnxruntime", data="synthetic", out=tmp_path / "made")
    assert any("the calibration data is made up" in note for note in made.measurements["notes"])
    assert any("no figure here is of real data" in note for note in made.measurements["notes"])
    x = data(16)
    with torch.no_grad():
        wanted = graph.run(x)[0]
    error = float((made.predict(x) - wanted).norm() / wanted.norm())
    assert error < 0.05
