"""LiteRT's lines of an artifact's `run.py`: all from the class on, behind those of `_runner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._runner import Run, Runner


class Network(Runner):
    """The network in LiteRT on the CPU, with the kernels that were measured."""

    def load(self, options: Mapping[str, Any]) -> Run:
        interpreter = opened(
            (self.folder / "model.tflite").read_bytes(), options["threads"], options["kernels"]
        )
        inputs = [end["index"] for end in interpreter.get_input_details()]
        outputs = [end["index"] for end in interpreter.get_output_details()]

        def run(fed: Sequence[Any]) -> Sequence[Any]:
            shaped(interpreter, inputs, fed)
            for index, value in zip(inputs, fed, strict=True):
                interpreter.set_tensor(index, value)
            interpreter.invoke()
            return [np.array(interpreter.get_tensor(index)) for index in outputs]

        return run


def opened(content: bytes, threads: int, kernels: str) -> Any:
    """An interpreter with its tensors allocated. kernels: "xnnpack", or "reference" ones without any delegate."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_REF if kernels == "reference" else OpResolverType.AUTO
    interpreter = Interpreter(
        model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
    )
    interpreter.allocate_tensors()
    return interpreter


def shaped(interpreter: Any, inputs: Sequence[int], fed: Sequence[Any]) -> None:
    """Make the tensors as long as what is fed: the batch of a file is 1 until it is told."""
    ends = {end["index"]: tuple(end["shape"]) for end in interpreter.get_input_details()}
    others = [(i, value.shape) for i, value in zip(inputs, fed, strict=True) if ends[i] != value.shape]
    for index, shape in others:
        interpreter.resize_tensor_input(index, shape, strict=True)
    if others:
        interpreter.allocate_tensors()
