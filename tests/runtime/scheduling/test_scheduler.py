"""Requests that are computed together answer as each does alone, and come and go without trace."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac import Scheduler, TextRequest
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.runtime.generation.row_processors import RowProcessors
from lorac.runtime.row_bank import RowBank
from lorac.runtime.scheduling.running_batch import RunningBatch
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.runtime.scheduling.token_stream import TokenStream
from lorac.testing import adapter_away
from tests.decoders import DECODERS, IDS
from tests.refusing import refuses

CHOICES: list[Any] = ["one", "two", {"one": 0.7, "two": 0.3}, None]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 12}


@pytest.fixture(scope="module")
def compiled() -> Any:
    host = DECODERS["llama"]()
    variants = {
        "one": lorac.LoRA(r=3, targets="all-linear"),
        "two": lorac.DoRA(r=1, targets=["q_proj", "down_proj"]),
        "merged": lorac.SHiRA(r=1, targets=["q_proj"]),
    }
    adapters = [adapter_away(variant, host, IDS, name=name, seed=1) for name, variant in variants.items()]
    return lorac.compile(host, adapters, target="onnxruntime", active="two", cache=True, self_test=False)


@pytest.fixture
def scheduler(compiled: Any) -> Iterator[Scheduler]:
    with Scheduler(compiled, rows=3, waiting=40, chunk=4) as made:
        yield made


class Gate:
    """A logits processor that keeps the scheduler waiting from some token of a request on, until it is opened."""

    def __init__(self, free: int) -> None:
        self.free, self.opened = free, threading.Event()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.free == 0:
            assert self.opened.wait(60)
        self.free = max(0, self.free - 1)
        return scores

    def request(self) -> TextRequest:
        """Return a request of fifty tokens that it keeps waiting."""
        return TextRequest(
            prompt(1), "one", options={"max_new_tokens": 50, "eos_token_id": None, "logits_processor": [self]}
        )


def prompt(seed: int, length: int = 6) -> torch.Tensor:
    return torch.randint(1, 20, (length,), generator=torch.Generator().manual_seed(seed))


def alone(compiled: Any, request: TextRequest) -> list[int]:
    choice = {} if request.adapters is lorac.TextRequest.adapters else {"adapters": request.adapters}
    found = compiled.generate(request.ids[None], seed=request.seed, **choice, **request.options)
    return found[0, len(request.ids) :].tolist()


def some_requests(count: int) -> list[TextRequest]:
    generator = random.Random(5)
    options = [{"max_new_tokens": generator.randrange(1, 7)} | (SAMPLED if n % 2 else {}) for n in range(count)]
    choices = [generator.choice(CHOICES) for _ in range(count)]
    drawn = zip(options, choices, strict=True)
    return [
        TextRequest(prompt(n, generator.randrange(1, 12)), choice, seed=n, options=given)
        for n, (given, choice) in enumerate(drawn)
    ]


def test_each_request_matches_a_single_run(compiled: Any, scheduler: Scheduler) -> None:
    requests = some_requests(14)
    streams = [scheduler.submit(request) for request in requests]
    answers = [[token.id for token in stream] for stream in streams]
    assert answers == [alone(compiled, request) for request in requests]
    assert {stream.reason for stream in streams} <= {"stop", "length"}
    scheduler.close()
    assert scheduler.load == (0, 0)


def test_wakes_an_event_loop_once_a_step(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    async def count(stream: TokenStream) -> int:
        return len([token async for token in stream])

    async def work() -> list[int]:
        loop, calls = asyncio.get_running_loop(), list[Any]()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (calls.append(given), wake(*given))[1])
        requests = [TextRequest(prompt(1), "one", options={**SAMPLED, **fixed}) for _ in range(3)]
        found = await asyncio.gather(*(count(stream) for stream in scheduler.submit_all(requests)))
        assert len(calls) <= 12 + 3 + 3, "those of other steps, and one for the end of each"
        return found

    fixed = {"max_new_tokens": 12, "eos_token_id": None}
    assert asyncio.run(work()) == [12] * 3


@pytest.mark.medium("sampled tokens", keep=["options1"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "repetition_penalty": 1.8, "min_new_tokens": 5},
        {**SAMPLED, "eos_token_id": None},
        {**SAMPLED, "min_new_tokens": 4},
    ],
)
def test_continues_a_request_after_an_interrupted_run(
    compiled: Any, scheduler: Scheduler, options: dict[str, Any]
) -> None:
    request = TextRequest(prompt(4), {"one": 0.7, "two": 0.3}, seed=8, options={**options, "max_new_tokens": 9})
    first = scheduler.submit(request)
    whole = [token.id for token in first]
    for drawn in range(1, len(whole) + 1):
        ids = torch.cat([request.ids, torch.tensor(whole[:drawn])])
        rest = scheduler.submit(replace(request, ids=ids, drawn=drawn))
        assert [token.id for token in rest] == whole[drawn:]
        assert rest.reason == first.reason


def test_the_active_choice_is_the_default_and_a_merged_weight_has_a_call_of_its_own(
    compiled: Any, scheduler: Scheduler
) -> None:
    requests = [TextRequest(prompt(1), options={"max_new_tokens": 3})]
    requests += [
        TextRequest(prompt(n), choice, options={"max_new_tokens": 4}) for n, choice in enumerate(["merged", "one"])
    ]
    streams = [scheduler.submit(request) for request in requests]
    assert [[token.id for token in stream] for stream in streams] == [alone(compiled, request) for request in requests]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many new tokens each row has, for each call of the engine."""
    noted, decode = list[list[int]](), OrtProgram.decode

    def note(program: Any, graph: str, cache: Any, step: Any) -> torch.Tensor:
        noted.append(list(step.counts))
        return decode(program, graph, cache, step)

    monkeypatch.setattr(OrtProgram, "decode", note)
    return noted


def test_batches_running_rows_with_a_chunk_of_a_prompt(
    compiled: Any, scheduler: Scheduler, calls: list[list[int]]
) -> None:
    requests = [TextRequest(prompt(n), c, options={"max_new_tokens": 9}) for n, c in enumerate(CHOICES[:3])]
    late = TextRequest(prompt(7, 11), None, options={"max_new_tokens": 2})
    for stream in scheduler.submit_all([*requests, late]):
        list(stream)
    assert [1, 1, 1] in calls
    assert max(map(max, calls)) == 4
    assert sum(len(counts) > 1 for counts in calls) < 18


@pytest.mark.parametrize("choices", [CHOICES[:3], ["one"] * 3])
def test_prompts_that_come_together_share_a_call(
    choices: list[Any], compiled: Any, scheduler: Scheduler, calls: list[list[int]]
) -> None:
    lengths = (6, 1, 10)
    requests = [
        TextRequest(prompt(n, length), choice, options={"max_new_tokens": 4, "eos_token_id": None})
        for n, (length, choice) in enumerate(zip(lengths, choices, strict=True))
    ]
    streams = scheduler.submit_all(requests)
    answers = [[token.id for token in stream] for stream in streams]
    assert [sorted(counts) for counts in calls[:4]] == [[1, 4, 4], [1, 2, 4], [1, 1, 2], [1, 1, 1]]
    assert answers == [alone(compiled, request) for request in requests]


def test_a_step_reads_a_chunk_for_each_tenant_and_cuts_none(
    compiled: Any, scheduler: Scheduler, calls: list[list[int]]
) -> None:
    tenants = {"ann": 6, "ann again": 10, "bob": 10}
    requests = [
        TextRequest(prompt(n, length), "one", tenant=name[:3], options={"max_new_tokens": 2, "eos_token_id": None})
        for n, (name, length) in enumerate(tenants.items())
    ]
    answers = [[token.id for token in stream] for stream in scheduler.submit_all(requests)]
    assert calls[:3] == [[4, 4, 0], [2, 4, 0], [1, 2, 4]], "2 tokens of her chunk are left in the second step"
    assert answers == [alone(compiled, request) for request in requests]


def test_a_request_that_ends_in_its_prompt_leaves_the_others_that_are_read(
    compiled: Any, scheduler: Scheduler, calls: list[list[int]]
) -> None:
    requests = [TextRequest(prompt(n, 10), c, options={"max_new_tokens": 4}) for n, c in enumerate(CHOICES[:3])]
    left, *streams = scheduler.submit_all([replace(requests[0], deadline=0), *requests[1:]])
    assert list(left) == []
    assert [[t.id for t in stream] for stream in streams] == [alone(compiled, request) for request in requests[1:]]
    assert max(map(len, calls)) == 2


@pytest.mark.medium("test_a_request_waits_for_memory_or_is_rejected")
def test_a_request_waits_for_room_for_its_adapters(calls: list[list[int]]) -> None:
    host = DECODERS["llama"]()
    variants = {"one": lorac.LoRA(r=2, targets="all-linear"), "two": lorac.LoRA(r=9, targets="all-linear")}
    adapters = [adapter_away(variant, host, IDS, name=name, seed=1) for name, variant in variants.items()]
    compiled = lorac.compile(host, adapters, target="onnxruntime", active=None, cache=True, self_test=False)
    requests = [TextRequest(prompt(n), c, options={"max_new_tokens": 3}) for n, c in enumerate(["one", "two"])]
    expected = alone(compiled, requests[0])
    with Scheduler(compiled, rows=2, chunk=64, prompt_cache=0) as scheduler:
        list(scheduler.submit(requests[0]))  # the bank has room for its rank
        gc.collect()
        compiled.memory.limit = compiled.memory.used + 6 * compiled.engine.new_cache("main", 1, 9).nbytes
        calls.clear()
        streams = scheduler.submit_all(requests)
        assert [token.id for token in streams[0]] == expected
        with refuses("over_budget"):
            list(streams[1])
    assert calls[0] == [6]


def test_rows_of_one_choice_share_a_place(compiled: Any, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    places, bound = list[int](), RowBank.bound

    def noted(bank: RowBank, *given: int) -> Any:
        places.append(given[0])
        return bound(bank, *given)

    monkeypatch.setattr(RowBank, "bound", noted)
    for choices in (["one", "one"], ["one", "two"], [None, None]):
        requests = [TextRequest(prompt(n), c, options={"max_new_tokens": 5}) for n, c in enumerate(choices)]
        streams = scheduler.submit_all(requests)
        assert [[t.id for t in stream] for stream in streams] == [alone(compiled, request) for request in requests]
        assert bool(places) == (choices == ["one", "two"])
        places.clear()


def test_an_async_reader_that_leaves_frees_its_row(compiled: Any, scheduler: Scheduler) -> None:
    async def read(stream: Any, most: int) -> list[int]:
        found = []
        async for token in stream:
            found.append(token.id)
            if len(found) == most:
                break
        return found

    async def leave(stream: Any, gate: Gate) -> list[int]:
        found = await read(stream, 2)
        async with asyncio.timeout(60):
            while stream.interrupted != "cancelled":  # the loop closes a generator that was left
                await asyncio.sleep(0)
        gate.opened.set()
        return found

    async def work() -> tuple[list[int], list[int]]:
        gate = Gate(2)
        left, whole = scheduler.submit_all(
            [gate.request(), TextRequest(prompt(2), "two", options={"max_new_tokens": 8})]
        )
        first, second = await asyncio.gather(leave(left, gate), read(whole, 99))
        assert left.interrupted == "cancelled"
        return first, second

    first, second = asyncio.run(work())
    expected = [
        TextRequest(prompt(1), "one", options={"max_new_tokens": 2}),
        TextRequest(prompt(2), "two", options={"max_new_tokens": 8}),
    ]
    assert [first, second] == [alone(compiled, request) for request in expected]
    scheduler.close()
    assert scheduler.load == (0, 0)


def test_a_closed_event_loop_frees_only_its_own_row(compiled: Any, scheduler: Scheduler) -> None:
    gate = Gate(1)
    left = scheduler.submit(gate.request())
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        await anext(aiter(left))

    task = loop.create_task(begin())
    loop.run_until_complete(task)
    loop.close()
    gate.opened.set()
    whole = TextRequest(prompt(2), "two", options={"max_new_tokens": 8})
    assert [token.id for token in scheduler.submit(whole)] == alone(compiled, whole)
    scheduler.close()
    assert left.reason == "cancelled"
    assert list(left) != list(left) == []  # a second loop ends


@pytest.mark.medium("a failing processor of logits", keep=["logits_processor"])
@pytest.mark.parametrize("fails", ["logits_processor", "stopping_criteria", "probabilities"])
def test_a_failure_ends_only_its_own_request(fails: str, compiled: Any, scheduler: Scheduler) -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor, **rest: Any) -> torch.Tensor:
        if ids.shape[1] < 8:
            return scores if fails != "stopping_criteria" else torch.zeros(1, dtype=torch.bool)
        if fails == "probabilities":
            return scores * float("nan")
        raise ZeroDivisionError

    own = {"stopping_criteria" if fails == "stopping_criteria" else "logits_processor": [fail]}
    bad = TextRequest(prompt(1), "one", seed=1, options={"max_new_tokens": 9, "eos_token_id": 96, **own, **SAMPLED})
    requests = [
        TextRequest(prompt(n), choice, seed=n, options={"max_new_tokens": 9, **SAMPLED})
        for n, choice in enumerate(CHOICES)
    ]
    stream, *streams = [scheduler.submit(request) for request in (bad, *requests)]
    assert [[token.id for token in stream] for stream in streams] == [alone(compiled, request) for request in requests]
    found = iter(stream)
    assert len([next(found), next(found)]) == 2
    with pytest.raises(RuntimeError if fails == "probabilities" else ZeroDivisionError):
        next(found), next(found)


def test_other_requests_change_no_bit_of_a_request(compiled: Any) -> None:
    def run(other: Any, seed: int) -> list[Any]:
        options = {"max_new_tokens": 6, "eos_token_id": None}
        requests = [
            TextRequest(prompt(1), "one", logprobs=2, options=options),
            TextRequest(prompt(seed), other, options=options),
        ]
        with Scheduler(compiled, rows=2) as scheduler:
            stream, beside = scheduler.submit_all(requests)  # both begin in one step
        assert len(list(beside)) == 6
        return list(stream)

    assert len({str(run(other, seed)) for seed, other in enumerate(CHOICES[1:])}) == 1


def test_a_free_row_goes_to_the_tenant_with_the_fewest(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, begin = list[str](), RunningRow.begin

    def noted(row: RunningRow, *given: Any) -> Any:
        begun.append(str(row.request.seed))
        return begin(row, *given)

    monkeypatch.setattr(RunningRow, "begin", noted)
    options = {"max_new_tokens": 3, "eos_token_id": None}
    with Scheduler(compiled, rows=2) as scheduler:
        scheduler.submit_all(
            [TextRequest(prompt(n), tenant=tenant, seed=n, options=options) for n, tenant in enumerate("aaab")]
        )
    assert begun == ["0", "3", "1", "2"]


def submit(scheduler: Scheduler, tenant: str, count: int, tokens: int = 1) -> list[TokenStream]:
    options = {"max_new_tokens": tokens, "eos_token_id": None}
    return scheduler.submit_all([TextRequest(prompt(n), tenant=tenant, options=options) for n in range(count)])


def test_a_full_line_takes_each_tenant_up_to_its_share(compiled: Any) -> None:
    gate = Gate(1)
    with Scheduler(compiled, rows=1, waiting=4) as scheduler:
        reader = iter(scheduler.submit(replace(gate.request(), tenant="alice")))
        next(reader)
        taken = submit(scheduler, "alice", 4)
        with refuses("queue_full", match="share of 4 places in line is 4"):
            submit(scheduler, "alice", 1)
        taken += submit(scheduler, "bob", 2)
        with refuses("queue_full", match="share of 4 places in line is 2"):
            submit(scheduler, "bob", 1)
        taken += submit(scheduler, "carol", 2)
        assert scheduler.load == (1, 8)
        reader.close()
        gate.opened.set()
        assert [len(list(stream)) for stream in taken] == [1] * 8


def test_a_tenant_has_half_of_the_rows_next_to_recent_ones(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    most, step = list[int](), RunningBatch.step

    def counted(batch: RunningBatch) -> None:
        most.append(len(batch.rows))
        step(batch)

    monkeypatch.setattr(RunningBatch, "step", counted)
    with Scheduler(compiled, rows=4, chunk=8) as scheduler:
        for stream in submit(scheduler, "alice", 6, 3):
            list(stream)
        assert max(most) == 4
        most.clear()
        list(submit(scheduler, "bob", 1)[0])
        for stream in submit(scheduler, "alice", 6, 3):
            list(stream)
        assert max(most) == 2
        most.clear()
        list(submit(scheduler, "carol", 1)[0])
        for stream in [*submit(scheduler, "alice", 6, 12), *submit(scheduler, "bob", 6, 12)]:
            list(stream)
        assert max(most) == 3, "the last row is kept for carol"


def test_a_request_without_room_costs_nothing(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, made = Gate(1), RunningRow.__init__
    with Scheduler(compiled, rows=1, waiting=2) as scheduler:
        reader = iter(scheduler.submit(gate.request()))
        next(reader)
        submit(scheduler, "", 2)
        monkeypatch.setattr(RunningRow, "__init__", lambda *given: pytest.fail("it was prepared"))
        with refuses("queue_full"):
            submit(scheduler, "", 1)
        monkeypatch.setattr(RunningRow, "__init__", made)
        gate.opened.set()


def test_shares_prefixes_within_a_tenant_only(compiled: Any, scheduler: Scheduler) -> None:
    long = prompt(3, 16)
    list(scheduler.submit(TextRequest(long, "one", tenant="a", options={"max_new_tokens": 1})))
    own = scheduler._batch.prompts
    key = next(iter(own._entries)).key
    assert own.find(compiled.engine, key, [long]) is not None
    assert own.find(compiled.engine, (("main", "b"), *key[1:]), [long]) is None
    list(scheduler.submit(TextRequest(long, "one", tenant="b", options={"max_new_tokens": 1})))
    assert own.find(compiled.engine, key, [long]) is not None, "another tenant's prompts stay"
    request = TextRequest(torch.cat([long, prompt(4)]), "one", tenant="a", options={"max_new_tokens": 5})
    assert [token.id for token in scheduler.submit(request)] == alone(compiled, request)


def test_a_dropped_prompt_leaves_the_memory_budget(compiled: Any) -> None:
    compiled.memory._make_room(0, None)  # drops entries of caches that died, whose id may be the new one's
    with Scheduler(compiled, prompt_cache=compiled.engine.new_cache("main", 1, 18).nbytes) as scheduler:
        for n in range(4):
            list(scheduler.submit(TextRequest(prompt(n), options={"max_new_tokens": 1})))
        own = scheduler._batch.prompts
        assert sum(key[0] == id(own) for key in compiled.memory._kept) == len(own) < 4


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED])
def test_names_the_adapter_whose_logits_are_not_numbers(
    options: dict[str, Any], compiled: Any, scheduler: Scheduler
) -> None:
    bad = lorac.Adapter("bad", compiled.adapters["one"].variant, compiled.adapters["one"].tensors)
    compiled.add_adapter(bad, name="bad")
    try:
        with torch.no_grad():
            for tensor in compiled.adapters["bad"].parameters():
                tensor.fill_(1e38)
        good = TextRequest(prompt(1), "one", options={"max_new_tokens": 4})
        streams = scheduler.submit_all([TextRequest(prompt(1), "bad", options={"max_new_tokens": 4, **options}), good])
        with refuses("non_finite", match="'bad'"):
            list(streams[0])
        assert [token.id for token in streams[1]] == alone(compiled, good)
    finally:
        compiled.remove_adapter("bad")


def test_rejects_at_once_a_request_that_memory_never_has_room_for(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begin = Gate(1), RunningRow.begin

    def fail(row: RunningRow, *given: Any) -> Any:
        if row.request.seed == 7:
            raise lorac.OverBudget("too large").for_good()
        return begin(row, *given)

    monkeypatch.setattr(RunningRow, "begin", fail)
    reader = iter(scheduler.submit(gate.request()))
    next(reader)
    stream = scheduler.submit(TextRequest(prompt(2), seed=7, options={"max_new_tokens": 2}))
    gate.opened.set()
    with refuses("over_budget"):
        list(stream)
    assert scheduler.load == (1, 0), "it waited for no row"
    reader.close()


def test_log_probabilities(compiled: Any, scheduler: Scheduler) -> None:
    (token,) = scheduler.submit(TextRequest(prompt(1), "one", logprobs=3, options={"max_new_tokens": 1}))
    expected = compiled(input_ids=prompt(1)[None], adapters="one").logits[0, -1].log_softmax(-1)
    assert [id for id, _ in token.likeliest] == expected.topk(3).indices.tolist()
    assert token.likeliest[0] == (token.id, token.logprob)


def test_refusals_come_before_the_first_token(compiled: Any) -> None:
    with Scheduler(compiled, rows=1, waiting=1) as scheduler:
        for error, request in {
            "adapter_not_found": TextRequest(prompt(1), "tow", options={"max_new_tokens": 2}),
            "input_mismatch": TextRequest(torch.tensor([1, 10**6]), options={"max_new_tokens": 2}),
            "option_error": TextRequest(prompt(1), options={"temprature": 0.3}),
            "unavailable": TextRequest(prompt(1), options={"num_beams": 2}),
        }.items():
            with refuses(error):
                scheduler.submit(request)
        with refuses("input_mismatch", match="drawn=6 of 6"):
            scheduler.submit(TextRequest(prompt(1), drawn=6))
        gate = Gate(1)
        reader = iter(scheduler.submit(gate.request()))
        next(reader)
        waiting = scheduler.submit(TextRequest(prompt(2), options={"max_new_tokens": 1}))
        with refuses("queue_full"):
            scheduler.submit(TextRequest(prompt(3), options={"max_new_tokens": 1}))
        reader.close()
        gate.opened.set()
        assert len(list(waiting)) == 1
    with refuses("unavailable", match="closed"):
        scheduler.submit(TextRequest(prompt(1), options={"max_new_tokens": 1}))


def test_a_deadline_ends_waiting_and_running_requests(scheduler: Scheduler) -> None:
    streams = [scheduler.submit(TextRequest(prompt(n), deadline=0, options={"max_new_tokens": 50})) for n in range(5)]
    assert [list(stream) for stream in streams][-1] == []
    assert {stream.reason for stream in streams} == {"deadline"}


def test_a_request_waits_for_memory_or_is_rejected(llama_folder: Path) -> None:
    compiled = lorac.load(llama_folder)
    requests = [TextRequest(prompt(n), options={"max_new_tokens": 12}) for n in range(2)]
    expected = [alone(compiled, request) for request in requests]
    with Scheduler(compiled, rows=2, prompt_cache=0) as scheduler:
        list(scheduler.submit(requests[0]))
        gc.collect()
        compiled.memory.limit = compiled.memory.used + 3 * compiled.engine.new_cache("main", 1, 18).nbytes
        streams = [scheduler.submit(request) for request in requests]
        assert [[token.id for token in stream] for stream in streams] == expected
        with refuses("over_budget"):
            list(scheduler.submit(TextRequest(prompt(9), options={"max_new_tokens": 55})))
        assert [token.id for token in scheduler.submit(requests[0])] == expected[0]


def test_the_error_of_a_request_keeps_no_memory(llama_folder: Path) -> None:
    compiled = lorac.load(llama_folder)
    with compiled.hold("one"), Scheduler(compiled, rows=2, chunk=4) as scheduler:
        compiled.memory.limit = compiled.memory.used + compiled.engine.new_cache("main", 1, 18).nbytes
        with pytest.raises(lorac.OverBudget) as kept:
            list(scheduler.submit(TextRequest(prompt(1), "one", options={"max_new_tokens": 12})))
        assert not [frame for frame, _ in traceback.walk_tb(kept.tb) if "cache" in frame.f_locals]


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_a_rejected_request_frees_its_memory_without_the_collector(llama_folder: Path) -> None:
    compiled = lorac.load(llama_folder)
    mixtures = [{"one": strength, "two": 0.5} for strength in (0.1, 0.2, 0.3)]
    with Scheduler(compiled, rows=2, chunk=4, prompt_cache=0) as scheduler:
        short = [TextRequest(prompt(1), mixture, options={"max_new_tokens": 2}) for mixture in mixtures]
        list(scheduler.submit(short[0]))
        compiled.memory.limit = compiled.memory.used + compiled.engine.new_cache("main", 1, 18).nbytes
        for request in short[:2]:
            with pytest.raises(lorac.OverBudget):
                list(scheduler.submit(replace(request, options={"max_new_tokens": 55})))
        assert [len(list(scheduler.submit(request))) for request in short] == [2, 2, 2]
        failing = replace(short[0], options={"max_new_tokens": 2, "logits_processor": [_fail]})
        with pytest.raises(ZeroDivisionError) as failed:
            list(scheduler.submit(failing))
        assert "in _fail" in failed.value.__notes__[0], "its traceback is text"
    del failed
    assert not [found for found in gc.get_objects() if isinstance(found, RunningRow | RowProcessors)]


def _fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.medium("a request that waits for memory")
def test_a_prompt_that_was_read_runs_where_memory_has_no_room_for_a_copy(llama_folder: Path) -> None:
    compiled = lorac.load(llama_folder)
    request = TextRequest(prompt(0), options={"max_new_tokens": 12})
    expected = alone(compiled, request)
    with Scheduler(compiled, rows=3, prompt_cache=0) as scheduler:
        list(scheduler.submit(TextRequest(prompt(1), options={"max_new_tokens": 1})))
        gc.collect()
        compiled.memory.limit = compiled.memory.used + 2 * compiled.engine.new_cache("main", 1, 18).nbytes
        assert [token.id for token in scheduler.submit(request)] == expected


def test_adapters_can_be_added_and_removed_during_a_request(compiled: Any, scheduler: Scheduler) -> None:
    request = TextRequest(prompt(1), "late", options={"max_new_tokens": 20})
    compiled.add_adapter(compiled.adapters["one"], name="late")
    stream = scheduler.submit(request)
    expected = alone(compiled, request)
    first = next(iter(stream))
    assert first.id == expected[0]
    compiled.remove_adapter("late")
    with refuses("adapter_not_found"):
        scheduler.submit(request)


def test_rejects_a_program_without_a_cache() -> None:
    with refuses("unavailable"):
        Scheduler(lorac.compile(DECODERS["llama"](), lorac.LoRA(r=1, targets=["q_proj"])))
