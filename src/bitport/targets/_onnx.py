"""A lowered graph → ONNX with QuantizeLinear / DequantizeLinear, named as the user named the network.

PyTorch's own exporter does the operators; `bitport::quantize` and `bitport::dequantize` get translations here.
Afterwards every trace of the machine (stack traces, source paths) is removed and names are restored. For every runtime
that reads ONNX.
"""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ExportError, first_line
from ..graph import Graph
from ..graph.experts import EXPERT_LINEAR
from ..graph.simplify import split_attention
from ..numerics.arithmetic import spread
from ..plan.capture import capture
from ..plan.lower import QUANTIZED, Lowered
from ..plan.ops import DEQUANTIZE, QUANTIZE, QUANTIZE_DYNAMIC

if TYPE_CHECKING:
    import onnx_ir as ir

U8_OFFSET = 128  # bitport's int8 is signed; fast kernels of runtimes that read ONNX want u8 = s8 + 128
SCOPES = "pkg.torch.onnx.name_scopes"
ROUNDING = ("QuantizeLinear", "Clip")  # what makes an activation's integers
AGAIN = "~"  # before the number of a further ONNX operator that one operator of the network became
EXTERNAL_ABOVE = 1 << 30  # protobuf ends at 2 GiB; leave room


def with_heads(graph: Graph) -> Graph:
    """The graph, or a copy without attention: PyTorch's exporter can't translate one without a heads axis."""
    if not any(graph.op(node).kind == "sdpa" for node in graph.nodes()):
        return graph
    # and it loses track of the strides of those that it can
    graph = graph.clone()
    split_attention(graph)
    return graph


def to_onnx(
    lowered: Lowered, graph: Graph, *, opset: int, rewrite: Callable[[ir.Model], object] | None = None
) -> ir.Model:
    """A lowered graph as an ONNX model with the names of `graph`.

    Args:
        rewrite: changes the model in place before names are restored; new nodes take SCOPES from those they replace.

    Raises ExportError when PyTorch's exporter refuses, naming its reason.
    """
    model = _exported(capture(lowered, graph), opset, _experts(graph))
    if rewrite is not None:
        rewrite(model)
    _restore_names(model, graph, lowered.names)
    _strip(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    import onnx_ir

    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external = f"{path.name}.data" if size > EXTERNAL_ABOVE else None
    onnx_ir.save(model, path, external_data=external)


def _experts(graph: Graph) -> set[Callable[..., Any]]:
    """Products of experts in this graph; libraries register such operators under names of their own."""
    nodes = (node for node in graph.nodes() if graph.op(node).kind == "grouped_mm")
    return {node.target for node in nodes if callable(node.target)}


def _exported(
    program: torch.export.ExportedProgram, opset: int, experts: Iterable[Callable[..., Any]]
) -> ir.Model:
    try:
        with _silence():
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=_translations() | dict.fromkeys(experts, _grouped_product),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"PyTorch's ONNX exporter refused the network: {_first_cause(error)}") from error
    assert result is not None
    model: ir.Model = result.model
    return model


def _first_cause(error: BaseException) -> str:
    """What went wrong in the first place; the exporter wraps it in several layers of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    from onnxscript import opset20 as op
    from onnxscript import opset21
    from onnxscript.function_libs.torch_lib.ops import nn

    def quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, axis: int) -> Any:
        q = op.QuantizeLinear(x, scale, zero_point, axis=max(axis, 0))
        limits = np.iinfo(zero_point.dtype.numpy())
        if (low, high) == (limits.min, limits.max):
            return q
        # a narrower format in this type: the integers themselves are clamped, so that what makes them is still fused
        return op.Clip(q, *(op.Cast(op.Constant(value_int=end), to=zero_point.dtype) for end in (low, high)))

    def quantize_dynamic(x: Any, low: int, high: int) -> Any:
        if (low, high) != (0, 255):
            raise ExportError(
                f"ONNX takes ranges while running for the integers 0 … 255 only, not {low} … {high}"
            )
        return op.DynamicQuantizeLinear(x)

    def dequantize(q: Any, scale: Any, zero_point: Any, axis: int, group: int = 0) -> Any:
        if group:
            return opset21.DequantizeLinear(q, scale, zero_point, axis=1, block_size=group)
        return op.DequantizeLinear(q, scale, zero_point, axis=max(axis, 0))

    def adaptive_average_pool(x: Any, output_size: Any) -> Any:
        if all(size == 1 for size in output_size):
            return op.GlobalAveragePool(x)
        return _adaptive_average_pool(op, x, list(output_size))

    aten = torch.ops.aten
    pools = (
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
    )
    return {
        QUANTIZE: quantize,
        QUANTIZE_DYNAMIC: quantize_dynamic,
        DEQUANTIZE: dequantize,
        aten.histc.default: _histogram,
        aten.rsub.Scalar: _from_constant,
        EXPERT_LINEAR: _expert_linear,
        **dict.fromkeys(pools, adaptive_average_pool),
        aten.avg_pool2d.default: _average_pool(nn.aten_avg_pool2d, 2),
        aten.avg_pool3d.default: _average_pool(nn.aten_avg_pool3d, 3),
    }


def _average_pool(plain: Callable[..., Any], ndim: int) -> Callable[..., Any]:
    """PyTorch's own translation of an average pool, which leaves out a divisor of one's own."""
    from onnxscript import opset20 as op

    def translated(
        x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        if divisor_override is None:
            return plain(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
        if ceil_mode:
            raise ExportError(
                "an average pool can't be exported with divisor_override and ceil_mode: leave one out"
            )
        mean = plain(x, kernel_size, stride, padding, ceil_mode, count_include_pad=True)
        factor = math.prod(spread(kernel_size, ndim)) / divisor_override
        return op.Mul(mean, op.CastLike(op.Constant(value_float=factor), mean))

    return translated


def _grouped_product(x: Any, matrices: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of x [S, K] up to ends[e] meet matrices[e] [K, N]; each expert computes its own rows only."""
    from onnxscript import INT64
    from onnxscript import opset20 as op

    count = matrices.shape[0] if matrices.shape is not None else None
    if bias is not None or not isinstance(count, int):
        raise ExportError("a grouped matrix product needs a known number of experts and no bias")
    stops = op.Cast(ends, to=INT64.dtype)
    starts = op.Concat(op.Constant(value_ints=[0]), op.Slice(stops, [0], [count - 1], [0]), axis=0)
    parts = []
    for expert in range(count):
        here, after = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        rows = op.Slice(x, op.Slice(starts, here, after, [0]), op.Slice(stops, here, after, [0]), [0])
        parts.append(op.MatMul(rows, op.Gather(matrices, op.Constant(value_int=expert), axis=0)))
    return op.Concat(*parts, axis=0)


def _expert_linear(x: Any, weight: Any, ends: Any) -> Any:
    """Each expert's rows meet its own part of the weight, [E·N, K]; a dequantize follows its slice.

    A product is fused with dequantizes right in front of it, so they move behind what picks the operands.
    """
    from onnxscript import INT64
    from onnxscript import opset20 as op

    count = ends.shape[0] if ends.shape is not None else None
    if not isinstance(count, int) or weight.shape is None:
        raise ExportError("a product of experts needs a known number of experts")
    outputs = weight.shape[0] // count
    stops = op.Cast(ends, to=INT64.dtype)
    starts = op.Concat(op.Constant(value_ints=[0]), op.Slice(stops, [0], [count - 1], [0]), axis=0)
    parts = []
    for expert in range(count):
        here, after = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        first, last = op.Slice(starts, here, after, [0]), op.Slice(stops, here, after, [0])
        own = ([expert * outputs], [(expert + 1) * outputs], [0])
        rows = _quantized_slice(x, (first, last, [0]))
        parts.append(op.MatMul(rows, op.Transpose(_quantized_slice(weight, own), perm=[1, 0])))
    return op.Concat(*parts, axis=0)


def _quantized_slice(value: Any, where: tuple[Any, Any, Any]) -> Any:
    """A slice along the first axis, of the integers where the value is dequantized (scales along it as well)."""
    from onnxscript import opset20 as op

    made = value.producer()
    if made is None or made.op_type != "DequantizeLinear":
        return op.Slice(value, *where)
    integers, scale, zero_point = made.inputs
    if scale.shape is not None and len(scale.shape):
        scale, zero_point = op.Slice(scale, *where), op.Slice(zero_point, *where)
    return op.DequantizeLinear(op.Slice(integers, *where), scale, zero_point, axis=0)


def _from_constant(x: Any, value: float, alpha: float = 1) -> Any:
    """value − alpha·x; PyTorch's own decomposition fails where x is of integers and the value is not."""
    from onnxscript import FLOAT
    from onnxscript import opset20 as op

    if isinstance(value, float) and x.dtype is not None and x.dtype.is_integer():
        x = op.Cast(x, to=FLOAT.dtype)

    def constant(number: float) -> Any:
        is_int = isinstance(number, int)
        made = op.Constant(value_int=number) if is_int else op.Constant(value_float=number)
        return op.CastLike(made, x)

    return op.Sub(constant(value), x if alpha == 1 else op.Mul(constant(alpha), x))


def _histogram(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """aten.histc over a given range: equal bins from min to max, the last one closed; others don't count."""
    from onnxscript import FLOAT
    from onnxscript import opset20 as op

    if not min < max:
        raise ExportError("torch.histc over the data's own range can't be exported: give its min and max")
    value = op.Unsqueeze(x, [-1])
    edges = [min + (max - min) * i / bins for i in range(bins + 1)]
    lower, upper = op.Constant(value_floats=edges[:-1]), op.Constant(value_floats=edges[1:])
    below = op.Or(
        op.Less(value, upper), op.And(op.Equal(value, upper), op.Equal(upper, op.Constant(value_float=max)))
    )
    inside = op.And(op.GreaterOrEqual(value, lower), below)
    return op.ReduceSum(op.Cast(inside, to=FLOAT.dtype), [0], keepdims=0)


def _adaptive_average_pool(op: Any, x: Any, output_size: Sequence[int]) -> Any:
    """Windows from floor(i·n/m) to ceil((i + 1)·n/m) along each axis, as torch defines them."""
    space = list(x.shape)[2:] if x.shape is not None else []
    if len(space) != len(output_size) or not all(isinstance(n, int) for n in space):
        raise ExportError(
            "adaptive average pooling needs image sizes that are fixed: load the network without dynamic ones"
        )
    if all(n % m == 0 for n, m in zip(space, output_size, strict=True)):
        kernel = [n // m for n, m in zip(space, output_size, strict=True)]
        return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
    for axis, (n, m) in enumerate(zip(space, output_size, strict=True), start=2):
        windows = [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        parts = [op.ReduceMean(op.Slice(x, [a], [b], [axis]), [axis], keepdims=1) for a, b in windows]
        x = op.Concat(*parts, axis=axis)
    return x


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter logs about optional packages and warns about its own deprecations; neither is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _restore_names(model: ir.Model, graph: Graph, buffers: Mapping[str, str]) -> None:
    operators: dict[str, int] = {}
    values: dict[str, int] = {}

    def unique(taken: dict[str, int], name: str) -> str:
        # not `#2`: that is how the second call of a module is named
        taken[name] = taken.get(name, 0) + 1
        return name if taken[name] == 1 else f"{name}{AGAIN}{taken[name]}"

    inputs = dict(zip(model.graph.inputs, graph.inputs, strict=True))
    outputs = dict(zip(model.graph.outputs, graph.outputs, strict=True))
    for reserved in (*(spec.name for spec in graph.inputs), *(spec.name for spec in graph.outputs)):
        values[reserved] = 1
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        name = next((scope for scope in scopes if scope), node.op_type)
        node.name = unique(operators, name)
        for index, output in enumerate(node.outputs):
            if output in outputs:
                continue
            if node.op_type in ROUNDING and name.endswith(QUANTIZED) and not _is_clamped(output):
                output.name = unique(values, name)
            else:
                output.name = unique(values, f"{node.name}/out{index or ''}")
    for stored in list(model.graph.initializers.values()):
        old = str(stored.name)
        del model.graph.initializers[old]
        stored.name = unique(values, buffers.get(old.removeprefix("module."), old))
        model.graph.initializers[stored.name] = stored
    for value, name, shape in (
        *((value, spec.name, spec.shape) for value, spec in inputs.items()),
        *((value, spec.name, spec.shape) for value, spec in outputs.items()),
    ):
        value.name = name
        _name_axes(value, shape)


def _is_clamped(value: ir.Value) -> bool:
    """Whether integers are still to be clamped to the range of a format narrower than their type."""
    return any(use.node.op_type == "Clip" for use in value.uses())


def _name_axes(value: ir.Value, shape: tuple[int | str, ...]) -> None:
    import onnx_ir

    value.shape = onnx_ir.Shape(shape)


def _strip(model: ir.Model) -> None:
    """No stack trace, source path or tool note of this machine may travel in the file."""
    model.metadata_props.clear()
    model.doc_string = None
    model.producer_version = (model.producer_version or "").partition("+")[
        0
    ]  # +cpu, +cu130: how PyTorch was built
    model.graph.doc_string = None
    model.graph.name = "bitport"
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            output.doc_string = None
            if output.name not in {v.name for v in model.graph.outputs}:
                output.shape, output.type = None, output.type
    for function in model.functions.values():
        function.doc_string = None
        function.metadata_props.clear()
        for node in function:
            node.metadata_props.clear()
            node.doc_string = None
