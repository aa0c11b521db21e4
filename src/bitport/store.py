"""Publishes a folder all at once: whoever looks sees the old one whole or the new one whole, even after kill
-9.

A run takes the lock `<out>.lock`, fills a hidden folder beside `out`, flushes it to disk and exchanges the
two with one system call (Linux `renameat2(RENAME_EXCHANGE)`,
https://man7.org/linux/man-pages/man2/rename.2.html). Where the file system has no exchange, `out` is moved
aside first; a run that is killed between those two renames is repaired by the next one. POSIX only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from bitport import records
from bitport.errors import ArtifactError, BitportError, Locked, Tampered

MANIFEST = "manifest.json"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LOCK_START = b'{"bitport_lock": 1'
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


class Workspace:
    """A place to build an artifact in, published as a whole or not at all.

        with Workspace(out) as workspace:
            ...  # write files below workspace.path, manifest.json among them
            workspace.publish()

    out: the folder to publish to: absent, empty, or an artifact, which is then replaced. A folder of anything
        else is never touched.
    need_bytes: if given, refused at once where the file system has less room.

    Entering raises Locked (naming process and host) when another run has the same `out`; ArtifactError when
    `out` is a file, a link, somebody's folder, or can't be written. What the disk refuses inside the `with`
    (full, read-only, quota) leaves it as ArtifactError. On leaving, whatever wasn't published is removed.
    """

    def __init__(self, out: str | Path, *, need_bytes: int | None = None) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f".{self.out.name}.{os.getpid()}.tmp"
        self._need_bytes = need_bytes
        self._lock: _Lock | None = None
        self._published = False

    def __enter__(self) -> Self:
        if not self.out.name or "\0" in str(self.out):
            raise ArtifactError(f"{str(self.out)!r} can't be an output folder: name another one")
        with contextlib.ExitStack() as undo:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._lock = _Lock(self.out.parent / f"{self.out.name}.lock")
                undo.callback(self._lock.release)
                self._remove_leftovers()
                _repair(self.out)
                _refuse_foreign(self.out)
                self._refuse_little_room()
                self.path.mkdir()
            except OSError as error:
                raise _disk_error(self.out, error.strerror) from error
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            reason = None if self._published else _disk_reason(error, self.path)
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            if self._lock is not None:
                self._lock.release()
        if reason is not None:
            raise _disk_error(self.out, reason) from error

    def publish(self) -> Path:
        """Put what was built in place of `out`, atomically; returns `out`. Raises ArtifactError."""
        return self.publish_as(self.out)

    def publish_as(self, other: str | Path) -> Path:
        """Publish under another name beside `out` (`<out>.rejected`), by the same rules; `out` stays."""
        place = Path(os.path.abspath(other))
        if self._published:
            raise ArtifactError(f"{self.out} was already published: open a new workspace")
        if place.parent != self.out.parent:
            raise ArtifactError(f"{place} must lie beside {self.out} to be published atomically")
        try:
            _repair(place)
            _refuse_foreign(place)
            flush(self.path)
            if not place.exists():
                os.rename(self.path, place)
            elif not _exchange(self.path, place):
                os.rename(place, _aside(place))
                os.rename(self.path, place)
                shutil.rmtree(_aside(place), ignore_errors=True)
            _flush_entry(place.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                _repair(place)
            raise _disk_error(place, error.strerror) from error
        self._published = True
        return place

    def _remove_leftovers(self) -> None:
        """Clear up after runs that were killed. We hold the lock, so no living run owns any of it."""
        leftover = re.compile(rf"\.{re.escape(self.out.name)}\.\d+\.tmp")
        for entry in self.out.parent.iterdir():
            if leftover.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)

    def _refuse_little_room(self) -> None:
        free = shutil.disk_usage(self.out.parent).free
        if self._need_bytes is not None and free < self._need_bytes:
            raise ArtifactError(
                f"output folder {self.out} needs about {self._need_bytes:,} bytes and the disk has {free:,}: "
                "free space or choose another folder"
            )


@contextlib.contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A place to write a new file at: under its name all at once, or not at all. What is there is never replaced.

    Raises ArtifactError when `out` exists, before anything is done and again at the end, or can't be written.
    """
    place = Path(os.path.abspath(out))
    refuse_taken(place)
    scratch = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
        yield scratch / place.name
        _flush_entry(scratch / place.name)
        try:
            os.link(scratch / place.name, place)  # unlike a rename it fails where somebody was faster
        except FileExistsError:
            raise _taken(place) from None
        except OSError:  # a file system without hard links
            os.rename(scratch / place.name, place)
        _flush_entry(place.parent)
    except OSError as error:
        raise ArtifactError(
            f"{place} can't be written ({error.strerror}): free space, mend its permissions, or name another file"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def refuse_taken(place: Path) -> None:
    """Raise ArtifactError for a new file's place where something is: to be told before long work."""
    if os.path.lexists(place):
        raise _taken(place)


def _taken(place: Path) -> ArtifactError:
    return ArtifactError(f"{place} exists already and is not replaced: name another file, or remove it")


def manifest(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but its `manifest.json`: POSIX relative name → hex, sorted.

    Raises ArtifactError for a folder that can't be read or holds links or devices.
    """
    return {name: records.sha256_file(path) for name, path in _files(Path(folder)).items()}


def verify_manifest(folder: str | Path, *, besides: Collection[str] = ()) -> None:
    """Hold the files of an artifact, `besides` some, against `files` of its `manifest.json`.

    Raises Tampered naming changed, missing and extra files; ArtifactError for a folder that is no artifact.
    """
    place = Path(folder)
    stated = {name: digest for name, digest in _stated_files(place).items() if name not in besides}
    found = {name: digest for name, digest in manifest(place).items() if name not in besides}
    faults = {
        "changed": sorted(name for name in stated.keys() & found.keys() if stated[name] != found[name]),
        "missing": sorted(stated.keys() - found.keys()),
        "extra": sorted(found.keys() - stated.keys()),
    }
    if any(faults.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise Tampered(f"artifact {place.name!r} is not what was published ({told}): make it again")


class _Lock:
    """An flock on a file that tells who holds it. The kernel frees it when the holder dies.

    The file is removed while it is still locked, and whoever locked a removed file tries again: no two hold
    it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A holder that has only just locked may not have signed yet: it gets this long.
        deadline = time.monotonic() + 0.1
        while (handle := self._try(signed_by=deadline)) is None:
            time.sleep(0.005)
        self._handle = handle

    def _try(self, signed_by: float) -> int | None:
        """The locked handle; None to try again. Raises Locked, ArtifactError, OSError."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = _holder(os.pread(handle, 4096, 0))
                if holder is None and time.monotonic() < signed_by:
                    return None
                raise Locked(
                    f"output folder {self._path.with_suffix('')} is being written by another run "
                    f"({holder or 'unknown'}): wait for it, stop it, or choose another folder"
                ) from error
            if not self._is_at_path(handle):
                return None
            content = os.pread(handle, 4096, 0)
            if content and not (content.startswith(_LOCK_START) or _LOCK_START.startswith(content)):
                raise ArtifactError(f"{self._path} is in the way and is not a lock of bitport: rename it")
            undo.callback(
                self._path.unlink
            )  # a full disk takes no signature; it shall not keep an empty lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, _signature(), 0)
            undo.pop_all()
        return handle

    def _is_at_path(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._handle)


def _signature() -> bytes:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    return json.dumps({"bitport_lock": 1, **who}).encode()


def _holder(content: bytes) -> str | None:
    """Who signed a lock; None where nobody has (yet)."""
    try:
        who = json.loads(content)
        return f"process {who['pid']} on {who['host']}, since {who['started']}"
    except (ValueError, KeyError, TypeError):
        return None


def _repair(place: Path) -> None:
    """Undo the half of an exchange by two renames that a killed run left behind."""
    aside = _aside(place)
    if aside.is_dir() and not aside.is_symlink():
        if place.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, place)


def _aside(place: Path) -> Path:
    return place.parent / f".{place.name}.old"


def _refuse_foreign(place: Path) -> None:
    """Only an absent or empty folder, or an artifact with nothing else in it, may be replaced."""
    if place.is_symlink():
        raise ArtifactError(f"output folder {place} is a link: name the folder itself")
    if not place.exists():
        return
    if not place.is_dir():
        raise ArtifactError(f"output folder {place} is a file: name a folder")
    if not any(place.iterdir()):
        return
    try:
        strangers = sorted(_files(place).keys() - _stated_files(place).keys())
    except ArtifactError as error:
        raise ArtifactError(
            f"output folder {place} is not empty and not an artifact ({error}): choose another folder"
        ) from error
    if strangers:
        raise ArtifactError(
            f"output folder {place} holds files that are not the artifact's ({', '.join(strangers[:5])}): "
            "move them elsewhere, or choose another folder"
        )


def _stated_files(folder: Path) -> dict[str, str]:
    """What `manifest.json` says: name → SHA-256. The names are compared, never opened."""
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).is_symlink():
        raise ArtifactError(
            f"{folder.name or str(folder)!r} is no artifact: it has no {MANIFEST}; "
            "give a folder that bitport compress wrote"
        )
    files = records.load(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise ArtifactError(
            f"{folder.name or str(folder)!r} is no artifact: its {MANIFEST} lists no files; compress the network again"
        )
    return files


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder but its manifest: POSIX relative name → path, sorted by name."""
    found: dict[str, Path] = {}
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise):
            for name in (*folders, *names):
                path = Path(parent, name)
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    found[path.relative_to(folder).as_posix()] = path
                elif not stat.S_ISDIR(mode):
                    raise ArtifactError(
                        f"{folder.name!r} holds {name!r}, which is a link or device: remove it"
                    )
    except OSError as error:
        raise ArtifactError(f"folder {folder.name!r} can't be read ({error.strerror})") from error
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False where the system or file system can't. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def flush(folder: Path) -> None:
    """Force all files and folders below to disk, leaves first. Raises OSError."""
    for parent, _, names in os.walk(folder, topdown=False, onerror=_raise):
        for name in names:
            _flush_entry(Path(parent, name))
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    raise error


def _disk_error(place: Path, reason: str | None) -> ArtifactError:
    return ArtifactError(
        f"output folder {place} can't be written ({reason}); what was there before is intact: "
        "free space, mend its permissions, or choose another folder"
    )


def _disk_reason(error: BaseException | None, path: Path) -> str | None:
    """Why the disk refused, if that is what the error, or what caused it, is about."""
    if not isinstance(error, Exception):
        return None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (cause.errno in _DISK_ERRORS or str(path) in str(cause.filename)):
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    # Writers in C++ (torch, onnxruntime) say "write failed" and keep the reason to themselves.
    full = shutil.disk_usage(path.parent).free < 64 * 1024
    return os.strerror(errno.ENOSPC) if full and not isinstance(error, BitportError) else None
