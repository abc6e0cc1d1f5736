"""How many tokens of a prompt a step reads is chosen by the time that they take, and then stays."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac import LoracWarning, Scheduler, TextRequest
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.runtime.scheduling import running_batch
from lorac.runtime.scheduling.chunk_choice import (
    LARGE,
    LARGE_TOGETHER,
    LEAST,
    MOST,
    choose_chunk,
    large_chunk,
    largest_chunk,
)
from lorac.runtime.scheduling.running_batch import RunningBatch
from lorac.runtime.scheduling.running_row import RunningRow


@pytest.mark.parametrize(
    ("token", "longest", "chunk"),
    [
        (0.01, MOST, 32),  # with 64 tokens a step takes more than half as long again
        (0.02, MOST, 16),
        (0.2, MOST, LEAST),
        (0.0001, MOST, MOST),
        (0.0001, 100, 64),
        (0.0001, 5, LEAST),
    ],
)
def test_with_a_chunk_a_step_takes_half_as_long_again(token: float, longest: int, chunk: int) -> None:
    assert largest_chunk(lambda tokens: 1.0 + token * tokens, longest) == chunk


@pytest.fixture(scope="module")
def compiled(llama_folder: Path) -> Any:
    return lorac.load(llama_folder)


def chosen(scheduler: Scheduler) -> int:
    until = time.monotonic() + 60
    while scheduler.chunk is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return scheduler.chunk


@pytest.mark.medium("the choice from given times")
def test_a_scheduler_times_the_model_once(compiled: Any) -> None:
    request = TextRequest(torch.arange(1, 20), "one", options={"max_new_tokens": 5})
    expected = compiled.generate(request.ids[None], adapters="one", max_new_tokens=5)[0, 19:].tolist()
    used = compiled.memory.used
    with Scheduler(compiled, rows=2, prompt_cache=0) as scheduler:
        chunk = chosen(scheduler)
        assert chunk in {2**power for power in range(2, 7)}, "the model has 64 positions"
        gc.collect()
        assert compiled.memory.used - used == scheduler.nbytes["bank"]
        assert [token.id for token in scheduler.submit(request)] == expected
        assert scheduler.chunk == chunk
    with Scheduler(compiled, rows=2, chunk=3) as scheduler:
        assert scheduler.chunk == 3


@pytest.mark.parametrize(
    ("begun", "shapes"),
    [
        ((1, 0, 1), [(1, 29), (1, 1), (2, LEAST)]),
        ((1, 2, 0), [(1, 29), (3, 29), (3, 1)]),
        ((1, 1, 1), [(1, 29), (2, LEAST), (3, 29)]),
    ],
)
def test_prompts_are_read_in_large_chunks_where_fewer_rows_run(
    compiled: Any, monkeypatch: pytest.MonkeyPatch, begun: tuple[int, ...], shapes: list[tuple[int, int]]
) -> None:
    steps = record_steps(compiled, monkeypatch, [("", count) for count in begun], is_shared=False)
    assert [(len(counts), max(counts)) for counts in steps] == shapes


def test_a_step_reads_one_chunk_for_each_of_several_tenants(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [("alice", 1), ("bob", 2), ("", 0)]
    steps = record_steps(compiled, monkeypatch, begun, is_shared=True)
    assert steps == [[LEAST], [LEAST, LEAST, 0], [LEAST, LEAST, 0]]


def record_steps(
    compiled: Any, monkeypatch: pytest.MonkeyPatch, begun: Sequence[tuple[str, int]], *, is_shared: bool
) -> list[list[int]]:
    """Return how many tokens of each row each step computes, before which so many requests of a tenant begin."""
    monkeypatch.setattr(running_batch, "choose_chunk", lambda *_: LEAST)
    found, decode = list[list[int]](), OrtProgram.decode

    def noted(program: Any, graph: str, cache: Any, step: Any) -> Any:
        found.append([*step.counts])
        return decode(program, graph, cache, step)

    monkeypatch.setattr(OrtProgram, "decode", noted)
    batch = RunningBatch(compiled, 3, None, None, "main")
    batch.choose_chunk()
    batch.is_shared = is_shared
    options = {"max_new_tokens": 34, "eos_token_id": None}
    with torch.no_grad():
        for tenant, rows in begun:
            for _ in range(rows):
                request = TextRequest(torch.arange(1, 30), tenant=tenant, options=options)
                batch.admit(RunningRow(compiled, request, "main"))
            batch.step()
    return found


@pytest.mark.parametrize(
    ("chunk", "prompts", "each"),
    [
        (LEAST, 1, LARGE),
        (LEAST, 8, LARGE_TOGETHER // 8),
        (LEAST, 10**3, LEAST),
        (MOST, 8, MOST),
    ],
)
def test_the_more_prompts_are_read_together_the_smaller_their_chunks(chunk: int, prompts: int, each: int) -> None:
    assert large_chunk(chunk, prompts) == each


def test_a_model_without_room_to_be_timed(compiled: Any) -> None:
    compiled.remove_adapter("one")
    gc.collect()
    compiled.memory.limit = compiled.memory.used
    try:
        with pytest.warns(LoracWarning, match=f"by {LEAST} tokens: "):
            assert choose_chunk(compiled, "main", 2, None) == LEAST
    finally:
        compiled.memory.limit = None
