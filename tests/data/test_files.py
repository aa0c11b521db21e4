"""Data from files and callables; archives that lie, are damaged or too big are refused."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitport.data import Source, files, open_data
from bitport.errors import DataError

X = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
Y = np.arange(10)


def read(data: Any, names: list[str], labels: str = "optional") -> tuple[list[torch.Tensor], list[Any]]:
    batches = list(Source(data, role="evaluation", names=names, labels=labels))
    return [batch.inputs[0] for batch in batches], [batch.labels for batch in batches]


def npy_bytes(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_x_and_y_in_batches(self, tmp_path: Path, save: Callable[..., None]) -> None:
        save(tmp_path / "d.npz", x=X, y=Y)
        data = open_data(tmp_path / "d.npz", names=["image"], batch_size=4)
        for _ in range(2):
            inputs, labels = read(data, ["image"])
            assert [len(part) for part in inputs] == [4, 4, 2]
            assert torch.equal(torch.cat(inputs), torch.from_numpy(X))
            assert torch.equal(torch.cat(labels), torch.from_numpy(Y))
        assert len(data) == 3

    def test_the_default_batch_is_32(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=np.zeros((40, 2), np.float32))
        inputs, labels = read(open_data(str(tmp_path / "d.npz")), ["image"])
        assert [len(part) for part in inputs] == [32, 8]
        assert labels == [None, None]

    def test_input_names(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", ids=Y, mask=Y % 2, y=Y)
        for names in (["mask", "ids"], None):
            (batch,) = list(open_data(tmp_path / "d.npz", names=names))
            assert set(batch.inputs) == {"ids", "mask"}
            assert batch.labels.tolist() == Y.tolist()

    def test_an_input_that_is_called_y(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=X, y=Y)
        (batch,) = list(open_data(tmp_path / "d.npz", names=["x", "y"]))
        assert set(batch.inputs) == {"x", "y"}
        assert batch.labels is None

    @pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float64", ">f4"])
    def test_dtypes(self, tmp_path: Path, dtype: str) -> None:
        np.savez(tmp_path / "d.npz", x=(X > 0).astype(dtype))
        inputs, _ = read(open_data(tmp_path / "d.npz"), ["x"])
        assert np.array_equal(inputs[0].numpy(), X > 0)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": X, "labels": Y}, r"\['labels', 'x'\].*'image' \(or 'x' for one input\)"),
            ({"images": X}, "'image'"),
            ({"y": Y}, "'image'"),
            ({"x": X, "y": Y[:-1]}, "differ in their number of samples"),
            ({"x": np.float32(1)}, "sample axis"),
            ({"x": np.asfortranarray(X)}, "C order"),
            ({"x": X.astype(complex)}, "complex128"),
            ({"x": np.array(["a", "b"])}, "<U1"),
            ({"x": np.zeros(3, [("a", "f4")])}, "only plain numbers"),
            ({"x": np.array([{"a": 1}], object)}, "dtype object; only plain numbers are read, never pickled"),
        ],
    )
    def test_other_contents_are_named(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(DataError, match=rf"'d\.npz'.*{message}"):
            open_data(tmp_path / "d.npz", names=["image"])

    def test_no_pickle_is_executed(self, tmp_path: Path) -> None:
        class Canary:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {tmp_path}/canary",)

        np.savez(tmp_path / "d.npz", x=np.array([Canary()], object))
        with pytest.raises(DataError, match="never pickled"):
            open_data(tmp_path / "d.npz")
        assert not (tmp_path / "canary").exists()

    def test_an_empty_array_is_empty_data(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=X[:0])
        with pytest.raises(DataError, match="data is empty"):
            read(open_data(tmp_path / "d.npz"), ["x"])


class TestHostileArchives:
    def test_not_an_archive_and_truncated(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "whole.npz", x=X)
        content = (tmp_path / "whole.npz").read_bytes()
        for part in (b"", b"text", content[: len(content) // 2]):
            (tmp_path / "d.npz").write_bytes(part)
            with pytest.raises(DataError, match=r"can't be read as an \.npz"):
                open_data(tmp_path / "d.npz")

    def test_a_flipped_byte_is_found(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, x=X)
        content = bytearray(path.read_bytes())
        content[content.index(X.tobytes()[:16]) + 40] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"'d\.npz' is refused: array 'x'"):
            list(open_data(path))

    def test_a_bomb_is_refused_before_it_unpacks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "SMALL_BYTES", 2**20)
        np.savez_compressed(tmp_path / "d.npz", x=np.zeros(2**22, np.uint8))
        with pytest.raises(DataError, match=r"unpack to 4,194,\d{3} bytes, above the limit of 1,048,576"):
            open_data(tmp_path / "d.npz")

    def test_the_absolute_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "MAX_BYTES", 100)
        np.savez(tmp_path / "d.npz", x=X)
        with pytest.raises(DataError, match="above the limit of 100"):
            open_data(tmp_path / "d.npz")

    def test_blank_data_is_no_bomb(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "d.npz", x=np.zeros((64, 2**16), np.uint8))
        assert len(open_data(tmp_path / "d.npz")) == 2

    @pytest.mark.parametrize("shape", [(10**12, 8), (2**62, 4), (2**64,), (3, 3), (-4, -4)])
    def test_a_shape_that_lies(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64
        with pytest.raises(DataError, match=r"array 'x' (claims shape|must have a sample axis)"):
            open_data(archive(tmp_path / "d.npz", {"x.npy": content}))

    def test_an_array_that_ends_early(self, tmp_path: Path) -> None:
        whole = npy_bytes(X)
        with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.npy", whole[:-100])
            file.filelist[0].file_size = len(whole)
        with pytest.raises(DataError, match=r"array 'x' (ends early|is damaged)"):
            list(open_data(tmp_path / "d.npz"))

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{}", b"\x93NUMPY\x09\x00" + b" " * 64, b"GIF89a",
         b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os')".ljust(64)],
    )  # fmt: skip
    def test_broken_headers(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(DataError, match="array 'x' can't be read"):
            open_data(archive(tmp_path / "d.npz", {"x.npy": content}))

    @pytest.mark.parametrize("members", [["x.npy", "run.py"], ["x.txt"], []])
    def test_other_members(self, tmp_path: Path, members: list[str]) -> None:
        with pytest.raises(DataError, match=r"'d\.npz'"):
            open_data(archive(tmp_path / "d.npz", dict.fromkeys(members, npy_bytes(X))))

    def test_a_path_as_member_touches_no_file(self, tmp_path: Path) -> None:
        archive(tmp_path / "d.npz", {"../../victim.npy": npy_bytes(X)})
        with pytest.raises(DataError, match="victim"):
            open_data(tmp_path / "d.npz", names=["x"])
        assert [entry.name for entry in tmp_path.iterdir()] == ["d.npz"]

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_name_twice(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
            file.writestr("x.npy", npy_bytes(X))
            file.writestr("x.npy", npy_bytes(X + 1))
        with pytest.raises(DataError, match="not distinct"):
            open_data(tmp_path / "d.npz")

    def test_memory_is_that_of_a_batch(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "d.npz", x=np.zeros((120, 2**18), np.float32))  # 120 MiB unpacked
        code = (
            "import resource, sys\n"
            "from bitport.data import open_data\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak()\n"
            "assert sum(len(batch.inputs) for batch in open_data(sys.argv[1], batch_size=8)) == 120\n"
            "assert peak() - before < 60, (before, peak())\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "d.npz")], check=True, timeout=60)


class TestCallable:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "their_data.py").write_text(
            "import torch\n"
            "class Loader:\n"
            "    built = 0\n"
            "    def __init__(self): Loader.built += 1\n"
            "    def __iter__(self): return iter([torch.ones(2, 3)])\n"
            "def generate():\n"
            "    yield torch.ones(2, 3)\n"
            "def broken(): raise ValueError('no disk')\n"
            "def nothing(): return None\n"
            "value = 3\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_data", raising=False)

    @pytest.mark.parametrize("name", ["generate", "Loader"])
    def test_can_be_read_twice(self, name: str) -> None:
        data = open_data(f"their_data:{name}")
        assert len(read(data, ["x"])[0]) == len(read(data, ["x"])[0]) == 1

    def test_a_dataset_is_built_once(self) -> None:
        data = open_data("their_data:Loader")
        read(data, ["x"])
        read(data, ["x"])
        assert sys.modules["their_data"].Loader.built == 1

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("no_such_module_x:f", "can't be imported .ModuleNotFoundError"),
            ("their_data:absent", "can't be imported .AttributeError"),
            ("their_data:", "can't be imported"),
            (":generate", "can't be imported"),
            ("their_data:value", "is int: name a callable"),
            ("their_data:broken", "raised .ValueError: no disk"),
            ("their_data:nothing", "returned NoneType"),
        ],
    )
    def test_failures_are_named(self, spec: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_data(spec)


class TestSpec:
    @pytest.mark.parametrize("spec", ["absent.npz", "absent"])
    def test_missing(self, tmp_path: Path, spec: str) -> None:
        with pytest.raises(DataError, match="no data at"):
            open_data(tmp_path / spec)

    def test_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "data.csv").write_text("1,2")
        with pytest.raises(DataError, match=r"'data\.csv' is of an unknown kind"):
            open_data(tmp_path / "data.csv")

    def test_batch_size(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="batch size 0"):
            open_data(tmp_path, batch_size=0)
