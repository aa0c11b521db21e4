"""One-op ONNX graphs, run by ONNX Runtime: the oracle of the arithmetic tests."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bitport.numerics.arithmetic import QSpec, QTensor


class OneOp:
    """A graph in the making: each method adds nodes and returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.feeds: dict[str, np.ndarray[Any, Any]] = {}
        self.outputs: list[onnx.ValueInfoProto] = []

    def _name(self) -> str:
        return f"v{len(self.nodes) + len(self.constants) + len(self.feeds)}"

    def constant(self, values: Any) -> str:
        name = self._name()
        self.constants.append(numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def input(self, values: np.ndarray[Any, Any]) -> str:
        name = self._name()
        self.feeds[name] = values
        return name

    def op(self, kind: str, *inputs: str, **attrs: Any) -> str:
        name = self._name()
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attrs))
        return name

    def activation(self, x: QTensor) -> str:
        """u8 graph input → DequantizeLinear."""
        name = self.input((x.q + 128).numpy().astype(np.uint8))
        return self.op("DequantizeLinear", name, *self._parameters(x, 128, np.uint8))

    def weight(self, w: QTensor, kind: type[np.integer[Any]] = np.int8) -> str:
        """s8 (or int32: bias) constant → DequantizeLinear, per channel where its scale is."""
        axis = {} if w.axis is None else {"axis": w.axis}
        name = self.constant(w.q.numpy().astype(kind))
        return self.op("DequantizeLinear", name, *self._parameters(w, 0, kind), **axis)

    def quantized(self, name: str, out: QSpec) -> None:
        """QuantizeLinear to u8 → graph output."""
        self._output(
            self.op("QuantizeLinear", name, *self._parameters(out, 128, np.uint8)), TensorProto.UINT8
        )

    def floating(self, name: str) -> None:
        self._output(name, TensorProto.FLOAT)

    def _parameters(self, t: QTensor | QSpec, shift: int, kind: type[np.integer[Any]]) -> tuple[str, str]:
        zero_point = (t.zero_point + shift).numpy().astype(kind)
        return self.constant(t.scale.numpy()), self.constant(zero_point)

    def _output(self, name: str, kind: int) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, None))

    def run(self) -> tuple[Tensor, list[str]]:
        """The output (u8 as int32 in the signed scheme) and the operators of the optimized graph."""
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
            for name, values in self.feeds.items()
        ]
        graph = helper.make_graph(self.nodes, "one_op", inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            kinds = [node.op_type for node in onnx.load(optimized).graph.node]
        result = session.run(None, self.feeds)[0]
        if result.dtype == np.uint8:
            return torch.from_numpy(result.astype(np.int32)) - 128, kinds
        return torch.from_numpy(result), kinds


class Draw:
    """Random tensors whose scales are of one family.

    random: any float32, where ties hardly occur. power: powers of two, which make exact ties. near: small
    multiples of one random number, whose ratios are simple fractions up to rounding: there every float32
    operation decides.
    """

    def __init__(self, family: str, seed: int) -> None:
        self.family = family
        self.rng = np.random.default_rng(seed)
        self.unit = float(self.rng.uniform(0.002, 0.01))

    def scale(self, about: float | None = None) -> Tensor:
        """A scale, near `about` if given; 0-d."""
        if self.family == "power":
            exponent = self.rng.integers(-8, -3) if about is None else np.ceil(np.log2(about))
            return torch.tensor(2.0 ** float(exponent))
        if self.family == "near":
            multiple = self.rng.integers(1, 7) if about is None else 2 * int(np.ceil(about / self.unit / 2))
            return torch.tensor(float(np.float32(self.unit) * np.float32(multiple)), dtype=torch.float32)
        return torch.tensor(self.rng.uniform(0.002, 0.05) if about is None else about, dtype=torch.float32)

    def factor(self) -> Tensor:
        """A scale to be multiplied with another one; near: a small multiple of 1/64: ratios stay simple."""
        if self.family == "near":
            return torch.tensor(float(self.rng.integers(1, 7)) / 64)
        return self.scale()

    def zero_point(self) -> Tensor:
        return torch.tensor(int(self.rng.integers(-128, 128)), dtype=torch.int32)

    def integers(self, shape: Sequence[int], low: int = -128, high: int = 127) -> Tensor:
        return torch.from_numpy(np.asarray(self.rng.integers(low, high + 1, tuple(shape)), np.int32))

    def activation(self, *shape: int, factor: bool = False) -> QTensor:
        scale = self.factor() if factor else self.scale()
        return QTensor(self.integers(shape), scale, self.zero_point(), -128, 127)

    def weight(self, *shape: int, axis: int | None = 0) -> QTensor:
        scale = self.factor() if axis is None else torch.stack([self.factor() for _ in range(shape[axis])])
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return QTensor(self.integers(shape, low=-127), scale, zero, -127, 127, axis)

    def bias(self, x: QTensor, w: QTensor, count: int) -> QTensor:
        scale = x.scale * w.scale
        zero = torch.zeros_like(scale, dtype=torch.int32)
        axis = 0 if scale.ndim else None
        return QTensor(self.integers((count,), -20000, 20000), scale, zero, -(2**31), 2**31 - 1, axis)

    def out(self, real: Tensor, zero_point: int | None = None) -> QSpec:
        """A spec that covers zero and most of the range of `real`, so that some values are clipped."""
        low, high = min(0.0, float(real.min())), max(0.0, float(real.max()))
        scale = self.scale(max(high - low, 1e-3) * float(self.rng.uniform(0.8, 1.2)) / 255)
        if zero_point is None:
            middle = -(low + high) / 2 / float(scale) + float(self.rng.uniform(-15, 15))
            zero_point = round(min(127, max(-128, middle)))
        return QSpec(scale, torch.tensor(zero_point, dtype=torch.int32), -128, 127)
