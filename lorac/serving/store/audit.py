"""The audit log: each action on an adapter, its tenant and its outcome."""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lorac.errors import ArtifactError, LoracError, short
from lorac.storage.paths import translate_os_errors

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
