"""Requests with images: a row of a running batch gets the tokens that ``generate`` gives it alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.runtime.scheduling.token_stream import TextRequest
from lorac.testing import assert_close
from tests.image_models import IMAGE, PIXELS, batch, made, opposite, row
from tests.refusing import refuses

FAMILY = "qwen2_5_vl"
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
CHOICES: list[Any] = ["one", "two", None]


@pytest.fixture(scope="module")
def compiled() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "forward reads 'image_grid_thw' as numbers", lorac.LoracWarning)
        return lorac.compile(
            made(FAMILY), target="onnxruntime", active=None, cache=True, example_inputs=batch(FAMILY, (3, 3), seed=7)
        )


@pytest.fixture
def scheduler(compiled: Any) -> Iterator[lorac.Scheduler]:
    with lorac.Scheduler(compiled, rows=4, chunk=3) as running:
        yield running


def _request(alone: dict[str, Tensor], adapters: Any, **more: Any) -> TextRequest:
    images = {name: value for name, value in alone.items() if name not in {"input_ids", "attention_mask"}}
    return TextRequest(alone["input_ids"][0], adapters, options={**GREEDY, **images}, **more)


def _alone(compiled: Any, alone: dict[str, Tensor], adapters: Any) -> list[int]:
    found = compiled.generate(**alone, adapters=adapters, **GREEDY)
    return found[0, alone["input_ids"].shape[1] :].tolist()


def _tokens(stream: Any) -> list[int]:
    return [token.id for token in stream]


@pytest.mark.medium("chunks of prompts are those of generate's, but for this cut")
@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
def test_chunks_divide_no_tokens_that_see_each_other(family: str) -> None:
    compiled = lorac.compile(
        made(family), target="onnxruntime", active=None, cache=True, example_inputs=batch(family, (3, 3), seed=7)
    )
    rows = [row(batch(family), place) for place in range(3)]
    expected = [_alone(compiled, alone, "one") for alone in rows]
    with lorac.Scheduler(compiled, rows=4, chunk=3) as running:
        assert [_tokens(stream) for stream in running.submit_all([_request(one, "one") for one in rows])] == expected


def test_rows_with_images_and_without_run_together(compiled: Any, scheduler: lorac.Scheduler) -> None:
    rows = [row(batch(FAMILY), place) for place in range(3)]
    text = {"input_ids": torch.tensor([[7, 8, 9, 10, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    asked = [*zip(rows, CHOICES, strict=True), (text, "two")]
    expected = [_alone(compiled, *one) for one in asked]
    streams = scheduler.submit_all([_request(*one) for one in asked])
    assert [_tokens(stream) for stream in streams] == expected
    assert len({*map(tuple, expected)}) == 4


def test_cached_prompts_are_found_by_their_images(
    compiled: Any, scheduler: lorac.Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = row(batch(FAMILY), 1), row(opposite(FAMILY), 1)
    expected, prompts, hits = [_alone(compiled, one, "one") for one in (first, other)], scheduler._batch.prompts, []
    assert expected[0] != expected[1] and prompts is not None
    find = prompts.find

    def noted(*given: Any) -> Any:
        found = find(*given)
        hits.append(0 if found is None else found.lengths[0])
        return found

    monkeypatch.setattr(prompts, "find", noted)
    for one, place in ((first, 0), (other, 1), (first, 0)):
        assert _tokens(scheduler.submit(_request(one, "one"))) == expected[place]
    assert hits == [0, first["input_ids"][0].tolist().index(IMAGE), first["input_ids"].shape[1] - 1]


def test_text_behind_the_beginning_of_a_prompt_with_an_image_has_its_own_positions(compiled: Any) -> None:
    image = row(batch(FAMILY), 2)
    ids = torch.cat([image["input_ids"][:, :1], torch.tensor([[7, 8, 9]])], 1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"adapters": "one", "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    expected, prompts = compiled.generate(**text, **options), lorac.PromptCache()
    compiled.generate(**image, adapters="one", prompt_cache=prompts, **GREEDY)
    found = compiled.generate(**text, prompt_cache=prompts, **options)
    for logits, others in zip(found.logits, expected.logits, strict=True):
        assert_close(logits, others)


def test_a_request_that_was_interrupted_goes_on(compiled: Any, scheduler: lorac.Scheduler) -> None:
    one = row(batch(FAMILY), 0)
    whole = _alone(compiled, one, "two")
    begun = {**one, "input_ids": torch.cat([one["input_ids"], torch.tensor([whole[:3]])], 1)}
    assert _tokens(scheduler.submit(_request(begun, "two", drawn=3))) == whole[3:]


def test_rejects_other_numbers_of_placeholders(scheduler: lorac.Scheduler) -> None:
    one = row(batch(FAMILY), 0)
    ids = one["input_ids"].clone()
    ids[0, ids[0].tolist().index(IMAGE)] = 9
    with refuses("input_mismatch", match="3 tokens for images, and pixel_values= gives 4 features"):
        _tokens(scheduler.submit(_request({**one, "input_ids": ids}, "one")))
    missing = {name: value for name, value in one.items() if name != "image_grid_thw"}
    with refuses("input_mismatch", match="gives pixel_values and no image_grid_thw"):
        scheduler.submit(_request(missing, "one"))
    with pytest.raises(lorac.LoracError, match="pixel_mask"):
        scheduler.submit(_request({**one, "pixel_mask": one[PIXELS]}, "one"))
