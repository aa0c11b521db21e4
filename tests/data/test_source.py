"""A source can be read again, names the batch at fault, keeps nothing, and knows its hash."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bitport.data import Batch, Source
from bitport.errors import BitportError, DataError


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


X, Y = torch.randn(10, 3), torch.arange(10)


def source(data: Any, role: str = "calibration", labels: str = "optional", **more: Any) -> Source:
    return Source(data, role=role, names=more.pop("names", ["x"]), labels=labels, **more)


def pairs(size: int = 4, inputs: Tensor = X, labels: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def generate() -> Iterator[tuple[Tensor, Tensor]]:
    yield from pairs()


class TestReading:
    @pytest.mark.parametrize(
        "data",
        [
            pairs(),
            tuple(pairs()),
            generate,
            lambda: iter(pairs()),
            lambda: pairs(),
            DataLoader(TensorDataset(X, Y), batch_size=4),
            [Batch(x, y) for x, y in pairs()],
        ],
        ids=["list", "tuple", "generator", "iterator", "callable-list", "DataLoader", "Batch"],
    )
    def test_everything_re_iterable_reads_the_same_twice(self, data: Any) -> None:
        stream = source(data)
        for _ in range(2):
            batches = list(stream)
            assert torch.equal(torch.cat([batch.inputs[0] for batch in batches]), X)
            assert torch.equal(torch.cat([batch.labels for batch in batches]), Y)
            assert all(type(batch.inputs) is tuple for batch in batches)

    @pytest.mark.parametrize(
        "make", [generate, lambda: iter(pairs()), lambda: map(tuple, pairs()), lambda: zip(X, Y, strict=True)]
    )
    def test_a_one_shot_iterator_is_refused_with_the_remedy(self, make: Callable[[], Any]) -> None:
        with pytest.raises(DataError, match=r"one-shot iterator .*list\(…\), or a callable"):
            source(make())

    def test_a_callable_that_returns_a_used_iterator(self) -> None:
        used = iter(pairs())
        stream = source(lambda: used)
        list(stream)
        with pytest.raises(DataError, match=r"empty the second time.*new iterator"):
            list(stream)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (X, r"bare tensor: give a list of batches"),
            (X.numpy(), "bare array"),
            ({"x": X}, "single batch: put it into a list"),
            (Batch(X, Y), "single batch"),
            ("data.npz", "a path: open it first"),
            (3, "of type int"),
            (None, "of type NoneType"),
        ],
    )
    def test_what_is_no_stream(self, data: Any, message: str) -> None:
        with pytest.raises(DataError, match=f"the calibration data is (a )?{message}"):
            source(data)

    @pytest.mark.parametrize("returned", [None, X, 5, {"x": X}])
    def test_a_callable_that_returns_no_stream(self, returned: Any) -> None:
        with pytest.raises(DataError, match="callable given as calibration data returned"):
            list(source(lambda: returned))

    @pytest.mark.parametrize("data", [[], lambda: iter(()), DataLoader(TensorDataset(X[:0]))])
    def test_empty(self, data: Any) -> None:
        with pytest.raises(DataError, match="the calibration data is empty: give at least one batch"):
            list(source(data))

    def test_unknown_roles(self) -> None:
        with pytest.raises(DataError, match="role 'test'"):
            source([X], role="test")
        with pytest.raises(DataError, match="labels 'some'"):
            source([X], labels="some")

    def test_nothing_is_kept(self) -> None:
        alive: list[weakref.ref[Tensor]] = []

        def fresh() -> Iterator[Tensor]:
            for _ in range(20):
                x = torch.randn(8, 3)
                alive.append(weakref.ref(x))
                yield x

        stream = source(fresh)
        for _ in stream:
            continue
        gc.collect()
        assert len(alive) == 20
        assert sum(reference() is not None for reference in alive) == 0


class TestFaults:
    def test_a_loader_that_raises_midway(self) -> None:
        def broken() -> Iterator[Tensor]:
            yield X
            yield X
            raise OSError("disk gone")

        with pytest.raises(DataError, match=r"raised at batch 2 \(OSError: disk gone\)") as info:
            list(source(broken))
        assert info.value.batch == 2
        assert isinstance(info.value.__cause__, OSError)

    def test_a_callable_that_raises(self) -> None:
        def broken() -> Iterator[Tensor]:
            raise ValueError

        with pytest.raises(DataError, match=r"can't be opened \(ValueError\)"):
            list(source(lambda: broken()))

    def test_our_own_errors_pass(self) -> None:
        def ours() -> Iterator[Tensor]:
            yield X
            raise DataError("image 'a.png' can't be read")

        with pytest.raises(DataError, match=r"^image 'a\.png'"):
            list(source(ours))

    def test_an_error_of_the_reader_is_not_ours(self) -> None:
        def read() -> None:
            for _ in source(pairs()):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            read()

    def test_wrong_elements_tell_their_batch(self) -> None:
        with pytest.raises(DataError, match="Batch 1 is a tuple of 3") as info:
            list(source([(X, Y), (X, Y, Y)]))
        assert info.value.batch == 1

    def test_labels(self) -> None:
        assert [batch.labels for batch in source(pairs(), labels="ignored")] == [None] * 3
        assert next(iter(source([X]))).labels is None
        with pytest.raises(DataError, match="batch 1 of the evaluation data has no labels") as info:
            list(source([(X, Y), X], role="evaluation", labels="required"))
        assert info.value.batch == 1

    def test_specs_are_applied(self) -> None:
        spec = Spec("x", ("batch", 3), torch.float32)
        assert len(list(source(pairs(), specs=[spec]))) == 3
        with pytest.raises(DataError, match=r"batch 1: expected float32, got float64"):
            list(source([X, X.double()], specs=[spec]))

    @pytest.mark.parametrize("role", ["train", "evaluation"])
    def test_nan_is_counted_and_refused(self, role: str) -> None:
        bad = X.clone()
        bad[1, :2] = np.nan
        with pytest.raises(
            DataError, match=f"input 'x' of batch 1 of the {role} data holds 2 NaN among 30"
        ) as info:
            list(source([X, bad], role=role))
        assert info.value.batch == 1

    def test_a_rare_nan_batch_is_left_out_of_calibration(self) -> None:
        bad = torch.full((2, 3), np.nan)
        stream = source([*[X] * 99, bad])
        assert len(list(stream)) == 99
        assert stream.dropped == 1
        with pytest.raises(DataError, match="2 of 100 batches of the calibration data hold NaN"):
            list(source([*[X] * 98, bad, bad]))
        with pytest.raises(BitportError, match="1 of 1"):
            list(source([bad]))

    def test_infinite_inputs_pass(self) -> None:
        assert len(list(source([torch.full((2, 3), -np.inf)], role="evaluation"))) == 1


class TestDigest:
    def test_equal_whatever_the_batch_size_and_the_kind_of_stream(self) -> None:
        digests = {source(data).digest() for data in (pairs(4), pairs(3), generate, [(X.numpy(), Y.numpy())])}
        assert len(digests) == 1
        assert len(digests.pop()) == 64

    def test_is_known_across_processes(self) -> None:
        stream = source([(torch.arange(6.0).reshape(2, 3), torch.tensor([0, 1]))])
        assert stream.digest() == "58cd609828cd271352b2f74c59517150e6482c3d6a23c0f0e43471e8b988dbad"

    def test_computed_in_the_first_pass(self) -> None:
        passes = []

        def counted() -> Iterator[Any]:
            passes.append(1)
            return generate()

        stream = source(counted)
        list(stream)
        first = stream.digest()
        list(stream)
        assert stream.digest() == first
        assert len(passes) == 2

    def test_a_pass_that_was_broken_off_does_not_count(self) -> None:
        stream = source(pairs())
        next(iter(stream))
        assert stream.digest() == source(pairs()).digest()

    @pytest.mark.parametrize(
        "other",
        [
            pairs(inputs=X.flip(0)),
            pairs(inputs=X.double()),
            pairs(labels=Y + 1),
            pairs(labels=Y.int()),
            pairs()[:-1],
            [X],
            [(X.reshape(10, 3, 1), Y)],
        ],
        ids=["order", "dtype", "labels", "label dtype", "fewer", "no labels", "shape"],
    )
    def test_differs_for_other_data(self, other: Any) -> None:
        assert source(other).digest() != source(pairs()).digest()

    def test_inputs_only(self) -> None:
        assert source(pairs(labels=Y + 1)).digest(labels=False) == source([X]).digest(labels=False)

    def test_labels_of_any_make(self) -> None:
        def labelled(value: float) -> str:
            return source(
                [(X, [{"boxes": torch.tensor([value]), "name": "a", "n": np.ones(2)}, object()])]
            ).digest()

        assert labelled(1.0) == labelled(1.0)
        assert labelled(1.0) != labelled(2.0)

    def test_several_inputs_and_odd_dtypes(self) -> None:
        ids, scale = torch.ones(2, 3, dtype=torch.int64), torch.tensor(0.5, dtype=torch.bfloat16)
        first = source([{"ids": ids, "scale": scale}], names=["ids", "scale"]).digest()
        assert first == source([{"scale": scale, "ids": ids.clone()}], names=["ids", "scale"]).digest()
        assert first != source([{"ids": ids, "scale": scale + 1}], names=["ids", "scale"]).digest()

    def test_overlap_counts_shared_samples(self) -> None:
        shared = torch.cat([X[:4], torch.randn(3, 3)])
        assert source(pairs()).overlap(source([shared], role="evaluation")) == 4
        assert source(pairs()).overlap(source([torch.randn(5, 3)])) == 0
