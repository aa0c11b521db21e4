"""Every integer kernel against ONNX Runtime: no integer may differ, and the fused kernel must have run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tests.targets.onnxruntime.one_op import Draw, OneOp
from torch import Tensor
from torch.nn import functional as F

from bitport.errors import TargetError
from bitport.numerics.arithmetic import Call, QSpec, QTensor
from bitport.targets._base import has_integer_dot_product
from bitport.targets.onnxruntime.arithmetic import KERNELS

# without it pairs of u8·s8 products saturate at 16 bits
needs_dot_product = pytest.mark.skipif(
    not has_integer_dot_product(), reason="this CPU has no 8-bit dot product instruction"
)

FAMILIES = ("random", "power", "near")


def check(kernel: str, graph: OneOp, call: Call) -> None:
    got, kinds = graph.run()
    assert kernel in kinds, kinds
    if call.out is not None and kernel != "DequantizeLinear":
        assert "DequantizeLinear" not in kinds, kinds
    want = KERNELS[call.kind](call)
    assert want.dtype == (torch.float32 if call.out is None else torch.int32)
    assert want.shape == got.shape
    assert int((want != got).sum()) == 0
    assert want.unique().numel() > 1
    if call.out is not None:
        inside = (want > call.out.low) & (want < call.out.high)
        assert inside.float().mean() > 0.02, "almost everything was clipped: this compares nothing"


def unary(
    kernel: str, kind: str, op: str, x: QTensor, out: QSpec, attrs: Mapping[str, Any], **onnx: Any
) -> None:
    graph = OneOp()
    graph.quantized(graph.op(op, graph.activation(x), **onnx), out)
    check(kernel, graph, Call(kind, attrs, (x,), out))


def _real(bias: QTensor | None) -> Tensor | None:
    return None if bias is None else bias.dequantize()


CONVOLUTIONS = [
    # x, weight, stride, padding, dilation, groups
    ((1, 3, 9, 9), (8, 3, 3, 3), 2, 1, 1, 1),
    ((7, 16, 8, 8), (5, 16, 1, 1), 1, 0, 1, 1),
    ((1, 16, 8, 8), (16, 1, 3, 3), 1, 1, 1, 16),
    ((2, 24, 9, 9), (24, 1, 5, 5), 2, 2, 1, 24),
    ((1, 16, 8, 8), (32, 1, 3, 3), 1, 0, 1, 16),
    ((2, 8, 7, 7), (12, 2, 3, 3), 1, 2, 2, 4),
    ((1, 1, 8, 8), (4, 1, 3, 3), 1, 0, 1, 1),
    ((1, 128, 5, 5), (8, 128, 3, 3), 1, 1, 1, 1),
    ((2, 6, 20), (4, 6, 5), 1, 2, 1, 1),
    ((1, 2, 5, 5, 5), (3, 2, 3, 3, 3), 1, 1, 1, 1),
]


@needs_dot_product
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("axis", [0, None])
def test_convolution(family: str, with_bias: bool, axis: int | None) -> None:
    for seed, (x_shape, w_shape, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        draw = Draw(family, seed)
        x, w = draw.activation(*x_shape), draw.weight(*w_shape, axis=axis)
        bias = draw.bias(x, w, w_shape[0]) if with_bias else None
        ndim = len(w_shape) - 2
        attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "ndim": ndim}
        real = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1](
            x.dequantize(), w.dequantize(), _real(bias), stride, padding, dilation, groups
        )
        out = draw.out(real)
        graph = OneOp()
        operands = [graph.activation(x), graph.weight(w)]
        if bias is not None:
            operands.append(graph.weight(bias, kind=bias.q.numpy().dtype.type))
        name = graph.op(
            "Conv",
            *operands,
            strides=[stride] * ndim,
            pads=[padding] * 2 * ndim,
            dilations=[dilation] * ndim,
            group=groups,
        )
        graph.quantized(name, out)
        check("QLinearConv", graph, Call("conv", attrs, (x, w, bias), out))


@needs_dot_product
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("quantized", [True, False])
def test_gemm(family: str, axis: int | None, quantized: bool) -> None:
    for seed, (rows, terms, columns) in enumerate(
        [(1, 1, 5), (7, 3, 5), (7, 64, 10), (1, 1152, 33), (16, 513, 48)]
    ):
        for with_bias in (True, False):
            draw = Draw(family, seed)
            x, w = draw.activation(rows, terms), draw.weight(columns, terms, axis=axis)
            bias = draw.bias(x, w, columns) if with_bias else None
            graph = OneOp()
            operands = [graph.activation(x), graph.weight(w)]
            if bias is not None:
                operands.append(graph.weight(bias, kind=bias.q.numpy().dtype.type))
            name = graph.op("Gemm", *operands, transB=1)
            out = draw.out(F.linear(x.dequantize(), w.dequantize(), _real(bias))) if quantized else None
            if out is None:
                graph.floating(name)
            else:
                graph.quantized(name, out)
            check("QGemm", graph, Call("linear", {}, (x, w, bias), out))


@needs_dot_product
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [True, False])
def test_matmul_of_activations(family: str, quantized: bool) -> None:
    kernel = "QLinearMatMul" if quantized else "MatMulIntegerToFloat"
    shapes = [
        ((7, 5), (5, 3)),
        ((2, 3, 4, 8), (2, 3, 8, 5)),
        ((4, 7, 64), (4, 64, 9)),
        ((3, 5, 600), (600, 6)),
    ]
    for seed, (first, second) in enumerate(shapes):
        draw = Draw(family, seed)
        a, b = draw.activation(*first), draw.activation(*second, factor=True)
        out = draw.out(a.dequantize() @ b.dequantize()) if quantized else None
        graph = OneOp()
        name = graph.op("MatMul", graph.activation(a), graph.activation(b))
        if out is None:
            graph.floating(name)
        else:
            graph.quantized(name, out)
        check(kernel, graph, Call("matmul", {}, (a, b), out))


@needs_dot_product
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("axis", [0, None])
def test_matmul_with_weight(family: str, quantized: bool, axis: int | None) -> None:
    kernel = "QLinearMatMul" if quantized else "MatMulIntegerToFloat"
    for seed, (shape, columns) in enumerate([((2, 5, 64), 16), ((2, 3, 5, 7), 9), ((4, 1152), 33)]):
        draw = Draw(family, seed)
        x, w = draw.activation(*shape), draw.weight(columns, shape[-1], axis=axis)
        turned = QTensor(
            w.q.T.contiguous(), w.scale, w.zero_point, w.low, w.high, None if axis is None else 1
        )
        out = draw.out(F.linear(x.dequantize(), w.dequantize())) if quantized else None
        for call in (Call("linear", {}, (x, w, None), out), Call("matmul", {}, (x, turned), out)):
            graph = OneOp()
            name = graph.op("MatMul", graph.activation(x), graph.weight(turned))
            if out is None:
                graph.floating(name)
            else:
                graph.quantized(name, out)
            check(kernel, graph, call)


BROADCASTS = [
    ((4, 50), (4, 50)),
    ((7, 3, 33), (1, 3, 33)),
    ((2, 5, 6, 6), (2, 5, 1, 1)),
    ((2, 5, 1, 1), (2, 5, 6, 6)),
    ((64, 40), (1,)),
    ((640, 1), (1,)),
    ((64, 1), (1, 1)),
    ((1, 1), (64, 1)),
    ((30, 1), ()),
    ((), (30, 7)),
    ((3, 40), (40,)),
    ((5, 1), (1, 7)),
    ((1, 1, 1), (1, 30, 1)),
    ((4, 6, 1), (4, 6, 1)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "op"), [("add", "Add"), ("mul", "Mul")])
def test_add_and_mul(family: str, kind: str, op: str) -> None:
    for seed in range(8):
        for first, second in BROADCASTS:
            draw = Draw(family, seed)
            a, b = draw.activation(*first), draw.activation(*second, factor=kind == "mul")
            if torch.equal(b.q, b.zero_point.expand_as(b.q)):
                continue  # a product with nothing but zeros
            values = a.dequantize(), b.dequantize()
            out = draw.out(values[0] + values[1] if kind == "add" else values[0] * values[1])
            graph = OneOp()
            graph.quantized(graph.op(op, graph.activation(a), graph.activation(b)), out)
            check("QLinear" + op, graph, Call(kind, {}, (a, b), out))


@pytest.mark.parametrize("family", FAMILIES)
def test_cat_and_where(family: str) -> None:
    for seed in range(6):
        draw = Draw(family, seed)
        a, b = draw.activation(2, 3, 50), draw.activation(2, 4, 50)
        for out in (draw.out(a.dequantize()), QSpec(a.scale, a.zero_point, -128, 127)):
            graph = OneOp()
            graph.quantized(graph.op("Concat", graph.activation(a), graph.activation(b), axis=1), out)
            check("QLinearConcat", graph, Call("cat", {"dim": 1}, (a, b), out))
            condition = torch.from_numpy(draw.rng.random((2, 1, 50)) > 0.5)
            other = QTensor(b.q[:, :1], b.scale, b.zero_point, -128, 127)
            graph = OneOp()
            sides = [graph.activation(a), graph.activation(other)]
            graph.quantized(graph.op("Where", graph.input(condition.numpy()), *sides), out)
            check("QLinearWhere", graph, Call("where", {}, (condition, a, other), out))


@pytest.mark.parametrize("family", FAMILIES)
def test_global_average_pool(family: str) -> None:
    for seed, shape in enumerate(
        [(1, 8, 7, 7), (7, 5, 4, 4), (2, 30, 30), (1, 8, 3, 3, 3), (3, 16, 1, 1)] * 4
    ):
        draw = Draw(family, seed)
        x = draw.activation(*shape)
        out = draw.out(x.dequantize().mean(list(range(2, len(shape)))))
        unary("QLinearGlobalAveragePool", "global_avg_pool", "GlobalAveragePool", x, out, {})


POOLS = [
    # shape, kernel, stride, padding, count_include_pad, ceil_mode
    ((1, 4, 9, 9), 3, 2, 0, True, False),
    ((2, 3, 8, 8), 2, 2, 0, True, False),
    ((1, 3, 8, 8), 3, 1, 1, False, False),
    ((1, 3, 8, 8), 3, 1, 1, True, False),
    ((4, 8, 7, 7), 7, 1, 0, True, False),
    ((4, 64, 4, 4), 4, 4, 0, True, False),
    ((2, 3, 20), 4, 2, 1, False, False),
    ((1, 2, 6, 6, 6), 2, 2, 0, True, False),
    ((2, 3, 8, 8), 3, 2, 0, True, True),
    ((2, 3, 7, 7), 2, 2, 1, False, True),
    ((2, 3, 7, 7), 3, 2, 1, True, True),
    ((2, 3, 4, 4), 5, 1, 2, True, False),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_average_pool(family: str) -> None:
    for seed in range(3):
        for shape, kernel, stride, padding, count_padding, ceil_mode in POOLS:
            draw = Draw(family, seed)
            x = draw.activation(*shape)
            ndim = len(shape) - 2
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[ndim - 1]
            out = draw.out(pool(x.dequantize(), kernel, stride, padding, ceil_mode, count_padding))
            attrs = {
                "kernel": kernel,
                "stride": stride,
                "padding": padding,
                "ceil_mode": ceil_mode,
                "ndim": ndim,
            }
            onnx = {"kernel_shape": [kernel] * ndim, "strides": [stride] * ndim, "pads": [padding] * 2 * ndim}
            unary(
                "QLinearAveragePool",
                "avg_pool",
                "AveragePool",
                x,
                out,
                attrs | {"count_include_pad": count_padding},
                **onnx,
                ceil_mode=int(ceil_mode),
                # without padding there is nothing to include, and ONNX Runtime is right only if told so
                count_include_pad=int(count_padding and padding > 0),
            )


def test_average_pool_that_onnx_runtime_gets_wrong_is_refused() -> None:
    x = Draw("random", 0).activation(1, 2, 9, 9)
    attrs = {"kernel": 4, "stride": 3, "padding": 1, "ceil_mode": True, "count_include_pad": True, "ndim": 2}
    real = F.avg_pool2d(x.dequantize(), 4, 3, 1, True, True)
    out = QSpec(real.abs().max() / 100, torch.tensor(0, dtype=torch.int32), -128, 127)
    with pytest.raises(TargetError, match="use float"):
        KERNELS["avg_pool"](Call("avg_pool", attrs, (x,), out))
    graph = OneOp()
    pool = {
        "kernel_shape": [4, 4],
        "strides": [3, 3],
        "pads": [1] * 4,
        "ceil_mode": 1,
        "count_include_pad": 1,
    }
    graph.quantized(graph.op("AveragePool", graph.activation(x), **pool), out)
    got, _ = graph.run()
    error = ((got - out.zero_point) * out.scale - real).abs().max() / out.scale
    assert error > 5, "ONNX Runtime has become right: allow this pool"


@pytest.mark.parametrize(("shape", "padding"), [((2, 4, 16), 0), ((2, 4, 9, 9), 1), ((1, 2, 6, 6, 6), 0)])
def test_max_pool(shape: tuple[int, ...], padding: int) -> None:
    draw, ndim = Draw("random", 0), len(shape) - 2
    x = draw.activation(*shape)
    attrs = {"kernel": 3, "stride": 2, "padding": padding, "dilation": 1, "ceil_mode": False, "ndim": ndim}
    onnx = {"kernel_shape": [3] * ndim, "strides": [2] * ndim, "pads": [padding] * 2 * ndim}
    unary("MaxPool", "max_pool", "MaxPool", x, QSpec(x.scale, x.zero_point, -128, 127), attrs, **onnx)


SOFTMAX_OUTPUTS = [(1 / 256, -128), (1 / 255, -128), (0.0031, -100), (0.011, -128)]


@pytest.mark.parametrize("family", [*FAMILIES, "wide"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((7, 10), -1), ((1, 1000), -1), ((2, 4, 50, 50), -1), ((2, 5, 6), 1)]
)
def test_softmax(family: str, shape: tuple[int, ...], dim: int) -> None:
    for seed, (scale, zero_point) in enumerate(SOFTMAX_OUTPUTS):
        draw = Draw("random" if family == "wide" else family, seed)
        x = draw.activation(*shape)
        if family == "wide":
            x = QTensor(x.q, torch.tensor(float(draw.rng.uniform(0.1, 0.4))), x.zero_point, -128, 127)
        out = QSpec(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), -128, 127)
        graph = OneOp()
        graph.quantized(graph.op("Softmax", graph.activation(x), axis=dim), out)
        got, kinds = graph.run()
        assert kinds == ["QLinearSoftmax"]
        assert torch.equal(KERNELS["softmax"](Call("softmax", {"dim": dim}, (x,), out)), got)


def test_softmax_of_one_element_is_refused() -> None:
    x = Draw("random", 0).activation(3, 1)
    out = QSpec(torch.tensor(1 / 256), torch.tensor(-128, dtype=torch.int32), -128, 127)
    with pytest.raises(TargetError, match="replace it by ones"):
        KERNELS["softmax"](Call("softmax", {"dim": -1}, (x,), out))
    graph = OneOp()
    graph.quantized(graph.op("Softmax", graph.activation(x), axis=-1), out)
    assert torch.equal(graph.run()[0], torch.full((3, 1), -128)), "ONNX Runtime has become right: allow it"


@pytest.mark.parametrize("family", FAMILIES)
def test_tables(family: str) -> None:
    every = torch.arange(-128, 128, dtype=torch.int32).reshape(1, 256)
    for seed in range(10):
        draw = Draw(family, seed)
        zero_point = torch.tensor(int(draw.rng.integers(-100, 100)), dtype=torch.int32)
        x = QTensor(every, draw.scale(), zero_point, -128, 127)
        real = x.dequantize()
        unary("QLinearSigmoid", "sigmoid", "Sigmoid", x, draw.out(real.sigmoid()), {})
        fixed = QSpec(torch.tensor(1 / 256), torch.tensor(-128, dtype=torch.int32), -128, 127)
        unary("QLinearSigmoid", "sigmoid", "Sigmoid", x, fixed, {})
        for slope in (0.01, 0.1, 0.25):
            out = draw.out(F.leaky_relu(real, slope))
            attrs = {"negative_slope": slope}
            unary("QLinearLeakyRelu", "leaky_relu", "LeakyRelu", x, out, attrs, alpha=slope)
        for lowest in (-128, 5):
            unary("DequantizeLinear", "relu", "Relu", x, draw.out(real.relu(), lowest), {})


@pytest.mark.parametrize("kind", ["conv", "add", "softmax", "cat"])
def test_operand_that_is_not_quantized_is_named(kind: str) -> None:
    out = Draw("random", 0).out(torch.ones(1))
    plain: Tensor = torch.zeros(2, 2)
    with pytest.raises(TargetError, match=f"{kind}: operand 0"):
        KERNELS[kind](Call(kind, {"dim": 0}, (plain, plain), out))


def test_float_output_where_there_is_none_is_refused() -> None:
    x = Draw("random", 0).activation(2, 2)
    with pytest.raises(TargetError, match="no such kernel with float output"):
        KERNELS["mul"](Call("mul", {}, (x, x), None))
