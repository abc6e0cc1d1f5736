"""The number of a prompt's tokens per step, chosen by the time that an engine takes for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lorac.errors import warn
from lorac.target.engine import BoundProgram, Engine
from lorac.target.kv_cache import DecodeStep

if TYPE_CHECKING:
    from lorac.runtime.generation.generating_model import GeneratingModel
    from lorac.runtime.row_bank import RowBank

SLOWER = 1.5
"""The most time of a step that reads a chunk, in steps of running rows alone, whose tokens wait for it."""
LEAST, MOST = 4, 512
"""The fewest and the most tokens of a chunk; in between, powers of two are tried."""
LARGE, LARGE_TOGETHER = 64, 256
"""The tokens of each prompt per step while a tenant alone has more prompts that are read than rows that run, which wait
for them; and the most of all prompts together."""
_REPEATS = 3


def choose_chunk(model: GeneratingModel, graph: str, rows: int, bank: RowBank | None) -> int:
    """Return the most tokens of a prompt with which a step of half the rows takes half as long again.

    Args:
        model: the compiled model; it is called some twenty times.
        graph: decodes.
        rows: the most rows of a step.
        bank: holds the rows' own adapters, if they may have such.
    """
    engine, running = model.engine, [1] * max(rows // 2, 1)
    spec = engine.cache_spec(graph)
    longest = MOST if spec is None or spec.limit is None else min(MOST, spec.limit)
    try:
        with model.switch.hold() as held:

            def measure(tokens: int) -> float:
                counts = [*running, tokens][-rows:] if tokens else running
                program = held.program_of(engine) if bank is None else bank.bound(len(counts))
                return _time_step(engine, graph, program, counts)

            return largest_chunk(measure, longest)
    except Exception as error:  # engines raise their libraries' errors, and requests report them
        warn(f"the scheduler could not time the model, and reads prompts by {LEAST} tokens: {error}")
        return LEAST


def largest_chunk(measure: Callable[[int], float], longest: int) -> int:
    """Return the most tokens with which a step takes at most ``SLOWER`` times as long, but at least ``LEAST``.

    Args:
        measure: returns the seconds of a step in which so many tokens of a prompt are read.
        longest: the most tokens.
    """
    chunk, most = LEAST, SLOWER * measure(0)
    while 2 * chunk <= longest and measure(2 * chunk) <= most:
        chunk *= 2
    return chunk


def large_chunk(chunk: int, prompts: int) -> int:
    """Return the most tokens of each prompt per step while more prompts are read than rows run.

    Args:
        chunk: the most otherwise, and the fewest now.
        prompts: how many are read.
    """
    return max(chunk, min(LARGE, LARGE_TOGETHER // prompts))


def _time_step(engine: Engine, graph: str, program: BoundProgram, counts: Sequence[int]) -> float:
    """Return the shortest of some times of an engine's call in seconds, for new rows of so many tokens."""
    rows, most = len(counts), max(counts)
    ids, wanted = torch.zeros(rows, most, dtype=torch.long), torch.tensor(counts)[:, None] - 1
    step, times = DecodeStep(ids=ids, counts=counts, wanted=wanted), []
    for _ in range(_REPEATS):
        cache = engine.new_cache(graph, rows, most)
        begun = time.perf_counter()
        program.decode(graph, cache, step).sum().item()  # of an engine on a device, whose calls return before
        times.append(time.perf_counter() - begun)
    return min(times)
