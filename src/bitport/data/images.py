"""Images from a folder by class, with the preprocessing that the recipe states and the artifact stores.

values = (pixels / 255 − mean) / std      per channel, float32
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitport.data.batch import Batch
from bitport.errors import DataError, MissingDependency, RecipeError

if TYPE_CHECKING:
    from PIL.Image import Image

_CHANNELS = {"rgb": 3, "gray": 1}
_LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input.

    size: one number scales the shorter side to it, [height, width] scales to exactly that (bilinear,
        antialiased); None keeps the image's own size.
    crop: centre crop to a square or [height, width], after scaling; None: `size` when that is one number.
    mean, std: per channel, or one number for all, on the 0–1 scale.
    color: "rgb" or "gray". layout: "NCHW" or "NHWC".
    """

    size: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    color: str = "rgb"
    layout: str = "NCHW"

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> Preprocessing:
        """Read a `[preprocessing]` table. Raises RecipeError that names the key and what is allowed."""
        allowed = {field.name for field in fields(cls)}
        for key in table:
            if key not in allowed:
                raise RecipeError(f"preprocessing.{key} is unknown; known: {', '.join(sorted(allowed))}")
        color = _one_of(table, "color", tuple(_CHANNELS), "rgb")
        return cls(
            size=_size(table, "size"),
            crop=_size(table, "crop"),
            mean=_per_channel(table, "mean", 0.0, color),
            std=_per_channel(table, "std", 1.0, color),
            color=color,
            layout=_one_of(table, "layout", _LAYOUTS, "NCHW"),
        )

    def to_table(self) -> dict[str, Any]:
        """The table with every default spelled out; what is None is left out, as TOML has no null."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def apply(self, image: Image) -> np.ndarray[Any, Any]:
        """A Pillow image → float32 [C, H, W] or [H, W, C]."""
        image = image.convert("L" if self.color == "gray" else "RGB")
        if self.size is not None:
            image = image.resize(_scaled(image.size, self.size), _bilinear())
        crop = self.crop if self.crop is not None else self.size if isinstance(self.size, int) else None
        if crop is not None:
            height, width = (crop, crop) if isinstance(crop, int) else crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            if left < 0 or top < 0:
                raise DataError(f"it is {image.height}×{image.width}, smaller than the crop {height}×{width}")
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, np.float32).reshape(image.height, image.width, -1) / np.float32(255)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        values: np.ndarray[Any, Any] = (pixels - mean) / std
        return values.transpose(2, 0, 1) if self.layout == "NCHW" else values


class ImageFolder:
    """The images below a folder, as batches; labels are the sub-folders' indices in sorted order.

    Classes take turns (first image of each class, then the second …), so that the first batches already show
    every class. A folder without sub-folders holds unlabelled images. Files that aren't images by their
    suffix, and names that start with a dot, are passed over; an image that can't be read is a DataError that
    names it.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing, batch_size: int) -> None:
        suffixes = _image_suffixes()
        self._folder, self._preprocessing, self._batch_size = folder, preprocessing, batch_size
        self.classes = tuple(
            sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        )
        by_class = [_images(folder / name, suffixes) for name in self.classes]
        if self.classes and _images(folder, suffixes):
            raise DataError(
                f"folder {folder.name!r} holds images both beside and in class folders: sort them in"
            )
        self._files: list[tuple[Path, int | None]] = [
            (file, label)
            for turn in zip_longest(*by_class)
            for label, file in enumerate(turn)
            if file is not None
        ]
        if not self.classes:
            self._files = [(file, None) for file in _images(folder, suffixes)]
        if not self._files:
            raise DataError(
                f"folder {folder.name or str(folder)!r} holds no images: expected <class>/<image> below it"
            )

    def __len__(self) -> int:
        """Number of batches; the last one may be short."""
        return math.ceil(len(self._files) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        shape: tuple[int, ...] | None = None
        for start in range(0, len(self._files), self._batch_size):
            part = self._files[start : start + self._batch_size]
            images = []
            for file, _ in part:
                images.append(self._load(file))
                shape = shape or images[0].shape
                if images[-1].shape != shape:
                    raise DataError(
                        f"image {self._name(file)!r} has shape {images[-1].shape}, the first one {shape}: "
                        "state preprocessing.size or preprocessing.crop"
                    )
            labels = np.array([label for _, label in part], np.int64) if self.classes else None
            yield Batch(np.stack(images), labels)

    def _load(self, file: Path) -> np.ndarray[Any, Any]:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                # Pillow only warns of a picture that unpacks to an absurd size.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as image:
                    if image.mode.startswith(("I", "F")):
                        raise DataError(f"its pixels are {image.mode}, not 8 bits: convert it")
                    return self._preprocessing.apply(image)
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            DataError,
            Image.DecompressionBombError,
            Warning,
        ) as error:
            raise DataError(
                f"image {self._name(file)!r} can't be read: {_without(str(error), file)}"
            ) from error

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()


def _without(message: str, file: Path) -> str:
    """Pillow's messages tell the absolute path; ours go into records."""
    return message.replace(str(file), file.name)


def _image_suffixes() -> frozenset[str]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("a folder of images", "pillow", "images") from error
    return frozenset(Image.registered_extensions())


def _images(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found = (file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.name[0] != ".")
    return sorted((file for file in found if file.is_file()), key=lambda file: file.name)


def _bilinear() -> Any:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _scaled(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) as Pillow has it."""
    if not isinstance(wanted, int):
        return wanted[1], wanted[0]
    shorter = min(size)
    width, height = (max(wanted, round(side * wanted / shorter)) for side in size)
    return width, height


def _one_of(table: Mapping[str, Any], key: str, allowed: Sequence[str], default: str) -> str:
    value = table.get(key, default)
    if value not in allowed:
        raise RecipeError(f"preprocessing.{key} is {value!r}; known: {', '.join(allowed)}")
    return str(value)


def _size(table: Mapping[str, Any], key: str) -> int | tuple[int, int] | None:
    value = table.get(key)
    parts = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)
    if value is not None and not all(type(part) is int and part > 0 for part in parts):
        raise RecipeError(f"preprocessing.{key} is {value!r}; expected pixels: n or [height, width], above 0")
    return (parts[0], parts[1]) if len(parts) == 2 else value


def _per_channel(table: Mapping[str, Any], key: str, default: float, color: str) -> tuple[float, ...]:
    value = table.get(key, default)
    parts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    numbers = all(type(part) in (int, float) and math.isfinite(part) for part in parts)
    if not numbers or len(parts) not in (1, _CHANNELS[color]):
        raise RecipeError(
            f"preprocessing.{key} is {value!r}; expected one number, or one per channel of {color!r}"
        )
    if key == "std" and min(parts) <= 0:
        raise RecipeError(f"preprocessing.std is {value!r}; it must be above 0")
    return tuple(float(part) for part in parts)
