"""How much of the data goes through two networks at once."""

from __future__ import annotations

import pytest
import torch
from tests.flow import Net, conv, prepare
from torch import nn

from bitport.artifact import make_target
from bitport.steps import _abreast
from bitport.steps._abreast import ALIVE, Abreast, affordable, results_of, rows_of


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


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 5), (3, 7, 12)),
    "strided": (conv(3, 8, stride=2), (4, 3, 9, 7)),
    "groups": (conv(6, 4, groups=2, dilation=2), (4, 6, 8, 8)),
    "one dimension": (nn.Conv1d(3, 4, 3), (4, 3, 20)),
}


@pytest.mark.parametrize("most", [10, 10_000])
@pytest.mark.parametrize("name", LAYERS)
def test_results_are_those_of_the_same_rows(name: str, most: int) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    weight = layer.get_parameter("weight").detach()
    groups, kernel = getattr(layer, "groups", 1), tuple(weight.shape[2:])
    keys = ("stride", "padding", "dilation", "groups")
    attrs = {key: getattr(layer, key) for key in keys} if kernel else {}
    w_BRK = weight.reshape(groups, len(weight) // groups, -1)
    rows = [torch.einsum("pbk,brk->pbr", part, w_BRK).flatten(1) for part in rows_of(x, attrs, kernel, most)]
    with torch.no_grad():
        found = results_of(layer(x), kernel, most) - layer.get_parameter("bias")
    assert len(found) == min(most, len(found))
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_what_a_node_reads_and_gives_is_there_before_its_copy_runs() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=conv(3, 8), b=conv(8, 4))
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(net, [x], "null")
    real = prepared.reference
    seen = {}
    abreast = Abreast(real, real, prepared.plan, make_target("null").arithmetic(), [(x,)])
    for node, copy in abreast.walk():
        if not node.op.startswith("call"):
            continue
        float_run, run = abreast.runs[0]
        seen[real.name(node)] = (float_run.read(node, 0), float_run.value(node))
        with pytest.raises(KeyError):
            run.value(copy)
    assert torch.equal(seen["a"][0], x) and torch.equal(seen["relu"][0], seen["a"][1])
    assert torch.equal(seen["b"][1], real.run(x)[0])
    assert not any(
        isinstance(value, torch.Tensor) and value.dim() == 4
        for key, value in abreast.runs[0][0].values.items()
        if real.name(key) in ("a", "relu")
    )
