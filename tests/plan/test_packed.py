"""Weights at their true width: what is written is what the graph holds, to the bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests import small
from tests.flow import Net, Prepared, conv, images, prepare
from torch import Tensor, nn

import bitport
from bitport.artifact import WEIGHTS, Artifact
from bitport.errors import ArtifactError, Tampered
from bitport.formats import Format
from bitport.frontends.pytorch import load_module
from bitport.graph import Graph
from bitport.numerics.codes import storage_bits
from bitport.plan.constants import grid_of
from bitport.plan.packed import packed_weights, unpacked_weight
from bitport.recipe import Override, StepSpec

FLOAT = {"format": "float32"}
FORMATS = (
    *(f"int{bits}" for bits in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)),
    *("uint1", "uint4", "uint16", "int[-3,9]", "int4 bits(8)", "int8n", "ternary", "binary", "sign"),
    *("float16", "bfloat16", "e4m3", "e5m2", "e2m1", "e3m2", "e5m9", "e8m10", "e1m3"),
    *("nf4", "codebook(5)", "codebook(256)", "log2(2)", "log2(5)", "log2(8)"),
    *("mxfp8", "mxfp6", "mxfp4", "nvfp4", "int4 group(7) scale(float16)", "int3 group(5) scale(bfloat16)"),
    *("int8 channel scale(e8m0)", "nf4 group(16) scale(e4m3)", "int4 group(1)", "int4 group(4000)"),
)


@functools.cache
def odd() -> Graph:
    """Odd sizes, a kernel of one value, a channel of one value."""
    net = Net(
        lambda m, x: m.d(m.c(m.t(m.b(m.a(x)))).mean((2, 3))),
        a=conv(3, 5), b=conv(5, 5, groups=5), t=nn.ConvTranspose2d(5, 3, 2), c=conv(3, 1, 1), d=nn.Linear(1, 7),
    )  # fmt: skip
    return load_module(net.eval(), images(2))


@functools.cache
def packed(text: str, symmetric: bool) -> tuple[Prepared, Mapping[str, Tensor], Mapping[str, str]]:
    options: dict[str, Any] = {"format": text} if symmetric else {"format": text, "symmetric": False}
    prepared = prepare(odd(), [images(4)], "null", weights=options, activations=FLOAT)
    tensors, notes = packed_weights(prepared.work, prepared.plan)
    return prepared, load(save(tensors, notes)), notes


@pytest.mark.parametrize(
    ("text", "symmetric"),
    [(text, kept) for text in FORMATS for kept in (True, False) if kept or Format.parse(text).is_int],
)
def test_what_is_packed_is_what_the_graph_holds(text: str, symmetric: bool) -> None:
    prepared, tensors, notes = packed(text, symmetric)
    keys = [key for key in notes if key != "schema"]
    assert keys == [f"{name}.weight" for name in "abtcd"]
    for key in keys:
        coded = unpacked_weight(tensors, notes, key)
        found, wanted = coded.dequantize(), prepared.work.tensor(key)
        assert found.dtype == torch.float32 and torch.equal(found, wanted), key
        assert coded.grid.format == prepared.plan.ties[key].format
        # nothing is stored wider than the record says
        stored = sum(
            t.numel() * t.element_size() for name, t in tensors.items() if name.startswith(f"{key}.")
        )
        bits = storage_bits(wanted.numel(), grid_of(prepared.plan.ties[key]))
        assert bits / 8 <= stored < bits / 8 + 2, key


def test_the_widths_of_the_parts() -> None:
    _, tensors, notes = packed("int4 group(7) scale(float16)", False)
    # 5·27 values of 4 bits; 4 groups a channel with a scale and a zero point of 4 bits each
    assert tensors["a.weight.codes"].shape == (68,) and tensors["a.weight.codes"].dtype == torch.uint8
    assert tensors["a.weight.scale"].shape == (5, 4) and tensors["a.weight.scale"].dtype == torch.float16
    assert tensors["a.weight.zero_point"].shape == (10,)
    assert json.loads(notes["a.weight"]) == {
        "format": "int4 group(7,0) scale(float16)", "shape": [5, 3, 3, 3], "parameter": "a.weight",
    }  # fmt: skip
    _, tensors, _ = packed("nvfp4", True)
    assert tensors["a.weight.factor"].shape == () and tensors["a.weight.scale"].dtype == torch.uint8
    _, tensors, _ = packed("int4", True)
    assert "a.weight.zero_point" not in tensors


def test_an_artifact_reads_its_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)
    small.without_page(monkeypatch)
    options = {"weights": {"format": "int4", "granularity": "group", "group": 5, "symmetric": False}}
    recipe = bitport.Recipe(
        steps=(StepSpec("quantize", {**options, "activations": FLOAT}),),
        overrides=(Override("body", weights={"format": "nf4"}),),
    )
    artifact = small.compressed(tmp_path / "out", recipe=recipe)
    weights = artifact.weights()
    assert {key: str(coded.grid.format) for key, coded in weights.items()} == {
        "stem.weight": "int4 group(5,0)", "body.weight": "nf4 group(5,0)", "fc.weight": "int4 group(5,0)",
    }  # fmt: skip
    for key, coded in weights.items():
        assert torch.equal(coded.dequantize(), artifact.graph.tensor(key))
    # a file that was changed is told by name, and a malformed one is no traceback
    path = artifact.path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Tampered, match=WEIGHTS):
        Artifact.load(artifact.path)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} can't be read .*: make the artifact again"):
        artifact.weights()


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        ({"a.weight.codes": torch.zeros(67, dtype=torch.uint8)}, "take 68 bytes, but 67 were given"),
        ({"a.weight.codes": torch.zeros(68)}, "packed codes are torch.float32"),
        ({"a.weight.codes": None}, "a.weight.codes"),
        (
            {"a.weight.scale": torch.ones(5, 3, dtype=torch.float16)},
            r"shape \[., .\], not of torch.float16 and \[5, 4\]",
        ),
        (
            {"a.weight.scale": torch.ones(4, 5, dtype=torch.float16)},
            r"shape \[., .\], not of torch.float16 and \[5, 4\]",
        ),
        ({"a.weight.scale": torch.full((5, 4), torch.nan, dtype=torch.float16)}, "finite positive"),
        ({"a.weight.scale": torch.full((5, 4), -1.0, dtype=torch.float16)}, "finite positive"),
        ({"a.weight.scale": torch.ones(5, 4, dtype=torch.int8)}, "torch.int8"),
        ({"a.weight.zero_point": torch.zeros(9, dtype=torch.uint8)}, "take 10 bytes, but 9 were given"),
        ({"a.weight.zero_point": None}, "zero_point"),
    ],
)
def test_forged_tensors_are_refused(forged: dict[str, Tensor | None], said: str) -> None:
    _, tensors, notes = packed("int4 group(7) scale(float16)", False)
    changed = {key: value for key, value in {**tensors, **forged}.items() if value is not None}
    with pytest.raises(ArtifactError, match=rf"the packed weight 'a.weight' is malformed .*{said}"):
        unpacked_weight(changed, notes, "a.weight")


@pytest.mark.parametrize(
    "note",
    [
        "{", "[]", "3", "null", "{}",
        json.dumps({"format": "int4 group(7,0)", "shape": [5, -3, 3, 3]}),
        json.dumps({"format": "int4 group(7,0)", "shape": [5, 3, 3]}),
        json.dumps({"format": "int4 group(7,0)", "shape": "5333"}),
        json.dumps({"format": "int4 group(7,0)", "shape": [5, 3, 3, 2**62]}),
        json.dumps({"format": "int4 group(7,9)", "shape": [5, 3, 3, 3]}),
        json.dumps({"format": "int99", "shape": [5, 3, 3, 3]}),
        json.dumps({"format": 4, "shape": [5, 3, 3, 3]}),
        json.dumps({"format": "codebook(5)", "shape": [5, 3, 3, 3]}),
    ],
)  # fmt: skip
def test_forged_notes_are_refused(note: str) -> None:
    _, tensors, notes = packed("int4 group(7) scale(float16)", False)
    with pytest.raises(ArtifactError, match=r"the packed weight 'a.weight' is malformed \("):
        unpacked_weight(tensors, {**notes, "a.weight": note}, "a.weight")
    with pytest.raises(ArtifactError, match=r"the packed weight 'z' is malformed \('z'\)"):
        unpacked_weight(tensors, notes, "z")


@pytest.mark.parametrize("bad", [torch.full((5,), torch.nan), torch.ones(4), torch.arange(5).int(), None])
def test_forged_tables_are_refused(bad: Tensor | None) -> None:
    _, tensors, notes = packed("codebook(5)", True)
    changed = {**tensors, "a.weight.table": bad} if bad is not None else dict(tensors)
    if bad is None:
        del changed["a.weight.table"]
    with pytest.raises(ArtifactError, match=r"the packed weight 'a.weight' is malformed .*table"):
        unpacked_weight(changed, notes, "a.weight")
