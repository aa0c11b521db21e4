"""Activations of fewer than 8 bits: carried in bytes, clamped to their range as integers, and fused all the same."""

from __future__ import annotations

import torch
from tests.flow import Net
from tests.targets.onnxruntime.handmade import Handmade
from torch import Tensor, nn

from bitport.plan.ops import DEQUANTIZE, QUANTIZE

LINEAR = torch.ops.aten.linear.default
CONV = torch.ops.aten.conv2d.default
LOW, HIGH = 120, 135  # int4 in a byte whose zero is 128


def test_every_integer_kernel_is_still_fused_and_its_integers_stay_in_range() -> None:
    generator = torch.Generator().manual_seed(0)
    made = Handmade()
    args = (torch.tensor(0.25), torch.tensor(128, dtype=torch.uint8))

    def quantized(value: object, name: str) -> tuple[object, object]:
        stored = (made.buffer(f"{name}/scale", args[0]), made.buffer(f"{name}/zero_point", args[1]))
        q = made.call(f"{name}/q", QUANTIZE, value, *stored, LOW, HIGH, -1)
        return q, stored

    def real(quantized: tuple[object, object], name: str) -> object:
        q, stored = quantized
        return made.call(f"{name}/dq", DEQUANTIZE, q, *stored, -1)

    def parameters(name: str, shape: tuple[int, ...]) -> tuple[object, object]:
        scale, zeros = (
            torch.rand(shape[0], generator=generator) * 0.1 + 0.05,
            torch.zeros(shape[0], dtype=torch.int64),
        )
        w = made.weight(
            f"{name}.weight", torch.randint(-7, 8, shape, generator=generator), scale, zeros, 4, -8, 0
        )
        bias = torch.randint(-9, 9, shape[:1], generator=generator, dtype=torch.int32)
        stored = (made.buffer(f"{name}.bias/q", bias), made.buffer(f"{name}.bias/scale", args[0] * scale))
        return w, made.call(
            f"{name}/dq", DEQUANTIZE, *stored, made.buffer(f"{name}.bias/zero_point", zeros.int()), 0
        )

    x = quantized(made.x, "x")
    a = quantized(made.call("a", CONV, real(x, "a"), *parameters("a", (4, 4, 3, 3)), [1, 1], [1, 1]), "a")
    b = quantized(made.call("b", CONV, real(a, "b"), *parameters("b", (4, 4, 3, 3)), [1, 1], [1, 1]), "b")
    total = quantized(made.call("add", torch.ops.aten.add.Tensor, real(a, "add"), real(b, "add")), "add")
    pooled = made.call("pool", torch.ops.aten.max_pool2d.default, total[0], [2, 2])
    rows = made.call("flatten", torch.ops.aten.reshape.default, pooled, [-1, 16])
    c = quantized(made.call("c", LINEAR, real((rows, total[1]), "c"), *parameters("c", (16, 16))), "c")
    d = quantized(made.call("mul", torch.ops.aten.mul.Tensor, real(c, "mul"), real(c, "mul")), "mul")
    results = [real(d, "output"), real(b, "output")]
    value: Tensor = torch.randn(3, 4, 4, 4, generator=generator) * 3
    like = Net(
        lambda m, x: (m.c(nn.functional.max_pool2d(m.a(x), 2).flatten(1)), m.a(x)),
        a=nn.Conv2d(4, 4, 3, padding=1), c=nn.Linear(16, 16),
    )  # fmt: skip
    computed = made.computed(results, value)
    ran = made.run(results, like, value)
    kernels = {"a": "QLinearConv", "b": "QLinearConv", "add": "QLinearAdd", "c": "QGemm", "mul": "QLinearMul"}
    for name, kernel in kernels.items():
        assert ran.by_name[name] == [kernel], ran.by_name
    assert ran.kinds.count("Clip") == 6
    for got, want in zip(ran.outputs, computed, strict=True):
        steps = torch.round(got / args[0])
        assert float(steps.min()) >= LOW - 128 and float(steps.max()) <= HIGH - 128
        assert {float(steps.min()), float(steps.max())} & {-8.0, 7.0}, "nothing had to be clamped"
        assert float((got == want).float().mean()) > 0.99
    clips = {node.output[0] for node in ran.model.graph.node if node.op_type == "Clip"}
    assert clips == {f"{name}/q" for name in ("x", "a", "b", "add", "c", "mul")}
