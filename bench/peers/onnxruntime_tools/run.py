"""ONNX Runtime's own tools, judged by what it computes. `python -m bench.peers.onnxruntime_tools.run JOB.json`.

Images: `quant_pre_process` and `quantize_static` as q/dq, activations unsigned and weights signed, a scale a channel.
Text: `MatMulNBitsQuantizer`. Two ways are tried in each cell; what counts is the one whose outputs on the calibration
data are nearer the float network's.

Left out: Entropy, whose histogram of 128 bins gives MinMax's ranges; the package's GPTQ, whose result doesn't depend on
its Hessian and is worse than rounding; SmoothQuant, which takes Neural Compressor 2, and that a NumPy before 2.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from bench.peers import choice, common

OPSET = 21  # the first with int4
WEIGHTS = {8: QuantType.QInt8, 4: QuantType.QInt4}
ACTIVATIONS = {8: QuantType.QUInt8, 4: QuantType.QUInt4}
LAYERS = ["Conv", "Gemm", "MatMul"]
PERCENTILES = {8: (99.999,), 4: (99.9, 99.0)}
Way = Callable[[Path], None]  # writes a quantized file


def exported(model: nn.Module, example: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model, (example,), path, dynamo=True, opset_version=OPSET, dynamic_shapes=({0: batch},), **names
    )


def outputs(path: Path, batches: Iterable[Tensor]) -> Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options)
    return torch.from_numpy(np.concatenate([session.run(None, {"x": batch.numpy()})[0] for batch in batches]))


class Reader(CalibrationDataReader):
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


def products(source: Path) -> list[str]:
    """The MatMuls without weights, those of attention."""
    graph = onnx.load(source).graph
    weights = {each.name for each in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and weights.isdisjoint(node.input)]


def static(cell: Mapping[str, Any], data: list[Tensor], source: Path) -> dict[str, Way]:
    """MinMax with every operator quantized (the default); percentiles with the layers' inputs alone."""
    attention = products(source)

    def way(method: CalibrationMethod, ops: list[str] | None, **extra: Any) -> Way:
        def write(path: Path) -> None:
            quantize_static(
                source,
                path,
                Reader(data),
                op_types_to_quantize=ops,
                nodes_to_exclude=None if ops is None else attention,
                per_channel=not cell["per_tensor"],
                activation_type=ACTIVATIONS[cell["activations"]],
                weight_type=WEIGHTS[cell["weights"]],
                calibrate_method=method,
                extra_options=extra,
            )

        return write

    found = {"MinMax": way(CalibrationMethod.MinMax, None)} if cell["activations"] == 8 else {}
    for percentile in PERCENTILES[cell["activations"]]:
        found[f"percentile {percentile:g}, layers' inputs"] = way(
            CalibrationMethod.Percentile,
            LAYERS,
            CalibPercentile=percentile,
            OpTypesToExcludeOutputQuantization=LAYERS,
        )
    return found


def weight_only(cell: Mapping[str, Any], source: Path) -> dict[str, Way]:
    """HQQ, and k-quant or (2 bits, which k-quant lacks) the default."""
    bits, group = cell["weights"], cell["group"]

    def way(config: nbits.WeightOnlyQuantConfig) -> Way:
        def write(path: Path) -> None:
            # it alters the model that it is given
            quantizer = nbits.MatMulNBitsQuantizer(onnx.load(source), block_size=group, algo_config=config)
            quantizer.process()
            onnx.save(quantizer.model.model, path)

        return write

    found = {"HQQ": way(nbits.HQQWeightOnlyQuantConfig(block_size=group, bits=bits))}
    if bits == 4:
        found["k-quant"] = way(nbits.KQuantWeightOnlyQuantConfig())
    else:
        found["default"] = way(nbits.DefaultWeightOnlyQuantConfig(block_size=group, bits=bits))
    return found


def check(cell: Mapping[str, Any]) -> None:
    if cell["group"] and cell["weights"] not in (2, 4):
        common.unsupported("MatMulNBits has 2, 4 and 8 bits")
    if not cell["group"] and cell["weights"] not in WEIGHTS:
        common.unsupported("quantize_static has weights of 4, 8 and 16 bits")


def main() -> None:
    job = common.read_job()
    cell = job["cell"]
    check(cell)
    data = common.calibration_batches(job)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        given, source = place / "given.onnx", place / "source.onnx"
        exported(common.network(job), data[0], given)
        started = time.perf_counter()
        quant_pre_process(given, source)
        reference = outputs(source, data)
        ways = weight_only(cell, source) if cell["group"] else static(cell, data, source)
        tried: dict[str, float] = {}
        for number, (method, write) in enumerate(ways.items()):
            write(place / f"{number}.onnx")
            tried[method] = choice.divergence(reference, outputs(place / f"{number}.onnx", data))
        best = min(tried, key=tried.__getitem__)
        seconds = time.perf_counter() - started
        found = outputs(place / f"{list(ways).index(best)}.onnx", common.test_batches(job))
    note = ", ".join(f"{method}: {value:.5f} nats" for method, value in tried.items())
    common.write(job, found, seconds, best, "onnxruntime", note, ("onnx", "onnxruntime"))


if __name__ == "__main__":
    main()
