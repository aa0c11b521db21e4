"""Images by class: order, labels, preprocessing as stated, and files that can't be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitport.data import Preprocessing, Source, open_data
from bitport.errors import DataError, MissingDependency, RecipeError

Image = pytest.importorskip("PIL.Image")


def save(path: Path, color: Any = (255, 0, 51), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        save(tmp_path / "cat" / f"{index}.png", (index, 0, 0))
    save(tmp_path / "ant" / "a.png", (100, 0, 0))
    save(tmp_path / "bee" / "a.JPG", (200, 0, 0))
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "bee" / ".hidden.png").write_text("not an image either")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_classes_are_sorted_and_take_turns(folder: Path) -> None:
    batches = list(open_data(folder, batch_size=2))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 2], [2]]
    assert batches[0].inputs.dtype == np.float32
    assert batches[0].inputs.shape == (2, 3, 6, 8)
    assert [round(float(value) * 255) for value in batches[1].inputs[:, 0, 0, 0]] == [0, 1]
    assert open_data(folder).classes == ("ant", "bee", "cat")
    assert len(open_data(folder, batch_size=2)) == 3


def test_a_source_takes_it(folder: Path) -> None:
    (batch,) = list(Source(open_data(folder), role="evaluation", names=["image"], labels="required"))
    assert batch.inputs[0].shape == (5, 3, 6, 8)
    assert batch.labels.dtype == torch.int64


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    (batch,) = list(open_data(tmp_path))
    assert batch.labels is None
    assert len(batch.inputs) == 2


def test_both_kinds_at_once_are_refused(folder: Path) -> None:
    save(folder / "stray.png")
    with pytest.raises(DataError, match="both beside and in class folders"):
        open_data(folder)


@pytest.mark.parametrize("make", [[], ["cat"]])
def test_no_images(tmp_path: Path, make: list[str]) -> None:
    for name in make:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_data(tmp_path)


def test_unreadable_images_are_named_without_the_folder(folder: Path) -> None:
    whole = folder / "cat" / "1.png"
    whole.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(DataError, match=r"image 'cat/1\.png' can't be read") as info:
        list(open_data(folder))
    assert str(folder) not in str(info.value)
    whole.write_text("text")
    with pytest.raises(DataError, match=r"image 'cat/1\.png' can't be read") as info:
        list(open_data(folder))
    assert str(folder) not in str(info.value)


def test_a_picture_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"'ant/a\.png' can't be read: .*(bomb|limit)"):
        list(open_data(folder))


def test_16_bit_images_are_not_clipped_silently(tmp_path: Path) -> None:
    save(tmp_path / "a" / "deep.png", 40_000, mode="I;16")
    with pytest.raises(DataError, match=r"deep\.png.*not 8 bits"):
        list(open_data(tmp_path))


def test_different_sizes_need_a_size(folder: Path) -> None:
    save(folder / "cat" / "9.png", size=(9, 9))
    with pytest.raises(DataError, match=r"'cat/9\.png' has shape \(3, 9, 9\).*preprocessing\.size"):
        list(open_data(folder))
    assert next(iter(open_data(folder, preprocessing={"size": [4, 5]}))).inputs.shape == (6, 3, 4, 5)


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("table", "shape"),
        [
            ({}, (3, 6, 8)),
            ({"size": 4}, (3, 4, 4)),
            ({"size": 4, "crop": 3}, (3, 3, 3)),
            ({"size": 4, "crop": [4, 5]}, (3, 4, 5)),
            ({"size": [12, 16]}, (3, 12, 16)),
            ({"crop": [2, 8]}, (3, 2, 8)),
            ({"layout": "NHWC"}, (6, 8, 3)),
            ({"color": "gray"}, (1, 6, 8)),
            ({"color": "gray", "layout": "NHWC", "size": 3}, (3, 3, 1)),
        ],
    )
    def test_shapes(self, table: dict[str, Any], shape: tuple[int, ...]) -> None:
        assert Preprocessing.parse(table).apply(Image.new("RGB", (8, 6))).shape == shape

    def test_values(self) -> None:
        image = Image.new("RGB", (8, 6), (255, 0, 51))
        table = {"mean": [0.5, 0.25, 0.2], "std": [0.5, 0.25, 2.0]}
        values = Preprocessing.parse(table).apply(image)
        np.testing.assert_allclose(values[:, 0, 0], [1.0, -1.0, 0.0], atol=1e-7)
        gray = Preprocessing.parse({"color": "gray", "mean": 1, "std": 2}).apply(Image.new("RGB", (2, 2)))
        np.testing.assert_array_equal(gray, np.full((1, 2, 2), -0.5, np.float32))

    def test_the_crop_is_centred(self) -> None:
        pixels = np.zeros((6, 8, 3), np.uint8)
        pixels[2:4, 3:5] = 255
        assert Preprocessing.parse({"crop": 2}).apply(Image.fromarray(pixels)).min() == 1.0

    def test_a_crop_larger_than_the_image(self) -> None:
        with pytest.raises(DataError, match="6×8, smaller than the crop 7×7"):
            Preprocessing.parse({"crop": 7}).apply(Image.new("RGB", (8, 6)))

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_image_modes(self, mode: str) -> None:
        assert Preprocessing().apply(Image.new(mode, (4, 4))).shape == (3, 4, 4)

    def test_the_table_is_explicit_and_reads_back(self) -> None:
        table = Preprocessing.parse({"size": [4, 5], "mean": 0.5}).to_table()
        assert table == {"size": (4, 5), "mean": (0.5,), "std": (1.0,), "color": "rgb", "layout": "NCHW"}
        assert Preprocessing.parse(table).to_table() == table

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"sizes": 3}, r"preprocessing\.sizes is unknown; known: color, crop, layout, mean, size, std"),
            ({"size": 0}, r"preprocessing\.size is 0"),
            ({"size": True}, r"preprocessing\.size"),
            ({"size": [1, 2, 3]}, r"preprocessing\.size"),
            ({"crop": [1, "2"]}, r"preprocessing\.crop"),
            ({"mean": [0.1, 0.2]}, "one per channel of 'rgb'"),
            ({"color": "gray", "std": [1.0, 1.0, 1.0]}, "one per channel of 'gray'"),
            ({"std": 0.0}, "above 0"),
            ({"mean": float("nan")}, r"preprocessing\.mean"),
            ({"mean": "0.5"}, r"preprocessing\.mean"),
            ({"color": "bgr"}, "known: rgb, gray"),
            ({"layout": ["NCHW"]}, "known: NCHW, NHWC"),
        ],
    )
    def test_wrong_tables_are_named(self, table: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Preprocessing.parse(table)


def test_pillow_is_imported_for_images_only() -> None:
    code = "import sys, bitport.data\nassert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_pillow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependency, match=r"bitport\[images\]"):
        open_data(folder)
