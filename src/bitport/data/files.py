"""Data from files: `.npz` archives, folders of images by class, and callables named `module:callable`.

An `.npz` is untrusted: it is read row by row straight from the archive, so that neither its memory nor its
time depends on what it claims to hold. Format:
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from bitport.data.batch import Batch
from bitport.data.images import ImageFolder, Preprocessing
from bitport.errors import UNREADABLE_ARCHIVE, BitportError, DataError

MAX_BYTES = 8 * 2**30
MAX_EXPANSION = 200
SMALL_BYTES = 256 * 2**20  # an archive may always hold this much: masks and blank images compress 1000-fold


def open_data(
    spec: str | Path,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
    preprocessing: Mapping[str, Any] | None = None,
) -> Any:
    """Open data that was named on a command line; what comes back can be given to `Source`.

    spec: an `.npz` (arrays `x` and `y`, or the input names and `y`; axis 0 is the sample), a folder of images
        with one sub-folder per class (classes count from 0 in sorted order), or `module:callable` that
        returns an iterable of batches.
    names: the network's input names; without them an `.npz` may hold `x` or any names.
    preprocessing: the recipe's table for images (`Preprocessing`).

    Raises DataError for a file that is missing, damaged, hostile or of another kind; RecipeError for a wrong
    table; MissingDependency when images are given and Pillow isn't installed.
    """
    if batch_size < 1:
        raise DataError(f"batch size {batch_size} must be at least 1")
    path = Path(spec)
    table = Preprocessing.parse(preprocessing or {})
    if path.is_dir():
        return ImageFolder(path, table, batch_size)
    if path.suffix == ".npz" and path.is_file():
        return NpzFile(path, names, batch_size)
    if path.exists():
        raise DataError(
            f"data file {path.name!r} is of an unknown kind: "
            "give an .npz, a folder of images by class, or module:callable"
        )
    if isinstance(spec, str) and ":" in spec:
        return _from_callable(spec)
    raise DataError(
        f"no data at {str(spec)!r}: give an .npz, a folder of images by class, or module:callable"
    )


def read_arrays(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of a small `.npz`, whole. Raises DataError as `open_data` does; nothing is unpickled."""
    place = Path(path)
    if place.suffix != ".npz" or not place.is_file():
        raise DataError(f"{place.name!r} is no .npz file here: save the arrays with numpy.savez")
    return _Archive(place).read()


class _Archive:
    """An `.npz` that nobody vouches for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, np.ndarray[Any, Any]]:
        with self._opened() as archive, ExitStack() as stack:
            shapes = self._headers(archive, whole=True)
            return {
                name: self._read(self._reader(archive, name, stack, whole=True), name, shape)
                for name, shape in shapes.items()
            }

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{self._path.name!r} can't be read as an .npz archive ({error}): write it again"
            ) from error

    def _headers(self, archive: zipfile.ZipFile, *, whole: bool = False) -> dict[str, tuple[int, ...]]:
        """Shape per array, after the whole archive was held against the limits."""
        members = archive.infolist()
        keys = [member.filename.removesuffix(".npy") for member in members]
        if len(set(keys)) != len(keys) or any(not member.filename.endswith(".npy") for member in members):
            raise self._refused(
                f"its members {[member.filename for member in members][:8]} are not distinct .npy arrays"
            )
        total = sum(member.file_size for member in members)
        limit = min(MAX_BYTES, max(SMALL_BYTES, MAX_EXPANSION * self._path.stat().st_size))
        if total > limit:
            raise self._refused(f"it would unpack to {total:,} bytes, above the limit of {limit:,}: split it")
        shapes = {}
        for key, member in zip(keys, members, strict=True):
            with ExitStack() as stack:
                stream, shape, dtype = self._reader(archive, key, stack, whole=whole)
                # Python integers: a product of hostile dimensions must not wrap.
                if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
                    raise self._refused(
                        f"array {key!r} claims shape {shape} but holds another number of bytes"
                    )
            shapes[key] = shape
        return shapes

    def _reader(
        self, archive: zipfile.ZipFile, key: str, stack: ExitStack, *, whole: bool = False
    ) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        """The stream of one array, standing behind its header; one that isn't read `whole` is cut along axis 0."""
        try:
            stream = stack.enter_context(archive.open(f"{key}.npy"))
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_column, dtype = read(stream)
        except (
            *UNREADABLE_ARCHIVE,
            # NumPy reads a header as a Python literal
            SyntaxError,
            tokenize.TokenError,
            TypeError,
            RecursionError,
        ) as error:
            raise self._refused(f"array {key!r} can't be read ({error})") from error
        if dtype.kind not in "biuf":
            raise self._refused(
                f"array {key!r} has dtype {dtype}; only plain numbers are read, never pickled objects"
            )
        if not (shape or whole) or min(shape, default=0) < 0 or (by_column and len(shape) > 1):
            raise self._refused(
                f"array {key!r} must have a sample axis and be in C order: np.ascontiguousarray it"
            )
        return stream, shape, dtype

    def _read(
        self, reader: tuple[IO[bytes], tuple[int, ...], np.dtype[Any]], key: str, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        stream, _, dtype = reader
        wanted = math.prod(shape) * dtype.itemsize
        try:
            data = stream.read(wanted)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise self._refused(f"array {key!r} is damaged ({error})") from error
        if len(data) != wanted:
            raise self._refused(f"array {key!r} ends early")
        return np.frombuffer(bytearray(data), dtype).reshape(shape)

    def _refused(self, why: str) -> DataError:
        return DataError(f"{self._path.name!r} is refused: {why[:1000]}")


class NpzFile(_Archive):
    """The arrays of an `.npz`, batch by batch. Opening it reads the headers only."""

    def __init__(self, path: Path, names: Sequence[str] | None, batch_size: int) -> None:
        super().__init__(path)
        self._batch_size = batch_size
        with self._opened() as archive:
            arrays = self._headers(archive)
        self._inputs, self._has_labels = self._choose(sorted(arrays), names)
        counts = {name: shape[0] for name, shape in arrays.items()}
        if len(set(counts.values())) != 1:
            raise DataError(
                f"the arrays of {path.name!r} differ in their number of samples (axis 0): {counts}"
            )
        self._count = next(iter(counts.values()))

    def __len__(self) -> int:
        """Number of batches; the last one may be short."""
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        columns = [*self._inputs, *(["y"] if self._has_labels else [])]
        with self._opened() as archive, ExitStack() as stack:
            readers = {name: self._reader(archive, name, stack) for name in columns}
            for start in range(0, self._count, self._batch_size):
                rows = min(self._batch_size, self._count - start)
                arrays = {
                    name: self._read(reader, name, (rows, *reader[1][1:])) for name, reader in readers.items()
                }
                labels = arrays.pop("y") if self._has_labels else None
                yield Batch(arrays["x"] if self._inputs == ("x",) else arrays, labels)

    def _choose(self, keys: Sequence[str], names: Sequence[str] | None) -> tuple[tuple[str, ...], bool]:
        """(names of the input arrays, whether `y` holds labels)"""
        has_labels = "y" in keys and "y" not in (names or ())
        found = [key for key in keys if key != "y" or not has_labels]
        if found == ["x"] and (names is None or len(names) == 1):
            return ("x",), has_labels
        if names is None and found:
            return tuple(found), has_labels
        if names is not None and sorted(names) == found:
            return tuple(names), has_labels
        inputs = (
            "'x', or any input names,"
            if names is None
            else f"{', '.join(map(repr, names))} (or 'x' for one input)"
        )
        raise DataError(
            f"{self._path.name!r} holds the arrays {list(keys)}; {inputs} and optionally 'y' were expected"
        )


def _from_callable(spec: str) -> Any:
    module, _, attribute = spec.partition(":")
    try:
        target: Any = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:
        raise DataError(
            f"data {spec!r} can't be imported ({type(error).__name__}: {error}): check module and name"
        ) from error
    if not callable(target):
        raise DataError(
            f"data {spec!r} is {type(target).__name__}: name a callable that returns an iterable of batches"
        )
    try:
        result = target()
    except BitportError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(
            f"data {spec!r} raised ({type(error).__name__}: {error}): mend the callable"
        ) from error
    if not isinstance(result, Iterable) and not hasattr(result, "__getitem__"):
        raise DataError(
            f"data {spec!r} returned {type(result).__name__}: it must return an iterable of batches"
        )
    # A generator can be read once; calling again gives a new one. A dataset need not be built again.
    return target if isinstance(result, Iterator) else result
