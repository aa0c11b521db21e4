"""Operators against ONNX's own node tests: the share that comes out right, of the imported operators and of all."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from bitport.errors import BitportError
from bitport.frontends.onnx import _deciding, _known, _module, _reading, load_model, operators
from bitport.frontends.onnx._calls import HELD_IN, SMALL_FLOATS, tensor

IN_FLOAT = {*HELD_IN, *SMALL_FLOATS}  # numpy types that are compared by value


class Case(NamedTuple):
    name: str
    proto: Any
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float

    @property
    def kinds(self) -> set[str]:
        return {node.op_type for node in self.proto.graph.node}


@functools.cache
def cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            Case(case.name, _proto(case), list(_data(case)), case.rtol, max(case.atol, 1e-6))
            for case in load_model_tests(kind="node")
        ]


def _proto(case: Any) -> Any:
    return case.model or onnx.load(Path(case.model_dir) / "model.onnx")


def _data(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    sets = case.data_sets
    if sets is None:
        folders = sorted(Path(case.model_dir).glob("test_data_set_*"))
        sets = [(_files(folder, "input"), _files(folder, "output")) for folder in folders]
    for given, wanted in sets:
        yield [_array(value) for value in given], [_array(value) for value in wanted]


def _files(folder: Path, kind: str) -> list[Any]:
    count = len(list(folder.glob(f"{kind}_*.pb")))
    return [onnx.TensorProto.FromString((folder / f"{kind}_{i}.pb").read_bytes()) for i in range(count)]


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def opened(
    case: Case, given: list[Any]
) -> tuple[_reading.Model, dict[str, torch.Tensor], list[str], list[torch.Tensor]]:
    """(model, inputs by name, which of them are fixed, the others in order)."""
    read = _reading.from_proto(case.proto)
    values = {port.name: tensor(np.array(x)) for port, x in zip(read.inputs, given, strict=False)}
    fixed = _deciding(read)
    return read, values, fixed, [values[port.name] for port in read.inputs if port.name not in fixed]


def passes(case: Case, *, whole: bool) -> bool:
    """Whether a test's outputs come out. whole: through the graph, captured; else from the module that is captured."""
    try:
        for given, wanted in case.data:
            read, values, fixed, free = opened(case, given)
            with torch.no_grad():
                if whole:
                    found = list(load_model(read, values, None).run(*free))
                else:
                    known = {name: _known(name, values) for name in fixed}
                    every = _module.network(read, known).eval()(*free)
                    found = list(every.values()) if isinstance(every, dict) else [every]
            if not _same(found, wanted, case):
                return False
    except BitportError:
        return False
    return True


def _same(found: list[torch.Tensor], wanted: list[Any], case: Case) -> bool:
    for y, value in zip(found, wanted, strict=True):
        expected = np.asarray(value)
        got = (y.float() if y.dtype in SMALL_FLOATS.values() else y).detach().numpy()
        if expected.dtype.name in IN_FLOAT:
            with np.errstate(invalid="ignore"):  # NaN
                got, expected = got.astype(np.float64), expected.astype(np.float64)
        if got.dtype != expected.dtype or got.shape != expected.shape:
            return False
        if not np.allclose(got, expected, rtol=case.rtol, atol=case.atol, equal_nan=True):
            return False
    return True


@functools.cache
def outcomes() -> dict[str, bool]:
    return {case.name: passes(case, whole=False) for case in cases()}


def test_at_least_120_operators_are_imported() -> None:
    assert len(operators()) >= 120


def test_19_of_20_tests_of_the_imported_operators_pass_and_3_of_5_of_all() -> None:
    imported = [case.name for case in cases() if case.kinds <= set(operators())]
    good = [name for name in imported if outcomes()[name]]
    assert len(imported) > 1600
    assert len(good) >= 0.95 * len(imported), sorted({*imported} - {*good})
    assert sum(outcomes().values()) >= 0.6 * len(cases())


def test_what_the_module_computes_the_graph_computes() -> None:
    """The first test of every operator that has passed, captured and raised."""
    first: dict[str, Case] = {}
    for case in cases():
        if outcomes()[case.name]:
            for kind in case.kinds:
                first.setdefault(kind, case)
    chosen = {case.name: case for case in first.values()}
    failed = [name for name, case in chosen.items() if not passes(case, whole=True)]
    assert len(chosen) > 100 and not failed


@pytest.mark.slow
def test_all_that_passes_passes_through_the_graph() -> None:
    failed = [case.name for case in cases() if outcomes()[case.name] and not passes(case, whole=True)]
    assert not failed


@pytest.mark.parametrize("kind", ["NonMaxSuppression", "LinearAttention", "StringConcat"])
def test_an_operator_that_is_not_imported_is_named_with_its_node_and_opset(kind: str) -> None:
    case = next(case for case in cases() if kind in case.kinds)
    with pytest.raises(BitportError, match=rf"{kind}.*opset \d+.*can't be imported"):
        _module.network(_reading.from_proto(case.proto), {})
