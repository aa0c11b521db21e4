"""TensorFlow networks as ONNX files, by tf2onnx. Runs in a process of its own; nothing of the file runs unseen.

A SavedModel is a program: its operators may run Python or write files, some of them while it is only being loaded. So
its text is read first, and only operators that have a counterpart in ONNX, or keep variables, are let through.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitport.errors import FOREIGN, LoadError, UnsafeFile, first_line

OPSET = 18
SIGNATURE = "serving_default"
# what TensorFlow itself writes around a network: variables, calls, and what is gone once they are constants
AROUND = {
    "AssignVariableOp", "Const", "DisableCopyOnRead", "Erfc", "Identity", "IdentityN", "NoOp", "PartitionedCall",
    "Placeholder", "ReadVariableOp", "ResourceGather", "StatefulPartitionedCall", "StopGradient", "VarHandleOp",
    "VarIsInitializedOp", "While", "StatelessWhile", "If", "StatelessIf", "VariableV2", "Assert", "CheckNumerics",
    "EnsureShape", "LogicalAnd", "TensorListFromTensor", "TensorListGetItem", "TensorListReserve", "TensorListSetItem",
    "TensorListStack",
}  # fmt: skip
# what saves and restores; written into functions that only a saver calls
SAVING = {
    "MergeV2Checkpoints", "RestoreV2", "SaveV2", "ShardedFilename", "StaticRegexFullMatch", "StringJoin", "Select",
    "Pack",
}  # fmt: skip
SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
NEVER = re.compile(
    r"PyFunc|ReadFile|WriteFile|Reader|Writer|Dataset|Iterator|Print|Save|Restore|Checkpoint|MatchingFiles|Library|"
    r"TextFile|Debug|Rpc|Summary|Dump|Custom|Queue|Barrier|Send|Recv"
)


def saved_model(path: str, out: str) -> None:
    """Raises UnsafeFile, LoadError."""
    import tensorflow as tf
    from tf2onnx import convert, tf_loader

    folder = Path(path)
    graph = _read(folder)
    signatures = [name for name in graph.signature_def if not name.startswith("__")]
    if SIGNATURE in signatures or len(signatures) == 1:
        wanted = SIGNATURE if SIGNATURE in signatures else signatures[0]
    else:
        raise LoadError(
            f"{folder.name} has no signature {SIGNATURE!r} (it has {', '.join(map(repr, signatures)) or 'none'}): "
            "save it with one"
        )
    _check(graph, folder.name)
    try:
        frozen, inputs, outputs, tables, names = tf_loader.from_saved_model(
            path, None, None, list(graph.meta_info_def.tags), [wanted],
            return_initialized_tables=True, return_tensors_to_rename=True,
        )  # fmt: skip
        with tf.device("/cpu:0"):
            model, _ = convert._convert_common(
                frozen, name=folder.name, opset=OPSET, input_names=inputs, output_names=outputs,
                tensors_to_rename=names, initialized_tables=tables,
            )  # fmt: skip
    except (*FOREIGN, tf.errors.OpError) as error:
        raise LoadError(f"{folder.name} can't be converted by tf2onnx: {first_line(error)}") from error
    _write(model, out)


def tflite(path: str, out: str) -> None:
    """Raises LoadError."""
    import struct

    from tf2onnx import convert

    try:
        model, _ = convert.from_tflite(path, opset=OPSET)
    except (*FOREIGN, struct.error) as error:
        raise LoadError(f"{Path(path).name} can't be converted by tf2onnx: {first_line(error)}") from error
    _write(model, out)


def _read(folder: Path) -> Any:
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    found = saved_model_pb2.SavedModel()
    try:
        found.ParseFromString((folder / "saved_model.pb").read_bytes())
    except (DecodeError, OSError) as error:
        raise LoadError(f"{folder.name} holds no SavedModel, or is cut off: {first_line(error)}") from error
    serving = [graph for graph in found.meta_graphs if "serve" in graph.meta_info_def.tags]
    if len(serving) != 1 or len(found.meta_graphs) != 1:
        raise LoadError(f"{folder.name} holds {len(serving)} graphs tagged 'serve': save it with one")
    return serving[0]


def _check(graph: Any, label: str) -> None:
    """Raises UnsafeFile for the first operator that isn't known to compute only."""
    known = _convertible() | AROUND
    savers = _savers(graph)
    for function, node in _nodes(graph):
        if function in savers and node.op in SAVING:
            continue
        if node.op not in known or NEVER.search(node.op):
            where = f" in {function!r}" if function else ""
            raise UnsafeFile(
                f"{label}: node {node.name[:100]!r}{where} is {node.op[:50]!r}, which may run code or touch files, or "
                "has no counterpart in ONNX; nothing of the file was run. Save the network without it"
            )


def _nodes(graph: Any) -> Iterator[tuple[str, Any]]:
    for node in graph.graph_def.node:
        yield "", node
    for function in graph.graph_def.library.function:
        for node in function.node_def:
            yield function.signature.name, node


def _savers(graph: Any) -> set[str]:
    """Functions that save and restore, and that nothing of the network can call."""
    named = {f.signature.name for f in graph.graph_def.library.function if SAVER.fullmatch(f.signature.name)}
    called = {name for function, node in _nodes(graph) if function for name in _called(node)}
    objects = graph.object_graph_def
    called |= set(objects.concrete_functions)
    own = {graph.saver_def.save_tensor_name.split(":")[0], graph.saver_def.restore_op_name.split(":")[0]}
    called |= {name for node in graph.graph_def.node if node.name not in own for name in _called(node)}
    return named - called


def _called(node: Any) -> Iterator[str]:
    for attribute in node.attr.values():
        for item in [attribute.func, *attribute.list.func]:
            if item.name:
                yield item.name


def _convertible() -> set[str]:
    """Operators of TensorFlow that tf2onnx converts."""
    from tf2onnx.handler import tf_op

    importlib.import_module("tf2onnx.tfonnx")  # fills the table
    versions = [version for versions in tf_op.get_opsets().values() for version in versions]
    return {name for version in versions for name in version if not name.startswith("TFL_")}


# ---------------------------------------------------------------------------- what tf2onnx leaves


def _write(model: Any, out: str) -> None:
    import onnx

    _rename(model.graph)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        spelled = SPELLED.get(node.op_type)
        model.graph.node.extend([node] if spelled is None else spelled(node))
    try:
        onnx.save_model(model, out)
    except ValueError:  # larger than one file may be
        onnx.save_model(model, out, save_as_external_data=True, location="model.data")


def _rename(graph: Any) -> None:
    """Names as the user knows them: without the call that a SavedModel is one of, without what a fused node lists."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    wanted: dict[str, str] = {}
    for port in (*graph.input, *graph.output):
        short = re.sub(r"^serving_default_|:\d+$", "", port.name)
        if short not in taken and not short.startswith("StatefulPartitionedCall"):
            wanted[port.name] = port.name = short
            taken.add(short)
    for node in graph.node:
        node.name = re.sub(r"^(StatefulPartitionedCall(_\d+)?/)+", "", node.name.split(";")[0])
        for names in (node.input, node.output):
            names[:] = [wanted.get(name, name) for name in names]


def _erfc(node: Any) -> list[Any]:
    """1 − erf(x)"""
    from onnx import helper

    part, one, name = f"{node.output[0]}/erf", f"{node.output[0]}/one", node.name
    return [
        _constant(one, 1.0),
        helper.make_node("Erf", list(node.input), [part], f"{name}/erf"),
        helper.make_node("Sub", [one, part], list(node.output), name),
    ]


def _gelu(node: Any) -> list[Any]:
    """x · (½ + ½ erf(x / √2)), or by tanh, as GELU's paper has them (Hendrycks & Gimpel 2016)."""
    from onnx import helper

    x, y = node.input[0], node.output[0]
    tanh = any(attribute.name == "approximate" and attribute.i for attribute in node.attribute)
    made: list[Any] = []

    def add(kind: str, *inputs: str) -> str:
        made.append(helper.make_node(kind, list(inputs), [f"{y}/{len(made)}"], f"{node.name}/{len(made)}"))
        return f"{y}/{len(made) - 1}"

    def number(value: float) -> str:
        made.append(_constant(f"{y}/{len(made)}", value))
        return f"{y}/{len(made) - 1}"

    if tanh:
        cube = add("Mul", add("Mul", x, x), x)
        inner = add("Add", x, add("Mul", cube, number(0.044715)))
        bent = add("Tanh", add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        bent = add("Erf", add("Mul", x, number(math.sqrt(0.5))))
    half = add("Add", add("Mul", bent, number(0.5)), number(0.5))
    made.append(helper.make_node("Mul", [x, half], [y], node.name))
    return made


def _constant(name: str, value: float) -> Any:
    from onnx import TensorProto, helper

    return helper.make_node(
        "Constant", [], [name], name, value=helper.make_tensor(name, TensorProto.FLOAT, [], [value])
    )


SPELLED = {"Erfc": _erfc, "TFL_GELU": _gelu}
