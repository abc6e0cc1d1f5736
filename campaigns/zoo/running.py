"""Models one after another or a few at a time, each in a process of its own with limits of time and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from campaigns.zoo.checking import TIMEOUT, UNTYPED
from campaigns.zoo.journal import Record

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a forked process waits for ever for processes of its parent
PATIENCE = 5
"""How many times its processor's time a process may take by the clock: others use the machine too."""


@dataclass(frozen=True)
class Asked:
    """What is done with one model, and what it may take.

    Attributes:
        seconds: of the processor.
        gibibytes: of memory.
        ways: targets with their modes.
        plain: whether it is also exported without lorac.
        generates: whether it also generates.
    """

    seconds: int
    gibibytes: int
    ways: Sequence[str]
    plain: bool
    generates: bool = False


def run(names: Sequence[str], asked: Asked, workers: int) -> Iterator[tuple[str, Record]]:
    """Return the record of every model, in their order.

    The processes are forked from one that has imported the libraries, which takes longer than most models do.
    """
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    compilers = ["torch._inductor.compile_fx"] if "aoti live" in asked.ways else []
    context.set_forkserver_preload(["campaigns.zoo.preloading", *compilers])
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(names, pool.map(lambda name: _run(context, name, asked), names), strict=True)


def _run(context: Any, name: str, asked: Asked) -> Record:
    """One model's record; of a process that ends without one, what ended it."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, asked, theirs), daemon=True)
    process.start()
    theirs.close()
    record = _received(ours, process, asked)
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    return record or _ended(name, process.exitcode)


def _received(ours: Connection, process: Any, asked: Asked) -> Record | None:
    """Return what a process sends; None if it ends without sending, as one over its limits does."""
    until = time.monotonic() + asked.seconds * PATIENCE
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, and what it sent is in the pipe
        watched = psutil.Process(process.pid)
        while not ours.poll(0.5):
            _kill_beyond(process, watched.memory_info().rss / 2**30 > asked.gibibytes or time.monotonic() > until)
    try:
        return ours.recv()
    except EOFError:
        return None


def _kill_beyond(process: Any, beyond: bool) -> None:
    if beyond:
        process.kill()


def _ended(name: str, code: int | None) -> Record:
    """Classify the end of a process: a kill is the limits' doing, anything else a crash."""
    killed = code in (-signal.SIGKILL, -signal.SIGXCPU)
    what = f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
    about = {"class": "process", "message": what, "lines": []}
    return {"model": name, "ways": {}, "outcome": TIMEOUT if killed else UNTYPED, **about}


def _child(name: str, asked: Asked, connection: Connection) -> None:
    """Check one model and send its record."""
    from campaigns.zoo import checking
    from campaigns.zoo.entries import entry

    resource.setrlimit(resource.RLIMIT_CPU, (asked.seconds, asked.seconds + 5))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    ways = tuple(pair for pair in (*checking.WAYS, *checking.ENGINES) if " ".join(pair) in asked.ways)
    record = checking.check(entry(name), plain=asked.plain, ways=ways, generates=asked.generates)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    connection.send({**record, "seconds": round(time.process_time(), 1), "peak": usage.ru_maxrss // 1024})
