"""Damages ONNX models at random and loads them: `python -m tests.faults.fuzzing_onnx FOLDER SEED SECONDS`.

A process of its own, because what it looks for may end it. The model that is being loaded lies in the folder.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from tests.faults.fuzzing import fuzz
from tests.frontends.onnx.made import model

import bitport

ODD = (0, 1, -1, 2, 7, 127, 255, 2**31 - 1, 2**31, 2**40, -(2**40), 2**63 - 1, -(2**63))
WORDS = (
    "",
    "x",
    "y",
    "w",
    "h",
    "Relu",
    "Conv",
    "If",
    "Loop",
    "axis",
    "perm",
    "a" * 5000,
    "\u202e",
    "..",
    "m",
)


def seeds() -> list[onnx.ModelProto]:
    """Small honest models, of many operators in all."""
    node, rng = helper.make_node, np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    def codes(*shape: int) -> Any:
        return rng.integers(-9, 9, shape).astype(np.int8)

    scale, zero, bias = np.float32(0.1), np.uint8(0), np.arange(4, dtype=np.int32)
    twice = helper.make_function(
        "m", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    called = model([node("Twice", ["x"], ["h"], domain="m"), node("Relu", ["h"], ["y"])])
    called.functions.append(twice)
    called.opset_import.append(helper.make_opsetid("m", 1))
    value = helper.make_tensor_value_info("z", 1, None)
    branch = helper.make_graph([node("Relu", ["x"], ["z"])], "branch", [], [value])
    other = helper.make_graph([node("Neg", ["x"], ["z"])], "branch", [], [value])
    carried = helper.make_tensor_value_info("v", 1, None)
    head = [helper.make_tensor_value_info("t", 7, []), helper.make_tensor_value_info("going", 9, [])]
    iteration = helper.make_graph(
        [node("Identity", ["going"], ["still"]), node("Add", ["v", "x"], ["more"])],
        "iteration",
        [*head, carried],
        [
            helper.make_tensor_value_info("still", 9, []),
            helper.make_tensor_value_info("more", 1, None),
            carried,
        ],
    )
    recurrent = {"w": weight(1, 16, 3), "r": weight(1, 16, 4), "b": weight(1, 32)}
    return [
        model(
            [
                node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[1, 1], dilations=[1, 1], group=1),
                node("BatchNormalization", ["c", "g", "g", "g", "v"], ["n"], epsilon=1e-5),
                node("MaxPool", ["n"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
                node("Flatten", ["p"], ["f"]),
                node("Gemm", ["f", "d"], ["s"], transB=1),
                node("Softmax", ["s"], ["y"], axis=1),
            ],
            {"w": weight(2, 3, 3, 3), "g": weight(2), "v": np.ones(2, np.float32), "d": weight(4, 32)},
        ),
        model([node("LSTM", ["x", "w", "r", "b"], ["", "y"], hidden_size=4)], recurrent, shape=(5, 2, 3)),
        model(
            [
                node("Shape", ["x"], ["s"]),
                node("Gather", ["s", "zero"], ["n"], axis=0),
                node("Concat", ["n", "rest"], ["t"], axis=0),
                node("Reshape", ["x", "t"], ["r"]),
                node("Transpose", ["r"], ["q"], perm=[0, 2, 1]),
                node("MatMul", ["r", "q"], ["a"]),
                node("Slice", ["a", "zero", "one", "axes"], ["b"]),
                node("Split", ["b"], ["u", "v"], num_outputs=2, axis=2),
                node("Add", ["u", "v"], ["y"]),
            ],
            {"zero": np.array([0]), "one": np.array([1]), "axes": np.array([1]), "rest": np.array([4, 48])},
        ),
        model(
            [
                node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                node("Resize", ["d", "", "k"], ["e"], mode="linear"),
                node("Pad", ["e", "p"], ["y"], mode="reflect"),
            ],
            {
                "s": scale,
                "z": zero,
                "k": np.array([1, 1, 2, 2], np.float32),
                "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            },
        ),
        model(
            [
                node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                node(
                    "QLinearConv", ["q", "s", "z", "w", "ws", "wz", "s", "z", "b"], ["c"], pads=[1, 1, 1, 1]
                ),
                node("QLinearAdd", ["c", "s", "z", "c", "s", "z", "s", "z"], ["a"], domain="com.microsoft"),
                node("DequantizeLinear", ["a", "s", "z"], ["y"]),
            ],
            {
                "s": scale,
                "z": zero,
                "w": codes(4, 3, 3, 3),
                "ws": np.full(4, scale),
                "wz": codes(4),
                "b": bias,
            },
        ),
        model(
            [
                node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
                node("MatMulInteger", ["q", "w", "z", "wz"], ["m"]),
                node("Mul", ["s", "ws"], ["k"]),
                node("Cast", ["m"], ["f"], to=1),
                node("Mul", ["f", "k"], ["y"]),
            ],
            {"w": codes(8, 4), "wz": codes(4), "ws": np.full(4, scale)},
        ),
        model([node("Relu", ["x"], ["h"]), node("Softmax", ["h"], ["y"], axis=1)], opset=6),
        model([node("If", ["c"], ["y"], then_branch=branch, else_branch=other)], {"c": np.array(True)}),
        model([node("Loop", ["n", "", "x"], ["y", "every"], body=iteration)], {"n": np.array(3)}),
        called,
    ]


def messages(message: Any) -> list[Any]:
    """A message and all within it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if hasattr(value, "append") else [value]:
                found += messages(inner)
    return found


def change(proto: Any, dice: random.Random) -> None:
    """One field of one message, in a way that protobuf can hold."""
    message = dice.choice(messages(proto))
    field = dice.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    if hasattr(value, "MergeFrom") and not hasattr(value, "append"):
        message.ClearField(field.name) if dice.random() < 0.5 else value.SetInParent()
    elif hasattr(value, "append"):
        if value and dice.random() < 0.4:
            del value[dice.randrange(len(value))]
        elif field.type == field.TYPE_MESSAGE:
            value.extend([dice.choice(list(value))] if value else [])
        elif value and dice.random() < 0.6:
            value[dice.randrange(len(value))] = made(field, dice)
        else:
            value.append(made(field, dice))
    else:
        setattr(message, field.name, made(field, dice))


def made(field: Any, dice: random.Random) -> Any:
    if field.type == field.TYPE_STRING:
        return dice.choice(WORDS)
    if field.type == field.TYPE_BYTES:
        return dice.randbytes(dice.choice((0, 1, 8, 48)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return dice.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.type == field.TYPE_ENUM:
        return dice.choice([item.number for item in field.enum_type.values])
    wide = field.type in (field.TYPE_INT64, field.TYPE_UINT64)
    odd = dice.choice([number for number in ODD if wide or -(2**31) <= number < 2**31])
    return abs(odd) if field.type in (field.TYPE_UINT64, field.TYPE_UINT32) else odd


def damaged(dice: random.Random, models: list[onnx.ModelProto]) -> bytes:
    proto = onnx.ModelProto()
    proto.CopyFrom(dice.choice(models))
    kind = dice.random()
    for _ in range(dice.randint(1, 3) if kind < 0.7 else 0):
        change(proto, dice)
    content = bytearray(proto.SerializeToString())
    if kind > 0.6 and content:
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(content))
            content[at : at + 1] = dice.choice((dice.randbytes(1), b"", dice.randbytes(5)))
    return bytes(content[: dice.randrange(len(content) + 1)] if kind > 0.95 else content)


def main(folder: Path, seed: int, seconds: float) -> None:
    dice, models, path = random.Random(seed), seeds(), folder / "net.onnx"
    for proto in models:
        path.write_bytes(proto.SerializeToString())
        bitport.load(path)  # honest ones are read
    torch.set_num_threads(1)
    fuzz(seconds, lambda: path.write_bytes(damaged(dice, models)), lambda: bitport.load(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
