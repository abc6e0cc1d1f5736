"""The process that reads uploads is limited, and ended where it hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorac.serving.store import AdapterStore, reading_process
from tests.refusing import refuses
from tests.serving.store.stores import made, native, send


@pytest.fixture
def reader(store: AdapterStore, tenant: str) -> Iterator[int]:
    """The number of the process, which has read something."""
    send(store, tenant, "first", native(made("m")))
    process = store._readers.readers[0]._process
    assert process is not None
    yield process.pid
    send(store, tenant, "last", native(made("m")))


@pytest.mark.slow
def test_a_reader_that_hangs_is_ended(
    store: AdapterStore, tenant: str, reader: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(reader, signal.SIGSTOP)
    with monkeypatch.context() as patch, refuses("over_budget", match="time or memory"):
        patch.setattr(reading_process, "_WAIT", 0.02)
        send(store, tenant, "mine", native(made("n", seed=1)))
    assert store._readers.readers[0]._process is None


@pytest.mark.medium("its other limits", cases=["time"])
@pytest.mark.parametrize("work", ["time", "memory", "files", "network"])
def test_a_reader_is_limited(work: str, tmp_path: Path) -> None:
    assert forked(WORKS[work], tmp_path) in OUTCOMES[work]


def forked(work: Callable[[Path], object], folder: Path) -> int:
    """Return how a limited child ends that does some work: 0 for done, 1 for refused, else minus a signal."""
    from lorac.serving.store.reading_main import _limit

    child = os.fork()
    if not child:
        status = 1
        try:
            _limit(0.5, 64 << 20, 1000)
            work(folder)
            status = 0
        except (MemoryError, OSError):
            pass
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spin(folder: Path) -> None:
    while True:
        pass


def connect(folder: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()


WORKS: dict[str, Callable[[Path], object]] = {
    "time": spin,
    "memory": lambda _: bytearray(256 << 20),
    "files": lambda folder: (folder / "large").write_bytes(bytes(2000)),
    "network": connect,
}
OUTCOMES = {"time": {-signal.SIGXCPU, -signal.SIGKILL}, "memory": {1}, "files": {1}, "network": {1}}
