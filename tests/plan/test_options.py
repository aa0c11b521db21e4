"""What a recipe says of a tensor, and what becomes of it where an override says something else."""

from __future__ import annotations

from typing import Any

import pytest
from tests.flow import Net, conv, images, prepare
from torch import nn
from torch.nn import functional as F

from bitport.errors import FormatError, TargetError
from bitport.plan import TensorOptions
from bitport.plan.options import mode_of
from bitport.recipe.model import Override


@pytest.mark.parametrize(
    ("options", "axis", "expected"),
    [
        ({"format": "int8"}, 0, "int8 symmetric channel(0)"),
        ({"format": "int8"}, 1, "int8 symmetric channel(1)"),
        ({"format": "int8"}, None, "int8 symmetric"),
        ({"format": "int8 tensor"}, 0, "int8 symmetric"),
        ({"format": "int8 channel(1)"}, 0, "int8 symmetric channel(1)"),
        ({"format": "int8", "symmetric": False}, 0, "int8 channel(0)"),
        ({"format": "int4", "group": 32}, 0, "int4 symmetric group(32,0)"),
        ({"format": "int4 group(8)"}, 1, "int4 symmetric group(8,1)"),
        ({"format": "int4", "group": 32}, None, "int4 symmetric"),
        ({"format": "int4", "granularity": "global"}, 0, "int4 symmetric global"),
        ({"format": "uint4"}, 0, "uint4 symmetric channel(0)"),
        # no codes on one side of the fixed zero point: these can't be symmetric
        ({"format": "binary"}, 0, "uint1 channel(0)"),
        ({"format": "int[0,1]"}, 0, "uint1 channel(0)"),
        ({"format": "int2"}, 0, "int2 symmetric channel(0)"),
        ({"format": "nf4"}, 0, "nf4 channel(0)"),
        ({"format": "mxfp4"}, 0, "e2m1 group(32,0) scale(e8m0)"),
        ({"format": "mxfp4"}, None, "e2m1 scale(e8m0)"),
        ({"format": "float16", "granularity": "group", "group": 4}, 0, "float16"),
    ],
)
def test_the_format_of_weights(options: dict[str, Any], axis: int | None, expected: str) -> None:
    assert str(TensorOptions(**options).for_weights(axis)) == expected


def test_the_format_of_activations() -> None:
    assert str(TensorOptions("int8").for_activations()) == "int8"
    assert (
        str(TensorOptions("int8", symmetric=True, granularity="global").for_activations())
        == "int8 symmetric global"
    )
    with pytest.raises(FormatError, match="can't be symmetric"):
        TensorOptions("uint1", symmetric=True).for_activations()
    with pytest.raises(FormatError, match=r"groups of 0 values: write group\(SIZE\)"):
        TensorOptions("int4", granularity="group").for_weights(0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # in a recipe of groups one layer is asked for in another format: what shares a scale stays
        ({"format": "int8"}, "int8 group(32,0)"),
        ({"format": "nf4"}, "nf4 group(32,0)"),
        ({"group": 64}, "int4 group(64,0)"),
        ({"symmetric": True}, "int4 symmetric group(32,0)"),
        ({"granularity": "channel"}, "int4 channel(0)"),
        ({"format": "int8", "granularity": "tensor"}, "int8"),
        ({"granularity": "group", "group": 8}, "int4 group(8,0)"),
        # a format that says it itself is taken at its word
        ({"format": "mxfp4"}, "e2m1 group(32,0) scale(e8m0)"),
        ({"format": "nvfp4"}, "e2m1 group(16,0) scale(e4m3)"),
        ({"format": "int8 tensor"}, "int8"),
        ({"format": "int8 channel"}, "int8 channel(0)"),
        ({"format": "int8 group(8)"}, "int8 group(8,0)"),
    ],
)  # fmt: skip
def test_an_override_of_groups(changed: dict[str, Any], expected: str) -> None:
    known = TensorOptions("int4", granularity="group", group=32, symmetric=False)
    assert str(known.changed(changed).for_weights(0)) == expected


def test_modes() -> None:
    w, eight, none = TensorOptions(), TensorOptions("int8"), TensorOptions("float32")
    assert mode_of(w, eight) == "static" and mode_of(w, none) == "weights"
    assert mode_of(w, TensorOptions("int8", dynamic=True)) == "dynamic"
    assert mode_of(w, TensorOptions("float32", dynamic=True)) == "weights"


def test_activations_that_an_override_wants_otherwise_have_a_range_of_their_own() -> None:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(), b=conv(8, 8), c=conv(8, 4))
    every = {"format": "int8", "granularity": "global"}
    overrides = [Override("b", activations={"format": "int4"})]
    plan = prepare(net, [images(8)], "null", weights=every, activations=every, overrides=overrides).plan
    measured = {name: tie for name, tie in plan.ties.items() if tie.source == "measured"}
    own = plan.tie_of("relu#2")
    assert own is not None
    assert str(measured.pop(own).format) == "int4 global"
    (shared,) = measured.values()
    assert str(shared.format) == "int8 global" and {"x", "a", "c"} <= set(shared.members)


@pytest.mark.parametrize(
    ("target", "weights", "activations", "said"),
    [
        ("onnxruntime", {"format": "int4", "group": 32}, {}, "a scale per group.*it holds integers within -128 … 127"),
        ("onnxruntime", {"format": "nf4"}, {}, "is no int format.*it holds integers within -128 … 127"),
        ("onnxruntime", {"format": "int8", "symmetric": False}, {}, r"is not symmetric.*\(symmetric\).*or float32"),
        ("onnxruntime", {"format": "int16"}, {}, "exceeds the integers -128 … 127"),
        ("onnxruntime", {}, {"format": "int[-300,300]"}, "kernels for .*-300,300. activations .*; it holds .*int16"),
        ("onnxruntime", {}, {"format": "e4m3"}, "integer kernels for e4m3 activations .*is no int format"),
        ("null", {"format": "int32"}, {}, "exceeds the integers -32768 … 65535"),
        ("null", {}, {"format": "int24"}, "exceeds the integers"),
        ("null", {}, {"format": "nf4"}, "integer kernels for nf4 activations"),
    ],
)  # fmt: skip
def test_what_a_target_can_not_hold_is_refused_with_what_it_can(
    target: str, weights: dict[str, Any], activations: dict[str, Any], said: str
) -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(12, 4))
    with pytest.raises(TargetError, match=rf"{target} has no .*{said}"):
        prepare(net, [images(8, 3, 12)], target, weights=weights, activations=activations)
