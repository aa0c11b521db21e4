"""What a batch may be, and what is said when it is something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from bitport.data import Batch, check_inputs, to_flat
from bitport.errors import DataError

X, Y = torch.randn(4, 3), torch.arange(4)


@dataclass(frozen=True)
class Spec:
    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


IMAGE = Spec("image", ("batch", 3, 32, 24))


class TestOneInput:
    @pytest.mark.parametrize(
        "element",
        [
            (X, Y),
            [X, Y],
            Batch(X, Y),
            Batch((X,), Y),
            Batch([X], Y),
            Batch({"x": X}, Y),
            (X.numpy(), Y.numpy()),
        ],
    )
    def test_with_labels(self, element: Any) -> None:
        flat, labels = to_flat(element, ["x"])
        assert len(flat) == 1
        assert torch.equal(flat[0], X)
        assert torch.equal(labels, Y)

    @pytest.mark.parametrize("element", [X, X.numpy(), {"x": X}, Batch(X), (X,), [X], (X, None)])
    def test_without_labels(self, element: Any) -> None:
        flat, labels = to_flat(element, ["x"])
        assert torch.equal(flat[0], X)
        assert labels is None

    def test_labels_of_any_make_pass(self) -> None:
        boxes = [{"boxes": X}, {"boxes": X}]
        assert to_flat((X, boxes), ["x"])[1] is boxes

    def test_arrays_that_torch_dislikes(self) -> None:
        plain = np.arange(12, dtype=np.float32).reshape(3, 4)
        read_only = plain.copy()
        read_only.flags.writeable = False
        for array in (read_only, plain.astype(">f4"), plain[:, ::-1][:, ::-1], np.asfortranarray(plain)):
            assert to_flat(array, ["x"])[0][0].tolist() == plain.tolist()

    def test_gradients_stay_outside(self) -> None:
        assert not to_flat(X.clone().requires_grad_(), ["x"])[0][0].requires_grad

    @pytest.mark.parametrize(
        ("element", "message"),
        [
            ((X, Y, Y), "tuple of 3 elements"),
            ("text", "type str; a tensor"),
            (None, "type NoneType"),
            ([1.0, 2.0], "type float"),
            ({"y": X}, "unknown 'y' and missing 'x'"),
            ({"x": X, "labels": Y}, r"unknown 'labels'.*Batch\(inputs=…, labels=…\)"),
            (np.array(["a"]), "array of dtype <U1"),
            (np.array([{}], object), "dtype object"),
            (torch.eye(3).to_sparse(), "dense"),
            (torch.empty(3, device="meta"), "meta"),
        ],
    )
    def test_wrong_elements_are_named(self, element: Any, message: str) -> None:
        with pytest.raises(DataError, match=message) as info:
            to_flat(element, ["x"], 7)
        assert info.value.batch == 7
        assert "atch 7" in str(info.value)


class TestSeveralInputs:
    NAMES = ("ids", "mask")

    @pytest.mark.parametrize("inputs", [(X, Y), [X, Y], {"mask": Y, "ids": X}])
    def test_in_the_networks_order(self, inputs: Any) -> None:
        flat, labels = to_flat(Batch(inputs, labels=Y), self.NAMES)
        assert flat[0] is not flat[1]
        assert torch.equal(flat[0], X)
        assert torch.equal(flat[1], Y)
        assert torch.equal(labels, Y)

    def test_a_dict_is_inputs(self) -> None:
        assert to_flat({"mask": Y, "ids": X}, self.NAMES)[1] is None

    @pytest.mark.parametrize("element", [(X, Y), [X, Y], (X,)])
    def test_a_bare_pair_is_ambiguous(self, element: Any) -> None:
        with pytest.raises(
            DataError, match=r"Batch 2 is a bare .*'ids', 'mask'.*yield a dict of inputs, or Batch"
        ):
            to_flat(element, self.NAMES, 2)

    def test_too_few(self) -> None:
        with pytest.raises(DataError, match=r"has 1 input; the network takes 2 \('ids', 'mask'\)"):
            to_flat(X, self.NAMES)


class TestCheckInputs:
    def test_right_ones_pass_unchanged(self) -> None:
        x = torch.randn(5, 3, 32, 24)
        assert check_inputs([x], [IMAGE])[0] is x

    def test_int32_is_widened(self) -> None:
        ids = torch.ones(2, 7, dtype=torch.int32)
        (checked,) = check_inputs([ids], [Spec("ids", ("batch", "length"), torch.int64)])
        assert checked.dtype == torch.int64
        assert torch.equal(checked, ids.long())

    @pytest.mark.parametrize(
        ("given", "expected", "message"),
        [
            (torch.float64, torch.float32, r"expected float32, got float64: convert it with \.float\(\)"),
            (torch.int64, torch.float32, r"expected float32, got int64: convert it with \.float\(\)"),
            (torch.uint8, torch.float32, r"got uint8.*0–255"),
            (torch.float16, torch.float32, r"got float16.*\.float\(\)"),
            (torch.float32, torch.int64, r"expected int64, got float32.*\.long\(\)"),
            (torch.uint8, torch.int64, r"expected int64, got uint8.*\.long\(\)"),
            (torch.int64, torch.int32, r"\.int\(\)"),
            (torch.float32, torch.bfloat16, r"\.to\(torch\.bfloat16\)"),
            (torch.complex64, torch.float32, "got complex64"),
        ],
    )
    def test_dtypes(self, given: torch.dtype, expected: torch.dtype, message: str) -> None:
        with pytest.raises(DataError, match=message):
            check_inputs([torch.ones(2, 3, dtype=given)], [Spec("x", ("batch", 3), expected)], 0)

    @pytest.mark.parametrize(
        ("shape", "hint"),
        [
            ((8, 32, 24, 3), r"channels last \(NHWC\).*\.permute\(0, 3, 1, 2\)"),
            ((3, 32, 24), r"batch axis is missing.*\.unsqueeze\(0\)"),
            ((1, 8, 3, 32, 24), r"one axis too many.*\.squeeze\(0\)"),
            ((8, 3, 32, 25), r"expected shape \[batch, 3, 32, 24\], got \[8, 3, 32, 25\]$"),
            ((8,), r"got \[8\]$"),
            ((0, 3, 32, 24), "empty"),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], hint: str) -> None:
        with pytest.raises(DataError, match=f"input 'image' of batch 3: (?=expected shape).*{hint}") as info:
            check_inputs([torch.zeros(shape)], [IMAGE], 3)
        assert info.value.batch == 3

    def test_the_hinted_permutation_is_right(self) -> None:
        nhwc = Spec("image", ("batch", 32, 24, 3))
        with pytest.raises(DataError, match=r"channels first.*permute\(0, 2, 3, 1\)"):
            check_inputs([torch.zeros(8, 3, 32, 24)], [nhwc])
        check_inputs([torch.zeros(8, 3, 32, 24).permute(0, 2, 3, 1)], [nhwc])
        check_inputs([torch.zeros(8, 32, 24, 3).permute(0, 3, 1, 2)], [IMAGE])

    def test_a_fixed_batch_is_said(self) -> None:
        with pytest.raises(DataError, match="fixed at 4"):
            check_inputs([torch.zeros(8, 3)], [Spec("x", (4, 3))])

    def test_one_symbol_has_one_size(self) -> None:
        specs = [Spec("ids", ("batch", "length")), Spec("mask", ("batch", "length"))]
        check_inputs([torch.zeros(2, 5), torch.zeros(2, 5)], specs)
        with pytest.raises(DataError, match=r"input 'mask'.*axis 'length' is 4 here but 5 in input 'ids'"):
            check_inputs([torch.zeros(2, 5), torch.zeros(2, 4)], specs)

    def test_wrong_count(self) -> None:
        with pytest.raises(DataError, match=r"has 2 inputs; the network takes 1 \('image'\)"):
            check_inputs([X, X], [IMAGE])
