"""Weights of every kind of format that are made wide when the file is loaded, and those of static integer kernels."""

from __future__ import annotations

import onnx
import pytest
import torch
from tests.flow import Net
from tests.targets.onnxruntime.handmade import Handmade, largest
from torch import Tensor, nn
from torch.nn import functional as F

from bitport.numerics.arithmetic import along, grouped
from bitport.numerics.packing import packed_bytes
from bitport.plan.ops import DEQUANTIZE, LOOKUP, QUANTIZE
from bitport.targets._base import has_integer_dot_product

LINEAR = torch.ops.aten.linear.default
CONV = torch.ops.aten.conv2d.default
TRANSPOSED = torch.ops.aten.conv_transpose2d.input
EMBEDDING = torch.ops.aten.embedding.default
TYPES = onnx.TensorProto
SMALL = {"e4m3": (torch.float8_e4m3fn, TYPES.FLOAT8E4M3FN), "e5m2": (torch.float8_e5m2, TYPES.FLOAT8E5M2)}


def table_of(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def assert_equal_to(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())


def test_tables_and_small_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width = 5, 24
    x = torch.randn(3, width, generator=generator)
    made, results, wanted, layers = Handmade(), [], [], {}
    for bits, kind, group in [(1, "sign", 0), (3, "log2", 8), (4, "nf4", 16), (5, "codebook", 0), (6, "e2m3", 32),
                              (8, "e4m3", 0), (8, "e5m2", 12), (8, "e3m4", 0)]:  # fmt: skip
        codes = torch.randint(0, 2**bits, (rows, width), generator=generator)
        table = torch.randn(2**bits, generator=generator).sort().values
        if kind in SMALL:
            table = table_of(SMALL[kind][0])
            codes = codes.masked_fill(~table[codes].isfinite() | (table[codes].abs() > 1e4), 3)
        scale = torch.rand((rows, -(-width // group)) if group else (), generator=generator) + 0.1
        stored = made.codes(f"{kind}.weight/q", codes, bits, 0)
        weight = made.call(
            f"{kind}/decoded", LOOKUP, stored, made.buffer(f"{kind}.weight/table", table),
            made.buffer(f"{kind}.weight/scale", scale), 0 if group else -1, group, kind,
        )  # fmt: skip
        results.append(made.call(kind, LINEAR, made.x, weight))
        wide = grouped(scale, codes.shape, 0, group) if group else scale
        wanted.append(F.linear(x, table[codes] * wide))
        layers[kind] = nn.Linear(width, rows, bias=False)
    ran = made.run(results, Net(lambda m, x: tuple(getattr(m, k)(x) for k in layers), **layers), x)
    assert set(ran.kinds) == {"Gemm"}
    for i, kind in enumerate(layers):
        assert ran.by_name[kind] == ["Gemm"]
        assert_equal_to(ran.outputs[i], wanted[i])
        stored = ran.stored[f"{kind}.weight/q"]
        assert ran.bytes_of(f"{kind}.weight/q") == packed_bytes(rows * width, stored["bits"])
    assert ran.initializer("nf4.weight/q").data_type == TYPES.UINT4
    for kind, (_, stored_as) in SMALL.items():
        assert ran.initializer(f"{kind}.weight/q").data_type == stored_as
        assert f"{kind}.weight/table" not in ran.names
    assert ran.initializer("e3m4.weight/q").data_type == TYPES.UINT8, "ONNX has no such float"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = Handmade()
    wide = made.call("fc/decoded", torch.ops.aten.to.dtype, made.buffer("fc.weight/q", w), torch.float32)
    y = made.call("fc", LINEAR, made.x, wide, made.buffer("fc.bias", torch.ones(5)))
    ran = made.run([y], nn.Linear(7, 5), x)
    assert ran.kinds == ["Gemm"] and ran.by_name == {"fc": ["Gemm"]}
    stored = ran.initializer("fc.weight/q")
    assert stored.data_type == (TYPES.FLOAT16 if dtype == torch.float16 else TYPES.BFLOAT16)
    assert len(stored.raw_data) == 2 * 35
    assert_equal_to(ran.outputs[0], F.linear(x, w.float(), torch.ones(5)))


def test_groups_along_any_axis() -> None:
    """Convolutions, transposed ones (channels along axis 1) and embeddings."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (4, 3, 3, 3), "up": (3, 5, 2, 2)}
    made, weights = Handmade(), {}
    for (name, shape), axis, group in zip(shapes.items(), (0, 1), (16, 5), strict=True):
        q = torch.randint(-4, 4, shape, generator=generator)
        rest = q.numel() // shape[axis]
        scale = torch.rand(shape[axis], -(-rest // group), generator=generator)
        zero = torch.randint(-4, 4, scale.shape, generator=generator)
        codes = made.codes(f"{name}.weight/q", q, 3, -4)
        zeros = made.codes(f"{name}.weight/zero_point", zero, 3, -4)
        args = (codes, made.buffer(f"{name}.weight/scale", scale), zeros, axis, group)
        weights[name] = made.call(f"{name}/dq", DEQUANTIZE, *args)
        spread = [grouped(v, q.shape, axis, group) for v in (zero, scale)]
        shapes[name] = (q - spread[0]) * spread[1]
    x = torch.randn(2, 3, 6, 6, generator=generator)
    y = made.call("conv", CONV, made.x, weights["conv"], None)
    z = made.call("up", TRANSPOSED, made.x, weights["up"], None)
    like = Net(lambda m, x: (m.conv(x), m.up(x)), conv=nn.Conv2d(3, 4, 3), up=nn.ConvTranspose2d(3, 5, 2))
    ran = made.run([y, z], like, x)
    assert ran.kinds.count("Conv") == 1 and ran.by_name["up"] == ["ConvTranspose"]
    assert not {"Gather", "BitShift", "Mul", "Cast", "Expand"} & set(ran.kinds), "decoded whenever it runs"
    assert_equal_to(ran.outputs[0], F.conv2d(x, shapes["conv"]))
    assert_equal_to(ran.outputs[1], F.conv_transpose2d(x, shapes["up"]))
    assert ran.bytes_of("conv.weight/q") == packed_bytes(108, 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_static_kernels_take_narrower_weights(bits: int) -> None:
    """They are stored narrow and are int8 before ONNX Runtime fuses: QLinearConv and QGemm still come out."""
    generator = torch.Generator().manual_seed(bits)
    low = -(2 ** (bits - 1))
    made = Handmade()
    x_scale, x_zero = torch.tensor(0.03), torch.tensor(128, dtype=torch.uint8)

    def quantized(value: object, name: str) -> object:
        args = (made.buffer(f"{name}/scale", x_scale), made.buffer(f"{name}/zero_point", x_zero))
        q = made.call(f"{name}/q", QUANTIZE, value, *args, 0, 255, -1)
        return made.call(f"{name}/dq", DEQUANTIZE, q, *args, -1)

    def weight(name: str, shape: tuple[int, ...]) -> tuple[object, object, Tensor, Tensor]:
        q = torch.randint(-largest(bits), largest(bits) + 1, shape, generator=generator)
        scale = torch.rand(shape[0], generator=generator) * 0.05 + 0.01
        bias = torch.randint(-200, 200, shape[:1], generator=generator, dtype=torch.int32)
        zeros = torch.zeros(shape[0], dtype=torch.int64)
        w = made.weight(f"{name}.weight", q, scale, zeros, bits, low, 0)
        b_scale = x_scale * scale
        args = (made.buffer(f"{name}.bias/q", bias), made.buffer(f"{name}.bias/scale", b_scale))
        b = made.call(f"{name}/dq", DEQUANTIZE, *args, made.buffer(f"{name}.bias/zero_point", zeros.int()), 0)
        return w, b, q * along(scale, len(shape), 0), bias * b_scale

    w1, b1, real_w1, real_b1 = weight("conv", (4, 3, 3, 3))
    w2, b2, real_w2, real_b2 = weight("fc", (5, 64))
    hidden = quantized(made.call("conv", CONV, quantized(made.x, "x"), w1, b1), "conv")
    rows = made.call("flatten", torch.ops.aten.reshape.default, hidden, [-1, 64])
    y = quantized(made.call("fc", LINEAR, rows, w2, b2), "fc")
    like = Net(lambda m, x: m.fc(m.conv(x).flatten(1)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(64, 5))
    x = torch.randn(2, 3, 6, 6, generator=generator)
    ran = made.run([y], like, x)
    assert ran.by_name["conv"] == ["QLinearConv"] and ran.by_name["fc"] == ["QGemm"], ran.by_name
    assert "Cast" not in ran.kinds
    assert ran.bytes_of("conv.weight/q") == packed_bytes(108, bits)
    assert ran.bytes_of("fc.weight/q") == packed_bytes(320, bits)
    expected = {4: TYPES.INT4, 8: TYPES.INT8}.get(bits, TYPES.UINT8)
    assert ran.initializer("fc.weight/q").data_type == expected

    def rounded(v: Tensor) -> Tensor:
        return torch.clamp(torch.round(v / x_scale), -128, 127) * x_scale

    want = rounded(F.linear(rounded(F.conv2d(rounded(x), real_w1, real_b1)).flatten(1), real_w2, real_b2))
    # ONNX Runtime quantizes the matrix of this Linear anew, to all 8 bits, whose products saturate without VNNI
    steps = 1.01 if has_integer_dot_product() else 2.01
    assert float((ran.outputs[0] - want).abs().max()) <= steps * float(x_scale)
    assert float((ran.outputs[0] == want).float().mean()) > 0.7
