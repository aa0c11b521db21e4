"""A checked stream of batches: refuses what can't be read twice, names the batch at fault, knows its hash."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitport.data.batch import Batch, InputLike, check_inputs, to_flat
from bitport.data.patience import Patience
from bitport.errors import BitportError, DataError

ROLES = ("calibration", "train", "evaluation")
LABELS = ("ignored", "optional", "required")
MAX_DROPPED_SHARE = 0.01


class Source:
    """A stream of `Batch` that can be read any number of times.

    data: a re-iterable (list, DataLoader …) or a callable that returns an iterator; `to_flat` says what each
        element may be.
    role: "calibration", "train" or "evaluation"; it is named in messages.
    names: the network's input names, in its order.
    labels: "ignored" (dropped), "optional" or "required".
    specs: the network's inputs, if each batch is to be held against them (`check_inputs`).

    Iterating yields `Batch(inputs=<tuple of tensors, in the order of names>, labels=…)` and keeps none of
    them. A calibration batch whose inputs hold NaN is left out and counted in `dropped`, up to 1 % of the
    batches of a pass; elsewhere, or above that, NaN is an error. Infinite inputs pass: masks use them.

    Raises DataError, with the index of the batch: one-shot iterators, empty data, a loader that raises (its
    error is the cause) or hangs (`data.patience`), wrong types, names, shapes or dtypes, missing labels, NaN.
    """

    def __init__(
        self,
        data: Any,
        *,
        role: str,
        names: Sequence[str],
        labels: str,
        specs: Sequence[InputLike] | None = None,
    ) -> None:
        if role not in ROLES or labels not in LABELS:
            raise DataError(f"role {role!r} must be one of {ROLES}, labels {labels!r} one of {LABELS}")
        self.role = role
        self.names = tuple(names)
        self.dropped = 0
        self._labels = labels
        self._specs = specs
        self._open = _opener(data, role)
        self._held = isinstance(data, (list, tuple))
        self._hash: _StreamHash | None = None
        self._spans: dict[str, tuple[float, float]] = {}

    def __iter__(self) -> Iterator[Batch]:
        fresh = _StreamHash() if self._hash is None else None
        dropped, index = 0, -1
        widest: dict[str, tuple[float, float]] = {}
        for index, element in enumerate(self._elements()):
            flat, labels = to_flat(element, self.names, index)
            if self._specs is not None:
                flat = check_inputs(flat, self._specs, index)
            if self._labels == "ignored":
                labels = None
            elif self._labels == "required" and labels is None:
                raise DataError(
                    f"batch {index} of the {self.role} data has no labels, which are needed here: "
                    "yield (inputs, labels) or Batch(inputs=…, labels=…)",
                    batch=index,
                )
            if fresh is not None:
                fresh.update(flat, labels)
                widest = _widened(widest, self.names, flat)
            if not self._is_usable(flat, index):
                dropped += 1
                continue
            yield Batch(tuple(flat), labels)
        if index < 0:
            self._raise_empty()
        self.dropped = dropped
        if dropped > MAX_DROPPED_SHARE * (index + 1):
            raise DataError(
                f"{dropped} of {index + 1} batches of the {self.role} data hold NaN, more than "
                f"{MAX_DROPPED_SHARE:.0%}: mend or remove those samples"
            )
        if fresh is not None:
            self._hash, self._spans = fresh, widest

    def digest(self, *, labels: bool = True) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and bytes of all samples, in their order; not of the batch
        size.

        Computed during the first complete pass; a source that was not read yet is read now. With
        `labels=False` only the inputs count, so that calibration and evaluation data can be compared.
        """
        return self._hashed().hexdigest(self.names, labels=labels)

    def overlap(self, other: Source) -> int:
        """How many distinct samples of this source `other` holds too (inputs equal to the byte)."""
        return len(self._hashed().samples & other._hashed().samples)

    def distinct(self) -> int:
        """How many samples differ from each other."""
        return len(self._hashed().samples)

    def spans(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest finite value of each float input over all samples."""
        self._hashed()
        return self._spans

    def _hashed(self) -> _StreamHash:
        if self._hash is None:
            for _ in self:
                continue
        assert self._hash is not None  # a pass that ends without an error has set it
        return self._hash

    def _elements(self) -> Iterator[Any]:
        """What the user's data yields; whatever it raises becomes a DataError that names the batch."""
        with Patience(self.role, held=self._held) as patience:
            try:
                iterator = patience.wait(0, lambda: iter(self._open()))
            except BitportError:
                raise
            except (Exception, SystemExit) as error:
                raise DataError(f"the {self.role} data can't be opened ({_told(error)})") from error
            for index in itertools.count():
                try:
                    element = patience.wait(index, lambda: next(iterator))
                except StopIteration:
                    return
                except BitportError:
                    raise
                except (Exception, SystemExit) as error:
                    raise DataError(
                        f"the {self.role} data raised at batch {index} ({_told(error)}): mend the loader",
                        batch=index,
                    ) from error
                yield element

    def _is_usable(self, flat: Sequence[Tensor], index: int) -> bool:
        for name, tensor in zip(self.names, flat, strict=True):
            bad = int(torch.isnan(tensor).sum()) if tensor.is_floating_point() or tensor.is_complex() else 0
            if bad and self.role != "calibration":
                raise DataError(
                    f"input {name!r} of batch {index} of the {self.role} data holds {bad} NaN among "
                    f"{tensor.numel()} values: mend or remove those samples",
                    batch=index,
                )
            if bad:
                return False
        return True

    def _raise_empty(self) -> None:
        if self._hash is not None:
            raise DataError(
                f"the {self.role} data is empty the second time it is read: "
                "the callable must return a new iterator each time it is called"
            )
        raise DataError(f"the {self.role} data is empty: give at least one batch")


def _opener(data: Any, role: str) -> Callable[[], Iterable[Any]]:
    """A function that starts a pass over `data`, or DataError with the remedy."""
    wrong = {
        (Tensor,): "a bare tensor: give a list of batches, as [x] or x.split(32)",
        (str, Path): "a path: open it first with bitport.data.open_data",
        (Mapping, Batch): "a single batch: put it into a list",
    }
    for types, message in wrong.items():
        if isinstance(data, types):
            raise DataError(f"the {role} data is {message}")
    if hasattr(data, "__array__"):
        raise DataError(
            f"the {role} data is a bare array: give a list of batches, as [x] or np.array_split(x, n)"
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"the {role} data is a one-shot iterator ({type(data).__name__}), and it is read more than once: "
            "give list(…), or a callable that returns a new iterator"
        )
    if isinstance(data, Iterable) or hasattr(data, "__getitem__"):
        return lambda: data
    if callable(data):
        return lambda: _called(data, role)
    raise DataError(
        f"the {role} data is of type {type(data).__name__}: give an iterable of batches, or a callable that "
        "returns an iterator"
    )


def _called(function: Callable[[], Any], role: str) -> Iterable[Any]:
    result = function()
    if not isinstance(result, Iterable) or isinstance(result, (Tensor, str, Mapping)):
        raise DataError(
            f"the callable given as {role} data returned {type(result).__name__}: "
            "it must return an iterator of batches"
        )
    return result


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _StreamHash:
    """Hashes sample by sample, so that neither memory nor the result depends on the batch size."""

    def __init__(self) -> None:
        self.samples: set[bytes] = set()
        self._inputs = hashlib.sha256()
        self._labels = hashlib.sha256()

    def update(self, flat: Sequence[Tensor], labels: Any) -> None:
        batched = len({tensor.shape[:1] for tensor in flat}) == 1 and all(tensor.dim() for tensor in flat)
        rows: Iterable[tuple[bytes, ...]]
        if batched:
            rows = zip(*(_rows(tensor) for tensor in flat), strict=True)
        else:  # no common batch axis: the whole batch is one sample
            rows = [tuple(_rows(tensor.unsqueeze(0))[0] for tensor in flat)]
        kinds = "".join(f"{tensor.dtype}{tuple(tensor.shape[batched:])}" for tensor in flat).encode()
        for row in rows:
            sample = hashlib.sha256(kinds)
            for part in row:
                sample.update(part)
            self._inputs.update(sample.digest())
            self.samples.add(sample.digest()[:12])
        if isinstance(labels, Tensor) and labels.dim() > 0:
            kind = f"{labels.dtype}{tuple(labels.shape[1:])}".encode()
            for part in _rows(labels):
                self._labels.update(hashlib.sha256(kind + part).digest())
        elif labels is not None:
            _feed(self._labels, labels)

    def hexdigest(self, names: Sequence[str], *, labels: bool) -> str:
        total = hashlib.sha256(repr(tuple(names)).encode())
        total.update(self._inputs.digest())
        if labels:
            total.update(self._labels.digest())
        return total.hexdigest()


def _widened(
    spans: dict[str, tuple[float, float]], names: Sequence[str], flat: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    found = dict(spans)
    for name, tensor in zip(names, flat, strict=True):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(end) for end in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = tensor[torch.isfinite(tensor)]
            if not finite.numel():
                continue
            low, high = (float(end) for end in torch.aminmax(finite))
        before = found.get(name, (low, high))
        found[name] = (min(low, before[0]), max(high, before[1]))
    return found


def _rows(tensor: Tensor) -> list[bytes]:
    """The bytes of each index of axis 0. Goes through a byte view: NumPy has no bfloat16."""
    count = tensor.shape[0]
    if tensor.numel() == 0:
        return [b""] * count
    rows = tensor.cpu().contiguous().reshape(count, -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]


def _feed(digest: _Hash, value: Any) -> None:
    """Hash a label of any make by its plain parts; an object of another type counts by its type's name only,
    because its `repr` may hold an address."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + _rows(value.reshape(1, -1))[0])
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part)
    elif hasattr(value, "__array__"):
        _feed(digest, np.asarray(value).tobytes())
    elif isinstance(value, (str, bytes, int, float)):
        digest.update(repr(value).encode())
