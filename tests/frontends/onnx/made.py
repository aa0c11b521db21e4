"""ONNX files to be read: exported networks, and graphs made by hand."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn


def exported(net: nn.Module, x: Tensor, path: Path, *, dynamo: bool) -> Path:
    """A file by one of PyTorch's two exporters, with an open batch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(net.eval(), (x,), path, dynamo=True, external_data=False, dynamic_shapes=shapes)
        else:
            axes = {"x": {0: "batch"}, "y": {0: "batch"}}
            torch.onnx.export(
                net.eval(), (x,), path, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes,
                opset_version=17,
            )  # fmt: skip
    return path


def model(
    nodes: list[Any],
    constants: dict[str, Any] | None = None,
    *,
    shape: Any = ("batch", 3, 8, 8),
    opset: int = 21,
) -> onnx.ModelProto:
    """A model with input `x` and output `y`."""
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
