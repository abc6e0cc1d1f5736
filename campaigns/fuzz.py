"""Damages files of every format, and artifacts: each loads, or is refused by an error of lorac's.

Every case has its own seed, so that it can be repeated alone: ``python -m campaigns.fuzz --seed 0 --only 1234``. Cases
run in forked processes with bounded memory; each is measured. Found is what raises anything else, costs more than
``lorac.budget`` allows, hangs, or ends the process. The kind ``ops`` calls the ops that a stored program may name, with
hostile operands (``campaigns.op_calls``), and ``native_op`` that of lorac-native (``campaigns.native_calls``).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorac
from campaigns import mutations, native_calls, op_calls, sound, special_files
from lorac.frontend.components import MAIN_GRAPH
from lorac.limits import ReadBudget
from lorac.merging import merge_checkpoint
from lorac.merging.recipe import read_merge_recipe
from lorac.merging.stored_model import StoredModel
from lorac.trainer import read_recipe
from lorac.trainer.checkpoints import open_checkpoint

BATCH = 100
"""Cases of one forked process."""
HANGS_AFTER = 180.0
"""Seconds of wall time without a word from a process; on a machine that has much else to do a case may wait long."""
SLACK_SECONDS, SLACK_BYTES = 1.0, 64 << 20
"""On top of the budget: for steps that cannot be interrupted, and for what an allocator keeps."""
CEILING = 4 << 30
"""Address space that a process may take beyond what it was forked with."""
WEIGHTS = {"native": 6, "peft": 6, "bin": 4, "artifact": 6, "training": 4, special_files.KIND: 6}
"""How often each kind is chosen; every other one half as often as a method's."""
CALLED: Mapping[str, Callable[[random.Random, Path], None]] = {"ops": op_calls.run, "native_op": native_calls.run}
"""Kinds that are no files, and are run if asked for -> what makes the calls of a case."""
KEPT = Path(".cache/fuzz")


@dataclass(frozen=True)
class Result:
    """The result of a case.

    Attributes:
        index: its number.
        kind, what: of the file.
        outcome: "loads", the name of an error of lorac's, or what was found.
        found: whether that must not be.
        detail: the error's last lines.
        seconds, bytes: what it cost.
    """

    index: int
    kind: str
    what: str
    outcome: str
    found: bool = False
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0


class Campaign:
    """A run.

    Args:
        seed: of all cases.
        folder: with the sound files, and room for damaged ones.
        kinds: those of the cases; empty: all.
    """

    def __init__(self, seed: int, folder: Path, kinds: Sequence[str] = ()) -> None:
        self.seed, self.folder = seed, folder
        self.sound = collections.defaultdict(list)
        is_special = special_files.KIND in kinds
        for one in (one for one in sound.read(folder) if not kinds or is_special or one.kind in kinds):
            self.sound[one.kind].append(one)
        self.kinds = sorted(kinds or [*self.sound, special_files.KIND])
        self.hosts = {one.host: sound.model(one.host) for ones in self.sound.values() for one in ones if one.host}

    def check(self) -> None:
        """Everything loads as long as nobody damages it."""
        for one in self.sound.get("recipe", ()):
            read_recipe(self.folder / one.place)  # it imports what a recipe's arguments are of
        for one in self.sound.get("model", ()):
            StoredModel.open(self.folder / one.place)
        for one in (one for ones in self.sound.values() for one in ones if one.host and not one.is_refused):
            place, host = self.folder / one.place, self.hosts[one.host]
            open_checkpoint(place).adapters(host) if one.kind == "training" else lorac.load_adapter(place, host)

    def prepared(self, index: int, folder: Path) -> tuple[sound.Sound, Path, random.Random]:
        """Write the damaged file of a case into a folder."""
        chance = random.Random(f"{self.seed}/{index}")
        kind = chance.choices(self.kinds, [WEIGHTS.get(kind, 2) for kind in self.kinds])[0]
        if kind in CALLED:
            return sound.Sound(kind, "", "", ""), folder, chance
        is_special = kind == special_files.KIND
        chosen = chance.choice(self.sound[chance.choice(sorted(self.sound)) if is_special else kind])
        source = self.folder / chosen.place
        place = folder / f"it{source.suffix}"
        shutil.copytree(source, place) if source.is_dir() else shutil.copyfile(source, place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            special_files.put_below(place, chance) if is_special else mutations.damage(kind, place, chance)
        return chosen, place, chance

    def run(self, index: int) -> Result:
        """One case, in this process."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f"{index}-") as folder:
            chosen, place, chance = self.prepared(index, Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            before, begun = _reset_peak(), time.process_time()
            outcome, detail = self._read(chosen, place, chance)
            seconds, taken = time.process_time() - begun, _peak() - before
        budget = ReadBudget()
        found = bool(detail)
        if chosen.kind in CALLED:
            return Result(index, chosen.kind, chosen.what, outcome, found, detail, seconds, taken)
        if seconds > budget.seconds + SLACK_SECONDS:
            outcome, found = f"takes long ({outcome})", True
        if taken > budget.bytes + 3 * size + SLACK_BYTES:
            outcome, found = f"takes memory ({outcome})", True
        return Result(index, chosen.kind, chosen.what, outcome, found, detail, seconds, taken)

    def _read(self, chosen: sound.Sound, place: Path, chance: random.Random) -> tuple[str, str]:
        """Read a file; return the outcome, and the end of the traceback of an error that is not lorac's."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._load(chosen, place, chance)
        except lorac.LoracError as error:
            return type(error).__name__, ""
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = next((f for f in reversed(frames) if "/lorac/" in f.filename), frames[-1])
            where = f"{own.filename.rpartition('/lorac/')[2]}:{own.name}"
            return f"{type(error).__name__} in {where}", traceback.format_exc(limit=-4)
        return "loads", ""

    def _load(self, chosen: sound.Sound, place: Path, chance: random.Random) -> None:
        if chosen.kind in CALLED:
            CALLED[chosen.kind](chance, place)
            return
        if chosen.kind == "artifact":
            loaded = lorac.load(place)
            with contextlib.suppress(lorac.LoracError):  # it loads, and then refuses a call of the example's shape
                if loaded.engine.cache_spec(MAIN_GRAPH) is not None:
                    loaded.generate(torch.tensor([[3, 4, 5], [0, 6, 7]]), max_new_tokens=3, do_sample=False)
                loaded(torch.zeros(3, 24))
            return
        if chosen.kind == "training":
            open_checkpoint(place).adapters(self.hosts[chosen.host])
            return
        if chosen.kind == "recipe":
            read_recipe(place)
            return
        if chosen.kind == "merge_recipe":
            read_merge_recipe(place)
            return
        if chosen.kind == "model":
            merge_checkpoint(place, self.folder / sound.MERGED, place.with_name("merged"))
            return
        model = self.hosts[chosen.host] if chance.random() < 0.7 else None
        adapter = lorac.load_adapter(place, model)
        if model is not None and chance.random() < 0.5:
            lorac.compile(model, {"a": adapter})


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _reset_peak() -> int:
    """Forget the highest memory so far; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@dataclass
class _Process:
    """A forked process with a batch of cases."""

    pid: int
    pipe: Any
    left: list[int]
    heard: float
    hangs: bool = False


def _fork(campaign: Campaign, cases: list[int]) -> _Process:
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Process(pid, os.fdopen(read), list(cases), time.monotonic())
    os.close(read)
    status = 1
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + CEILING, size + CEILING))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with os.fdopen(write, "w") as pipe:
            for index in cases:
                print(json.dumps(dataclasses.asdict(campaign.run(index))), file=pipe, flush=True)
        status = 0
    finally:
        os._exit(status)


def results(campaign: Campaign, cases: Sequence[int], workers: int) -> Iterator[Result]:
    """Every case's result, as they come."""
    waiting = collections.deque(list(cases[at : at + BATCH]) for at in range(0, len(cases), BATCH))
    running: list[_Process] = []
    watch = selectors.DefaultSelector()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_fork(campaign, waiting.popleft()))
            watch.register(running[-1].pipe, selectors.EVENT_READ, running[-1])
        for key, _ in watch.select(timeout=1.0):
            process, line = key.data, key.data.pipe.readline()
            if line:
                process.heard = time.monotonic()
                process.left.pop(0)
                yield Result(**json.loads(line))
                continue
            watch.unregister(process.pipe)
            running.remove(process)
            yield from _ended(process, waiting)
        for process in running:
            if time.monotonic() - process.heard > HANGS_AFTER:
                process.hangs = True
                os.kill(process.pid, signal.SIGKILL)


def _ended(process: _Process, waiting: collections.deque[list[int]]) -> Iterator[Result]:
    """Return the outcome of the case at which a process ended, if it did; later cases wait for another process."""
    process.pipe.close()
    _, status = os.waitpid(process.pid, 0)
    if not process.left:
        return
    lost = "hangs" if process.hangs else f"ends the process ({os.waitstatus_to_exitcode(status)})"
    yield Result(process.left[0], "", "", lost, found=True)
    if process.left[1:]:
        waiting.appendleft(process.left[1:])


# ── What is said ─────────────────────────────────────────────────────────────────────────────────────────────────────
def table(found: Sequence[Result]) -> str:
    """Outcomes by kind of file, and what the dearest case cost."""
    kinds = sorted({result.kind for result in found})
    counts = collections.Counter((result.outcome, result.kind) for result in found)
    outcomes = sorted({result.outcome for result in found}, key=lambda o: -sum(counts[o, kind] for kind in kinds))
    rows = [("outcome", *kinds, "all")]
    for outcome in outcomes:
        by_kind = [counts[outcome, kind] for kind in kinds]
        rows.append((outcome[:60], *map(str, by_kind), str(sum(1 for r in found if r.outcome == outcome))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a campaign; exits with 1 where something was found."""
    parser = argparse.ArgumentParser("python -m campaigns.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=30_000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="files of a few methods and targets alone")
    parser.add_argument("--kind", action="append", default=[], help="files of this kind alone; may be repeated")
    parser.add_argument(
        "--target", choices=sorted({target for target, _ in sound.ARTEFACTS}), help="its artifacts alone"
    )
    parser.add_argument("--only", type=int, help="run this case alone, in this process, and keep its file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lorac-fuzz-") as name:
        folder = Path(name)
        if not os.fork():  # what compiling starts, threads among it, stays out of the processes that are forked later
            sound.write(folder, quick=given.quick, target=given.target)
            os._exit(0)
        if os.wait()[1]:
            raise SystemExit("the sound files could not be written")
        torch.set_num_threads(1)  # a forked process waits for ever for threads of its parent
        if "ops" in given.kind:
            op_calls.import_lazily()
        campaign = Campaign(given.seed, folder, ["artifact"] if given.target else given.kind)
        campaign.check()
        if given.only is not None:
            _keep(campaign, given.only)
            print(campaign.run(given.only))
            return
        raise SystemExit(_report(campaign, given))


def _report(campaign: Campaign, given: argparse.Namespace) -> int:
    begun, found = time.monotonic(), []
    for result in results(campaign, range(given.mutations), given.workers):
        found.append(result)
        if result.found:
            _keep(campaign, result.index)
            print(f"case {result.index}: {result.kind} {result.what}: {result.outcome}\n{result.detail}", flush=True)
            for latest in campaign.folder.glob(f"{result.index}-*/{op_calls.LATEST}"):  # of a process that ended
                print(latest.read_text().rstrip(), flush=True)
    print(table(found))
    slowest, largest = max(found, key=lambda r: r.seconds), max(found, key=lambda r: r.bytes)
    wrong = sum(result.found for result in found)
    print(
        f"{len(found)} cases of seed {given.seed} in {time.monotonic() - begun:.0f} s; the longest took "
        f"{slowest.seconds:.2f} s (case {slowest.index}), the largest {largest.bytes >> 20} MiB "
        f"(case {largest.index}); found {wrong}"
    )
    if wrong:
        print(f"damaged files: {KEPT}; again: python -m campaigns.fuzz --seed {given.seed} --only CASE")
    return min(wrong, 1)


def _keep(campaign: Campaign, index: int) -> None:
    """Keep the damaged file of a case."""
    place = KEPT / f"{campaign.seed}-{index}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    campaign.prepared(index, place)


if __name__ == "__main__":
    main()
