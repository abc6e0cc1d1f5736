"""Rows that draw together, each by options of its own, get the tokens that each gets from ``generate`` alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria

from lorac.runtime.generation.driver import take_likeliest
from lorac.runtime.generation.row_processors import RowProcessors
from lorac.runtime.generation.row_sampler import BatchSampler, RowSampler
from lorac.target.kv_cache import DecodeStep
from tests.refusing import refuses
from tests.runtime.generation.recompute import over
from tests.runtime.generation.texts import compiled, prompts

ROWS = 12
SAMPLED: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model() -> Any:
    return over(compiled("llama"))


def some_options(generator: random.Random) -> dict[str, Any]:
    """Options of one request, chosen at random."""
    options: dict[str, Any] = {"max_new_tokens": generator.randrange(2, 12), "do_sample": generator.random() < 0.7}
    if options["do_sample"]:
        choices = {"temperature": [0.5, 0.9, 1.4], "top_k": [1, 5, 40, 500], "top_p": [0.3, 0.8, 0.95], "min_p": [0.05]}
        options |= {name: generator.choice(values) for name, values in choices.items() if generator.random() < 0.6}
        options |= {"typical_p": 0.7} if generator.random() < 0.2 else {}
    options |= {"repetition_penalty": generator.choice([1.2, 1.7])} if generator.random() < 0.5 else {}
    options |= {"no_repeat_ngram_size": 2, "min_new_tokens": 3} if generator.random() < 0.3 else {}
    options |= {"eos_token_id": list(range(20, 50))} if generator.random() < 0.5 else {}
    return options


@torch.no_grad()
def test_rows_with_different_options_sample_as_alone(model: Any) -> None:
    generator = random.Random(1)
    options = [some_options(generator) for _ in range(ROWS)]
    texts = prompts(3, tuple(generator.randrange(1, 9) for _ in range(ROWS)))
    expected = [model.generate(ids[None], seed=row, **options[row])[0] for row, ids in enumerate(texts)]
    rows = [RowSampler(model, ids, row, **options[row]) for row, ids in enumerate(texts)]
    cache = model.engine.new_cache("main", ROWS, 32)
    ended: dict[int, torch.Tensor] = {}
    running, batch = list(range(ROWS)), BatchSampler(rows)
    while running:
        new = [texts[row][length:] for row, length in zip(running, cache.lengths, strict=True)]
        counts = [len(ids) for ids in new]
        ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        step = DecodeStep(ids=ids, counts=counts, wanted=torch.tensor(counts)[:, None] - 1)
        tokens = batch.draw([texts[row] for row in running], model.switch.state.bound.decode("main", cache, step)[:, 0])
        for row, token in zip(running, tokens, strict=True):
            texts[row] = torch.cat([texts[row], token[None]])
        done = {place for place, row in enumerate(running) if rows[row].ends(texts[row])}
        ended |= {running[place]: texts[running[place]] for place in done}
        running = [running[place] for place in cache.remove(done)]
        batch = BatchSampler([rows[row] for row in running]) if done else batch
    for row, text in enumerate(expected):
        assert torch.equal(ended[row], text), options[row]
        assert len(text) <= rows[row].criteria.most


def test_ends_as_transformers_criteria_do_without_calling_them(model: Any) -> None:
    (ids,) = prompts(3, (6,))
    plain = RowSampler(model, ids, max_new_tokens=5, eos_token_id=[20, 21])
    custom = RowSampler(model, ids, max_new_tokens=5, eos_token_id=[20], stopping_criteria=[MaxLengthCriteria(9)])
    assert [(row.criteria.others, row.criteria.most) for row in (plain, custom)] == [([], 11), ([], 9)]
    texts = [torch.full((length,), last) for length in (7, 8, 9, 10, 11) for last in (3, 20, 21)]
    ends = [(len(text) > 10 or text[-1] > 3, len(text) > 8 or text[-1] == 20) for text in texts]
    assert [(plain.ends(text), custom.ends(text)) for text in texts] == ends


def test_runs_processors_of_one_class_once_for_all_rows(model: Any) -> None:
    generator = random.Random(2)
    scores = torch.randn(ROWS, 96)
    texts = prompts(4, tuple(generator.randrange(1, 9) for _ in range(ROWS)))
    names: dict[str, list[Any]] = {"temperature": [0.3, 0.7, 1.1], "top_k": [3, 9, 200], "top_p": [0.5, 0.9]}
    options: list[dict[str, Any]] = [
        {**{n: generator.choice(v) for n, v in names.items()}, **SAMPLED, "repetition_penalty": 1.1 + row / 10}
        for row in range(ROWS)
    ]
    rows = [RowSampler(model, text, **own).processors for text, own in zip(texts, options, strict=True)]
    together = RowProcessors(rows)
    assert len(together._stages) == 4
    apart = [row(text[None], own[None])[0] for row, text, own in zip(rows, texts, scores, strict=True)]
    assert torch.equal(together(texts, scores), torch.stack(apart))


def test_runs_custom_processors_per_row_in_order(model: Any) -> None:
    calls: list[tuple[int, ...]] = []

    def boost(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(ids.shape))
        return scores + (ids.sum() % 7)

    texts = prompts(5, (3, 6))
    rows = [RowSampler(model, text, logits_processor=[boost], top_k=4, **SAMPLED).processors for text in texts]
    scores = torch.randn(2, 96)
    apart = [row(text[None], own[None])[0] for row, text, own in zip(rows, texts, scores, strict=True)]
    calls.clear()
    assert torch.equal(RowProcessors(rows)(texts, scores), torch.stack(apart))
    assert sorted(calls) == [(1, 3), (1, 6)]


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("unavailable", {"num_beams": 2}),
        ("unavailable", {"num_return_sequences": 2, "do_sample": True}),
        ("unavailable", {"prompt_lookup_num_tokens": 2}),
        ("option_error", {"temperatur": 0.5}),
        ("input_mismatch", {"do_sample": True, "temperature": -1.0}),
    ],
    ids=str,
)
def test_rejects_options_that_rows_do_not_support(model: Any, code: str, options: dict[str, Any]) -> None:
    with refuses(code):
        RowSampler(model, prompts()[0], **{"max_new_tokens": 4, **options})


def test_rejects_more_tokens_than_positions() -> None:
    with refuses("input_mismatch", match="positions"):
        RowSampler(over(compiled("llama"), limit=12), prompts()[0], max_new_tokens=8)


def test_the_likeliest_token_is_torchs() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan")])
    scores = values[torch.randint(6, (500, 7), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(take_likeliest(scores), scores.argmax(-1))
    assert torch.equal(take_likeliest(scores[:, ::2]), scores[:, ::2].argmax(-1))
