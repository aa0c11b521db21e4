"""Text and speech networks of Hugging Face: values, gradients, and integers on the runtimes."""

from __future__ import annotations

import pytest
from tests.families import SEQUENCES
from tests.families.check import in_turn, on, on_the_runtime, values_and_gradients

from bitport.errors import ExportError

EARLY = ("bert", "gpt2", "llama", "mixtral", "wav2vec2")


@pytest.mark.parametrize("name", in_turn(SEQUENCES, EARLY))
def test_values_and_gradients_are_the_originals(name: str) -> None:
    values_and_gradients(name, 3)


@pytest.mark.parametrize("name", in_turn(SEQUENCES, ("gpt2", "mixtral")))
def test_its_integers_arrive_on_the_runtime(name: str) -> None:
    result = on_the_runtime(name)
    assert result.share() > 0.9
    assert result.prepared.real_error(result.example) < 0.25


# What stays in float there: products of two activations, so also those of experts; long kernels in groups.
SHARES = {"mixtral": 0.2, "qwen3_moe": 0.35, "gpt_oss": 0.2, "wav2vec2": 0.65}


@pytest.mark.parametrize("name", in_turn(SEQUENCES, ("bert",)))
def test_its_integers_arrive_on_openvino(name: str) -> None:
    assert on("openvino", name).share() > SHARES.get(name, 0.8)


# The rows of each expert are counted by histc, which ExecuTorch lacks.
EXECUTORCH_GAPS = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("name", in_turn([name for name in SEQUENCES if name not in EXECUTORCH_GAPS], ()))
def test_its_integers_arrive_on_executorch(name: str) -> None:
    assert on("executorch", name).share() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTORCH_GAPS)
def test_executorch_still_refuses_it_and_says_why(name: str) -> None:
    with pytest.raises(ExportError, match=r"aten\.histc"):
        on("executorch", name)


# Mixtures of experts sort their rows, which LiteRT can't.
LITERT_GAPS = dict.fromkeys(EXECUTORCH_GAPS, r"sort: LiteRT has no operator for aten\.sort")
ON_LITERT = [name for name in SEQUENCES if name not in LITERT_GAPS]


@pytest.mark.parametrize("name", in_turn(ON_LITERT, ("bert",)))
def test_its_integers_arrive_on_litert(name: str) -> None:
    result = on("litert", name)
    assert not result.shipped.inspection.missed and result.share() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", LITERT_GAPS)
def test_litert_still_refuses_it_and_says_why(name: str) -> None:
    with pytest.raises(ExportError, match=LITERT_GAPS[name]):
        on("litert", name)
