"""What is special about LiteRT: its file, its layouts, its two sets of kernels, its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.flow import Net, assert_exact, conv, images, prepare, ship, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport.artifact import make_target
from bitport.errors import ExportError, RecipeError, TargetError
from bitport.plan import Plan
from bitport.proof.integer import integer_record
from bitport.recipe import StepSpec
from bitport.targets.litert import LiteRt

FLOAT = {"format": "float32"}
INT8 = {"weights": {"format": "int8"}, "activations": {"format": "int8"}}
KERNELS = ("xnnpack", "reference")


def digits() -> nn.Module:
    return Net(
        lambda m, x: m.c(F.adaptive_avg_pool2d(F.relu(m.b(F.relu(m.a(x)))), 1).flatten(1)),
        a=conv(), b=conv(8, 16), c=nn.Linear(16, 4),
    )  # fmt: skip


def two_layers() -> nn.Module:
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(128, 256), b=nn.Linear(256, 64))


def with_kernels(kernels: str) -> Any:
    return make_target("litert", {"kernels": kernels})


def in_float(net: nn.Module, example: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    """The network's own file, as a function."""
    target = make_target("litert", {})
    target.export(bitport.load(net, example), Plan.empty("litert"), folder)
    session = target.open(folder)
    return lambda x: session.run((x,))[0]


def recipe(**options: Any) -> bitport.Recipe:
    return bitport.Recipe(steps=(StepSpec("quantize", INT8),), target=options, name="tested")


def test_from_the_recipe_to_the_measured_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = bitport.compress(
        bitport.load(digits(), images(4)), "int8", target="litert", data=[images(16) for _ in range(2)],
        out=tmp_path / "out", effort="plain",
    )  # fmt: skip
    found = artifact.measurements
    assert found["integer"]["mac_share"] == 1.0 and found["integer"]["float_ops"] == []
    assert found["parity"]["exact_share"] == 1.0 and found["parity"]["max_steps"] == 0
    assert found["parity"]["watched_db"] is None
    assert {path.name for path in artifact.path.glob("model.*")} == {"model.tflite"}
    x = images(3)
    assert torch.equal(artifact.predict(x), bitport.Artifact.load(artifact.path).predict(x))


def test_files_are_the_same_to_the_byte_and_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    prepared = prepare(digits(), [images(8)], "litert")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepared.target.export(prepared.work, prepared.plan, tmp_path / name)
    first, second = ((tmp_path / name / "model.tflite").read_bytes() for name in ("one", "two"))
    assert first == second
    assert str(tmp_path).encode() not in first


@pytest.mark.parametrize("kernels", KERNELS)
def test_whole_networks_are_equal_to_the_simulator(kernels: str) -> None:
    net = Net(
        lambda m, x: m.d(F.max_pool2d(F.relu(m.b(F.relu(m.a(x))) + m.c(x)), 2).flatten(1)),
        a=conv(3, 8, stride=2), b=conv(8, 8, groups=8), c=conv(3, 8, 1, stride=2), d=nn.Linear(32, 4),
    )  # fmt: skip
    shipped = ship(prepare(net, [images(16)], with_kernels(kernels)), images(32), images(1))
    assert_exact(shipped)
    assert shipped.inspection.counts["DEPTHWISE_CONV_2D I8"] == 1


@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 1), (2, 1), ("same", 1), (0, 2), (1, 2), (2, 2)])
def test_paddings(padding: Any, stride: int) -> None:
    # TFLite's SAME pads in front what torch does only now and then
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, 4, padding=padding, stride=stride), b=conv(8, 4, 1))
    assert_exact(ship(prepare(net, [images(16)], "litert"), images(8)))


def test_a_batch_norm_beside_an_operator_that_is_decomposed(tmp_path: Path) -> None:
    # torch decomposes both, and the norm gives three tensors then
    torch.manual_seed(0)
    net = Net(lambda m, x: m.a(F.pad(m.norm(x), (0, 1, 0, 1))), a=conv(), norm=nn.BatchNorm2d(3).eval())
    torch.nn.init.normal_(net.norm.running_mean)
    run = in_float(net, images(4), tmp_path)
    x = images(4)
    torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x) * 2.0 + 1.0,  # single numbers beside channels that are last
        lambda m, x: m.a(x) * m.scale,
        lambda m, x: torch.log1p(torch.exp(m.a(x))),
        lambda m, x: torch.erf(m.a(x)),
        lambda m, x: torch.tan(m.a(x).sigmoid()) + m.a(x).abs().add(1).reciprocal().prod(1, keepdim=True),
        lambda m, x: torch.where((m.a(x) > 0) ^ (m.a(x) < 1), m.a(x).sign(), m.scale),
        lambda m, x: F.group_norm(m.a(x), 2, m.a(x)[0, :, 0, 0], m.a(x)[0, :, 1, 1]),
        lambda m, x: m.a(x)[:, :, torch.tensor([[0], [2]]), torch.tensor([1, 3])],
        lambda m, x: m.a(x)[torch.tensor([0]), :, :, torch.tensor([3])],
        lambda m, x: F.fold(F.unfold(m.a(x), 2, stride=2), 8, 2, stride=2),
        lambda m, x: m.table.repeat(x.shape[0], 1, 1) + m.a(x).flatten(0, 1),
    ],
    ids=[
        "numbers",
        "number",
        "log1p",
        "erf",
        "tan",
        "xor",
        "group_norm",
        "two-axes",
        "axes-apart",
        "fold",
        "repeat",
    ],
)
def test_operators_that_it_has_none_for(function: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(function, a=conv(), scale=nn.Parameter(torch.tensor(2.0)), table=torch.randn(8, 8, 8))
    run = in_float(net, images(4), tmp_path)
    for batch in (4, 2):
        x = images(batch)
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda m, x: (m.a(x) * 8).int() & x.int(), "LiteRT has no bitwise operators"),
        (lambda m, x: (m.a(x) * 8).to(torch.int8) + 1, "computes with torch.int8 only where it is quantized"),
        (lambda m, x: m.a(x).to(torch.float8_e4m3fn).float(), "no numbers of type torch.float8_e4m3fn"),
        (lambda m, x: F.batch_norm(x, x[0, :, 0, 0], x[0, :, 1, 1].abs()), "statistics and weights that"),
    ],
)  # fmt: skip
def test_what_it_would_compute_wrongly_is_refused(function: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=why):
        in_float(Net(function, a=conv(3, 3)), images(4), tmp_path)


def test_logarithms_keep_the_digits_of_small_numbers(tmp_path: Path) -> None:
    net = Net(lambda m, x: torch.log1p(x))
    x = torch.tensor([[0.0, 1e-9, 3e-8, 1e-4, 0.4, 0.6, 1e6, 1e30]])
    torch.testing.assert_close(in_float(net, x, tmp_path)(x), net(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "net",
    [
        Net(lambda m, x: m.b(m.a(x).transpose(1, 2)), a=nn.Linear(12, 8), b=nn.Linear(6, 4)),
        Net(lambda m, x: m.b(F.layer_norm(m.a(x), (8,))), a=nn.Linear(12, 8), b=nn.Linear(8, 4)),
        Net(lambda m, x: m.b(m.a(x).softmax(1)), a=nn.Linear(12, 8), b=nn.Linear(8, 4)),
        Net(lambda m, x: m.b(F.gelu(m.a(x)).mean(1)), a=nn.Linear(12, 8), b=nn.Linear(8, 4)),
        Net(
            lambda m, x: m.b(F.scaled_dot_product_attention(m.a(x), m.a(x), m.c(x))),
            a=nn.Linear(12, 8), b=nn.Linear(8, 4), c=nn.Linear(12, 8),
        ),
        Net(
            lambda m, x: m.b(torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x)], 1)),
            a=nn.Linear(12, 8), b=nn.Linear(8, 4), cls=torch.randn(1, 1, 8),
        ),
    ],
    ids=["transpose", "layer_norm", "softmax", "gelu", "attention", "class-token"],
)  # fmt: skip
def test_transformers_parts(net: nn.Module) -> None:
    prepared = prepare(net, [tokens(16)], "litert")
    shipped = ship(prepared, tokens(32), tokens(1))
    assert not shipped.inspection.missed
    local = shipped.parity.record()["local"]
    assert local["integers"] and local["max_steps"] <= 1 and local["exact_share"] >= 0.995
    for a, b in zip(shipped.outputs, shipped.as_written, strict=True):
        assert float((a - b).abs().max()) <= 0.05 * float(b.abs().max())


@pytest.mark.parametrize("activations", [{"symmetric": True}, {"format": "int4"}])
@pytest.mark.parametrize("weights", [{"format": "int4"}, {"granularity": "tensor"}])
def test_symmetric_and_narrow_formats(activations: dict[str, Any], weights: dict[str, Any]) -> None:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + m.a(x))), a=conv(), b=conv(8, 8), c=conv(8, 4))
    prepared = prepare(net, [images(8)], "litert", activations=activations, weights=weights)
    assert_exact(ship(prepared, images(16)))


@pytest.mark.parametrize(
    ("weights", "activations", "bits"),
    [
        ({"format": "int4"}, {}, 4),
        ({"format": "int4"}, {"dynamic": True}, 4),
        ({"format": "int8"}, {"dynamic": True}, 8),
        ({"format": "int4"}, FLOAT, 4),
        ({"format": "int8", "symmetric": False}, FLOAT, 8),
        ({"format": "float16"}, FLOAT, 16),
    ],
    ids=["int4", "int4-dynamic", "int8-dynamic", "int4-weights", "int8-weights", "fp16"],
)
def test_narrow_weights_are_narrow_in_the_file(
    weights: dict[str, Any], activations: dict[str, Any], bits: int, tmp_path: Path
) -> None:
    prepared = prepare(
        two_layers(), [torch.randn(8, 128)], "litert", weights=weights, activations=activations
    )
    shipped = ship(prepared, torch.randn(8, 128))
    assert not shipped.inspection.missed
    assert shipped.record["outputs_db"] is None or shipped.record["outputs_db"] > 80
    found = integer_record(prepared.work, prepared.plan, shipped.inspection, dict.fromkeys(("a", "b"), 1))
    assert found["mac_share"] == (0.0 if activations is FLOAT else 1.0)
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    values = 128 * 256 + 256 * 64
    size = (tmp_path / "model.tflite").stat().st_size
    assert size <= values * bits // 8 + 32 * (256 + 64) + 4096


def test_an_integer_layer_that_runs_in_float_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = prepare(digits(), [images(8)], "litert")
    prepared.target.export(prepared.work, prepared.plan, tmp_path)
    assert not prepared.target.inspect(tmp_path, prepared.plan).missed
    prepared.target.export(prepared.work, Plan.empty("litert"), tmp_path)
    missed = prepared.target.inspect(tmp_path, prepared.plan).missed
    assert set(missed) == {"a", "b", "c", "adaptive_avg_pool2d"}
    assert missed["a"] == "the file doesn't run it as CONV_2D I8: it runs as CONV_2D, RELU"


def test_a_weight_that_is_wide_in_the_file_is_told(tmp_path: Path) -> None:
    narrow, wide = (
        prepare(two_layers(), [torch.randn(8, 128)], "litert", weights={"format": name}, activations=FLOAT)
        for name in ("int4", "int8")
    )
    wide.target.export(wide.work, wide.plan, tmp_path)
    assert not wide.target.inspect(tmp_path, wide.plan).missed
    missed = wide.target.inspect(tmp_path, narrow.plan).missed
    assert missed == {
        name: f"its weight {name}.weight takes 8 bits in the file, not 4" for name in ("a", "b")
    }


@pytest.mark.parametrize(
    ("weights", "why"),
    [({"format": "bfloat16"}, "LiteRT decodes float16 weights, not bfloat16"),
     ({"format": "e4m3"}, "LiteRT decodes float16 weights, not e4m3")],
)  # fmt: skip
def test_other_floats_are_refused(weights: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        prepare(two_layers(), [torch.randn(8, 128)], "litert", weights=weights, activations=FLOAT)


def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    graph = bitport.load(Net(lambda m, x: torch.sort(x)[0]), images(2))
    with pytest.raises(ExportError, match=r"sort: LiteRT has no operator for aten\.sort"):
        LiteRt().export(graph, Plan.empty("litert"), tmp_path)


@pytest.mark.slow
def test_integer_ends(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, data = bitport.load(digits(), images(4)), [images(16) for _ in range(2)]
    artifact = bitport.compress(
        graph, recipe(io="integer"), target="litert", data=data, out=tmp_path / "out", effort="plain"
    )
    assert artifact.measurements["parity.exact_share"] == 1.0
    session = LiteRt({"io": "integer"}).open(artifact.path)
    given, made = session.as_stored((images(2),))
    assert given[0].dtype == made[0].dtype == torch.int8


def exported(folder: Path) -> Path:
    LiteRt().export(bitport.load(digits(), images(4)), Plan.empty("litert"), folder)
    return folder / "model.tflite"


def test_batches_of_any_size(tmp_path: Path) -> None:
    exported(tmp_path)
    session, x = LiteRt().open(tmp_path), images(7)
    (whole,) = session.run((x,))
    for count in (1, 3):
        (part,) = session.run((x[:count],))
        assert torch.allclose(part, whole[:count], atol=1e-6)


def test_a_shape_or_type_that_it_does_not_take(tmp_path: Path) -> None:
    exported(tmp_path)
    session = LiteRt().open(tmp_path)
    with pytest.raises(TargetError, match=r"input 'x' has shape \(2, 3, 9, 8\); the file takes"):
        session.run((torch.randn(2, 3, 9, 8),))
    with pytest.raises(TargetError, match="input 'x' is int64; the file takes float32"):
        session.run((torch.zeros(2, 3, 8, 8, dtype=torch.int64),))


@pytest.mark.parametrize("keep", [0, 6, 40, 700, -1])
def test_a_file_that_is_cut_off(keep: int, tmp_path: Path) -> None:
    path = exported(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TargetError, match=r"model\.tflite"):
        LiteRt().open(tmp_path)


@pytest.mark.parametrize("options", [{"kernels": "fast"}, {"io": "int8"}, {"threads": 0}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"\[target\] {next(iter(options))}"):
        LiteRt(options)
