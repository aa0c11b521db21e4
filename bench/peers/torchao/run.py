"""torchao's outputs, computed by PyTorch's eager mode. `python -m bench.peers.torchao.run JOB.json`.

Images: PT2E with the quantizer for x86 and its default configuration; under 8 bits the same with narrower ranges of
integers. Text: `IntxWeightOnlyConfig`. Two ways are tried in each cell; what counts is the one whose outputs on the
calibration data are nearer the float network's. Its GPTQ needs CUDA.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from bench.peers import choice, common

EPSILON = 2**-12  # the default configuration's smallest scale
WEIGHTS = {8: torch.int8, 4: torch.int4, 3: torch.int3, 2: torch.int2}
OBSERVERS = {"histogram": HistogramObserver, "MinMax": MinMaxObserver}
Way = Callable[[], nn.Module]


def configuration(cell: Mapping[str, Any], observer: type[nn.Module]) -> QuantizationConfig:
    """The quantizer's default (unsigned activations, symmetric signed weights), at the cell's bits."""
    activations = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=2 ** cell["activations"] - 1,
        qscheme=torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=observer.with_args(eps=EPSILON),
    )
    half = 2 ** (cell["weights"] - 1)
    whole = cell["per_tensor"]
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-half,
        quant_max=half - 1,
        qscheme=torch.per_tensor_symmetric if whole else torch.per_channel_symmetric,
        ch_axis=None if whole else 0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=(MinMaxObserver if whole else PerChannelMinMaxObserver).with_args(
            eps=EPSILON
        ),
    )
    return QuantizationConfig(activations, activations, weights, None)


def static(cell: Mapping[str, Any], model: nn.Module, data: list[Tensor]) -> dict[str, Way]:
    """The default observer, and the plain one."""

    def way(observer: type[nn.Module]) -> Way:
        def make() -> nn.Module:
            batch = torch.export.Dim("batch")
            graph = torch.export.export(model, (data[0],), dynamic_shapes=({0: batch},)).module()
            quantizer = X86InductorQuantizer().set_global(configuration(cell, observer))
            prepared = prepare_pt2e(graph, quantizer)
            for part in data:
                prepared(part)
            made: nn.Module = convert_pt2e(prepared)
            return made

        return make

    return {name: way(observer) for name, observer in OBSERVERS.items()}


def weight_only(cell: Mapping[str, Any], model: nn.Module) -> dict[str, Way]:
    """Ranges with a zero point, and symmetric ones by HQQ."""

    def way(mapping: MappingType, algorithm: IntxChooseQParamsAlgorithm) -> Way:
        def make() -> nn.Module:
            made = copy.deepcopy(model)
            config = IntxWeightOnlyConfig(
                weight_dtype=WEIGHTS[cell["weights"]],
                granularity=PerGroup(cell["group"]),
                mapping_type=mapping,
                intx_choose_qparams_algorithm=algorithm,
            )
            quantize_(made, config)  # every Linear, and nothing else, unless told otherwise
            return made

        return make

    return {
        "asymmetric": way(MappingType.ASYMMETRIC, IntxChooseQParamsAlgorithm.AFFINE),
        "HQQ, scale only": way(MappingType.SYMMETRIC, IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY),
    }


def main() -> None:
    job = common.read_job()
    cell, model, data = job["cell"], common.network(job), common.calibration_batches(job)
    if cell["activations"] and cell["weights"] < 4:
        common.unsupported("it offers static quantization with 8 and 4 bits, not with 2")
    ways = weight_only(cell, model) if cell["group"] else static(cell, model, data)
    started = time.perf_counter()
    reference = choice.outputs(model, data)
    tried: dict[str, tuple[float, nn.Module]] = {}
    for method, make in ways.items():
        made = make()
        tried[method] = (choice.divergence(reference, choice.outputs(made, data)), made)
    best = min(tried, key=lambda method: tried[method][0])
    seconds = time.perf_counter() - started
    found = choice.outputs(tried[best][1], common.test_batches(job))
    note = ", ".join(f"{method}: {value:.5f} nats" for method, (value, _) in tried.items())
    common.write(job, found, seconds, best, "simulated", note, ("torchao",))


if __name__ == "__main__":
    main()
