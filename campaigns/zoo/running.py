"""Models one after another or a few at a time, each in a process of its own with limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from campaigns.zoo.journal import Record

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
PATIENCE = 5
"""How many times its processor's time a process may take by the clock: others use the machine too."""


@dataclass(frozen=True)
class Limits:
    """What one model may take.

    Attributes:
        seconds: of the processor.
        gibibytes: of memory.
        plain: whether it is also exported without lorac.
    """

    seconds: int
    gibibytes: int
    plain: bool = True


def run(names: Sequence[str], limits: Limits, workers: int) -> Iterator[tuple[str, Record]]:
    """The record of every model, as they end.

    The processes are forked from one that has imported the libraries, which takes longer than most models do.
    """
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaigns.zoo.preloading"])
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(names, pool.map(lambda name: _run(context, name, limits), names), strict=True)


def _run(context: Any, name: str, limits: Limits) -> Record:
    """One model's record; of a process that ends without one, what ended it."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, limits, theirs), daemon=True)
    begun = time.monotonic()
    process.start()
    theirs.close()
    record: Record | None = None
    try:
        if ours.poll(limits.seconds * PATIENCE):
            record = ours.recv()
    except EOFError:
        pass
    process.join(5 if record else 0.5)
    if process.is_alive():
        process.kill()
        process.join()
    return record if record is not None else _ended(name, process.exitcode, time.monotonic() - begun)


def _ended(name: str, code: int | None, seconds: float) -> Record:
    """A kill is taken for the limits' doing; any other end of a process is a crash."""
    killed = code in (-9, -24)
    what = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
    outcome = "timeout" if killed else "untyped"
    return {
        "model": name,
        "ways": {},
        "outcome": outcome,
        "class": "process",
        "message": what,
        "lines": [],
        "wall": round(seconds),
    }


def _child(name: str, limits: Limits, connection: Connection) -> None:
    """Check one model and send its record."""
    from campaigns.zoo import checking
    from campaigns.zoo.entries import entry

    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.gibibytes << 30,) * 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    record = checking.check(entry(name), plain=limits.plain)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    connection.send({**record, "seconds": round(time.process_time(), 1), "peak": usage.ru_maxrss // 1024})
