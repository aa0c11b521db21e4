"""Runs the network of this folder. Needs numpy and the runtime alone.

    python run.py                           compares what this machine computes with the golden pairs in sample.npz
    python run.py INPUTS.npz OUTPUTS.npz    arrays by input name in, arrays by output name out

    from run import Network
    network = Network()
    outputs = network({"x": array})         # by output name; network(array) where there is one input
    pixels = network.pixels(image)          # a uint8 image of the right size, [height, width, channels] → an input

Names, shapes and number formats are in manifest.json, under "inputs" and "outputs"; "stored" there tells scale and
zero_point where the file takes or gives integers: real = scale · (integer − zero_point).
"""

from __future__ import annotations

import json
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CLOSE = 0.02  # of the largest golden output: other processors round otherwise here and there


Run = Callable[[Sequence[Any]], Sequence[Any]]  # a file's inputs → its outputs, in the order of the manifest


class Runner(ABC):
    """A network, loaded. inputs, outputs: their names, shapes and number formats."""

    def __init__(self, folder: Path = HERE) -> None:
        self.folder = folder
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.inputs, self.outputs = manifest["inputs"], manifest["outputs"]
        self.compute = self.load(manifest["target_options"])

    @abstractmethod
    def load(self, options: Mapping[str, Any]) -> Run:
        """The file of this folder in its runtime. options: those that it was measured with."""

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """Outputs by name, as numbers. inputs: an array, or arrays by name; floats do where the file takes integers."""
        given = inputs if isinstance(inputs, Mapping) else {self.inputs[0]["name"]: inputs}
        fed = {spec["name"]: stored(given[spec["name"]], spec) for spec in self.inputs}
        found = self.run(fed)
        return {spec["name"]: real(found[spec["name"]], spec) for spec in self.outputs}

    def run(self, fed: Mapping[str, Any]) -> dict[str, Any]:
        """The file's own outputs of its own inputs: integers where its ends are."""
        found = self.compute([fed[spec["name"]] for spec in self.inputs])
        return {spec["name"]: value for spec, value in zip(self.outputs, found, strict=True)}

    def pixels(self, image: Any) -> Any:
        """An image as an input, with a batch of one: scaled to 0–1, centred, in the network's layout.

        image: uint8 [height, width, channels], of the size that `preprocessing` in recipe.toml says (resizing and
        cropping are left to the camera, or to an image library).
        """
        recipe = tomllib.loads((self.folder / "recipe.toml").read_text(encoding="utf-8"))
        table = recipe.get("preprocessing", {})
        mean, std = (np.array(table.get(key, value), np.float32) for key, value in (("mean", 0), ("std", 1)))
        values = (np.asarray(image, np.float32) / np.float32(255) - mean) / std
        return (values if table.get("layout") == "NHWC" else values.transpose(2, 0, 1))[None]


def stored(value: Any, spec: Mapping[str, Any]) -> Any:
    """An array as the file takes it: QuantizeLinear where it takes integers and gets floats."""
    array, kept = np.asarray(value), spec.get("stored")
    if kept is None:
        return array.astype(spec["dtype"], copy=False)
    return array if array.dtype == kept["dtype"] else quantize(array, **kept)


def real(value: Any, spec: Mapping[str, Any]) -> Any:
    """An output as numbers."""
    kept = spec.get("stored")
    return value if kept is None else dequantize(value, kept["scale"], kept["zero_point"])


def quantize(value: Any, scale: float, zero_point: int, dtype: str) -> Any:
    """As QuantizeLinear: divided in float32, rounded half to even, saturated; NaN is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.rint(value.astype(np.float32) / np.float32(scale)) + np.float32(zero_point)
        limits = np.iinfo(dtype)
        return np.clip(np.nan_to_num(scaled, nan=0.0), limits.min, limits.max).astype(dtype)


def dequantize(value: Any, scale: float, zero_point: int) -> Any:
    """scale · (integer − zero_point), float32."""
    return (value.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def check(network: Runner) -> int:
    """Compare with the golden pairs; 0 where they agree."""
    with np.load(network.folder / "sample.npz", allow_pickle=False) as sample:
        fed = {spec["name"]: sample[f"input.{spec['name']}"] for spec in network.inputs}
        wanted = {spec["name"]: sample[f"output.{spec['name']}"] for spec in network.outputs}
    failed = False
    for name, value in network.run(fed).items():
        golden = wanted[name]
        if value.shape != golden.shape:
            _say(f"{name}: shape {value.shape}, golden {golden.shape}")
            failed = True
            continue
        apart = np.abs(value.astype(np.float64) - golden.astype(np.float64))
        largest = float(np.abs(golden.astype(np.float64)).max(initial=0.0))
        close = bool(np.isfinite(apart).all()) and float(apart.max(initial=0.0)) <= CLOSE * largest
        equal = 100 * float((value == golden).mean()) if golden.size else 100.0
        _say(
            f"{name}: {equal:.2f} % equal to the golden outputs, furthest {float(apart.max(initial=0.0)):.3g}"
        )
        failed |= not close
    _say("FAILED: this runtime computes something else" if failed else "ok")
    return int(failed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def main(arguments: list[str], load: Callable[[], Runner]) -> int:
    if not arguments:
        return check(load())
    if len(arguments) != 2:
        _say(__doc__ or "")
        return 2
    with np.load(arguments[0], allow_pickle=False) as given:
        outputs = load()(dict(given))
    np.savez(arguments[1], **outputs)
    return 0
