"""What scripts outside the project rely on: names, signatures, keys, files, exit codes."""

from __future__ import annotations

import inspect
import json
import pkgutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests import small

import bitport
from bitport import errors
from bitport.cli import cli
from bitport.errors import GateFailed

PUBLIC = [
    "Artifact", "ArtifactError", "Batch", "BitportError", "DataError", "ExportError", "Format",
    "FormatError", "GateFailed", "GraphError", "Interrupted", "LoadError", "Locked", "Metric",
    "MetricError", "MissingDependency", "NotEnoughMemory", "Recipe", "RecipeError", "Tampered", "TargetError",
    "UnknownName", "UnsafeFile", "WeightsError", "compress", "dequantize", "diagnose", "diff", "load", "report",
    "requantize", "targets", "verify",
]  # fmt: skip
HEAVY = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "sklearn",
    "scipy",
    "plotly",
    "rich",
)
KEYS = [
    "task.metric", "task.float", "task.simulated", "task.runtime", "task.drop", "task.ci95", "task.verdict",
    "task.samples", "parity.exact_share", "parity.max_steps", "parity.top1_agreement", "parity.edges",
    "integer.mac_share", "integer.float_ops", "latency.float_ms", "latency.compressed_ms",
    "latency.speedup", "latency.ci95", "latency.threads", "latency.batch", "latency.verdict",
    "size.float_bytes", "size.compressed_bytes", "size.ratio", "memory.compress_peak_bytes",
    "memory.run_peak_bytes", "macs", "sparsity", "seconds",
]  # fmt: skip
TEXTS = ("manifest.json", "measurements.json", "plan.json", "recipe.toml")
FILES = {
    "onnxruntime": {"model.onnx", "reference/model.onnx", "run.py"},
    # no runtime, hence no model file: the simulator's own graph and plan
    "null": {
        "null.pt2",
        "null.plan.json",
        "weights.safetensors",
        "reference/null.pt2",
        "reference/null.plan.json",
    },
}
COMMON = {
    *TEXTS, "graph.pt2", "reference/graph.pt2", "sample.npz", "report.html", "statistics.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module", params=["onnxruntime", "null"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bitport.Artifact:
    """One whole compression for each target, with nothing made cheaper."""
    with small.with_memory():
        return small.compressed(tmp_path_factory.mktemp("contract") / "out", request.param, max_drop=0.2)


# --------------------------------------------------------------------------------------------- names, signatures


def test_public_names_are_these_and_no_others() -> None:
    assert sorted(bitport.__all__) == PUBLIC
    assert dir(bitport) == PUBLIC
    for name in PUBLIC:
        assert getattr(bitport, name) is not None
    typed = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert {name for name in typed if issubclass(getattr(errors, name), errors.BitportError)} <= set(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitport.nothing


def test_signatures_are_those_of_the_fixed_interface() -> None:
    keyword = inspect.Parameter.KEYWORD_ONLY

    def shape(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
        """(names that may be given by position, names with their defaults that may not)"""
        every = inspect.signature(function).parameters.values()
        return [p.name for p in every if p.kind is not keyword], {
            p.name: p.default for p in every if p.kind is keyword
        }

    required = inspect.Parameter.empty
    positional, named = shape(bitport.load)
    assert positional == ["model", "example_inputs"]
    assert named == {"dynamic_shapes": "batch", "device": "cpu", "nonfinite": "refuse"}
    positional, named = shape(bitport.compress)
    assert positional == ["graph", "recipe"]
    assert named == {
        "target": required, "data": required, "train": None, "evaluation": None, "metric": None,
        "max_drop": None, "out": required, "teacher": None, "effort": None, "device": None, "seed": 0,
        "progress": None,
    }  # fmt: skip
    positional, named = shape(bitport.verify)
    assert (positional, named) == (
        ["folder", "data", "metric", "target"],
        {"outputs": None, "progress": None},
    )
    assert inspect.signature(bitport.verify).parameters["target"].default is None
    assert shape(bitport.report) == (["folder"], {})
    positional, named = shape(bitport.requantize)
    assert positional == ["folder", "recipe"]
    assert named == {
        "data": required, "out": required, "target": None, "evaluation": None, "metric": None, "max_drop": None,
        "effort": None, "seed": 0, "progress": None,
    }  # fmt: skip
    assert shape(bitport.dequantize) == (["folder", "data"], {"correct": True, "progress": None})
    assert shape(bitport.diagnose) == (
        ["folder", "data"],
        {"evaluation": None, "metric": None, "top": 3, "out": None, "progress": None},
    )
    assert shape(bitport.targets) == ([], {})
    assert shape(bitport.Artifact.load) == (["path"], {})
    assert shape(bitport.Artifact.predict) == (["self", "inputs"], {})
    assert list(inspect.signature(bitport.Batch).parameters) == ["inputs", "labels"]
    assert list(inspect.signature(bitport.Metric).parameters)[:4] == [
        "name", "higher_is_better", "per_sample", "dataset",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["import bitport", "import bitport.cli; bitport.cli.cli(['--help'])"])
def test_importing_and_helping_load_nothing_heavy(what: str) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr))
{what}
"""
    done = small.python(code)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr


def test_no_submodule_takes_the_name_of_a_function() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(bitport.__path__)}
    assert submodules & {"load", "compress", "verify", "report", "search"} == set()


@pytest.mark.parametrize("backwards", [False, True])
def test_functions_stay_functions_whatever_is_imported_first(backwards: bool) -> None:
    # `targets` is a package and a function of the interface: it has to be both, at any time
    code = f"""
import importlib, pkgutil, bitport
names = [m.name for m in pkgutil.walk_packages(bitport.__path__, "bitport.") if m.name != "bitport.__main__"]
first = bitport.targets() if {backwards} else None
for name in sorted(names, reverse={backwards}):
    importlib.import_module(name)
for name in ("load", "compress", "verify", "report"):
    assert type(getattr(bitport, name)).__name__ == "function", name
assert "null" in bitport.targets() and "null" in bitport.targets()
assert first in (None, bitport.targets())
from bitport import targets
assert targets() == bitport.targets()
import bitport.targets.null as null
assert null is bitport.targets.null
"""
    done = small.python(code)
    assert done.returncode == 0, done.stderr


def test_targets_tell_what_they_are_and_need() -> None:
    found = bitport.targets()
    assert {"null", "onnxruntime"} <= set(found)
    assert all(entry["summary"] and isinstance(entry["available"], bool) for entry in found.values())
    assert all("needs" in entry for entry in found.values() if not entry["available"])


# --------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_what_it_should_and_nothing_else(artifact: bitport.Artifact) -> None:
    # weights.safetensors is for model files that can't hold packed weights: ONNX can
    assert set(small.content(artifact.path)) == COMMON | FILES[artifact.target.name]
    siblings = {path.name for path in artifact.path.parent.iterdir()}
    assert siblings == {artifact.path.name}


def test_every_text_file_names_its_schema(artifact: bitport.Artifact) -> None:
    for name, text in small.content(artifact.path).items():
        if name.endswith(".json"):
            assert json.loads(text)["schema"] == 1, name
        if name.endswith(".toml"):
            assert tomllib.loads(text.decode())["schema"] == 1, name


def test_the_manifest_says_where_it_comes_from(artifact: bitport.Artifact) -> None:
    manifest = artifact.manifest
    assert set(manifest["files"]) == set(small.content(artifact.path)) - {"manifest.json"}
    assert all(len(digest) == 64 for digest in manifest["files"].values())
    assert manifest["seed"] == 0
    assert manifest["target"] == artifact.target.name
    assert {"python", "torch"} <= set(manifest["versions"])
    assert len(manifest["data_digest"]) == 64
    assert manifest["inputs"] == [{"name": "x", "shape": ["batch", 1, 8, 8], "dtype": "float32"}]
    assert [item["shape"] for item in manifest["outputs"]] == [["batch", 3]]


def missing_keys(record: Mapping[str, Any]) -> list[str]:
    """Keys that scripts read and that are neither there nor null with their reason beside them."""
    missing = []
    for path in KEYS:
        section: Any = record
        *parents, key = path.split(".")
        for parent in parents:
            section = section.get(parent)
            if not isinstance(section, Mapping):
                break
        if not isinstance(section, Mapping) or key not in section:
            missing.append(path)
        elif section[key] is None and not section.get(f"{key}_reason"):
            missing.append(f"{path} (no reason)")
    return missing


def test_every_key_that_scripts_read_is_there(artifact: bitport.Artifact) -> None:
    record = json.loads((artifact.path / "measurements.json").read_text())
    assert missing_keys(record) == []
    real = artifact.target.name == "onnxruntime"
    assert (record["latency"]["speedup"] is not None) == real
    assert (record["size"]["ratio"] is not None) == real
    assert ((record["memory"]["run_peak_bytes"] or 0) > 10**6) == real
    assert record["memory"]["compress_peak_bytes"] >= 0
    assert record["task"]["verdict"] == "holds"
    assert record["task"]["drop"] == pytest.approx(record["task"]["float"] - record["task"]["runtime"])
    low, high = record["task"]["ci95"]
    assert low <= record["task"]["drop"] <= high
    if real:
        size, latency = record["size"], record["latency"]
        assert size["compressed_bytes"] == (artifact.path / "model.onnx").stat().st_size
        assert size["float_bytes"] == (artifact.path / "reference" / "model.onnx").stat().st_size
        assert size["ratio"] == pytest.approx(size["compressed_bytes"] / size["float_bytes"])
        assert latency["speedup"] == pytest.approx(latency["float_ms"] / latency["compressed_ms"], rel=1e-6)
        assert record["integer"]["mac_share"] == 1.0


def test_a_verification_has_the_same_keys(
    artifact: bitport.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    before = small.content(artifact.path)
    record = bitport.verify(artifact.path)
    assert missing_keys(record.record) == []
    assert record["memory.compress_peak_bytes"] is None
    assert small.content(artifact.path) == before


def test_the_keys_are_there_when_nothing_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    for target in ("onnxruntime", "null"):
        record = small.compressed(tmp_path / target, target, recipe="float").measurements.record
        assert missing_keys(record) == []
        assert record["parity"]["exact_share"] is None
        assert record["integer"]["mac_share"] == 0.0


# --------------------------------------------------------------------------------------------- gates, exit codes


def test_a_failed_gate_leaves_the_folder_and_tells_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    out = small.compressed(tmp_path / "out").path
    before = small.content(out)
    with pytest.raises(GateFailed, match="too few to tell") as caught:
        small.compressed(out, max_drop=0.001)
    failed = caught.value
    assert failed.path == tmp_path / "out.rejected"
    assert str(failed.path) in str(failed)
    assert small.content(out) == before
    assert failed.measurements["task"]["verdict"] == "undecided"
    assert missing_keys(failed.measurements) == []
    rejected = bitport.Artifact.load(failed.path)
    assert json.loads(json.dumps(failed.measurements)) == rejected.measurements.record
    assert "undecided" in (failed.path / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.rejected"}
    # a second rejection replaces the first, and a good result leaves the rejected one for who wants to look
    with pytest.raises(GateFailed):
        small.compressed(out, max_drop=0.002)
    assert bitport.Artifact.load(failed.path).manifest["max_drop"] == 0.002


def test_a_failed_gate_without_an_earlier_result_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.quick(monkeypatch)
    with pytest.raises(GateFailed):
        small.compressed(tmp_path / "out", max_drop=0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]


NET = """
from tests import small
def net(): return small.tiny(), small.patterns(1)[0]
def data(): return small.calibration()
def judged(): return small.evaluation()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--max-drop", "0.2"), 0),
        (("--max-drop", "0.001"), 3),
        (("--metric", "bleu"), 1),
        (("--no-such-flag",), 2),
    ],
)
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int
) -> None:
    (tmp_path / "contract_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = {"target": "null", "recipe": "int8", "data": "contract_net:data", "eval": "contract_net:judged"}
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = ["compress", "contract_net:net", *given, "--out", "out", *arguments]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {0: {"out"}, 3: {"out.rejected"}}.get(code, set())
