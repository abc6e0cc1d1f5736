"""Writers killed at every step that changes the disk, and at random moments beside a second writer and a reader.

python -m campaigns.kill [--moments N] [--seed N] [--json FILE]

The writers: ``compiled.save`` over an older artifact, of eager mode, OpenVINO and AOTInductor, ``lorac swap --save``,
a folder of PEFT's among files of somebody else, and a file of lorac's own. Every version bears a number in all its
parts. Whatever is found afterwards must be one version, whole: the one from before or the one that was written. Once a
writer has ended well, nothing else is left.

Writers are forked from this process, which has everything imported, and die by SIGKILL. It neither writes nor reads
itself but in children: OpenVINO's threads do not live on in a child, and its destructors would wait for them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import lorac
from lorac.cli.artifacts import swap
from lorac.storage import atomic_folders as folders
from tests.storage import writers
from tests.storage.kills import killed_at

STEPS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir")
T = TypeVar("T")
_FIRST = 1
"""The version that lies there first; ``swap --save`` leaves its adapters as they are."""


@dataclass(frozen=True)
class Writer:
    """Something that writes versions.

    Attributes:
        name: for the table.
        write: (target, number) -> None.
        read: target -> the number of the version there, None where nothing is; raises for a mixture.
        foreign: files of somebody else that lie in the target.
    """

    name: str
    write: Callable[[Path, int], None]
    read: Callable[[Path], int | None]
    foreign: bool = False


@dataclass
class Tally:
    """What was seen of one writer."""

    writer: str
    steps: int = 0
    moments: int = 0
    old: int = 0
    new: int = 0
    read: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


# ── The writers ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _compiled(target: str) -> lorac.Compiled:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 6))
    adapters = {"a": lorac.LoRA(r=2, targets=["0", "1"])}
    return lorac.compile(host, adapters, target, example_inputs=(torch.ones(2, 10),))


def _artifact(engine: str) -> Writer:
    compile_once = functools.cache(lambda: _compiled(engine))
    if engine != "openvino":  # AOTInductor takes half a minute
        compile_once()

    def write(target: Path, number: int) -> None:
        compiled = compile_once()
        compiled.swap({"a": float(number)})
        with torch.no_grad():
            compiled.adapters["a"].tensors["0"]["lora_B"].fill_(float(number))
        compiled.save(target)

    where = "" if engine == "eager" else f", {engine}"
    return Writer(f"compiled.save{where}", write, _read_artifact)


def _read_artifact(target: Path) -> int | None:
    """Return the number: the active strength and, if ``compiled.save`` wrote it, the adapter's own."""
    folders.recover_folder(target)
    if not target.exists():
        return None
    loaded = lorac.load(target, trust=True)
    number, tensor = loaded.active["a"], loaded.adapters["a"].tensors["0"]["lora_B"]
    assert bool((tensor == number).all()) or bool((tensor == _FIRST).all()), "a mixture"
    return int(number)


def _swap_and_save(target: Path, number: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        swap(target, f"a={number}", save=True)


def all_writers() -> list[Writer]:
    """Return the writers, each over an older version where it needs one."""
    targets = [
        "eager",
        *["openvino"] * bool(importlib.util.find_spec("openvino")),
        *["aoti"] * bool(shutil.which("g++")),
    ]
    return [
        *map(_artifact, targets),
        Writer("swap --save", _swap_and_save, _read_artifact),
        *(
            Writer(
                kind, lambda t, n, k=kind: writers.write(k, t, n), lambda t, k=kind: writers.read(k, t), kind == "peft"
            )
            for kind in ("peft", "native")
        ),
    ]


# ── Dying ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _forked(work: Callable[[], None]) -> int:
    """Fork a child that does some work and ends; return its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _apart(work: Callable[..., T], *given: Any) -> T:
    """Do some work in a child and return its result; what it raises is raised here."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        try:
            sender.send((work(*given), None))
        except BaseException as error:
            sender.send((None, error))

    child = _forked(send)
    sender.close()
    with receiver:
        found, error = receiver.recv()
    _ended(child)
    if error is not None:
        raise error
    return found


def _ended(child: int) -> int:
    """How a child ended: 0, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _until(writer: Writer, target: Path, number: int, moment: int, exchange: bool) -> None:
    """Write, and be killed before the ``moment``-th step that changes the disk."""
    dying = killed_at(moment)
    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    folders._exchange_in_one_step = dying(folders._exchange_in_one_step) if exchange else (lambda one, other: False)
    writer.write(target, number)


def _on(writer: Writer, target: Path, first: int) -> None:
    """Write every second version from the first on, for ever."""
    for number in range(first, sys.maxsize, 2):
        with contextlib.suppress(lorac.LoracError):  # another writer took what it was about to read, every time
            writer.write(target, number)


# ── The campaign ─────────────────────────────────────────────────────────────────────────────────────────────────────
def at_every_step(writer: Writer, target: Path, tally: Tally, exchange: bool, stride: int = 1) -> None:
    """Kill it before its first step, its second, and so on until it ends."""
    moment, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        moment += stride
        before, number = _apart(writer.read, target), 100 + moment
        ended = _ended(_forked(lambda: _until(writer, target, number, moment, exchange)))  # noqa: B023  (forked at once)
        if ended not in (0, -signal.SIGKILL):
            tally.wrong.append(f"step {moment}: the writer ended with {ended}")
        if exchange and not target.exists():
            tally.wrong.append(f"step {moment}: neither the old nor the new was there")
        found = _apart(writer.read, target)
        if found not in (before, number):
            tally.wrong.append(f"step {moment}: found {found}, not {before} or {number}")
        tally.old, tally.new = tally.old + (found == before), tally.new + (found == number)
        tally.steps += 1
    _check_left(writer, target, tally)


def at_random_moments(writer: Writer, target: Path, tally: Tally, moments: int, chance: random.Random) -> None:
    """Kill one of two writers at random, again and again, while this process reads."""
    second = _forked(lambda: _on(writer, target, 1001))
    begun = time.monotonic()
    _apart(writer.write, target, 1000)
    whole = time.monotonic() - begun
    try:
        for moment in range(moments):
            first = _forked(lambda: _on(writer, target, 2000 + 100 * moment))  # noqa: B023  (forked at once)
            time.sleep(chance.uniform(0, 3 * whole))
            _kill(first, tally)
            _look(writer, target, tally)
            tally.moments += 1
    finally:
        _kill(second, tally)
    _apart(writer.write, target, 7)
    _check_left(writer, target, tally)


def _kill(child: int, tally: Tally) -> None:
    """Kill a writer that writes for ever; one that has ended by then has failed."""
    os.kill(child, signal.SIGKILL)
    if (ended := _ended(child)) != -signal.SIGKILL:
        tally.wrong.append(f"a writer ended with {ended} before it was killed")


def _look(writer: Writer, target: Path, tally: Tally) -> None:
    try:
        found = _apart(writer.read, target)
    except lorac.LoracError as error:  # it came too late twenty times, and says so
        tally.refused += 1
        tally.wrong.extend([] if str(target) in str(error) else [f"an error that does not name the target: {error}"])
        return
    tally.read += 1
    if found is None:
        tally.wrong.append("nothing was there")


def _check_left(writer: Writer, target: Path, tally: Tally) -> None:
    """Once a writer has ended well, nothing is beside the target, and what was somebody else's is in it."""
    beside = sorted(path.name for path in target.parent.iterdir())
    if beside != [target.name]:
        tally.wrong.append(f"left behind: {beside}")
    for name, text in writers.FOREIGN.items() if writer.foreign else ():
        if (target / name).read_text() != text:
            tally.wrong.append(f"{name} is not what somebody else wrote")


def campaign(writer: Writer, moments: int, seed: int, folder: Path, stride: int = 1) -> Tally:
    """All of it for one writer."""
    target, tally = folder / "it", Tally(writer.name)
    folder.mkdir()
    start = all_writers()[0] if writer.name == "swap --save" else writer
    _apart(start.write, target, _FIRST)
    for name, text in writers.FOREIGN.items() if writer.foreign else ():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
    for exchange in (True, False) if target.is_dir() else (True,):
        at_every_step(writer, target, tally, exchange, stride)
    at_random_moments(writer, target, tally, moments, random.Random(seed))
    return tally


def report(tallies: Sequence[Tally]) -> str:
    """Format a table of what was seen."""
    lines = [f"{'writer':24}{'steps':>7}{'moments':>9}{'old':>6}{'new':>6}{'read':>7}{'refused':>9}{'wrong':>7}"]
    for t in tallies:
        numbers = f"{t.steps:7}{t.moments:9}{t.old:6}{t.new:6}{t.read:7}{t.refused:9}{len(t.wrong):7}"
        lines.append(f"{t.writer:24}{numbers}")
        lines.extend(f"    {text}" for text in t.wrong[:10])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where something was found that must not be."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.kill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=200, help="random moments at which each writer is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        places = enumerate(all_writers())
        tallies = [campaign(w, given.moments, given.seed, Path(folder) / str(index)) for index, w in places]
    print(report(tallies))
    print(f"{time.monotonic() - begun:.0f} s")
    if given.json:
        given.json.write_text(json.dumps([vars(tally) for tally in tallies], indent=1), encoding="utf-8")
    if any(tally.wrong for tally in tallies):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
