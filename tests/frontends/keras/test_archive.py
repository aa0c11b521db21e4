"""A `.keras` file is looked through before Keras sees it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import pytest

import bitport
from bitport.errors import LoadError, UnsafeFile
from bitport.frontends.keras._archive import CONFIG, METADATA, WEIGHTS, check_weights, checked

HDF = b"\x89HDF\r\n\x1a\n" + bytes(64)


def layer(
    kind: str = "Dense", module: str = "keras.layers", registered: str | None = None, **config: Any
) -> Any:
    return {
        "module": module,
        "class_name": kind,
        "registered_name": registered,
        "config": {"name": "mine", **config},
    }


def network(*layers: Any, **more: Any) -> Any:
    config = {"name": "net", "layers": list(layers)}
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": config,
        "registered_name": "Sequential",
        **more,
    }


def saved(path: Path, config: Any, weights: bytes = HDF, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(METADATA, "{}")
        archive.writestr(CONFIG, config if isinstance(config, str) else json.dumps(config))
        archive.writestr(WEIGHTS, weights)
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_layers_of_keras_pass(tmp_path: Path) -> None:
    function = {
        "module": "builtins",
        "class_name": "function",
        "config": "gelu",
        "registered_name": "function",
    }
    foreign_loss = layer("MyLoss", "mine", "Mine>MyLoss")
    checked(
        saved(
            tmp_path / "a.keras", network(layer(activation=function), compile_config={"loss": foreign_loss})
        )
    )


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (
            layer("Lambda", function={"class_name": "__lambda__", "config": {"code": "4wAA"}}),
            "'mine' is a Lambda",
        ),
        (layer(activation={"class_name": "__lambda__", "config": {"code": "4wAA"}}), "holds code"),
        (layer("Mine", "my.layers", "Custom>Mine"), "Custom>Mine"),
        (layer("run", "os"), "module 'os'"),
        (layer("Popen", "subprocess"), "module 'subprocess'"),
        (layer("Dense", "keras.layers", "Custom>Dense"), "Custom>Dense"),
        (layer("Dense", "keras_hub.layers"), "keras_hub"),
        (layer("TorchModuleWrapper"), "TorchModuleWrapper"),
        (layer("TextVectorization"), "reads text or files"),
        (
            {"module": "builtins", "class_name": "function", "config": "a.b", "registered_name": "function"},
            "builtins",
        ),
        (layer(inner=[{"deep": layer("eval", "builtins")}]), "'eval'"),
    ],
)
def test_code_and_foreign_classes_are_refused(tmp_path: Path, item: Any, told: str) -> None:
    path = saved(tmp_path / "a.keras", network(item))
    with pytest.raises(UnsafeFile, match=told):
        bitport.load(path)


@pytest.mark.parametrize(
    ("config", "weights", "members", "told"),
    [
        ("{", HDF, {}, "no JSON"),
        ("[" * 200_000, HDF, {}, "no JSON"),
        ("[]", HDF, {}, "describes no network"),
        (network(), b"not hdf", {}, "no HDF5"),
        (network(), HDF, {"odd.bin": b""}, "doesn't belong"),
        (network(), HDF, {"../up": b""}, "doesn't belong"),
        (network(), HDF, {"assets/vocabulary.txt": b""}, "assets"),
    ],
)
def test_odd_archives_are_told(
    tmp_path: Path, config: Any, weights: bytes, members: dict[str, bytes], told: str
) -> None:
    with pytest.raises(LoadError, match=told):
        checked(saved(tmp_path / "a.keras", config, weights, **members))


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.keras", network())
    data = path.read_bytes()
    for length in range(0, len(data), 29):
        path.write_bytes(data[:length])
        with pytest.raises(LoadError):
            checked(path)
    place = data.index(HDF) + 20
    path.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    with pytest.raises(LoadError, match="CRC"):
        checked(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(CONFIG, json.dumps(network()))
    with pytest.raises(LoadError, match=f"no {WEIGHTS}"):
        checked(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, " " * (65 * 2**20))
        archive.writestr(WEIGHTS, HDF)
    with pytest.raises(LoadError, match="unpacks to"):
        checked(path)


def weights(write: Any) -> io.BytesIO:
    found = io.BytesIO()
    with h5py.File(found, "w") as file:
        write(file)
    return found


def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    def plain(file: Any) -> None:
        file["layers/dense/vars/0"] = [[1.0, 2.0]]

    def linked(file: Any) -> None:
        file["layers"] = h5py.ExternalLink("/etc/hostname", "/")

    def soft(file: Any) -> None:
        file["layers"] = h5py.SoftLink("/other")

    def outside(file: Any) -> None:
        file.create_dataset("v", (4,), "u1", external=[("/etc/hostname", 0, 4)])

    def absent(file: Any) -> None:
        file.create_dataset("v", (2**40,), "f4", chunks=(2**20,))

    def packed(file: Any) -> None:
        file.create_dataset("v", (2**40,), "f4", chunks=(2**20,), compression="gzip")

    check_weights(weights(plain), "a.keras")
    for write in (linked, soft, outside):
        with pytest.raises(UnsafeFile):
            check_weights(weights(write), "a.keras")
    for write in (absent, packed):
        with pytest.raises(LoadError, match=r"fewer numbers|unpacks"):
            check_weights(weights(write), "a.keras")
    with pytest.raises(LoadError, match="damaged"):
        check_weights(io.BytesIO(weights(plain).getvalue()[:600]), "a.keras")


def test_a_keras_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(bitport.MissingDependency, match=r"bitport\[keras\]"):
        bitport.load(saved(tmp_path / "a.keras", network()))


def test_weights_of_another_network_are_told(tmp_path: Path) -> None:
    inner = {"module": "keras.layers", "class_name": "InputLayer", "registered_name": None}
    first = inner | {"config": {"batch_shape": [None, 4], "dtype": "float32", "name": "x"}}
    dense = layer(units=3, name="dense") | {"build_config": {"input_shape": [None, 4]}}

    def other(file: Any) -> None:
        file["layers/dense/vars/0"] = [[1.0, 2.0]]

    path = saved(tmp_path / "a.keras", network(first, dense), weights(other).getvalue())
    with pytest.raises(LoadError, match="can't be read by Keras"):
        bitport.load(path)
