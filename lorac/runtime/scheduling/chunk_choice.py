"""The choice of a chunk size, the number of a prompt's tokens per step, by timing the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lorac.errors import warn
from lorac.target.kv_cache import DecodeStep

if TYPE_CHECKING:
    from lorac.runtime.generation.generate import GeneratingModel
    from lorac.runtime.row_bank import RowBank

SLOWER = 1.5
"""The longest time of a step that reads a chunk, as a multiple of the time of a step without one."""
LEAST, MOST = 4, 512
"""The smallest and the largest chunk in tokens; sizes in between are tried by doubling."""
LARGE, LARGE_TOGETHER = 64, 256
"""The larger chunk of each prompt while the only tenant has more rows that read prompts than rows that generate, and
the most tokens of all prompts together."""
_REPEATS = 3


def choose_chunk(model: GeneratingModel, graph: str, rows: int, bank: RowBank | None) -> int:
    """Return the largest chunk with which a step of half the rows takes at most 1.5 times as long as without.

    Args:
        model: the compiled model; it is called some twenty times.
        graph: the graph that decodes.
        rows: the most rows of a step.
        bank: the places for the rows' own adapters; None where rows cannot have their own.
    """
    engine, running = model.engine, [1] * max(rows // 2, 1)
    spec = engine.cache_spec(graph)
    longest = MOST if spec is None or spec.limit is None else min(MOST, spec.limit)
    try:
        with model.switch.hold() as held:

            def measure(tokens: int) -> float:
                counts = [*running, tokens][-rows:] if tokens else running
                program = held.program_of(engine) if bank is None else bank.bound(len(counts))
                most, times = max(counts), list[float]()
                ids, wanted = torch.zeros(len(counts), most, dtype=torch.long), torch.tensor(counts)[:, None] - 1
                step = DecodeStep(ids=ids, counts=counts, wanted=wanted)
                for _ in range(_REPEATS):
                    cache = engine.new_cache(graph, len(counts), most)
                    begun = time.perf_counter()
                    program.decode(graph, cache, step).sum().item()  # waits for a device, whose calls return early
                    times.append(time.perf_counter() - begun)
                return min(times)

            return largest_chunk(measure, longest)
    except Exception as error:  # engines raise their libraries' errors, and requests report them
        warn(f"the scheduler could not time the model, and reads prompts by {LEAST} tokens: {error}")
        return LEAST


def largest_chunk(measure: Callable[[int], float], longest: int) -> int:
    """Return the largest chunk with which a step takes at most ``SLOWER`` times as long, but at least ``LEAST``.

    Args:
        measure: returns the seconds of a step that reads this many tokens of a prompt.
        longest: the largest chunk allowed.
    """
    chunk, most = LEAST, SLOWER * measure(0)
    while 2 * chunk <= longest and measure(2 * chunk) <= most:
        chunk *= 2
    return chunk


def large_chunk(chunk: int, prompts: int) -> int:
    """Return the chunk of each prompt while more rows read prompts than generate.

    Args:
        chunk: the usual chunk; the result is at least as large.
        prompts: the number of prompts being read.
    """
    return max(chunk, min(LARGE, LARGE_TOGETHER // prompts))
