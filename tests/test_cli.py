from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests import fixtures_measurements as fixtures

import bitport
from bitport.cli import cli
from bitport.errors import BitportError, GateFailed, Interrupted, LoadError, UnknownName
from bitport.progress import NullProgress
from bitport.records import Measurement

COMPRESS = (
    "compress",
    "net.pt2",
    "--target",
    "onnxruntime",
    "--recipe",
    "int8",
    "--data",
    "d.npz",
    "--out",
    "out",
)
UNDECIDED = {**fixtures.record()["task"], "verdict": "undecided", "samples_needed": 3512}


class FakeApi(ModuleType):
    """Stands in for `bitport.api`: remembers its calls, answers what a test put in."""

    def __init__(self) -> None:
        super().__init__("bitport.api")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: dict[str, Callable[..., Any]] = {
            "load": lambda *args, **_: ("graph", *args),
            "compress": lambda *_, out, **__: fixtures.write(Path(out)),
            "verify": lambda *_, **__: Measurement(fixtures.record()),
            "report": lambda folder: Path(folder) / "report.html",
            "targets": lambda: {
                "null": {"summary": "simulates only", "available": True},
                "[red]x": {"summary": "a runtime", "available": False, "needs": "pip install x"},
            },
            "inspect": lambda *_, **__: INSPECTED,
            "prepare": lambda *_: None,
            "run": lambda *, out, **_: fixtures.write(Path(out)),
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.answers:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self.answers[name](*args, **kwargs)

        return call


INSPECTED = {
    "layers": [
        {
            "name": "stem",
            "op": "conv",
            "shape": ["batch", 32, 8, 8],
            "parameters": 896,
            "macs": 55296,
            "integer": True,
        },
        {
            "name": "act",
            "op": "gelu",
            "shape": ["batch", 32, 8, 8],
            "parameters": 0,
            "macs": 0,
            "integer": False,
            "reason": "no kernel",
        },
    ],
    "totals": {"parameters": 896, "macs": 55296, "mac_share": 1.0},
    "speed": "about 2.5× faster on this CPU: AVX512-VNNI",
    "notes": ["axis 1 is fixed at 32"],
}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApi:
    fake = FakeApi()
    for name in ("api", "demo"):
        monkeypatch.setitem(sys.modules, f"bitport.{name}", fake)
        monkeypatch.setattr(bitport, name, fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


# --------------------------------------------------------------------------------------- what is asked for


def test_compress_passes_files_names_and_limits_on(api: FakeApi, tmp_path: Path) -> None:
    result = invoke(
        *COMPRESS,
        "--train",
        "t.npz",
        "--eval",
        "e.npz",
        "--metric",
        "top1",
        "--max-drop",
        "0.005",
        "--effort",
        "best",
    )
    assert result.exit_code == 0, result.stderr
    _, (_, loaded, _), (_, args, kwargs) = api.calls
    assert loaded == ("net.pt2",)
    assert args == (("graph", "net.pt2"), "int8")
    assert isinstance(kwargs.pop("progress"), NullProgress)
    assert kwargs == {
        "target": "onnxruntime",
        "data": "d.npz",
        "train": "t.npz",
        "evaluation": "e.npz",
        "metric": "top1",
        "max_drop": 0.005,
        "out": Path("out"),
        "effort": "best",
    }


def test_summary_tells_the_table_the_verdict_and_where_to_look(api: FakeApi, tmp_path: Path) -> None:
    fixtures.write(tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("")
    text = invoke(*COMPRESS).stdout
    for words in ("98.89 %", "98.78 %", "2.76 MB", "724 kB", "0.26×", "1.14 ms", "2.3× faster", "99.996 %"):
        assert words in text
    assert "✓ " + fixtures.record()["verdict"]["sentence"] in " ".join(text.split())
    assert os.path.join("out", "report.html") in text
    assert "worst layer  layer4.add (add, 27.7 dB)" in text
    assert "se.gelu: onnxruntime has no integer kernel for Gelu" in text


def test_json_is_one_document_and_the_measurement_itself(api: FakeApi) -> None:
    def chatty(*_: Any, out: Path, **__: Any) -> None:
        sys.stdout.write("noise of a library\n")
        os.write(1, b"noise of a C library\n")
        fixtures.write(out)

    api.answers["compress"] = chatty
    result = invoke(*COMPRESS, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == fixtures.record()
    assert "noise of a library" in result.stderr


def test_verify(api: FakeApi) -> None:
    result = invoke("verify", "out", "--data", "e.npz", "--target", "null", "--json")
    ((name, args, kwargs),) = api.calls
    assert isinstance(kwargs.pop("progress"), NullProgress)
    assert (name, args) == ("verify", (Path("out"),))
    assert kwargs == {"data": "e.npz", "metric": None, "target": "null"}
    assert result.exit_code == 0
    assert json.loads(result.stdout)["task"]["metric"] == "top1"


def test_report_prints_its_path(api: FakeApi) -> None:
    assert invoke("report", "out").stdout.strip() == os.path.join("out", "report.html")
    assert json.loads(invoke("report", "out", "--json").stdout) == {
        "report": os.path.join("out", "report.html")
    }


def test_demo(api: FakeApi, tmp_path: Path) -> None:
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    assert api.calls[0][2]["out"] == Path("out/demo")
    assert "✓" in result.stdout


def test_inspect_shows_layers_totals_reasons_and_speed(api: FakeApi) -> None:
    result = invoke("inspect", "net.pt2", "--target", "onnxruntime")
    assert result.exit_code == 0, result.stderr
    assert api.calls[1] == ("inspect", (("graph", "net.pt2"),), {"target": "onnxruntime"})
    for words in (
        "stem",
        "batch×32×8×8",
        "896",
        "55.3 k",
        "float: no kernel",
        "100 %",
        "2.5× faster",
        "axis 1",
    ):
        assert words in result.stdout
    assert json.loads(invoke("inspect", "net.pt2", "--json").stdout) == INSPECTED


def test_inspect_without_target_has_no_column_for_it(api: FakeApi) -> None:
    bare = [{k: v for k, v in row.items() if k not in ("integer", "reason")} for row in INSPECTED["layers"]]  # type: ignore[attr-defined]
    api.answers["inspect"] = lambda *_, **__: {"layers": bare, "totals": {"parameters": 896, "macs": 55296}}
    text = invoke("inspect", "net.pt2").stdout
    assert "stem" in text
    assert "runs in" not in text
    assert "float" not in text


def test_model_from_a_callable(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_a.py").write_text("class nets:\n    def small(): return ('model', 'example')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert invoke("inspect", "my_nets_a:nets.small").exit_code == 0
    assert api.calls[0] == ("load", ("model", "example"), {"nonfinite": "refuse"})


@pytest.mark.parametrize(
    ("source", "spec", "words"),
    [
        ("def f(): return 3", "{}:f", "return (model, example_inputs)"),
        ("def f(): raise ValueError('oh no')", "{}:f", "ValueError: oh no"),
        ("def f(): pass", "{}:g", "AttributeError"),
        ("import sys; sys.exit(0)", "{}:f", "could not be called (SystemExit: 0)"),
        ("", "no_such_module_at_all:f", "ModuleNotFoundError"),
    ],
)
def test_a_callable_that_does_not_give_a_model(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, spec: str, words: str
) -> None:
    name = f"my_nets_{len(source)}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke("inspect", spec.format(name))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["targets", "steps", "formats", "criteria"])
def test_list(api: FakeApi, kind: str) -> None:
    result = invoke("list", kind)
    assert result.exit_code == 0, result.stderr
    found = json.loads(invoke("list", kind, "--json").stdout)[kind]
    for name, entry in found.items():
        assert name in result.stdout
        assert entry["summary"] in " ".join(result.stdout.split())
    if kind == "targets":
        assert "[red]x" in found
        assert "not available: pip install x" in result.stdout
    if kind == "formats":
        assert found["int8n"]["summary"] == "-127 … 127, stored in 8 bits"
    if not found:
        assert f"no {kind}" in result.stdout


# ------------------------------------------------------------------------------------ codes and failures


@pytest.mark.parametrize(
    "args",
    [
        ("compress", "net.pt2"),
        ("verify",),
        ("list", "flavours"),
        ("nonsense",),
        (*COMPRESS, "--max-drop", "nan"),
        (*COMPRESS, "--max-drop", "much"),
        (*COMPRESS, "--no-such-flag"),
    ],
)
def test_wrong_usage_is_2_and_does_nothing(api: FakeApi, args: tuple[str, ...]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr
    assert api.calls == []


def test_a_failed_gate_is_3_and_still_tells_everything(api: FakeApi) -> None:
    task = {**fixtures.record()["task"], "verdict": "fails", "drop": 0.03, "ci95": [0.02, 0.04]}
    record = fixtures.record(task=task, verdict=None)

    def fail(*_: Any, **__: Any) -> None:
        raise GateFailed("accuracy dropped by 3.00 points, 0.50 are allowed", record, Path("out.rejected"))

    api.answers["compress"] = fail
    result = invoke(*COMPRESS)
    assert result.exit_code == 3
    assert result.stderr == "gate missed: the result is in out.rejected\n"
    assert "✗ rejected: int8 on onnxruntime loses 3.00 points" in " ".join(result.stdout.split())
    as_json = invoke(*COMPRESS, "--json")
    assert as_json.exit_code == 3
    assert json.loads(as_json.stdout)["task"]["verdict"] == "fails"


def test_undecided_is_3(api: FakeApi) -> None:
    api.answers["verify"] = lambda *_, **__: Measurement(fixtures.record(task=UNDECIDED, verdict=None))
    result = invoke("verify", "out")
    assert result.exit_code == 3
    assert "? undecided" in result.stdout
    assert "4,000 samples" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            LoadError("net.pt2 is no zip file: export it again"),
            1,
            "error: net.pt2 is no zip file: export it again",
        ),
        (UnknownName("target", "onxruntime", ["onnxruntime", "null"]), 1, "Did you mean 'onnxruntime'?"),
        (BitportError("two\nlines \x1b[31m"), 1, "error: two lines \\u001b[31m"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "unexpected ZeroDivisionError: division by zero (BITPORT_DEBUG=1",
        ),
        (Interrupted("stopped after step 2: run again to resume"), 75, "stopped after step 2"),
        (KeyboardInterrupt(), 75, "interrupted"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_errors_are_one_line_with_the_right_code(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.delenv("BITPORT_DEBUG", raising=False)
    api.answers["load"] = fail
    result = invoke("inspect", "net.pt2")
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    as_json = invoke("inspect", "net.pt2", "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout)["error"]["type"] == type(error).__name__


def test_debug_shows_the_traceback(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setenv("BITPORT_DEBUG", "1")
    api.answers["load"] = fail
    result = invoke("inspect", "net.pt2", "--json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in fail" in result.stderr
    json.loads(result.stdout)


def test_a_record_that_is_no_json_is_an_error_not_half_a_document(api: FakeApi) -> None:
    api.answers["inspect"] = lambda *_, **__: {"layers": [], "macs": float("nan")}
    result = invoke("inspect", "net.pt2", "--json")
    assert result.exit_code == 1
    assert list(json.loads(result.stdout)) == ["error"]


# -------------------------------------------------------------------------------------- as a real process

FAKE = """
import sys, time, types
import bitport
api = types.ModuleType("bitport.api")
sys.modules["bitport.api"] = bitport.api = api
api.load = lambda *args, **kwargs: None
def inspect(graph, target=None):
    {body}
    return {{"layers": [{{"name": "n" * 100, "op": "conv"}}] * 5000, "totals": {{}}}}
api.inspect = inspect
from bitport.cli import main
sys.argv = ["bitport", "inspect", "net.pt2"]
main()
"""


def environment() -> dict[str, str]:
    source = str(Path(next(iter(bitport.__path__))).parent)
    return {**os.environ, "PYTHONPATH": source, "PYTHONWARNINGS": "", "COLUMNS": "100"}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(code: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment()
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_help_is_fast_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bitport', '--help']\n"
        "from bitport.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "heavy = {'torch', 'numpy', 'rich', 'onnx', 'onnxruntime', 'plotly', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout
    assert "75" in done.stdout
    assert time.perf_counter() - begin < 3  # 0.1 s alone; the machine is shared


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitport", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
        check=True,
    )
    assert done.stdout.startswith("bitport ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_with_75(start: Callable[..., subprocess.Popen[str]], number: signal.Signals) -> None:
    process = start(FAKE.format(body="print('ready', file=sys.stderr, flush=True); time.sleep(60)"))
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=10) == 75
    assert process.stderr.read() == "interrupted: run the same command again\n"


def test_a_reader_that_leaves_early_is_no_error(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(FAKE.format(body="pass"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""


def test_progress_is_drawn_on_a_terminal_only() -> None:
    code = FAKE.format(body="time.sleep(0.3)").replace(
        "api.load = lambda *args, **kwargs: None", "api.load = lambda *args, **kwargs: time.sleep(0.5)"
    )
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment()
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=20)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert process.returncode == 0
    assert "load net.pt2" in drawn
    assert "load net.pt2" not in out


def test_output_of_c_code_stays_out_of_stdout(start: Callable[..., subprocess.Popen[str]]) -> None:
    body = "import ctypes; ctypes.CDLL(None).printf(b'from C\\n')"
    process = start(FAKE.format(body=body))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "from C" in err
    assert "from C" not in out
