"""Over a cache only new tokens are computed, and impossible calls are refused before anything is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorac
from tests.runtime.generation.recompute import over
from tests.runtime.generation.texts import LENGTHS, adapted, compiled, padded, prompts

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return over(compiled("llama"))


def test_finished_rows_feed_no_tokens(model: Any) -> None:
    ends = list(range(20, 60))
    answer = model.generate(**padded(prompts(), "left"), **GREEDY, eos_token_id=ends)
    new = answer[:, max(LENGTHS) :]
    done = torch.isin(new, torch.tensor(ends)).int().cumsum(1)[:, :-1]
    assert 0 < int(done[:, 0].sum()) < len(LENGTHS)
    assert model.engine.fed[0] == list(LENGTHS)
    assert model.engine.fed[1:] == (done == 0).int().T.tolist()


def test_prompts_are_computed_once_for_all_their_beams(model: Any) -> None:
    model.generate(**padded(prompts(), "left"), **GREEDY, num_beams=3)
    assert model.engine.fed[0] == list(LENGTHS)
    assert model.engine.fed[1] == [1] * 3 * len(LENGTHS)


def test_prompts_in_pieces(model: Any) -> None:
    """All pieces are as long as they may be, and the last of each row comes in the last call."""
    expected = model.generate(**padded(prompts(), "left"), **GREEDY)
    model.engine.fed.clear()
    assert torch.equal(model.generate(**padded(prompts(), "left"), **GREEDY, prefill_chunk_size=4), expected)
    assert model.engine.fed[:3] == [[4, 0, 3, 0], [1, 0, 0, 0], [4, 4, 4, 1]]


def test_the_cache_grows_beyond_its_first_size(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(**padded(prompts(), "left"), **GREEDY)
    monkeypatch.setattr("lorac.runtime.generation.decoding_state._INITIAL_ROOM", 1)
    assert torch.equal(model.generate(**padded(prompts(), "left"), **GREEDY), expected)


# ── Prefixes ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _longer(sequences: torch.Tensor) -> torch.Tensor:
    return torch.cat([sequences, torch.randint(3, 96, (sequences.shape[0], 3))], 1)


def test_a_conversation_computes_only_new_tokens(model: Any) -> None:
    cache = lorac.PromptCache()
    first = model.generate(prompts()[0][None], **GREEDY, prompt_cache=cache)
    assert first.shape[1] == LENGTHS[0] + NEW
    told = _longer(first)
    expected = model.generate(told, **GREEDY)
    model.engine.fed.clear()
    assert torch.equal(model.generate(told, **GREEDY, prompt_cache=cache), expected)
    # The last token that was made was never computed with; the three of the next turn come with it.
    assert model.engine.fed[0] == [4]
    assert len(cache) == 1


@pytest.mark.medium("beams", keep=["options1"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "seed": 1}])
def test_rows_begin_as_the_longest_text_that_is_known(options: dict[str, Any], model: Any) -> None:
    cache = lorac.PromptCache()
    options = {**GREEDY, **options}
    model.generate(**padded(prompts(), "left"), **options, prompt_cache=cache)
    ends = prompts(1, (2, 2, 2, 2))
    rows = [torch.cat([row, end]) for row, end in zip(prompts()[::-1], ends, strict=True)]
    expected = model.generate(**padded(rows, "left"), **options)
    model.engine.fed.clear()
    assert torch.equal(model.generate(**padded(rows, "left"), **options, prompt_cache=cache), expected)
    assert max(model.engine.fed[0]) == 2


def test_a_prompt_cache_is_not_shared_between_choices(model: Any) -> None:
    cache, row = lorac.PromptCache(), prompts()[0][None]
    first = model.generate(row, **GREEDY, prompt_cache=cache)
    model.engine.fed.clear()
    base = model.generate(row, **GREEDY, prompt_cache=cache, adapters=None)
    assert model.engine.fed[0] == [LENGTHS[0]]
    assert not torch.equal(base, first)
    assert len(cache) == 2
    model.engine.fed.clear()
    model.generate(row, **GREEDY, prompt_cache=cache, adapters={"default": 0.5})  # of the same tensors
    assert model.engine.fed[0] == [LENGTHS[0]]
    tensor = next(iter(model.adapters["default"].parameters()))
    with torch.no_grad():
        tensor.mul_(1.0)  # written, as a step of a training does
    model.engine.fed.clear()
    model.generate(row, **GREEDY, prompt_cache=cache)
    assert model.engine.fed[0] == [LENGTHS[0]]


def test_prefixes_stay_within_their_budget(model: Any) -> None:
    one = lorac.PromptCache()
    model.generate(prompts()[0][None], **GREEDY, prompt_cache=one)
    few = lorac.PromptCache(bytes=2 * one.used)
    for seed in range(4):
        model.generate(prompts(seed)[0][None], **GREEDY, prompt_cache=few)
        assert few.used <= few.bytes
    assert len(few) == 2
    model.engine.fed.clear()
    model.generate(prompts(3)[0][None], **GREEDY, prompt_cache=few)
    assert model.engine.fed[0] == [1]
    few.clear()
    assert few.used == 0


def test_prefixes_of_adapters_that_are_gone_are_forgotten() -> None:
    """On removal at once; those of an adapter that was trained when it is used again."""
    model, cache, row = over(lorac.compile(adapted("llama"))), lorac.PromptCache(), prompts()[0][None]
    other = over(compiled("llama"))
    for choice in ("default", {"default": 0.5}, None):
        model.generate(row, **GREEDY, prompt_cache=cache, adapters=choice)
    other.generate(row, **GREEDY, prompt_cache=cache)
    with torch.no_grad():
        next(iter(model.adapters["default"].parameters())).mul_(1.0)
    model.generate(row, **GREEDY, prompt_cache=cache)
    assert len(cache) == 4
    model.remove_adapter("default")
    assert len(cache) == 2
    model.engine.fed.clear()
    model.generate(row, **GREEDY, prompt_cache=cache)
    assert model.engine.fed[0] == [1], "the base's prompts are kept"


def test_continues_with_a_returned_cache(model: Any) -> None:
    answer = model.generate(prompts()[0][None], **GREEDY, return_dict_in_generate=True)
    told = _longer(answer.sequences)
    expected = model.generate(told, **GREEDY)
    model.engine.fed.clear()
    assert torch.equal(model.generate(told, **GREEDY, cache=answer.cache), expected)
    assert model.engine.fed[0] == [4]
    held = answer.cache.cache.lengths
    with pytest.raises(lorac.InputMismatch, match="the cache holds"):
        model.generate(told, **GREEDY, cache=answer.cache)
    assert answer.cache.cache.lengths == held


def test_rejects_a_cache_of_another_text_or_model(model: Any) -> None:
    answer = model.generate(prompts()[0][None], **GREEDY, return_dict_in_generate=True)
    told = _longer(answer.sequences)
    other = told.clone()
    other[0, 3] = 3 if told[0, 3] != 3 else 4
    with pytest.raises(lorac.InputMismatch, match="row 0 does not begin with the tokens that the cache holds of it"):
        model.generate(other, **GREEDY, cache=answer.cache)
    with pytest.raises(lorac.InputMismatch, match="the cache belongs to another model"):
        over(compiled("llama")).generate(told, **GREEDY, cache=answer.cache)
    assert torch.equal(model.generate(told, **GREEDY, cache=answer.cache), model.generate(told, **GREEDY))


# ── One call ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Swapping:
    """A criterion that lets another thread swap once, after the first token."""

    def __init__(self, model: Any) -> None:
        self.model, self.swapped = model, threading.Event()
        self.thread = threading.Thread(target=self._swap, daemon=True)

    def _swap(self) -> None:
        self.model.swap(None)
        self.swapped.set()

    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        if not self.thread.is_alive() and not self.swapped.is_set():
            self.thread.start()
            self.early = self.swapped.wait(0.2)
        return torch.zeros(ids.shape[0], dtype=torch.bool)


@pytest.mark.medium("fused weights in eager, and adapters that change within a call", keep=["fused-eager"])
@pytest.mark.parametrize("cached", [False, True], ids=["eager", "cached"])
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_swap_meanwhile_is_of_the_next_call(mode: str, cached: bool) -> None:
    """Live, it comes at once and changes nothing for the call; fused, it waits for the call's end (invariant 7)."""
    eager = lorac.compile(adapted("llama"), mode=mode)
    made = over(eager) if cached else eager
    row = prompts()[0][None]
    expected, base = made.generate(row, **GREEDY), made.generate(row, **GREEDY, adapters=None)
    swapping = _Swapping(made)
    assert torch.equal(made.generate(row, **GREEDY, stopping_criteria=[swapping]), expected)
    assert swapping.early == (mode == "live")
    swapping.thread.join(20)
    assert made.active == {}
    assert torch.equal(made.generate(row, **GREEDY), base)
    assert torch.equal(made.generate(row, **GREEDY, adapters="default"), expected)


def _from_within(change: Callable[[], object]) -> Callable[..., torch.Tensor]:
    """Return a criterion that runs a change in the thread of the call."""

    def criterion(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        change()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    return criterion


@pytest.mark.medium("the active choice in eager, and a call's own over a cache", keep=["active-eager", "own-cached"])
@pytest.mark.parametrize("cached", [False, True], ids=["eager", "cached"])
@pytest.mark.parametrize("own", [{}, {"adapters": "default"}], ids=["active", "own"])
def test_fused_weights_do_not_change_from_within_a_call(own: dict[str, Any], cached: bool) -> None:
    """A swap, a removal, an addition, another choice: each is refused, and the text and the adapters are untouched."""
    eager = lorac.compile(adapted("llama"), mode="fused")
    made, row = over(eager) if cached else eager, prompts()[0][None]
    if own:
        made.swap(None)
    expected, active = made.generate(row, **GREEDY, **own), made.active
    for change in (
        lambda: made.swap({"default": 0.5}),
        lambda: made.remove_adapter("default"),
        lambda: made.add_adapter(lorac.LoRA(r=1, targets=["q_proj"]), "more"),
        lambda: made(input_ids=row, adapters={"default": 0.5}),
    ):
        with pytest.raises(lorac.Unavailable, match="a running call of this thread uses the weights"):
            made.generate(row, **GREEDY, **own, stopping_criteria=[_from_within(change)])
    assert made.active == active
    assert list(made.adapters) == ["default"]
    assert torch.equal(made.generate(row, **GREEDY, **own), expected)


def test_live_adapters_change_from_within_a_call_and_the_call_does_not() -> None:
    for made in (lorac.compile(adapted("llama")), over(lorac.compile(adapted("llama")))):
        row = prompts()[0][None]
        expected = made.generate(row, **GREEDY)
        criterion = _from_within(lambda made=made: made.swap(None))
        assert torch.equal(made.generate(row, **GREEDY, stopping_criteria=[criterion]), expected)
        assert made.active == {}


def test_a_hook_does_not_change_fused_weights() -> None:
    made = lorac.compile(adapted("llama"), mode="fused")
    handle = made.host.register_forward_hook(lambda *_: made.swap(None))
    with pytest.raises(lorac.Unavailable, match="a running call of this thread uses the weights"):
        made(input_ids=prompts()[0][None])
    handle.remove()
    assert made.active == {"default": 1.0}


def test_baked(model: Any) -> None:
    baked = lorac.compile(adapted("llama"), mode="baked")
    row = prompts()[0][None]
    expected = model.generate(row, **GREEDY)
    for made in (baked, over(baked)):
        assert torch.equal(made.generate(row, **GREEDY), expected)
        with pytest.raises(lorac.Unavailable):
            made.generate(row, **GREEDY, adapters=None)


def test_a_failed_step_leaves_the_cache_unchanged(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt comes in pieces, of which the second fails."""
    answer = model.generate(prompts()[0][None], **GREEDY, return_dict_in_generate=True)
    told = torch.cat([answer.sequences, torch.randint(3, 96, (1, 9))], 1)
    expected, held = model.generate(told, **GREEDY), answer.cache.cache.lengths
    program = type(model.switch.state.bound)
    honest, calls = program.decode, iter([True, False])

    def failing(*given: Any) -> Any:
        if not next(calls, False):
            raise MemoryError
        return honest(*given)

    with monkeypatch.context() as patch:
        patch.setattr(program, "decode", failing)
        with pytest.raises(MemoryError):
            model.generate(told, **GREEDY, cache=answer.cache, prefill_chunk_size=4)
    assert answer.cache.cache.lengths == held
    assert torch.equal(model.generate(told, **GREEDY, cache=answer.cache), expected)


def test_draws_on_one_thread_and_leaves_torch_its_threads(model: Any) -> None:
    """torch's other threads spin after each operator, on the cores that the engine computes on."""
    seen, threads = list[int](), torch.get_num_threads()

    def note(texts: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return scores

    options = {"max_new_tokens": 2, "do_sample": False, "logits_processor": [note]}
    torch.set_num_threads(2)
    try:
        model.generate(prompts(1, (4,))[0][None], **options)
        with lorac.Scheduler(model, rows=1, chunk=4) as scheduler:
            list(scheduler.submit(lorac.TextRequest(prompts(1, (4,))[0], options=options)))
        assert (seen, torch.get_num_threads()) == ([1] * 4, 2)
    finally:
        torch.set_num_threads(threads)
