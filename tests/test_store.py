"""Old whole or new whole: whatever kills the run, fills the disk, or runs at the same time."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitport import records, store
from bitport.errors import ArtifactError, GateFailed, Locked, Tampered
from bitport.store import Workspace, manifest, verify_manifest


def fill(folder: Path, version: str) -> None:
    """An artifact whose every file tells its version."""
    (folder / "reference").mkdir()
    for name in ("model.onnx", "plan.json", "reference/model.onnx"):
        (folder / name).write_text(version * 1000)
    records.dump(folder / "manifest.json", {"files": manifest(folder)})


def publish(out: Path, version: str) -> None:
    with Workspace(out) as workspace:
        fill(workspace.path, version)
        assert workspace.publish() == out


def fail(out: Path, error: BaseException) -> None:
    """A run that ends by an error when its artifact was nearly done."""
    with Workspace(out) as workspace:
        fill(workspace.path, "2")
        raise error


def version_of(out: Path) -> str:
    """The version of a whole artifact; fails when it is not whole."""
    verify_manifest(out)
    texts = {
        path.read_text()[0] for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"
    }
    (version,) = texts
    return version


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting a folder in place of another."""
    if request.param == "two renames":
        monkeypatch.setattr(store, "_exchange", lambda first, second: False)
    return str(request.param)


class TestPublish:
    def test_new_then_replaced_and_nothing_is_left_beside(self, tmp_path: Path, way: str) -> None:
        for version in "123":
            publish(tmp_path / "out", version)
            assert version_of(tmp_path / "out") == version
            assert names(tmp_path) == ["out"]

    def test_into_an_empty_folder_and_into_missing_parents(self, tmp_path: Path, way: str) -> None:
        (tmp_path / "out").mkdir()
        publish(tmp_path / "out", "1")
        publish(tmp_path / "a" / "b" / "out", "1")
        assert version_of(tmp_path / "out") == version_of(tmp_path / "a" / "b" / "out") == "1"

    def test_a_relative_and_an_odd_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("out", "./dots/../with space", "ünï.v1.2", "[a]*"):
            for version in "12":
                with Workspace(name) as workspace:
                    fill(workspace.path, version)
                    assert workspace.publish() == tmp_path / Path(name).name
            assert version_of(tmp_path / Path(name).name) == "2"

    def test_without_publishing_nothing_changes(self, tmp_path: Path, way: str) -> None:
        publish(tmp_path / "out", "1")
        with Workspace(tmp_path / "out") as workspace:
            fill(workspace.path, "2")
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out"]

    def test_an_error_inside_passes_and_nothing_changes(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "1")
        with pytest.raises(KeyError):
            fail(tmp_path / "out", KeyError())
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out"]

    def test_rejected_results_go_beside(self, tmp_path: Path, way: str) -> None:
        publish(tmp_path / "out", "1")
        rejected = tmp_path / "out.rejected"

        def reject(version: str) -> None:
            with Workspace(tmp_path / "out") as workspace:
                fill(workspace.path, version)
                raise GateFailed("missed", {}, workspace.publish_as(rejected))

        for version in "23":
            with pytest.raises(GateFailed):
                reject(version)
            assert version_of(rejected) == version
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out", "out.rejected"]

    def test_only_beside_and_only_once(self, tmp_path: Path) -> None:
        with Workspace(tmp_path / "out") as workspace:
            fill(workspace.path, "1")
            with pytest.raises(ArtifactError, match="must lie beside"):
                workspace.publish_as(tmp_path / "elsewhere" / "out")
            workspace.publish()
            with pytest.raises(ArtifactError, match="already published"):
                workspace.publish()

    def test_everything_is_flushed_before_the_exchange(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(tmp_path / "out", "1")
        events: list[str] = []
        flush, exchange = os.fsync, store._exchange
        monkeypatch.setattr(
            os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), flush(handle))
        )
        monkeypatch.setattr(
            store, "_exchange", lambda first, second: (events.append("exchange"), exchange(first, second))[1]
        )
        publish(tmp_path / "out", "2")
        before = [Path(event) for event in events[: events.index("exchange")]]
        (work,) = (path for path in before if path.name.endswith(".tmp"))
        assert {path.relative_to(work).as_posix() for path in before} == {
            ".", "reference", "manifest.json", "model.onnx", "plan.json", "reference/model.onnx"
        }  # fmt: skip
        assert events[events.index("exchange") + 1 :] == [str(tmp_path)]


class TestProtection:
    def test_somebodys_folder_is_never_touched(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("three years of work")
        with pytest.raises(
            ArtifactError, match=r"out is not empty and not an artifact .*choose another folder"
        ):
            publish(tmp_path / "out", "1")
        assert (tmp_path / "out" / "thesis.txt").read_text() == "three years of work"
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("text", ["{}", "not json", '{"schema": 1}', '{"schema": 1, "files": [1]}',
                                      '{"manifest_version": 3, "name": "a browser extension"}'])  # fmt: skip
    def test_another_programs_manifest_does_not_make_an_artifact(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="not an artifact"):
            publish(tmp_path / "out", "1")
        assert (tmp_path / "out" / "manifest.json").read_text() == text

    def test_strange_files_in_an_artifact_are_not_deleted_with_it(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "1")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ArtifactError, match=r"holds files that are not the artifact's \(notes\.txt\)"):
            publish(tmp_path / "out", "2")
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"

    def test_a_folder_that_came_in_between_is_not_touched_either(self, tmp_path: Path) -> None:
        with Workspace(tmp_path / "out") as workspace:
            fill(workspace.path, "1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("work")
            with pytest.raises(ArtifactError, match="not an artifact"):
                workspace.publish()
        assert names(tmp_path / "out") == ["thesis.txt"]

    def test_a_changed_or_incomplete_artifact_may_be_replaced(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "1")
        (tmp_path / "out" / "plan.json").unlink()
        (tmp_path / "out" / "model.onnx").write_text("changed")
        publish(tmp_path / "out", "2")
        assert version_of(tmp_path / "out") == "2"

    def test_files_links_and_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        publish(tmp_path / "real", "1")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for out, message in (
            ("file", "is a file"),
            ("link", "is a link"),
            ("dangling", "is a link"),
            ("/", "'/'"),
        ):
            with pytest.raises(ArtifactError, match=message):
                publish(tmp_path / out, "2")
        with pytest.raises(ArtifactError, match="can't be an output folder"):
            publish(tmp_path / "a\0b", "2")
        assert version_of(tmp_path / "real") == "1"
        assert names(tmp_path) == ["dangling", "file", "link", "real"]

    def test_a_file_that_is_called_like_the_lock(self, tmp_path: Path) -> None:
        (tmp_path / "poetry.lock").write_text("# a lock file of another program")
        with pytest.raises(ArtifactError, match=r"poetry\.lock is in the way"):
            publish(tmp_path / "poetry", "1")
        assert (tmp_path / "poetry.lock").read_text() == "# a lock file of another program"

    def test_a_lock_that_is_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("")
        (tmp_path / "out.lock").symlink_to(tmp_path / "target")
        with pytest.raises(ArtifactError, match="symbolic links"):
            publish(tmp_path / "out", "1")
        assert (tmp_path / "target").read_text() == ""

    def test_leftovers_of_other_names_stay(self, tmp_path: Path) -> None:
        for name in (".out.5.123.tmp", ".other.123.tmp", ".out.tmp", "out.123.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / ".out.7.tmp").write_text("a file")
        before = names(tmp_path)
        publish(tmp_path / "out", "1")
        assert names(tmp_path) == sorted([*before, "out"])


class TestDisk:
    def test_a_parent_that_is_a_file_or_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        for parent in (tmp_path / "file", Path("/proc")):
            with pytest.raises(ArtifactError, match=r"output folder .*out can't be written"):
                publish(parent / "out", "1")

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="File name too long"):
            publish(tmp_path / ("x" * 300), "1")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    def test_what_the_disk_refuses_inside(self, tmp_path: Path, code: int) -> None:
        publish(tmp_path / "out", "1")
        error = RuntimeError("writer failed")
        error.__cause__ = OSError(code, os.strerror(code))
        message = rf"out can't be written \({os.strerror(code)}\).*intact"
        with pytest.raises(ArtifactError, match=message) as info:
            fail(tmp_path / "out", error)
        assert isinstance(info.value.__cause__, RuntimeError)
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out"]

    def test_a_file_below_that_cannot_be_opened(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="No such file"), Workspace(tmp_path / "out") as workspace:
            (workspace.path / "no" / "folder").write_text("x")

    def test_other_errors_of_files_are_not_ours(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), Workspace(tmp_path / "out"):
            (tmp_path / "elsewhere" / "data").read_text()

    def test_a_writer_that_hides_the_reason(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = store.shutil.disk_usage(tmp_path)
        frees = iter([10**12, 0])  # at the beginning, at the failure
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=next(frees)))
        with pytest.raises(ArtifactError, match="No space left"):
            fail(tmp_path / "out", RuntimeError("PytorchStreamWriter failed writing file data/0"))

    def test_room_is_asked_for_first(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ArtifactError, match=r"needs about 1(,000){6} bytes and the disk has"),
            Workspace(tmp_path / "out", need_bytes=10**18),
        ):
            raise AssertionError("entered")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("failing", ["fsync", "rename"])
    def test_a_failure_while_publishing(
        self, tmp_path: Path, way: str, failing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(tmp_path / "out", "1")
        original: Callable[..., Any] = getattr(os, failing)

        def refuse(*arguments: Any) -> Any:
            # Moving the old folder aside works, putting the new one in its place doesn't.
            if failing == "fsync" or str(arguments[0]).endswith(".tmp"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments)

        monkeypatch.setattr(os, failing, refuse)
        if (way, failing) == ("exchange", "rename"):
            monkeypatch.setattr(
                store,
                "_exchange",
                lambda first, second: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")),
            )
        with pytest.raises(ArtifactError, match="No space left"):
            publish(tmp_path / "out", "2")
        monkeypatch.undo()
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out"]

    def test_a_file_size_limit_at_every_point(self, tmp_path: Path) -> None:
        """The kernel itself refuses writes: nothing, a part, or nearly all of the artifact fits."""
        code = (
            "import resource, signal, sys\n"
            "from pathlib import Path\n"
            "from bitport.errors import ArtifactError\n"
            "from bitport.store import Workspace\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "for limit in (0, 10, 50_000, 99_999):\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
            "    try:\n"
            "        with Workspace(sys.argv[1]) as workspace:\n"
            "            (workspace.path / 'model.onnx').write_bytes(b'x' * 100_000)\n"
            "            workspace.publish()\n"
            "    except ArtifactError as error:\n"
            "        assert 'File too large' in str(error), error\n"
            "    else:\n"
            "        raise AssertionError(limit)\n"
        )
        publish(tmp_path / "out", "1")
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, timeout=60)
        assert version_of(tmp_path / "out") == "1"
        assert names(tmp_path) == ["out"]


HOLD = """
import sys, time
from bitport.store import Workspace
with Workspace(sys.argv[1]) as workspace:
    print(workspace.path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another run that has the same output folder open."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(str(tmp_path))
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


class TestLock:
    def test_a_second_run_is_refused_at_once_naming_the_first(
        self, tmp_path: Path, holder: subprocess.Popen[str]
    ) -> None:
        start = time.monotonic()
        with pytest.raises(Locked, match=f"process {holder.pid} on {socket.gethostname()}, since 2"):
            publish(tmp_path / "out", "2")
        assert time.monotonic() - start < 0.2
        publish(tmp_path / "other", "1")

    def test_a_killed_run_leaves_nothing_that_stays(
        self, tmp_path: Path, holder: subprocess.Popen[str]
    ) -> None:
        holder.kill()
        holder.wait()
        assert names(tmp_path) == [f".out.{holder.pid}.tmp", "out.lock"]
        publish(tmp_path / "out", "1")
        assert names(tmp_path) == ["out"]

    def test_twice_in_one_process(self, tmp_path: Path) -> None:
        with Workspace(tmp_path / "out"):
            with pytest.raises(Locked, match=f"process {os.getpid()}"):
                publish(tmp_path / "out", "1")
            assert (tmp_path / "out.lock").exists()
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        "content", ["", '{"bitport', '{"bitport_lock": 1, "pid": 1, "host": "gone", "started": "']
    )
    def test_a_stale_lock_is_harmless(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "out.lock").write_text(content)
        publish(tmp_path / "out", "1")
        assert names(tmp_path) == ["out"]

    def test_an_unsigned_lock_that_is_held(self, tmp_path: Path) -> None:
        with Workspace(tmp_path / "out"):
            (tmp_path / "out.lock").write_text("")
            with pytest.raises(Locked, match="unknown"):
                publish(tmp_path / "out", "1")

    def test_many_at_once_never_hold_it_together(self, tmp_path: Path) -> None:
        """Each run counts up a number without any other protection: a lost update would show."""
        code = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from bitport.errors import Locked\n"
            "from bitport.store import Workspace\n"
            "counter, done = Path(sys.argv[1], 'counter'), 0\n"
            "for child in range(3):\n"
            "    if os.fork() == 0:\n"
            "        break\n"
            "while done < 40:\n"
            "    try:\n"
            "        with Workspace(Path(sys.argv[1], 'out')):\n"
            "            counter.write_text(str(int(counter.read_text()) + 1))\n"
            "        done += 1\n"
            "    except Locked:\n"
            "        pass\n"
            "try:\n"
            "    while True: os.wait()\n"
            "except ChildProcessError:\n"
            "    pass\n"
        )
        (tmp_path / "counter").write_text("0")
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
        assert (tmp_path / "counter").read_text() == "160"
        assert names(tmp_path) == ["counter"]


class TestManifest:
    def test_is_sorted_relative_and_without_itself(self, tmp_path: Path) -> None:
        fill_here = tmp_path / "a"
        fill_here.mkdir()
        fill(fill_here, "1")
        (fill_here / "reference" / "manifest.json").write_text("{}")
        found = manifest(fill_here)
        assert list(found) == ["model.onnx", "plan.json", "reference/manifest.json", "reference/model.onnx"]
        assert found["plan.json"] == records.sha256_bytes(b"1" * 1000)
        assert str(tmp_path) not in json.dumps(found)

    def test_each_fault_is_named(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        publish(out, "1")
        verify_manifest(out)
        (out / "plan.json").write_text("1" * 999 + "2")
        with pytest.raises(Tampered, match=r"\(changed: plan\.json\)"):
            verify_manifest(out)
        (out / "reference" / "model.onnx").unlink()
        (out / "extra.txt").write_text("")
        with pytest.raises(
            Tampered, match=r"changed: plan\.json; missing: reference/model\.onnx; extra: extra\.txt"
        ):
            verify_manifest(out)

    def test_links_are_refused(self, tmp_path: Path) -> None:
        for name, target in (("file", "/etc/hostname"), ("folder", "/etc")):
            out = tmp_path / name
            publish(out, "1")
            (out / "link").symlink_to(target)
            with pytest.raises(ArtifactError, match="'link', which is a link"):
                verify_manifest(out)

    def test_names_in_a_manifest_are_never_opened(self, tmp_path: Path) -> None:
        publish(tmp_path / "out", "1")
        (tmp_path / "secret").write_text("s")
        record = records.load(tmp_path / "out" / "manifest.json")
        record["files"]["../secret"] = records.sha256_bytes(b"s")
        records.dump(tmp_path / "out" / "manifest.json", record)
        with pytest.raises(Tampered, match=r"missing: \.\./secret"):
            verify_manifest(tmp_path / "out")

    def test_what_is_no_artifact(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"no artifact: it has no manifest\.json"):
            verify_manifest(tmp_path)
        (tmp_path / "manifest.json").write_text('{"schema": 1, "files": {"a": 1}}')
        with pytest.raises(ArtifactError, match="lists no files"):
            verify_manifest(tmp_path)
        with pytest.raises(ArtifactError, match="can't be read"):
            manifest(tmp_path / "absent")


def test_an_interrupt_removes_what_was_built(tmp_path: Path) -> None:
    publish(tmp_path / "out", "1")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())
    assert version_of(tmp_path / "out") == "1"
    assert names(tmp_path) == ["out"]
