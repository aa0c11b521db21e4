"""What is special about ONNX Runtime: its optimizer, its bugs, its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from tests.flow import Net, Prepared, Shipped, assert_exact, conv, images, prepare, ship, tokens
from tests.nets import build
from torch import nn
from torch.nn import functional as F

from bitport.errors import ExportError, RecipeError, TargetError
from bitport.plan import Plan
from bitport.recipe.model import Override
from bitport.rules import OpRule, Ruleset
from bitport.targets import _base
from bitport.targets.onnxruntime import OnnxRuntime, table

Linear = nn.Linear
FLOAT = {"format": "float32"}


def within_a_step(prepared: Prepared, shipped: Shipped) -> None:
    """Optimized and as written agree up to float rounding in front of a quantize."""
    for a, b in zip(shipped.outputs, shipped.as_written, strict=True):
        assert float((a - b).abs().max()) <= 0.03 * float(b.abs().max())


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda m, x: m.b(m.a(x).softmax(-1) * m.c(x)), a=Linear(12, 1), b=Linear(8, 4), c=Linear(12, 8)),
        Net(
            lambda m, x: (lambda q: m.b((q @ q.transpose(1, 2)).softmax(-1) @ q))(m.a(x)[:, :1]),
            a=Linear(12, 8), b=Linear(8, 4),
        ),
    ],
)  # fmt: skip
def test_a_softmax_over_one_element(net: nn.Module) -> None:
    # ONNX Runtime's integer softmax returns 0 there
    prepared = prepare(net, [tokens(8)])
    shipped = ship(prepared, tokens(16))
    assert_exact(shipped)
    within_a_step(prepared, shipped)
    assert "QLinearSoftmax" not in shipped.inspection.counts


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 2, 0)])
def test_an_average_pool_in_ceil_mode(kernel: int, stride: int, padding: int) -> None:
    # ONNX Runtime's integer average pool is wrong by up to 240 steps there
    net = Net(
        lambda m, x: m.b(F.avg_pool2d(m.a(x), kernel, stride, padding, ceil_mode=True)),
        a=conv(),
        b=conv(8, 4),
    )
    prepared = prepare(net, [images(8)])
    shipped = ship(prepared, images(16))
    assert_exact(shipped)
    within_a_step(prepared, shipped)
    assert "QLinearAveragePool" not in shipped.inspection.counts


def test_a_float_pool_in_front_of_a_move_is_not_fused() -> None:
    # ONNX Runtime pulls the quantize in front of the Reshape, and makes an integer pool that nobody planned
    net = Net(
        lambda m, x: m.b(F.adaptive_avg_pool2d(F.relu(m.a(x)), 3).flatten(1)), a=conv(), b=Linear(8 * 9, 4)
    )
    prepared = prepare(net, [images(8)], activations={"symmetric": True})
    shipped = ship(prepared, images(16))
    assert_exact(shipped)
    assert "QLinearAveragePool" not in shipped.inspection.counts


@pytest.mark.parametrize(
    "kind", ["conv", "sigmoid", "leaky_relu", "mul", "add", "global_avg_pool", "matmul", "linear"]
)
def test_an_operator_kept_in_float_really_stays_float(kind: str) -> None:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.leaky_relu(m.a(x)) * m.b(x).sigmoid() + m.c(x)
        pooled = m.d(y * F.adaptive_avg_pool2d(y, 1)).flatten(2)
        return m.f(m.e(pooled) @ pooled.transpose(1, 2))

    net = Net(forward, a=conv(), b=conv(), c=conv(), d=conv(8, 4), e=Linear(64, 64), f=Linear(4, 3))
    prepared = prepare(net, [images(8)], overrides=[Override(op=kind, activations={"format": "float32"})])
    shipped = ship(prepared, images(16))
    assert_exact(shipped)
    within_a_step(prepared, shipped)
    names = [name for name in prepared.plan.nodes if prepared.kind(name) == kind]
    assert names
    for name in names:
        ran = shipped.inspection.kernels.get(name, ())
        assert not set(ran) & shipped.inspection.integer, f"{name} ran as {ran}"
        assert "MatMulIntegerToFloat" not in ran


def test_taps_do_not_change_the_kernels(tmp_path: Path) -> None:
    model, example = build("mobilenet", 4)
    prepared = prepare(model, [example])
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    plain = prepared.target.inspect(tmp_path, prepared.plan)
    tapped = prepared.target.inspect(tmp_path, prepared.plan, taps=True)
    assert plain.missed == tapped.missed == {}
    integer = {kind: n for kind, n in plain.counts.items() if kind in plain.integer}
    assert integer == {kind: n for kind, n in tapped.counts.items() if kind in tapped.integer}
    session = prepared.target.open(tmp_path, taps=True)
    outputs, taps = session.run_tapped((example,))
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs, prepared.target.open(tmp_path).run((example,)), strict=True)
    )
    assert taps and all(int(q.min()) >= -128 and int(q.max()) <= 127 for q in taps.values())


class Optimistic(OnnxRuntime):
    """Claims an integer kernel that ONNX Runtime doesn't have."""

    def rules(self) -> Ruleset:
        right = super().rules()
        add = next(row for row in right.rows if "add" in row.kinds)
        row = OpRule(("gelu",), add.operands, add.output, "QLinearGelu", "elementwise")
        return replace(right, rows=(row, *right.rows))


def test_a_missed_fusion_is_named_with_what_ran_instead() -> None:
    net = Net(lambda m, x: m.b(F.gelu(m.a(x))), a=Linear(12, 8), b=Linear(8, 4))
    shipped = ship(prepare(net, [tokens(8)], Optimistic()), tokens(4))
    assert list(shipped.inspection.missed) == ["gelu"]
    assert shipped.inspection.missed["gelu"].startswith(
        "ONNX Runtime did not fuse it into QLinearGelu: it ran as"
    )
    from bitport.proof.integer import integer_record

    prepared = prepare(net, [tokens(8)], Optimistic())
    record = integer_record(prepared.work, prepared.plan, shipped.inspection, {"a": 96, "b": 32})
    assert [island["name"] for island in record["float_ops"]] == ["gelu"]
    assert record["float_ops"][0]["reason"] == shipped.inspection.missed["gelu"]


@pytest.mark.parametrize(
    ("isa", "limit"), [((), 63), (("avx2",), 63), (("avx512_vnni",), None), (("avx_vnni",), None)]
)
def test_weights_are_narrow_where_products_could_saturate(
    isa: tuple[str, ...], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_base, "host", lambda: {"machine": "x86_64", "isa": list(isa)})
    assert table.ruleset().weight_limit == limit
    prepared = prepare(Net(lambda m, x: m.a(x), a=conv()), [images(8)])
    assert prepared.plan.ties["a.weight"].format.high == (limit or 127)
    for activations, highest in (
        ({"format": "int8", "dynamic": True}, limit or 127),
        ({"format": "float32"}, 127),
    ):
        layer = prepare(Net(lambda m, x: m.a(x), a=nn.Linear(12, 4)), [tokens(8)], activations=activations)
        assert layer.plan.node("a").mode == ("dynamic" if "dynamic" in activations else "weights")
        assert layer.plan.ties["a.weight"].format.high == highest


def test_an_arm_processor_has_no_such_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "host", lambda: {"machine": "aarch64", "isa": []})
    assert table.ruleset().weight_limit is None


def test_too_long_sums_stay_float() -> None:
    wide = Linear(70_000, 2)
    prepared = prepare(Net(lambda m, x: m.b(m.a(x)), a=wide, b=Linear(2, 3)), [torch.randn(2, 70_000)])
    assert "overflow the 32-bit accumulator" in str(prepared.plan.node("a").reason)


def test_names_of_the_network_are_names_in_the_file(tmp_path: Path) -> None:
    net = Net(lambda m, x: {"a": m.b(F.relu(m.a(m.a(x))))}, a=conv(3, 3), b=conv(3, 4))
    prepared = prepare(net, [images(4)])
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    operators = [node.name for node in model.graph.node]
    values = [name for node in model.graph.node for name in node.output]
    assert {"a", "a#2", "b"} <= set(operators) and len(set(operators)) == len(operators)
    assert len(set(values)) == len(values)
    assert {"x/q", "a/q", "relu/q", "b/q"} <= set(values)
    assert [v.name for v in model.graph.input] == ["x"] and [v.name for v in model.graph.output] == ["a"]
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()


def test_an_operator_that_can_not_be_exported_names_the_first_cause(tmp_path: Path) -> None:
    net = Net(lambda m, x: torch.linalg.pinv(m.a(x)), a=Linear(12, 8))
    from bitport.frontends.pytorch import load_module

    with pytest.raises(ExportError) as caught:
        OnnxRuntime().export(load_module(net, tokens(2)), Plan.empty("onnxruntime"), tmp_path)
    assert "\x1b" not in str(caught.value) and "step 3/3" not in str(caught.value)


def test_bad_options_and_bad_files(tmp_path: Path) -> None:
    for options, message in (
        ({"threads": 0}, "at least 1"),
        ({"opset": 9}, "18 to 23"),
        ({"io": "int"}, "expected 'float' or 'integer'"),
        ({"speed": 1}, "no such option"),
        ({"threads": "1"}, "expected a value of type int"),
    ):
        with pytest.raises(RecipeError, match=message):
            OnnxRuntime(options)
    with pytest.raises(TargetError, match="has no provider 'Nothing'"):
        OnnxRuntime({"provider": "Nothing"}).open(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"rubbish")
    with pytest.raises(TargetError, match=r"can't load model\.onnx"):
        OnnxRuntime().open(tmp_path)


@pytest.mark.parametrize("clamp", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("wanted", ["float32", "int16"])
def test_weights_of_a_float_layer_stay_float_where_its_relu_is_rounded(
    clamp: type[nn.Module], wanted: str
) -> None:
    # the runtime drops the relu in front of a quantize, and rounds the weights of the layer that it finds there
    net = Net(lambda m, x: m.c(m.r(m.b(F.relu(m.a(x))))), a=conv(), b=conv(8, 8), r=clamp(), c=conv(8, 4))
    with torch.no_grad():
        net.b.weight[0] *= 50  # with one scale for all, little is left of the other channels
    words = {"format": wanted}
    keep = [
        Override(match=name, weights=FLOAT if wanted == "float32" else None, activations=words)
        for name in ("b", "r")
    ]
    prepared = prepare(net, [images(8)], overrides=keep)
    record = ship(prepared, images(8)).record
    assert record["exact_share"] > 0.999 and record["max_steps"] <= 1, record
