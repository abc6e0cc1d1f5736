"""Do rows with adapters of their own in one batch beat a batch per adapter, however many adapters are registered?

    python -m experiments.s_lora [--seeds 5] [--steps 120] [--smoke]

So many requests ("steps") come at once, by a power law over 5, 100 or 2000 registered adapters of ranks 8 to 64; each
has 8 to 256 tokens and gets as many. S-LoRA's memory is simulated (``experiments._paging``): one pool of 11 000 cells
for tokens and for adapters, up to 32 rows. Beside it stand the same pool less all registered adapters, which are kept
in it, and batches of one adapter each, at most as many rows. What counts is the decoding steps until all is answered;
what does not fit at all takes forever. "As fast" is at most an eighth more: the paper's throughput falls from 7.48 to
6.71 requests a second. Then lorac's eager target itself, three layers of 768: eight rows with an adapter each, by one
call, by a call for each, and by merging each before its call, in processor time as a share of the base's.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import lorac
from benchmarks.common import alternate
from experiments._finding import Expected, Finding, Table
from experiments._paging import PagedAllocator, TracedRequest, adapter_cells
from experiments._study import Experiment, Fault, main
from lorac.progress import progress

CELLS, ROWS, LONGEST, REGISTERED = 11_000, 32, 256, (5, 100, 2000)
RANKS = [(8, 16, 32, 64)[name % 4] for name in range(REGISTERED[-1])]
WIDTH, RANK, DISTINCT = 768, 8, 8
STEPS, TIMES = "decoding steps", "processor time"
ONE_CALL, CALLS, MERGED, NEAR = "one call", "a call per adapter", "merged before each call", "an eighth above"


def draw_trace(seed: int, count: int, registered: int) -> list[TracedRequest]:
    """Return requests that come at once, for adapters by a power law with the exponent 1."""
    generator, names = random.Random(seed), range(registered)
    chosen = generator.choices(names, [1 / (name + 1) for name in names], k=count)
    return [TracedRequest(0, f"a{name}", *(generator.randint(8, LONGEST) for _ in range(2))) for name in chosen]


def count_steps(trace: Sequence[TracedRequest], registered: int, cells: int = CELLS) -> float:
    """Return the steps until a trace is answered in a pool of cells; infinity where a part of it never fits."""
    ranks = {f"a{name}": rank for name, rank in enumerate(RANKS[:registered])}
    report = PagedAllocator(max(cells, 0), 1, ranks, ROWS).replay(trace)
    return math.inf if report.refused else report.steps


def simulate(seed: int, count: int) -> dict[str, float]:
    """Return the steps of each side."""
    found = {}
    for registered in REGISTERED:
        trace, own = draw_trace(seed, count, registered), f"{registered} registered"
        found[own] = count_steps(trace, registered)
        rest = CELLS - sum(map(adapter_cells, RANKS[:registered]))
        found[f"{own}, all kept"] = count_steps(trace, registered, rest)
        apart = defaultdict(list)
        for request in trace:
            apart[request.adapter].append(request)
        found[f"{own}, one at a time"] = sum(count_steps(part, registered) for part in apart.values())
    found[f"{NEAR} {REGISTERED[0]} registered"] = 1.125 * found[f"{REGISTERED[0]} registered"]
    return found


def write_adapters(folder: Path, model: nn.Module) -> None:
    """Write eight adapters into a folder "few", and them and as many more as are to be registered into "many"."""
    for number in range(DISTINCT):
        adapter = lorac.compile(model, {f"a{number}": lorac.LoRA(r=RANK)}).adapters[f"a{number}"]
        for tensors in adapter.tensors.values():
            nn.init.normal_(tensors["lora_B"], std=0.1)
        lorac.save_adapter(adapter, folder / "few" / adapter.name, model=model)
    for number in range(REGISTERED[-1]):
        first = folder / "few" / f"a{number % DISTINCT}"
        shutil.copytree(first, folder / "many" / f"a{number}", copy_function=os.link)


def make_sides(model: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the ways to run eight rows with an adapter each, and the base."""
    x, names = torch.randn(DISTINCT, WIDTH), [f"a{number}" for number in range(DISTINCT)]
    room = {"room": lorac.LoRA(r=RANK)}
    few, many, fused = (lorac.compile(model, room, mode=mode) for mode in ("live", "live", "fused"))
    for compiled, known in ((few, "few"), (many, "many"), (fused, "few")):
        compiled.register(folder / known)

    def merge_and_call() -> None:
        for row, name in zip(x, names, strict=True):
            fused.swap(name)
            fused(row[None])

    return {
        "base": lambda: model(x),
        f"{ONE_CALL}, {DISTINCT} registered": lambda: few(x, adapters=names),
        f"{ONE_CALL}, {REGISTERED[-1]} registered": lambda: many(x, adapters=names),
        CALLS: lambda: [many(row[None], adapters=name) for row, name in zip(x, names, strict=True)],
        MERGED: merge_and_call,
    }


@torch.no_grad()
def time_calls(seeds: int, rounds: int) -> dict[str, list[float]]:
    """Return the processor time of each way over that of the base; a seed is other rounds."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)]).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), model)
        sides = make_sides(model, Path(folder))
        found = [alternate(sides, rounds, clock=time.process_time) for _ in range(seeds)]
    return {name: [one[name] / one["base"] for one in found] for name in sides}


def find(given: argparse.Namespace) -> Finding:
    """Return the steps that the simulation counts, and the times of calls."""
    with progress("experiment", total=given.seeds + 1) as report:
        counted: dict[str, list[float]] = defaultdict(list)
        for seed in range(given.seeds):
            report.step(f"traces, seed {seed}")
            for side, steps in simulate(seed, given.steps).items():
                counted[side].append(steps)
        report.step("calls")
        times = time_calls(given.seeds, min(given.steps, 9))
    return Finding(
        [Table(STEPS, "until all is answered", dict(counted)), Table(TIMES, "over the base's", times)], EXPECTED
    )


JOIN = PagedAllocator._join


def join_alike(allocator: PagedAllocator, arrived: list[TracedRequest], running: list[Any], counts: Any) -> Any:
    """Let requests for the adapter that runs join, or for the first one that waits."""
    first = [row.request.adapter for row in running] or [request.adapter for request in arrived]
    return JOIN(allocator, [request for request in arrived if request.adapter == first[0]], running, counts)


FEW, _, MANY = (f"{count} registered" for count in REGISTERED)
EXPECTED = [
    Expected(STEPS, MANY, f"{NEAR} {FEW}"),
    Expected(STEPS, MANY, f"{MANY}, all kept"),
    *(
        Expected(STEPS, f"{count} registered", f"{count} registered, one at a time", "section 7")
        for count in REGISTERED
    ),
    Expected(TIMES, f"{ONE_CALL}, {MANY}", CALLS, "section 7"),
    Expected(TIMES, CALLS, MERGED, "section 7"),
]
EXPERIMENT = Experiment(
    claim="Rows with different adapters in one batch are answered far sooner than a batch for each adapter, and about "
    "as soon with thousands of registered adapters as with a few.",
    source="Sheng et al., S-LoRA, arXiv 2311.03285, section 7",
    find=find,
    steps=120,
    fails_by="a batch of many adapters that takes as long as a batch for each",
    fault=Fault("rows of one batch have one adapter", lambda: patch.object(PagedAllocator, "_join", join_alike)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "s_lora", __doc__)
