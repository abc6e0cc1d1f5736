"""The store's folder, and its audit log: each action on an adapter, its tenant and its outcome.

Every change of the folder is atomic: a kill at any moment leaves it done or not done.

    incoming/<tenant>/…                     files that a tenant may load by path; put there by the server's operator
    adapters/<tenant>/<digest>.safetensors  an adapter as the store rewrote it
    adapters/<tenant>/<name>@<digest>       an empty file: the adapter has that name

An adapter exists if a file records its name. An adapter's file without a name was left by a killed writer, and is
removed.
"""

import contextlib
import datetime
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lorac.errors import ArtifactError, LoracError, short
from lorac.storage.atomic_folders import flush
from lorac.storage.paths import translate_os_errors
from lorac.storage.process_folders import make_process_folder, remove_abandoned

_LONGEST = 500


class AuditLog:
    """A log file with one line of JSON, in ASCII, per action; it may be rotated while the server runs.

    Args:
        path: the file, to which lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def record(self, action: str, tenant: object, name: object) -> Iterator[dict[str, object]]:
        """Log the action of the block.

        The block may add fields to the line. Its outcome is "done", or the code of the error.

        Raises:
            ArtifactError: the line cannot be written; the action itself is done.
        """
        line: dict[str, object] = {"action": action, "tenant": _cut(tenant), "name": _cut(name)}
        try:
            yield line
        except BaseException as error:
            line["outcome"] = error.code if isinstance(error, LoracError) else type(error).__name__
            line["reason"] = str(error)[:_LONGEST]
            self._write(line)
            raise
        self._write({**line, "outcome": "done"})

    def _write(self, line: dict[str, object]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": now, **line}) + "\n"
        with translate_os_errors(self._path, ArtifactError, "written"):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # which Windows lacks
            with os.fdopen(os.open(self._path, flags, 0o600), "ab", buffering=0) as file:
                file.write(text.encode())


def _cut(value: object) -> str:
    """Return a name cut to ``_LONGEST`` characters, or the short repr of anything else."""
    return value[:_LONGEST] if isinstance(value, str) else short(value)


_NAMED = re.compile(r"(?P<name>[^@]+)@(?P<digest>[0-9a-f]{32})")
_WORK = ".work."
_ONLY_OWNER = 0o700


@dataclass(frozen=True)
class StoredName:
    """A name that a tenant's adapter has in the folder."""

    tenant: str
    name: str
    digest: str


class StoreFolder:
    """The folder of a store, which one process at a time may use.

    Args:
        path: the folder; it is created where it is missing.

    Raises:
        ArtifactError: another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._incoming, self._adapters = path, path / "incoming", path / "adapters"
        for folder in (path, self._incoming, self._adapters):
            folder.mkdir(mode=_ONLY_OWNER, parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock", mode=0o600, thread_local=False, blocking=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ArtifactError(
                f"another store uses '{path}'", next_step="close that store, or give each server a folder of its own"
            ) from error
        remove_abandoned(path, _WORK)

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.release()

    def incoming(self, tenant: str) -> Path:
        """Return the folder that a tenant may load from."""
        return _folder_of(self._incoming, tenant)

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Path]:
        """Yield an empty folder, and remove it after the block."""
        folder = make_process_folder(self.path, _WORK)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def file_of(self, tenant: str, digest: str) -> Path:
        """Return the path of an adapter's file."""
        return _folder_of(self._adapters, tenant) / f"{digest}.safetensors"

    def place(self, tenant: str, digest: str, staged: Path) -> None:
        """Move an adapter's file from a workshop to its path in the folder."""
        target = self.file_of(tenant, digest)
        target.parent.mkdir(mode=_ONLY_OWNER, exist_ok=True)
        flush(self._adapters)
        flush(staged)
        os.replace(staged, target)
        flush(target.parent)

    def discard(self, tenant: str, digest: str) -> None:
        """Remove an adapter's file that has no name; on Windows, a file in use stays until the next start."""
        with contextlib.suppress(PermissionError):
            self.file_of(tenant, digest).unlink(missing_ok=True)

    def add_name(self, entry: StoredName) -> None:
        """Give an adapter a name, and remove the name from any other adapter."""
        folder = self._adapters / entry.tenant
        for other in _find_names(folder):
            if other.name == entry.name and other.digest != entry.digest:
                self._path_of(other).unlink()
        self._path_of(entry).touch(mode=0o600)
        flush(folder)

    def remove_name(self, entry: StoredName) -> None:
        """Remove an adapter's name."""
        self._path_of(entry).unlink()
        flush(self._adapters / entry.tenant)

    def scan(self) -> list[StoredName]:
        """Return the names of all adapters, and remove files without a name."""
        found: list[StoredName] = []
        for folder in sorted(path for path in self._adapters.iterdir() if path.is_dir()):
            names = _find_names(folder)
            known = {f"{entry.digest}.safetensors" for entry in names}
            for file in {path.name for path in folder.glob("*.safetensors")} - known:
                (folder / file).unlink()
            found += names
        return found

    def _path_of(self, entry: StoredName) -> Path:
        return self._adapters / entry.tenant / f"{entry.name}@{entry.digest}"


def _folder_of(parent: Path, tenant: str) -> Path:
    """Return a tenant's folder; raise if a file system that ignores case takes it for another tenant's."""
    folder = parent / tenant
    if folder.exists() and tenant not in os.listdir(parent):
        fault = f"tenant '{tenant}' and another differ by case alone, which the file system of '{parent}' ignores"
        raise ArtifactError(fault, next_step="give the tenant another name")
    return folder


def _find_names(folder: Path) -> list[StoredName]:
    found = (_NAMED.fullmatch(name) for name in sorted(os.listdir(folder)))
    return [StoredName(folder.name, match["name"], match["digest"]) for match in found if match]
