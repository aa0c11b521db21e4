"""The picture's data: what each operator runs in, and who feeds whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.flow import Net, Prepared, conv, images, prepare
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.plan import Plan
from bitport.proof.network import network_record
from bitport.targets._base import Inspection

Row = Mapping[str, Any]


def drawn(
    prepared: Prepared, plan: Plan | None = None, **missed: str
) -> tuple[dict[str, Row], set[tuple[str, str]]]:
    made = network_record(prepared.work, plan or prepared.plan, Inspection({}, {}, missed))
    names = [row["name"] for row in made["nodes"]]
    assert len(set(names)) == len(names)
    assert all(a < b for a, b in made["edges"])
    return {row["name"]: row for row in made["nodes"]}, {(names[a], names[b]) for a, b in made["edges"]}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        x = F.relu(self.b(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def test_a_residual_network_with_an_island() -> None:
    rows, edges = drawn(prepare(Residual(), [images(8)]))
    assert edges == {
        ("x", "a"), ("a", "gelu"), ("gelu", "b"), ("gelu", "add"), ("b", "add"), ("add", "relu"),
        ("relu", "adaptive_avg_pool2d"), ("adaptive_avg_pool2d", "flatten"), ("flatten", "head"), ("head", "output"),
    }  # fmt: skip
    assert (rows["x"]["role"], rows["output"]["role"]) == ("input", "output")
    assert (rows["a"]["role"], rows["a"]["kernel"], rows["a"]["precision"]) == (
        "compute",
        "QLinearConv",
        "int8",
    )
    assert (rows["relu"]["role"], rows["relu"]["into"]) == ("fused", "add")
    assert (rows["flatten"]["role"], rows["flatten"]["precision"]) == ("move", "int8")
    assert rows["gelu"]["precision"] == "float" and "GELU" in rows["gelu"]["reason"]
    # it gives float numbers, and computes on integers
    assert rows["head"]["precision"] == "int8" and rows["output"]["precision"] == "float"
    assert rows["a"]["module"] == "a"


def test_what_the_runtime_left_in_float_is_float() -> None:
    prepared = prepare(Residual(), [images(8)])
    rows, _ = drawn(prepared, b="it was not fused")
    assert (rows["b"]["precision"], rows["b"]["kernel"], rows["b"]["reason"]) == (
        "float",
        None,
        "it was not fused",
    )


def test_an_unquantized_network_is_float_throughout() -> None:
    prepared = prepare(Residual(), [images(8)])
    rows, _ = drawn(prepared, Plan.empty("null"))
    assert {row["precision"] for row in rows.values()} == {"float"}
    assert rows["a"]["reason"] == "the recipe quantizes nothing"
    assert rows["flatten"]["reason"] is None


def test_parts_of_results_and_constants_are_no_boxes() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return left + right * m.table[:1].reshape(1, -1, 1, 1)

    torch.manual_seed(0)
    rows, edges = drawn(prepare(Net(run, a=conv(3, 8), table=torch.rand(2, 4)), [images(8)]))
    assert not [name for name in rows if "getitem" in name]
    assert not [row for row in rows.values() if row["op"] in ("getitem", "shape")]
    fed = {b for _, b in edges}
    assert set(rows) - fed == {"x"}


def test_masks_are_neither_integers_nor_float() -> None:
    net = Net(
        lambda m, x: torch.where(x.sum(-1, keepdim=True) > 0, m.a(x), m.b(x)),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
    )
    rows, _ = drawn(prepare(net, [torch.randn(8, 4)]))
    (mask,) = (row for row in rows.values() if row["role"] == "index")
    assert mask["precision"] == "bool"


@pytest.mark.parametrize(
    ("weights", "activations", "precision", "said"),
    [
        ("int4", {"format": "float32"}, "float", "its weights alone are stored narrow"),
        ("int4", {"dynamic": True}, "int8", "it rounds what it reads to 8 bits while it runs"),
        ("int4", {}, "int8", None),
        ("nf4", {"format": "float32"}, "float", "its weights alone are stored narrow"),
    ],
)
def test_what_weights_are_stored_in_stands_beside_what_is_computed(
    weights: str, activations: dict[str, Any], precision: str, said: str | None
) -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 4))
    prepared = prepare(net, [torch.randn(8, 6)], weights={"format": weights}, activations=activations)
    kernel = prepared.plan.node("a").kernel
    integer = frozenset() if precision == "float" else frozenset({str(kernel)})
    rows = network_record(prepared.work, prepared.plan, Inspection({}, {}, {}, integer))["nodes"]
    row = next(row for row in rows if row["name"] == "a")
    assert (row["precision"], row["weights"], row["reason"]) == (precision, weights, said)
