"""Canonical JSON, untrusted JSON, the measurement record, versions, and texts without paths."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitport import records
from bitport.errors import ArtifactError, UnknownName
from bitport.records import Measurement

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=["Cs"])
    ),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text("abc.é", max_size=3), part, max_size=3),
    max_leaves=12,
)  # fmt: skip


class TestWriting:
    def test_the_canonical_form(self, tmp_path: Path) -> None:
        records.dump(tmp_path / "r.json", {"b": [1, 0.1], "a": {"z": None, "é": True}, "t": (1, 2)})
        assert (tmp_path / "r.json").read_bytes() == (
            '{\n  "a": {\n    "z": null,\n    "é": true\n  },\n  "b": [\n    1,\n    0.1\n  ],\n'
            '  "schema": 1,\n  "t": [\n    1,\n    2\n  ]\n}\n'
        ).encode()

    @given(st.dictionaries(st.text("abcdé", min_size=1, max_size=4), plain, max_size=4))
    def test_what_is_written_reads_back_and_is_written_the_same(self, record: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "r.json")
            records.dump(path, record)
            first, again = path.read_bytes(), records.load(path)
            assert again == {"schema": 1, **record}
            records.dump(path, dict(reversed(again.items())))
            assert path.read_bytes() == first

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"a": {"b": [0.0, math.nan]}}, r"nan at a\.b\[1\]"),
            ({"a": math.inf}, "inf at a"),
            ({"a": np.float32(1)}, "float32 at a"),
            ({"a": {1, 2}}, "set at a"),
            ({"a": {1: 2}}, "key 1 at a"),
            ({"schema": 2}, "schema 2"),
            ({"schema": True}, "schema True"),
            ({"a": "\ud800"}, "Unicode"),
        ],
    )
    def test_what_json_cannot_hold_is_named(
        self, tmp_path: Path, record: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ArtifactError, match=message):
            records.dump(tmp_path / "r.json", record)
        assert not (tmp_path / "r.json").exists()

    def test_a_loop_is_refused(self) -> None:
        loop: dict[str, Any] = {}
        loop["a"] = loop
        with pytest.raises(ArtifactError, match="nested deeper than 64"):
            records.dumps(loop)


class TestReading:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "not valid JSON"),
            ("{", "not valid JSON"),
            ('{"schema": 1, "a": NaN}', "NaN is no JSON number"),
            ('{"schema": 1, "a": -Infinity}', "-Infinity"),
            ('{"schema": 1, "a": 1e999}', "1e999 is out of range"),
            ('{"schema": 1, "a": ' + "9" * 5000 + "}", "not valid JSON"),
            ('{"schema": 1, "a": 1, "a": 2}', "one key stands twice"),
            ('{"schema": 1, "a": "\\x00"}', "not valid JSON"),
            ("[1]", "holds list"),
            ('{"a": 1}', "has schema None; this version reads and writes schema 1"),
            ('{"schema": 2}', "schema 2"),
            ('{"schema": 1.0}', r"schema 1\.0"),
            ('{"schema": true}', "schema True"),
            ('{"schema": "1"}', "schema '1'"),
            ('{"schema": 1, "a": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
            ('{"schema": 1, "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 64"),
            ('{"schema": 1, "a": ' * 100_000, "nested deeper|not valid"),
        ],
    )
    def test_hostile_files(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ArtifactError, match=rf"record 'r\.json' .*(?:{message})"):
            records.load(tmp_path / "r.json")

    def test_other_encodings(self, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_bytes('{"schema": 1}'.encode("utf-16"))
        with pytest.raises(ArtifactError, match="not valid JSON"):
            records.load(tmp_path / "r.json")

    def test_missing_files_and_folders(self, tmp_path: Path) -> None:
        for path in (tmp_path / "absent.json", tmp_path):
            with pytest.raises(ArtifactError, match="can't be read"):
                records.load(path)

    def test_the_size_is_capped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "MAX_BYTES", 100)
        (tmp_path / "r.json").write_text('{"schema": 1, "a": "' + "x" * 100 + '"}')
        with pytest.raises(ArtifactError, match="larger than 100 bytes"):
            records.load(tmp_path / "r.json")


class TestMeasurement:
    def test_dotted_access(self) -> None:
        measurement = Measurement({"task": {"drop": 0.01, "ci95": [0.0, 0.02]}, "macs": 7})
        assert measurement.get("task.drop") == measurement["task.drop"] == 0.01
        assert measurement["macs"] == 7
        assert "task.drop" in measurement
        assert "task.verdict" not in measurement
        assert measurement.get("task.verdict") is None
        assert measurement.get("macs.drop", 5) == 5

    def test_a_wrong_key_lists_its_neighbours(self) -> None:
        with pytest.raises(UnknownName, match=r"'task\.dorp'.*Known: ci95, drop"):
            Measurement({"task": {"drop": 0, "ci95": 0}})["task.dorp"]
        with pytest.raises(UnknownName, match="Known: none"):
            Measurement({"macs": 7})["macs.x"]

    def test_absent_values_have_their_reason(self, tmp_path: Path) -> None:
        measurement = Measurement()
        measurement.absent("latency", "speedup", "no runtime here")
        measurement.absent("", "macs", "not counted")
        measurement.set("parity.local", "max_steps", 0)
        measurement.save(tmp_path / "m.json")
        again = Measurement.load(tmp_path / "m.json")
        assert again.record == {
            "schema": 1,
            "latency": {"speedup": None, "speedup_reason": "no runtime here"},
            "macs": None,
            "macs_reason": "not counted",
            "parity": {"local": {"max_steps": 0}},
        }
        assert again.reason("latency.speedup") == "no runtime here"
        assert again.reason("parity.local.max_steps") is None
        assert "latency.speedup" in again

    def test_a_value_takes_the_reason_away(self) -> None:
        measurement = Measurement()
        measurement.absent("latency", "speedup", "later")
        measurement.set("latency", "speedup", 2.0)
        assert measurement.record["latency"] == {"speedup": 2.0}

    def test_a_value_is_no_section(self) -> None:
        measurement = Measurement({"macs": 7})
        with pytest.raises(ArtifactError, match="'macs' already holds a value"):
            measurement.set("macs", "total", 1)

    def test_the_given_record_is_not_shared_at_its_top(self) -> None:
        given: dict[str, Any] = {}
        Measurement(given).set("", "macs", 1)
        assert given == {}


def test_absent_on_a_plain_section() -> None:
    section: dict[str, Any] = {"speedup": 2.0}
    records.absent(section, "speedup", "not measured")
    assert section == {"speedup": None, "speedup_reason": "not measured"}


def test_checksums(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(content)
    assert (
        records.sha256_bytes(content)
        == records.sha256_file(tmp_path / "f")
        == hashlib.sha256(content).hexdigest()
    )
    assert records.sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class TestVersions:
    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """bitport and two runtimes, as pip lays them out."""
        requires = {
            "bitport": [
                "Their-Runtime>=2,<3",
                "absent-one; extra == 'other'",
                'their-linter; extra == "lint"',
            ],
            "their-runtime": [],
            "their-linter": [],
        }
        for name, lines in requires.items():
            info = tmp_path / f"{name.replace('-', '_')}-2.5.dist-info"
            info.mkdir()
            head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n"
            (info / "METADATA").write_text(head + "".join(f"Requires-Dist: {line}\n" for line in lines))
        monkeypatch.syspath_prepend(str(tmp_path))

    def test_requirements_decide(self, installed: None) -> None:
        versions = records.versions()
        assert versions["bitport"] == versions["their-runtime"] == "2.5"
        assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {"torch", "numpy"} <= set(versions)
        assert not {"absent-one", "their-linter"} & set(versions)

    def test_nothing_is_imported(self) -> None:
        code = (
            "import sys; from bitport import records; before = set(sys.modules); records.versions()\n"
            "assert not {'numpy', 'torch', 'onnx', 'onnxruntime'} & (set(sys.modules) - before)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestScrub:
    @pytest.mark.parametrize(
        "text",
        [
            "node /layer1/layer1.0/conv1/Conv is float",
            "https://example.org/usr/lib/x",
            "1/2 and a/b/c, ./usr/lib.py and ../usr/lib.py",
            "ratio 3 /4/5",
            "conv.weight [64, 3, 7, 7] → int8",
            "",
        ],
    )
    def test_other_texts_stay(self, text: str) -> None:
        assert records.scrub(text) == text

    @pytest.mark.parametrize(
        ("text", "clean"),
        [
            ('File "/usr/lib/python3.11/ast.py", line 3', 'File "<path>/ast.py", line 3'),
            ("saved to /usr/share/private/project", "saved to <path>"),
            ("path=/usr/lib/x.so.", "path=<path>"),
            ("file:///usr/lib/x.onnx", "file:<path>/x.onnx"),
            (r"C:\Users\Jo\model.onnx: bad", "<path>/model.onnx: bad"),
            ("D:/data/nets/model.onnx", "<path>/model.onnx"),
            (r"\\server\share\model.onnx", "<path>/model.onnx"),
            ("/usr/jo.doe", "<path>"),
        ],
    )
    def test_paths_go(self, text: str, clean: str) -> None:
        assert records.scrub(text) == clean

    def test_the_systems_own_python_is_no_folder_of_anyone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "base_prefix", "/usr")
        for text in ("https://example.org/usr/lib/x", "./usr/lib.py and ../usr/lib.py"):
            assert records.scrub(text) == text
        assert records.scrub("/usr/jo.doe") == "<path>"

    def test_this_machines_folders_go_even_with_spaces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "jo do é"
        (home / "secret").mkdir(parents=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(home / "secret")
        text = f"{home}/secret/net.py and {home}; {sys.prefix}/lib/m.py"
        assert records.scrub(text) == "<path>/net.py and <path>; <path>/m.py"
        assert records.scrub(f"{home}x") != "<path>x"

    def test_a_removed_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert records.scrub("/usr/lib/a.py") == "<path>/a.py"

    def test_twice_is_once(self) -> None:
        once = records.scrub(json.dumps({"a": sys.executable, "b": "/usr/lib/a.py"}))
        assert records.scrub(once) == once
