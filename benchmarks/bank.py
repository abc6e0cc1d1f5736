"""Thousands of registered adapters under one budget of bytes: what admitting one costs, and what they take.

    python -m benchmarks.bank [--registered 2000] [--room 8] [--processes 3]

A prepared adapter is written into its place among those that a call takes. Of one from disk the format reads the header
and the configuration, if they are new, when it is registered; its values are read, checked, prepared and bound when it
is used, and written straight into its slots once two adapters of its structure were used. One that is evicted twice is
written as it is bound, and then read alone. Targets: <= 1.5 of a copy of its bytes, <= 1.5 of reading its file the
first time and <= 1.3 again, and no more memory than the budget and 10 kB for each registered adapter beyond what the
program took before.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from campaigns.soak import resident

COPY, AGAIN, PREPARED = "copy of its bytes", "copy of its bytes, A/A", "a prepared adapter into its place"
READ, READ_AGAIN, SWAP = "reading its file", "reading its file, A/A", "a swap to a prepared adapter"
NEW, FIRST = "an adapter from disk, of a new layout", "an adapter from disk, the first time"
DISK = "an adapter from disk, again"
MEMORY = ("registered, each", "beyond the budget")
_WARM_UP = 4
"""Adapters that are read before the first is timed."""
OPTIONS = (
    common.MODEL,
    common.layers(20),
    common.RANK,
    common.rounds(20),
    common.CLOCK,
    common.Option("registered", 2000, smoke=20, help="adapters on disk"),
    common.Option("room", 8, smoke=2, help="prepared adapters that the budget has room for"),
)


def prepare(given: argparse.Namespace) -> None:
    """Write the adapters: folders of PEFT's, all links to one."""
    folder = Path(given.folder) / "adapters"
    link_adapters(folder.with_name("one"), ["r"], given)
    link_adapters(folder, numbered(range(given.registered)), given)
    others = folder.with_name("others")
    link_adapters(others, [f"l{index}" for index in range(given.rounds + _WARM_UP)], given)
    for index, config in enumerate(sorted(others.glob("*/adapter_config.json"))):
        changed = json.loads(config.read_text()) | {"lora_alpha": given.rank + index + 1}
        config.unlink()  # the file is one with those of the others
        config.write_text(json.dumps(changed))


def numbered(numbers: Sequence[int]) -> list[str]:
    """Return names of adapters."""
    return [f"r{number}" for number in numbers]


def link_adapters(folder: Path, names: Sequence[str], given: argparse.Namespace) -> None:
    """Write adapters into a folder: folders of PEFT's, all links to the one beside it."""
    first = folder.with_name("first")
    if not first.exists():
        common.save_peft(first, given)
    for place in [folder / name for name in names if not (folder / name).exists()]:
        place.mkdir(parents=True)
        for file in first.iterdir():
            (place / file.name).hardlink_to(file)


def add_copies(model: Any, count: int) -> None:
    """Add adapters a0, a1, … of other values than the one that a compiled model has, in its place."""
    (first,) = model.adapters.values()
    model.remove_adapter(first.name)
    for index in range(count):
        tensors = {path: {name: one.clone() for name, one in at.items()} for path, at in first.tensors.items()}
        adapter = dataclasses.replace(first, name=f"a{index}", tensors=tensors)
        common.away_from_init(adapter, seed=index)
        model.add_adapter(adapter)


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """All figures, in one process."""
    import torch

    import lorac

    torch.set_num_threads(1)
    room = lorac.Reserve(targets="all-linear", rank=given.rank)
    options = {"threads": 1, "self_test": False, "cache": True}
    model = lorac.compile(common.llama(given), reserve=room, target="onnxruntime", **options)
    folder = Path(given.folder) / "adapters"
    model.register(folder.with_name("one"))  # what the first takes, such as a search of the model, no other does
    before = resident()
    names = model.register(folder)
    registered = resident() - before
    model.swap(names[0])
    bytes_each = model.memory.used
    found = _times_in_memory(model, names, given)
    model.swap(None)
    model.memory.limit = 0
    found |= _times_from_disk(model, names, folder, bytes_each, given)
    model.swap(None)
    model.memory.limit = 0
    before, budget = resident(), given.room * bytes_each
    model.memory.limit = budget
    for name in names[: 4 * given.room]:
        model.swap(name)
    return {
        **found,
        "bytes": bytes_each,
        MEMORY[0]: registered / len(names),
        MEMORY[1]: resident() - before - budget,
    }


def _times_in_memory(model: Any, names: Sequence[str], given: argparse.Namespace) -> dict[str, float]:
    """Seconds of admitting a prepared adapter, and of a copy of its bytes."""
    import torch

    states = [model.switch.states.of(((name, _active()),)) for name in names[:2]]  # both are swapped to below
    own = states[0].bound.placed_tensors().values()
    source = torch.cat([tensor.reshape(-1) for tensor in own])
    target, turns, bank = torch.empty_like(source), itertools.count(), model.switch.new_row_bank(2)
    placed = itertools.cycle(states)

    def place() -> None:
        bank.admit(0, next(placed))

    sides: dict[str, common.Side] = {name: lambda: target.copy_(source) for name in (COPY, AGAIN)}
    sides |= {PREPARED: place, SWAP: lambda: model.swap(names[next(turns) % 2])}
    return common.alternate(sides, given.rounds, clock=common.CLOCKS[given.clock])


def _times_from_disk(
    model: Any, names: Sequence[str], folder: Path, size: int, given: argparse.Namespace
) -> dict[str, float]:
    """Seconds of admitting an adapter that only files hold, and of reading its file."""
    model.memory.limit = int(2.5 * size)
    file, clock = folder / names[0] / "adapter_model.safetensors", common.CLOCKS[given.clock]
    others = model.register(folder.with_name("others"))

    def swap(some: Sequence[str]) -> common.Side:
        turns = itertools.cycle(some)
        return lambda: model.swap(next(turns))

    few, times = names[:5], dict[str, float]()
    for side, some in ((NEW, others), (FIRST, names)):
        times |= common.alternate({side: swap(some)}, given.rounds, _WARM_UP, clock)
    for name in few + few:
        model.swap(name)
    sides = {READ: file.read_bytes, READ_AGAIN: file.read_bytes, DISK: swap(few)}
    return {**times, **common.alternate(sides, given.rounds, clock=clock)}


def _active() -> Any:
    from lorac import Active

    return Active()


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Times beside what they are compared with, and bytes."""
    figures = found[("bank",)]
    copied, read = (COPY, AGAIN, PREPARED, SWAP), (READ, READ_AGAIN, NEW, FIRST, DISK)
    compared = {**dict.fromkeys(copied, COPY), **dict.fromkeys(read, READ)}
    rows = [
        (side, f"{1e3 * figures[side]:.2f}", f"{figures[side] / figures[base]:.2f}") for side, base in compared.items()
    ]
    ratios = {"copy": figures[AGAIN] / figures[COPY], "read": figures[READ_AGAIN] / figures[READ]}
    size = f"an adapter of {figures['bytes'] / 1e6:.1f} MB"
    times = common.Table(size, ("admission", "ms", "ratio"), rows, [(side,) for side in compared], ratios)
    memory = [(what, f"{figures[what]:.0f}") for what in MEMORY]
    title = f"{given.registered} registered, a budget for {given.room}"
    return [times, common.Table(title, ("memory", "bytes"), memory, [(what,) for what in MEMORY], ratios)]


BENCHMARK = common.Benchmark(
    name="bank",
    text=__doc__,
    options=OPTIONS,
    jobs=lambda given: [("bank",)],
    measure=measure,
    tables=tables,
    rooms=("lorac/adapters", "lorac/formats", "lorac/runtime"),
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
