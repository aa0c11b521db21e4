"""Lowered graphs made by hand, exported and run by ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from bitport.frontends.pytorch import load_module
from bitport.numerics.packing import pack
from bitport.plan.lower import Lowered
from bitport.plan.ops import DEQUANTIZE, UNPACK, code_type
from bitport.targets._base import has_integer_dot_product
from bitport.targets.onnxruntime.decode import KEY
from bitport.targets.onnxruntime.export import lowered_to_onnx
from bitport.targets.onnxruntime.inspect import user_name


@dataclass
class Ran:
    """What came out: the outputs, operator → kinds that ran it, the file as written, and what it says it stores."""

    outputs: list[Tensor]
    kinds: list[str]
    by_name: dict[str, list[str]]
    model: onnx.ModelProto
    stored: dict[str, Any]

    @property
    def names(self) -> set[str]:
        """Of all initializers."""
        return {i.name for i in self.model.graph.initializer}

    def initializer(self, name: str) -> onnx.TensorProto:
        (found,) = [i for i in self.model.graph.initializer if i.name == name]
        return found

    def bytes_of(self, name: str) -> int:
        return len(self.initializer(name).raw_data)


def largest(bits: int) -> int:
    """The largest code of a weight that multiplies bytes exactly on this processor: pairs saturate without VNNI."""
    code = 2 ** (bits - 1) - 1
    return code if has_integer_dot_product() else min(code, 63)


class Handmade:
    """A lowered graph with one input, in the making."""

    def __init__(self) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.names: dict[str, str] = {}
        self.x = self.graph.placeholder("x")

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        attribute = f"b{len(self.names)}"
        self.root.register_buffer(attribute, value)
        self.names[attribute] = name
        return self.graph.get_attr(attribute)

    def call(self, name: str, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {"nn_module_stack": {"": (name, "torch.nn.Module")}}
        return node

    def codes(self, name: str, codes: Tensor, bits: int, low: int) -> fx.Node:
        """Integers low … low + 2^bits − 1, as the lowering stores them."""
        if bits == 8:
            return self.buffer(name, codes.to(torch.int8 if low else torch.uint8))
        packed = self.buffer(name, pack(codes.to(torch.int32) - low, bits))
        return self.call(f"{name}/unpack", UNPACK, packed, bits, low, list(codes.shape))

    def weight(
        self, name: str, q: Tensor, scale: Tensor, zero: Tensor, bits: int, low: int, group: int
    ) -> fx.Node:
        """Integer codes of a weight with channels along axis 0, dequantized."""
        code = code_type(low, low + 2**bits - 1)
        codes = self.codes(f"{name}/q", q, bits, low)
        zeros = (
            self.codes(f"{name}/zero_point", zero, bits, low)
            if group
            else self.buffer(f"{name}/zero_point", zero.to(code))
        )
        axis = 0 if scale.ndim else -1
        return self.call(
            f"{name}/dq", DEQUANTIZE, codes, self.buffer(f"{name}/scale", scale), zeros, axis, group
        )

    def computed(self, results: Sequence[fx.Node], x: Tensor) -> tuple[Tensor, ...]:
        """What torch makes of the graph."""
        output = self.graph.output(tuple(results))
        found: tuple[Tensor, ...] = fx.GraphModule(self.root, self.graph)(x)
        self.graph.erase_node(output)
        return found

    def run(
        self,
        results: Sequence[fx.Node],
        like: nn.Module,
        x: Tensor,
        blockwise: Collection[str] = (),
        level: int = 4,
        opset: int = 20,
    ) -> Ran:
        """`like`: a float network with the same input and output shapes."""
        self.graph.output(tuple(results))
        network = load_module(like, x)
        lowered = Lowered(fx.GraphModule(self.root, self.graph), (), self.names)
        model = lowered_to_onnx(lowered, network, blockwise, opset=opset, accuracy_level=level)
        with tempfile.TemporaryDirectory() as folder:
            path, dump = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
            onnx_ir.save(model, path)
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.optimized_model_filepath = str(dump)
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            written, nodes = onnx.load(path), onnx.load(dump).graph.node
        (given,) = session.get_inputs()
        outputs = [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]
        by_name: dict[str, list[str]] = {}
        for node in nodes:
            by_name.setdefault(user_name(node.name), []).append(node.op_type)
        metadata = {item.key: item.value for item in written.metadata_props}
        return Ran(outputs, [n.op_type for n in nodes], by_name, written, json.loads(metadata.get(KEY, "{}")))
