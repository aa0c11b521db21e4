"""Formats, groups and scales on weights that don't suit them, through the public interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import small
from tests.flow import Net, prepare
from torch import Tensor, nn

import bitport
from bitport.errors import BitportError, FormatError, RecipeError, TargetError
from bitport.formats import SCALES
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.plan import Plan
from bitport.plan.packed import packed_weights, unpacked_weight
from bitport.recipe import Recipe, StepSpec

FLOAT = {"format": "float32"}
GROUPS = {"format": "int4", "granularity": "group", "group": 16, "symmetric": False}
Change = Callable[[small.Tiny], object]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)


def recipe(weights: Mapping[str, Any], activations: Mapping[str, Any] = FLOAT) -> Recipe:
    options = {"weights": weights, "activations": activations}
    return Recipe(steps=(StepSpec("quantize", options), StepSpec("calibrate", {})), name="mine")


def run(change: Change | None, chosen: Recipe | str, out: Path, target: str = "null") -> bitport.Artifact:
    model = small.tiny()
    if change is not None:
        with torch.no_grad():
            change(model)
    graph = bitport.load(model, torch.zeros(2, 1, 8, 8))
    return bitport.compress(graph, chosen, target=target, data=small.calibration(), metric="mse", out=out)


def told(artifact: bitport.Artifact, name: str) -> list[str]:
    return [note for note in artifact.measurements["notes"] if repr(name) in note]


def assert_finite(artifact: bitport.Artifact) -> None:
    found = artifact.predict(small.patterns(4)[0])
    assert isinstance(found, Tensor)
    assert bool(torch.isfinite(found).all())


def outlier(model: small.Tiny) -> None:
    model.body.weight[1, 3, 0, 0] = 1e30


# ------------------------------------------------------------------------------------- 24: one weight of 1e30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (GROUPS, "15 values of 'body.weight' in channel 1 become 0, because others there are far larger"),
        (
            {"format": "e4m3"},
            "71 values of 'body.weight' in channel 1 become 0, because others there are far larger",
        ),
        (
            {"format": "nf4"},
            "71 values of 'body.weight' in channel 1 are lost, because others there are far larger",
        ),
        ({"format": "int8", "granularity": "global"}, "575 values of 'body.weight' become 0"),
        (
            {"format": "float16"},
            "1 of 576 values of 'body.weight' lie far outside its range and are clipped, 100 %",
        ),
    ],
    ids=str,
)
def test_an_outlier_is_told_in_every_format(tmp_path: Path, weights: dict[str, Any], said: str) -> None:
    artifact = run(outlier, recipe(weights), tmp_path / "out")
    assert told(artifact, "body.weight")[0].startswith(said)
    assert all(bool(torch.isfinite(p).all()) for p in artifact.graph.gm.parameters())


# ------------------------------------------------------------------------------------- 25, 26: tiny weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "value"), [(outlier, r"1\.4.*e\+29"), (lambda m: m.body.weight.mul_(1e-9), r"\d\.\d+e-1[01]")]
)
def test_scales_beyond_float16_are_refused_by_name(tmp_path: Path, change: Change, value: str) -> None:
    chosen = recipe({"format": "int4 group(16) scale(float16)"})
    said = (
        rf"body\.weight: a scale of {value} can't be kept in float16 .*: store scales in float32 or bfloat16"
    )
    with pytest.raises(FormatError, match=said):
        run(change, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # and with the remedy it works
    found = run(change, recipe({"format": "int4 group(16) scale(bfloat16)"}), tmp_path / "out")
    assert_finite(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["null", "onnxruntime"])
def test_subnormal_weights_of_groups_give_no_nan(tmp_path: Path, target: str) -> None:
    artifact = run(lambda m: m.body.weight.fill_(1e-41), recipe(GROUPS), tmp_path / "out", target)
    assert told(artifact, "body.weight") == [
        "16 values of 'body.weight' in channel 0 become 0, being too small for its scales: keep it in float32"
    ]
    assert_finite(artifact)


@pytest.mark.slow
def test_weights_that_float16_flushes_are_told(tmp_path: Path) -> None:
    artifact = run(lambda m: m.body.weight.mul_(1e-9), "fp16", tmp_path / "out")
    (note,) = told(artifact, "body.weight")
    assert note.endswith("become 0, being too small for float16: keep it in float32")
    assert told(run(lambda m: m.body.weight.mul_(1e-9), "bf16", tmp_path / "other"), "body.weight") == []


@pytest.mark.parametrize("scale", ["float16", "bfloat16", "e8m0", "e4m3"])
def test_a_scale_that_is_raised_for_its_bias_can_still_be_stored(scale: str) -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(6, 3))
    with torch.no_grad():
        net.a.weight.mul_(1e-3 if scale == "float16" else 1e-12)
        net.a.weight[1] = 0
        net.a.bias.copy_(torch.tensor([1e5, 1e-3, -3.0]))
    weights = {"format": f"int4 scale({scale})"}
    prepared = prepare(net, [torch.randn(8, 6)], "null", weights=weights)
    tensors, notes = packed_weights(prepared.work, prepared.plan)
    found = unpacked_weight(tensors, notes, "a.weight")
    assert torch.equal(found.dequantize(), prepared.work.tensor("a.weight"))
    assert prepared.real_error(torch.randn(8, 6)) < 0.05


def test_one_scale_of_a_narrow_type_for_all_weights_can_be_stored() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 3), b=nn.Linear(3, 5))
    for scale in SCALES:
        weights = {"format": f"int8 global scale({scale})"}
        prepared = prepare(net, [torch.randn(8, 6)], "null", weights=weights, activations=FLOAT)
        tensors, notes = packed_weights(prepared.work, prepared.plan)
        keys = [key for key in notes if key != "schema"]
        assert [key.rpartition(": ")[2] for key in keys] == ["a.weight", "b.weight"]
        for key in keys:
            stored = unpacked_weight(tensors, notes, key)
            assert torch.equal(stored.dequantize(), prepared.work.tensor(key.rpartition(": ")[2]))


# ------------------------------------------------------------------------------------- 30: zero points


@pytest.mark.parametrize("text", ["int4", "uint4", "uint1", "int[-3,9]", "int16"])
def test_zero_points_of_one_sided_weights_stay_in_the_format(text: str) -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(6, 4))
    with torch.no_grad():
        net.a.weight.copy_(net.a.weight.abs() + 1)
        net.a.weight[1:3].neg_()
    weights = {"format": text, "symmetric": False, "granularity": "group", "group": 4}
    prepared = prepare(net, [torch.randn(8, 6)], "null", weights=weights, activations=FLOAT)
    (tie,) = prepared.plan.ties.values()
    _, zero_point = tie.parameters()
    fmt = tie.format
    assert int(zero_point.min()) == fmt.low and int(zero_point.max()) == fmt.high
    wanted = net.a.weight.detach()
    error = (prepared.work.tensor("a.weight").detach() - wanted).abs().max()
    assert float(error) <= 0.51 * float(wanted.abs().max()) / (fmt.levels - 1)


# ------------------------------------------------------------------------------------- 27, 28: sums and biases


@pytest.mark.parametrize("weights", [{"format": "int4"}, {"format": "int8"}], ids=str)
def test_the_bound_of_sums_is_static_and_told(weights: dict[str, Any]) -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(70_000, 2), b=nn.Linear(2, 2))
    plan = prepare(net, [torch.randn(2, 70_000)], weights=weights).plan
    assert plan.node("a").kernel is None
    assert plan.node("a").reason == "sums of 70000 products could overflow the 32-bit accumulator"
    # float kernels have no such bound
    alone = prepare(net, [torch.randn(2, 70_000)], weights=weights, activations=FLOAT).plan
    assert alone.node("a").mode == "weights"


def test_a_bias_beyond_32_bits_raises_the_scale_and_is_told(tmp_path: Path) -> None:
    def change(model: small.Tiny) -> None:
        model.body.weight.mul_(1e-9)
        model.body.bias.fill_(3.0)

    artifact = run(change, recipe({"format": "int4"}, {}), tmp_path / "out")
    assert (
        "the scale of 'body.weight' was raised so that its bias fits into 32 bits"
        in artifact.measurements["notes"]
    )
    scale, _ = artifact.plan.ties["body.bias"].parameters()
    assert float((3.0 / scale).max()) < 2**31


# ------------------------------------------------------------------------------------- 32: groups and packing


@pytest.mark.slow
@pytest.mark.parametrize("target", ["null", "onnxruntime"])
@pytest.mark.parametrize("group", [7, 100_000])
def test_groups_of_any_size(tmp_path: Path, group: int, target: str) -> None:
    artifact = run(None, recipe({**GROUPS, "group": group}), tmp_path / "out", target)
    scale, _ = artifact.plan.ties["body.weight"].parameters()
    assert scale.shape == (8, -(-72 // group))  # 72 values a channel; the last of 7 is a tail of 2
    x = small.patterns(8)[0]
    found = artifact.predict(x)
    assert isinstance(found, Tensor)
    wanted = artifact.graph.run(x)[0].detach()
    # ONNX Runtime rounds what it multiplies blocks with, unasked
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if target == "null" else 0.02)


@pytest.mark.parametrize("group", [0, -1, 2.5, "8", None])
def test_a_size_of_groups_that_is_none_is_refused(tmp_path: Path, group: Any) -> None:
    options = {"format": "int4", "granularity": "group", **({} if group is None else {"group": group})}
    said = r"write group\(SIZE\), at least 1|expected a whole number"
    with pytest.raises(RecipeError, match=rf"steps\[0\]\.weights\.(group|format).*({said})"):
        run(None, recipe(options), tmp_path / "out")


# ------------------------------------------------------------------------------------- what a runtime can't hold


HELD = r"it holds integers within -128 … 127 \(symmetric\)"


@pytest.mark.parametrize(
    ("weights", "activations", "said"),
    [
        ({"format": "nf4"}, {}, rf"no kernels for nf4 weights with integer activations .*{HELD}"),
        (
            GROUPS,
            {},
            rf"no kernels for int4 weights with integer activations .*has a scale per group.*{HELD}",
        ),
        (
            {},
            {"format": "int4", "dynamic": True},
            r"int4 activations \(int4 is not int8\); it holds int8 \(or float32\)",
        ),
        ({}, {"format": "int16", "dynamic": True}, r"\(int16 is not int8\); it holds int8 \(or float32\)"),
        (
            {},
            {"symmetric": True, "dynamic": True},
            r"\(int8 symmetric is not int8\); it holds int8 \(or float32\)",
        ),
        ({"format": "int24"}, FLOAT, "exceeds the integers"),
        (
            {},
            {"format": "e4m3"},
            "no integer kernels for e4m3 activations .*it holds integers within -128 … 127",
        ),
    ],
)
def test_what_the_runtime_can_not_hold_is_refused_with_what_it_can(
    tmp_path: Path, weights: dict[str, Any], activations: dict[str, Any], said: str
) -> None:
    with pytest.raises(TargetError, match=said):
        run(None, recipe(weights, activations), tmp_path / "out", "onnxruntime")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- any format, any tensor


@st.composite
def formats(draw: st.DrawFn) -> str:
    low = draw(st.integers(-300, 0))
    name = draw(
        st.sampled_from([
            *(f"int{bits}" for bits in range(1, 17)), "uint1", "uint4", "uint8", "int8n", "ternary", "binary", "sign",
            "nf4", "float16", "bfloat16", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
            f"codebook({draw(st.integers(2, 20))})", f"log2({draw(st.integers(2, 8))})",
            f"e{draw(st.integers(1, 8))}m{draw(st.integers(0, 10))}", f"int[{low},{draw(st.integers(low + 1, 400))}]",
        ])
    )  # fmt: skip
    if name in ("float16", "bfloat16", "e5m10", "e8m7") or name[:2] in ("mx", "nv"):
        return name
    shared = draw(
        st.sampled_from(
            ["", "tensor", "global", "channel", "channel(1)", "group(1)", "group(3)", "group(50)"]
        )
    )
    scale = draw(st.sampled_from(["", "", *(f"scale({scale})" for scale in SCALES)]))
    return " ".join(filter(None, (name, shared, scale)))


SIZES = (0.0, 1e-45, 1e-30, 1e-3, 1.0, 100.0, 1e30, 3e38)
_graphs: dict[tuple[int, int], Graph] = {}


def sized(inside: int, outside: int) -> Graph:
    if (inside, outside) not in _graphs:
        net = Net(lambda m, x: m.a(x), a=nn.Linear(inside, outside))
        _graphs[inside, outside] = load_module(net.eval(), torch.randn(2, inside))
    return _graphs[inside, outside].clone()


@settings(max_examples=150)
@given(
    formats(),
    st.sampled_from([None, True, False, "auto"]),
    st.sampled_from(["minmax", "mse", "percentile"]),
    st.sampled_from(["weights", "dynamic", "static"]),
    st.sampled_from([(1, 1), (5, 3), (7, 1), (12, 4)]),
    st.sampled_from(SIZES),
    st.integers(0, 2**31),
)
def test_any_format_of_any_weight_is_finite_or_refused(
    text: str, symmetric: Any, spec: str, mode: str, size: tuple[int, int], largest: float, seed: int
) -> None:
    graph = sized(*size)
    generator = torch.Generator().manual_seed(seed)
    w = (torch.rand(size[1], size[0], generator=generator) * 2 - 1) * largest
    w[torch.rand(w.shape, generator=generator) < 0.2] = 0
    graph.set_tensor("a.weight", w)
    weights = {"format": text, "range": spec, **({} if symmetric is None else {"symmetric": symmetric})}
    activations = {"weights": FLOAT, "dynamic": {"dynamic": True}, "static": {}}[mode]
    x = torch.randn(4, size[0], generator=generator)
    try:
        prepared = prepare(graph, [x], "null", weights=weights, activations=activations)
    except BitportError:
        return
    kept = prepared.work.tensor("a.weight")
    assert bool(torch.isfinite(kept).all())
    if largest < 1e30:  # sums of the largest numbers are infinite in float32 without any rounding
        assert bool(torch.isfinite(prepared.simulator().run((x,))[0]).all())
    tensors, notes = packed_weights(prepared.work, prepared.plan)
    (key,) = (key for key in notes if key != "schema")
    assert torch.equal(unpacked_weight(tensors, notes, key).dequantize(), kept)
    back = Plan.from_record(prepared.plan.to_record())
    assert back.ties.keys() == prepared.plan.ties.keys()
