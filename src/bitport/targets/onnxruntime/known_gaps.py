"""What ONNX Runtime 1.31 gets wrong, each shown by a network of one or two operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._base import KnownGap

if TYPE_CHECKING:
    import onnx


def _ran(nodes: list[onnx.NodeProto], constants: dict[str, Any], x: Any, *, optimize: bool = True) -> Any:
    """What becomes of x by nodes that end in y, of x's type."""
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        nodes, "probe",
        [helper.make_tensor_value_info("x", kind, x.shape)], [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def _padding_of_maxima() -> bool:
    from onnx import helper

    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    constants = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    x = np.full((1, 1, 2, 2), -1, np.float32)
    results = [_ran(nodes, constants, x, optimize=optimize) for optimize in (False, True)]
    return not np.array_equal(*results)


def _overhanging_means() -> bool:
    from onnx import helper

    node = helper.make_node(
        "QLinearAveragePool", ["x", "scale", "zero", "scale", "zero"], ["y"], domain="com.microsoft",
        kernel_shape=[3], strides=[2], pads=[1, 1], ceil_mode=1, count_include_pad=1,
    )  # fmt: skip
    constants = {"scale": np.float32(1), "zero": np.uint8(0)}
    found = _ran([node], constants, np.full((1, 1, 4), 90, np.uint8))
    # the last window has one value and one of padding within its bounds
    return int(found[0, 0, -1]) != 45


KNOWN_GAPS = (
    KnownGap(
        "Pad with zeros moves into MaxPool, where it means minus infinity (1.31.1)",
        "https://github.com/microsoft/onnxruntime/pull/18136",
        _padding_of_maxima,
    ),
    KnownGap(
        "QLinearAveragePool divides windows that overhang in ceil_mode by the whole kernel (1.31.1)",
        "https://github.com/microsoft/onnxruntime/issues/16203",
        _overhanging_means,
    ),
)
