"""Eight threads calling while a ninth swaps: calls per second against the same threads without swaps, live mode.

The target is 0.9 or more.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from benchmarks import common

TARGETS = ("eager", "onnxruntime")
CALLERS, SECONDS, ROUNDS, PROCESSES = 8, 4.0, 3, 3


def build(target: str) -> tuple[Any, Any]:
    """A compiled model with two adapters of one form, so that a call costs the same with either, and inputs."""
    import torch

    import lorac

    model = common.llama_170m(layers=2)
    inputs = {"input_ids": torch.randint(3, 32000, (1, 16), generator=torch.Generator().manual_seed(0))}
    options = {"threads": 1} if target == "onnxruntime" else {}
    adapters = {name: lorac.LoRA(r=16, targets=["q_proj", "v_proj"]) for name in ("a", "b")}
    compiled = lorac.compile(model, adapters, target=target, mode="live", active=None, **options)
    for seed, adapter in enumerate(compiled.adapters.values()):
        common.away_from_init(adapter, seed)
    return compiled, inputs


def calls_per_second(compiled: Any, inputs: Any, every: float | None) -> float:
    """Calls per second of all threads together; ``every``: seconds between two swaps, None for no swaps."""
    import torch

    counts, end = [0] * CALLERS, time.perf_counter() + SECONDS

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
            time.sleep(every)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(CALLERS)] + [threading.Thread(target=swap)]
    compiled.swap("a")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / SECONDS


def worker(target: str) -> dict[str, float]:
    """One process: each side's rounds, alternating."""
    import torch

    torch.set_num_threads(1)
    compiled, inputs = build(target)
    sides: dict[str, float | None] = {"none": None, "A/A": None, "1 s": 1.0, "50 ms": 0.05}
    rates: list[dict[str, float]] = [
        {name: calls_per_second(compiled, inputs, every) for name, every in sides.items()} for _ in range(ROUNDS)
    ]
    return common.medians(rates)


def main() -> None:
    """Print one table."""
    rows = []
    for target in TARGETS:
        rates = common.medians([common.in_fresh_process("benchmarks.threads", target) for _ in range(PROCESSES)])
        for name, rate in rates.items():
            rows.append((target, name, f"{rate:.1f}", f"{rate / rates['none']:.3f}"))
    common.print_table("Live calls from 8 threads while a ninth swaps", ("target", "swaps", "calls/s", "ratio"), rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(worker(sys.argv[1])))
    else:
        main()
