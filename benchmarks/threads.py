"""Eight threads calling while a ninth swaps: calls per second against the same threads without swaps, live mode.

    python -m benchmarks.threads [--layers 2] [--rounds 3] [--milliseconds 4000] [--only TARGET ...] [--processes 3]

The target is 0.9 or more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import common

TARGETS = ("eager", "onnxruntime")
CALLERS = 8
SIDES = {"none": None, "A/A": None, "1 s": 1.0, "50 ms": 0.05}
"""Seconds between two swaps; A/A is a second run without any."""


def build(target: str, given: argparse.Namespace) -> tuple[Any, Any]:
    """Return a compiled model with two adapters of one form, so that a call costs the same with either, and inputs."""
    import torch

    import lorac

    model = common.llama(given)
    inputs = {"input_ids": torch.from_numpy(common.tokens(given, (1, 16))["input_ids"])}
    options = {"threads": 1} if target == "onnxruntime" else {}
    adapters = {name: lorac.LoRA(r=16, targets=["q_proj", "v_proj"]) for name in ("a", "b")}
    compiled = lorac.compile(model, adapters, target=target, mode="live", active=None, **options)
    for seed, adapter in enumerate(compiled.adapters.values()):
        common.away_from_init(adapter, seed)
    return compiled, inputs


def calls_per_second(compiled: Any, inputs: Any, every: float | None, seconds: float) -> float:
    """Count calls per second of all threads; ``every``: seconds between two swaps, None for no swaps."""
    import torch

    counts, end = [0] * CALLERS, time.perf_counter() + seconds

    def call(index: int) -> None:
        with torch.no_grad():
            while time.perf_counter() < end:
                compiled(**inputs)
                counts[index] += 1

    def swap() -> None:
        turn = 0
        while every is not None and time.perf_counter() < end:
            compiled.swap("ba"[turn % 2])
            turn += 1
            time.sleep(min(every, seconds))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(CALLERS)] + [threading.Thread(target=swap)]
    compiled.swap("a")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One target in a process of its own: calls per second of each side, order shuffled per round."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compiled, inputs = build(*job, given)
        rates: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(given.rounds):
            for name in random.sample(list(SIDES), len(SIDES)):
                rates[name].append(calls_per_second(compiled, inputs, SIDES[name], given.milliseconds / 1e3))
    finally:
        torch.set_num_threads(threads)  # a smoke run is not alone in its process
    return {name: statistics.median(found) for name, found in rates.items()}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """One row per target and pace of swaps."""
    rows = [
        (target, name, f"{rate:.1f}", f"{rate / rates['none']:.3f}")
        for (target,), rates in found.items()
        for name, rate in rates.items()
    ]
    promised = [(target, name) for target in given.only for name in SIDES]
    a_a = {target: rates["A/A"] / rates["none"] for (target,), rates in found.items()}
    title = "Live calls from 8 threads while a ninth swaps"
    return [common.Table(title, ("target", "swaps", "calls/s", "ratio"), rows, promised, a_a)]


BENCHMARK = common.Benchmark(
    name="threads",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(2),
        common.rounds(3),
        common.Option("milliseconds", 4000, smoke=50, help="of calling, per figure"),
        common.Option("only", TARGETS, smoke=TARGETS, help="these targets"),
    ),
    jobs=lambda given: [(target,) for target in given.only],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
)

if __name__ == "__main__":
    BENCHMARK.main()
