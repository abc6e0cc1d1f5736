"""Processes that read uploads, so that a malicious upload harms its reader and not the server."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from lorac import errors
from lorac.errors import FormatError, LoracError
from lorac.serving.settings import StoreQuotas
from lorac.serving.store.reading_main import (
    BYTES_PER_PIXEL,
    FORKS,
    REFUSAL,
    REFUSED,
    REWRITTEN,
    main,
    over_budget_error,
)
from lorac.storage.open_file import OpenFile
from lorac.storage.strict_json import dump_json, parse_object

READERS = 2
"""The number of reading processes: one tenant's slow uploads do not block another's."""
_WAIT = 4.0
"""Seconds to wait for each second of processor time that a reader may take: other work may slow it."""
_STARTING = 60.0
"""Further seconds to wait for a process's first answer, since it imports its libraries first."""
_PROGRAM = f"from {main.__module__} import main; main()"
_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT")
"""Environment variables that a reader gets; Windows starts no process without the last one."""
_HEADER = 1 << 12
"""The most bytes before the pixels in a file of an image."""
_LONGEST_ANSWER, _LONGEST_REFUSAL = 100, 1 << 16
_KILLED = -9
_LIMITS = {-24: "time", _KILLED: "time or memory", -_KILLED: "time"}
"""Exit status -> the limit that was exceeded. Statuses: -SIGXCPU, -SIGKILL, and a killed process's on Windows."""


class ReadingProcess:
    """A process that reads uploads one at a time, and is started again whenever it ends.

    Args:
        quotas: the limits of reading an upload.
    """

    def __init__(self, quotas: StoreQuotas) -> None:
        self._quotas, self._lock = quotas, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = False

    def rewrite(self, folder: Path, base: str | None, size: int) -> Path:
        """Rewrite the adapter in a folder in a reading process; return the new file, which is still unchecked.

        Args:
            folder: contains the adapter's files; errors do not name it.
            base: the hash of the base weights, for an adapter that does not record it.
            size: the most bytes of the new file.

        Raises:
            FormatError, AdapterError, SiteError: as ``lorac.load_adapter``; or the process crashed, or took more time
                or memory than it may.
        """
        self._read(folder, {"base": base, "size": size})
        return folder / REWRITTEN

    def decode_images(self, folder: Path, pixels: int) -> None:
        """Decode the images in a folder in a reading process, as ``reading_main.decode_images`` does.

        Raises:
            FormatError: as that function; or the process crashed, or took more time or memory than it may.
        """
        self._read(folder, {"pixels": pixels, "size": BYTES_PER_PIXEL * pixels + _HEADER})

    def _read(self, folder: Path, request: Mapping[str, object]) -> None:
        limits = {"seconds": self._quotas.seconds, "memory": self._quotas.memory}
        status = self._ask(dump_json({"folder": os.fspath(folder), **request, **limits}))
        if status == REFUSED:
            raise _read_refusal(folder)
        if status in _LIMITS:
            raise over_budget_error(_LIMITS[status])
        if status:
            raise FormatError("the process that read it crashed", code="corrupt_file")

    def start(self) -> None:
        """Start the process, which takes some seconds, before the first request."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, request: str) -> int:
        with self._lock:
            process = self._start()
            assert process.stdin is not None and process.stdout is not None
            timeout = self._quotas.seconds * _WAIT + (0 if self._answered else _STARTING)
            timer = threading.Timer(timeout, _kill, [process])
            timer.start()
            try:
                process.stdin.write(f"{request}\n".encode())
                process.stdin.flush()
                answer = process.stdout.readline(_LONGEST_ANSWER) if FORKS else b"%d" % process.wait()
            except OSError:
                answer = b""
            timer.cancel()
            self._answered = bool(answer)
            if not (answer and FORKS):
                self._end()
            return int(answer or _KILLED)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        paths = [path or os.getcwd() for path in sys.path]
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._answered = False
        return self._process

    def _end(self) -> None:
        """Kill the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError), process:
                _kill(process)


class ReaderPool:
    """A pool of processes that read uploads and images; a thread reserves one at a time.

    Args:
        quotas: the limits of each reading.
    """

    def __init__(self, quotas: StoreQuotas) -> None:
        self.readers = [ReadingProcess(quotas) for _ in range(READERS)]
        self._free: queue.LifoQueue[ReadingProcess] = queue.LifoQueue()
        for reader in reversed(self.readers):
            self._free.put(reader)

    @contextlib.contextmanager
    def take(self) -> Iterator[ReadingProcess]:
        """Wait for a free process, and reserve it for the block."""
        reader = self._free.get()
        try:
            yield reader
        finally:
            self._free.put(reader)

    def close(self) -> None:
        """End the processes."""
        for reader in self.readers:
            reader.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its children."""
    with contextlib.suppress(OSError):  # it has ended
        if FORKS:
            os.killpg(process.pid, -_KILLED)
        elif process.poll() is None:  # its id does not belong to another process yet
            os.kill(process.pid, -_KILLED)


def _read_refusal(folder: Path) -> LoracError:
    """Return the error that a child has written."""
    refusal = OpenFile(folder / REFUSAL)
    with refusal.path.open("rb") as file:
        text = file.read(_LONGEST_REFUSAL)
    found = parse_object(text, lambda reason: FormatError(f"the answer of its reader {reason}", code="corrupt_file"))
    kind = getattr(errors, str(found.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, LoracError) and kind.__init__ is LoracError.__init__):
        kind = FormatError
    texts = (found.get(key) for key in ("what", "nearest", "next_step"))
    what, nearest, step = (  # without the folder in which the server keeps the upload
        text.replace(f"{folder}{os.sep}", "").replace(f"{folder}", "the upload") if isinstance(text, str) else None
        for text in texts
    )
    code = str(found.get("code"))
    return kind(what or "it cannot be read", nearest=nearest, next_step=step, code=code if code in kind.codes else None)
