"""Whatever is wrong: a typed error that names the thing and the remedy, and what was there before stays intact."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests import small
from torch import Tensor, nn
from torch.nn import functional as F

import bitport
from bitport import Batch, Recipe, errors
from bitport.cli import cli
from bitport.errors import DataError, LoadError, RecipeError, UnknownName, WeightsError
from bitport.graph import Graph
from bitport.recipe import StepSpec

X = torch.zeros(4, 1, 8, 8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small.quick(monkeypatch)


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Never modified: no run may."""
    return bitport.load(small.tiny(), X)


# --------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        (
            "body.weight",
            [float("nan")] * 2 + [float("inf")],
            "body.weight holds 2 NaN and 1 infinite of 576 values",
        ),
        ("fc.bias", [float("-inf")], "fc.bias holds 0 NaN and 1 infinite of 3 values"),
        ("bn.running_var", [float("nan")], "bn.running_var holds 1 NaN and 0 infinite of 8 values"),
    ],
)
def test_bad_weights_are_named_and_counted(name: str, bad: list[float], message: str) -> None:
    model = small.tiny()
    with torch.no_grad():
        model.state_dict()[name].flatten()[: len(bad)] = torch.tensor(bad)
    with pytest.raises(WeightsError, match=rf"{message}: train it again or repair it"):
        bitport.load(model, X)


def test_weights_that_went_bad_after_loading_are_named(tmp_path: Path) -> None:
    graph = bitport.load(small.tiny(), X)
    graph.tensor("body.weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"body\.weight holds 1 NaN and 0 infinite of 576"):
        bitport.compress(graph, "int8", target="null", data=small.calibration(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Flat(nn.Module):
    """Two convolutions whose results leave the network, so that zeros can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def dead(kind: str) -> Flat:
    """A network with weights of zeros only: in one channel, in a whole layer, or with zero biases, too."""
    torch.manual_seed(1)
    model = Flat().eval()
    with torch.no_grad():
        if kind == "channel":
            model.second.weight[2] = 0
            model.second.bias[2] = 0
        if kind == "channel with a bias":
            model.second.weight[2] = 0
            model.second.bias[2] = 0.75
        if kind == "layer":
            model.second.weight.zero_()
        if kind == "everything":
            for parameter in model.parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("channel", "null"), ("channel with a bias", "onnxruntime"), ("layer", "null"),
        ("everything", "onnxruntime"), ("everything", "null"),
    ],
)  # fmt: skip
def test_channels_of_zeros_are_exact(tmp_path: Path, kind: str, target: str) -> None:
    model = dead(kind)
    graph = bitport.load(model, X)
    artifact = bitport.compress(
        graph, "int8", target=target, data=small.calibration(), metric="mse", out=tmp_path / "out"
    )
    record = artifact.measurements
    assert record["parity.local"]["max_steps"] == 0
    assert record["parity.local"]["exact_share"] == 1.0
    x = small.patterns(8, seed=3)[0]
    found, real = artifact.predict(x), model(x)
    assert isinstance(found, Tensor)
    if kind == "everything":
        assert bool((found == 0).all())
    else:
        assert (found - real).abs().max() <= 0.05 * real.abs().max()
    # the stored weights of a dead channel are zeros, not the smallest step
    stored = artifact.graph.tensor("second.weight").detach()
    expected = model.second.weight.detach() == 0
    assert bool((stored[expected] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "target"), [(0.0, "onnxruntime"), (0.7, "onnxruntime"), (0.0, "null"), (-3.0, "null")]
)
def test_constant_activations_are_exact(tmp_path: Path, value: float, target: str) -> None:
    model = dead("none")
    constant = [torch.full((8, 1, 8, 8), value)] * 2
    graph = bitport.load(model, X)
    artifact = bitport.compress(
        graph, "int8", target=target, data=constant, metric="mse", out=tmp_path / "out"
    )
    record = artifact.measurements
    assert record["parity.local"]["max_steps"] == 0
    found, real = artifact.predict(constant[0]), model(constant[0])
    assert isinstance(found, Tensor)
    assert torch.isfinite(found).all()
    assert (found - real).abs().max() <= 0.05 * real.abs().max()


# --------------------------------------------------------------------------------------------- data


def raising() -> Iterator[Tensor]:
    yield X
    yield X
    raise OSError("the disk went away")


def nothing() -> Iterator[Tensor]:
    return iter(())


DATA: dict[str, tuple[Any, str, int | None]] = {
    "empty list": ([], "the {role} data is empty: give at least one batch", None),
    "empty callable": (nothing, "the {role} data is empty", None),
    "generator": ((X for _ in range(2)), r"one-shot iterator \(generator\).*give list\(…\), or a callable", None),
    "zip": (zip([X], [X], strict=True), r"one-shot iterator \(zip\)", None),
    "bare tensor": (X, r"a bare tensor: give a list of batches", None),
    "number": (3, "of type int: give an iterable of batches", None),
    "channels last": (
        [torch.zeros(4, 8, 8, 1)],
        r"'x' of batch 0: expected shape \[batch, 1, 8, 8\], got \[4, 8, 8, 1\].*channels last.*permute",
        0,
    ),
    "no batch axis": ([X, torch.zeros(1, 8, 8)], r"batch 1: .*batch axis is missing.*unsqueeze\(0\)", 1),
    "empty batch": ([torch.zeros(0, 1, 8, 8)], "it is empty; drop empty batches", 0),
    "doubles": ([X.double()], r"expected float32, got float64: convert it with \.float\(\)", 0),
    "bytes": ([X.byte()], r"expected float32, got uint8: .*scale it as in training", 0),
    "text": (["picture.png"], "'x' of batch 0 is of type str; a tensor or NumPy array was expected", 0),
    "unknown name": ([{"image": X}], r"unknown 'image' and missing 'x'.*it takes 'x'", 0),
    "three parts": ([(X, X, X)], "a tuple of 3 elements", 0),
    "raising": (raising, r"the {role} data raised at batch 2 \(OSError: the disk went away\): mend the loader", 2),
}  # fmt: skip


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize("kind", DATA)
def test_bad_data_is_told_by_role_and_batch(tmp_path: Path, graph: Graph, kind: str, role: str) -> None:
    data, message, batch = DATA[kind]
    given = {"data": data} if role == "calibration" else {"data": small.calibration(), "evaluation": data}
    with pytest.raises(DataError, match=message.format(role=role)) as caught:
        bitport.compress(graph, "int8", target="null", out=tmp_path / "out", **given)
    assert caught.value.batch == batch
    assert list(tmp_path.iterdir()) == []


def test_nan_among_the_inputs(tmp_path: Path) -> None:
    bad = X.clone()
    bad[1, 0, 2, 3] = float("nan")
    with pytest.raises(DataError, match=r"2 of 2 batches of the calibration data hold NaN.*mend or remove"):
        small.compressed(tmp_path / "out", data=[bad, bad])
    with pytest.raises(DataError, match=r"'x' of batch 1 of the evaluation data holds 1 NaN") as caught:
        small.compressed(tmp_path / "out", evaluation=[X, bad])
    assert caught.value.batch == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"metric 'top1' needs labels and the data has none: yield \(inputs, labels\)"
    ):
        small.compressed(tmp_path / "out", evaluation=small.calibration(), metric="top1")
    half = [(X, torch.zeros(4, dtype=torch.long)), X]
    with pytest.raises(errors.BitportError, match=r"labels") as caught:
        small.compressed(tmp_path / "out", evaluation=half)
    assert "batch 1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_fit_nothing(tmp_path: Path) -> None:
    with pytest.raises(errors.MetricError, match="sample 0 has the label 9, outside 0…2"):
        small.compressed(tmp_path / "out", evaluation=[(X, torch.full((4,), 9))])
    with pytest.raises(errors.MetricError, match=r"outputs \[4, 3\] and labels \[3\] don't match"):
        small.compressed(tmp_path / "out", evaluation=[(X, torch.zeros(3, dtype=torch.long))])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": "onnxruntim"}, UnknownName, "'onnxruntim'. Did you mean 'onnxruntime'.*Known: .*null"),
        ({"recipe": "int9"}, UnknownName, r"unknown recipe 'int9'.*Known: .*float, .*int8, .*int8-minmax"),
        ({"recipe": "none.toml"}, RecipeError, r"recipe 'none\.toml' can't be read"),
        ({"recipe": Recipe(steps=(StepSpec("prun"),))}, UnknownName, "unknown step.*'prun'.*Known: .*quantize"),
        (
            {"recipe": Recipe(steps=(StepSpec("quantize", {"weight": {}}),))},
            RecipeError,
            "weight.*activations, weights",
        ),
        (
            {"recipe": Recipe(steps=(StepSpec("quantize"),), target={"thread": 2}), "target": "onnxruntime"},
            RecipeError,
            r"\[target\] thread: onnxruntime has no such option; its options are: accuracy_level, io, opset, .*threads",
        ),
        (
            {"recipe": Recipe(steps=(StepSpec("quantize"),), target={"threads": "2"}), "target": "onnxruntime"},
            RecipeError,
            r"\[target\] threads = '2': expected a value of type int",
        ),
        ({"metric": "accuracy"}, UnknownName, "unknown metric 'accuracy'.*Known: agreement"),
        ({"effort": "max"}, UnknownName, "unknown effort 'max'.*Known: balanced, best, fast"),
    ],
)  # fmt: skip
def test_unknown_names_list_the_known_ones(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"target": "null", **change}
    with pytest.raises(error, match=message):
        small.compressed(tmp_path / "out", given.pop("target"), **given)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.pt2", r"missing\.pt2 doesn't exist: give a \.pt2, \.onnx, \.keras or \.tflite file"),
        ("weights.pth", r"weights\.pth holds pickled objects, which could run code: save the network with"),
        ("net.py", r"net\.py is Python: name the function in it .* as net:make"),
        ("net.mlmodel", r"net\.mlmodel: no front end reads \.mlmodel"),
        ("net.h5", r"net\.h5 is of an older Keras"),
        ("broken.pt2", r"broken\.pt2"),
        (3, "a int can't be loaded|an int can't be loaded"),
    ],
)
def test_models_that_can_not_be_read(tmp_path: Path, model: Any, message: str) -> None:
    for name in ("weights.pth", "net.py", "net.mlmodel", "net.h5", "broken.pt2"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(LoadError, match=message):
        bitport.load(tmp_path / model if isinstance(model, str) else model)


def test_a_module_without_an_example() -> None:
    with pytest.raises(LoadError, match="needs example_inputs"):
        bitport.load(small.tiny())


def test_an_example_that_does_not_fit_the_model() -> None:
    with pytest.raises(LoadError, match=r"can't be captured: .*channels"):
        bitport.load(small.tiny(), torch.zeros(1, 3, 8, 8))


# --------------------------------------------------------------------------------------------- on the command line

MODULE = """
import os, signal
import torch
from tests import small

def net(): return small.tiny(), small.patterns(1)[0]
def bad_net():
    model = small.tiny()
    model.body.weight.data[0] = float("nan")
    return model, small.patterns(1)[0]
def data(): return small.calibration()
def judged(): return small.evaluation()
def empty(): return []
def doubles(): return [batch.double() for batch in small.calibration()]
def raising():
    yield small.calibration()[0]
    raise OSError("the disk went away")
def interrupted():
    yield small.calibration()[0]
    os.kill(os.getpid(), signal.SIGINT)
    yield small.calibration()[1]
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`bitport compress` in an otherwise empty folder, with a model and data of one's own module."""
    (tmp_path / "bad_input_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def invoke(model: str = "bad_input_net:net", **change: str) -> Result:
        options = {
            "target": "null", "recipe": "int8", "data": "bad_input_net:data", "out": "out", **change,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        return CliRunner().invoke(cli, ["compress", model, *words])

    return invoke


@contextmanager
def canary(folder: Path) -> Iterator[Path]:
    """A .pt2 whose reading would create a file, if anything in it were unpickled."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return os.system, (f"touch {folder / 'executed'}",)

    torch.save({"model": Bomb()}, folder / "bomb.pt2")
    yield folder / "bomb.pt2"
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "bad_input_net:bad_net"}, ["body.weight holds 72 NaN", "repair it"]),
        ({"model": "bad_input_net:nett"}, ["could not be called", "AttributeError"]),
        ({"model": "no_such_module:net"}, ["could not be called", "ModuleNotFoundError"]),
        ({"model": "missing.pt2"}, ["missing.pt2 doesn't exist"]),
        ({"data": "bad_input_net:empty"}, ["calibration data is empty"]),
        ({"data": "bad_input_net:doubles"}, ["expected float32, got float64", ".float()"]),
        ({"data": "bad_input_net:raising"}, ["raised at batch 1", "the disk went away"]),
        ({"data": "bad_input_net:nothing"}, ["can't be imported"]),
        ({"data": "none.npz"}, ["no data at 'none.npz'"]),
        ({"eval": "bad_input_net:data", "metric": "top1"}, ["'top1' needs labels"]),
        ({"target": "openvin"}, ["unknown target 'openvin'", "Known:", "onnxruntime"]),
        ({"recipe": "int7"}, ["unknown recipe 'int7'", "Known:", "int8"]),
        ({"effort": "more"}, ["unknown effort 'more'", "best"]),
        ({"max_drop": "-1"}, ["max_drop = -1"]),
        ({"out": "bad_input_net.py"}, ["is a file: name a folder"]),
        ({"out": "/proc/bitport/out"}, ["can't be written"]),
        ({"train": "bad_input_net:judged"}, ["need a step that trains"]),
    ],
)
def test_one_line_and_no_traceback(
    command: Callable[..., Result], tmp_path: Path, change: dict[str, str], words: list[str]
) -> None:
    done = command(**change)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "unexpected" not in lines[0]
    assert [word for word in words if word not in lines[0]] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"bad_input_net.py", "__pycache__"}


def test_a_file_that_needs_unpickling_is_refused(command: Callable[..., Result], tmp_path: Path) -> None:
    with canary(tmp_path) as bomb:
        done = command(str(bomb))
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert "bomb.pt2" in done.stderr
        assert "unexpected" not in done.stderr
        inspected = CliRunner().invoke(cli, ["inspect", str(bomb)])
        assert inspected.exit_code == 1


def test_ctrl_c_ends_with_75_and_leaves_the_artifact(command: Callable[..., Result], tmp_path: Path) -> None:
    assert command().exit_code == 0
    before = small.content(tmp_path / "out")
    done = command(data="bad_input_net:interrupted")
    assert done.exit_code == 75, done.output
    said = "interrupted behind step 3 of 6 (calibrate): run the same command again to go on from there"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert small.content(tmp_path / "out") == before
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"bad_input_net.py", "out", ".out.checkpoint"}
    assert command().exit_code == 0
    assert not (tmp_path / ".out.checkpoint").exists()


def test_batches_of_labels_only_for_evaluation(tmp_path: Path) -> None:
    # labels of calibration data are ignored, whatever they are
    data = [Batch(X, labels="whatever"), (X, None), (X, object())]
    small.compressed(tmp_path / "out", data=data)
