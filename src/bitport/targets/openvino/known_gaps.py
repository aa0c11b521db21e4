"""What OpenVINO 2026.4 gets wrong in 8 bits, each shown by a network of a few operators: with its conversion to
integers and without it, results differ by far more than a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._base import KnownGap, host

STEPS = 20  # apart: rounding alone makes one or two
LOW, HIGH = -2.0, 2.5  # of all tensors here; its zero point is not 0


def _apart(build: Callable[[Any, Any], Any], shape: list[int]) -> float:
    """The largest difference in steps between the integer and the float form of `build(opset, x)`."""
    import openvino
    from openvino import opset13

    x = opset13.parameter(shape, np.float32, name="x")
    model = openvino.Model([build(opset13, _rounded(opset13, x))], [x], "probe")
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    core, results = openvino.Core(), []
    for mode in ({}, {"LP_TRANSFORMS_MODE": "NO"}):
        settings = {"INFERENCE_PRECISION_HINT": "f32", **mode}
        results.append(core.compile_model(model.clone(), "CPU", settings)([values])[0])
    return float(np.abs(results[0] - results[1]).max()) / ((HIGH - LOW) / 255)


def _rounded(ops: Any, value: Any) -> Any:
    low, high = (ops.constant(np.float32(end)) for end in (LOW, HIGH))
    return ops.fake_quantize(value, low, high, low, high, 256)


def _weights(ops: Any, shape: list[int], scale: float) -> Any:
    codes = np.random.default_rng(1).integers(-127, 128, shape).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(codes), np.float32), ops.constant(np.float32(scale)))


def _counted_padding() -> bool:
    def build(ops: Any, x: Any) -> Any:
        pooled = ops.avg_pool(x, [1, 1], [1, 1], [1, 1], [3, 3], exclude_pad=False)
        weights = _weights(ops, [8, 8, 1, 1], 0.01)
        return _rounded(ops, ops.convolution(_rounded(ops, pooled), weights, [1, 1], [0, 0], [0, 0], [1, 1]))

    return _apart(build, [2, 8, 9, 9]) > STEPS


def _long_grouped_kernels() -> bool | None:
    if "amx_int8" not in host()["isa"]:
        return None

    def build(ops: Any, x: Any) -> Any:
        weights = _weights(ops, [2, 8, 8, 1, 16], 0.001)
        return _rounded(ops, ops.group_convolution(x, weights, [1, 1], [0, 0], [0, 0], [1, 1]))

    return _apart(build, [1, 16, 1, 40]) > STEPS


KNOWN_GAPS = (
    KnownGap(
        "an average pool on integers counts its padding as codes of 0, not as zeros (2026.4.1)",
        "https://github.com/openvinotoolkit/openvino/blob/master/src/common/low_precision_transformations/src/avg_pool.cpp",
        _counted_padding,
    ),
    KnownGap(
        "grouped convolutions of kernels of 16 and longer with AMX instructions (2026.4.1)",
        "https://github.com/openvinotoolkit/openvino/blob/master/src/plugins/intel_cpu/src/nodes/conv.cpp",
        _long_grouped_kernels,
    ),
)
