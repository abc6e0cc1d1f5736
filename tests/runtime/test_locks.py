"""One writer or many readers, and a writer that is interrupted while it waits leaves no trace."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest

import lorac
from lorac.runtime.locks import ReadWriteLock


class Interrupted(Exception):
    """The exception that the signal handler raises."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def test_an_interrupted_writer_blocks_no_reader() -> None:
    lock, entered, leave, again = ReadWriteLock(), threading.Event(), threading.Event(), threading.Event()

    def read() -> None:
        with lock.reading():
            entered.set()
            leave.wait(30)

    def read_again() -> None:
        with lock.reading():
            again.set()

    held = threading.Thread(target=read, daemon=True)
    held.start()
    assert entered.wait(30)
    waiting = threading.Timer(0.05, read_again)  # it comes while the writer waits, and is held back by it
    waiting.daemon = True
    old = signal.signal(signal.SIGALRM, _interrupt)
    try:
        waiting.start()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            lock.writing(lambda: pytest.fail("a reader was still there"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert again.wait(5)
    leave.set()
    held.join(30)
    assert lock.writing(lambda: "alone") == "alone"


@pytest.mark.medium("test_threads.py swaps among readers")
def test_writers_are_alone_among_many_readers() -> None:
    """More threads than one frame of the stack holds, some of which end meanwhile."""
    lock, inside, seen, stop = ReadWriteLock(), [0], [0], threading.Event()
    count = threading.Lock()

    def read() -> None:
        while not stop.is_set():
            with lock.reading():
                with count:
                    inside[0] += 1
                with count:
                    inside[0] -= 1

    def wrote() -> None:
        seen[0] += 1
        assert inside == [0]

    for _ in range(3):
        readers = [threading.Thread(target=read, daemon=True) for _ in range(11)]
        for reader in readers:
            reader.start()
        for _ in range(20):
            lock.writing(wrote)
        stop.set()
        for reader in readers:
            reader.join(30)
        stop.clear()
    assert seen == [60]
    assert len(lock._readers) == 11


def test_a_reader_that_writes() -> None:
    lock = ReadWriteLock()
    with lock.reading():
        assert lock.writing(lambda: "alone") == "alone"


def test_rejects_a_change_from_within_a_call() -> None:
    lock = ReadWriteLock()
    lock.refuse_within()
    with lock.reading(), pytest.raises(lorac.Unavailable):
        lock.refuse_within()
    with pytest.raises(lorac.Unavailable):
        lock.writing(lock.refuse_within)
    lock.refuse_within()


def test_a_nested_reader_does_not_wait_for_a_writer() -> None:
    lock, wrote = ReadWriteLock(), threading.Event()
    writer = threading.Thread(target=lambda: lock.writing(wrote.set), daemon=True)
    with lock.reading():
        writer.start()
        assert not wrote.wait(0.1)
        with lock.reading():
            assert not wrote.is_set()
    assert wrote.wait(5)
