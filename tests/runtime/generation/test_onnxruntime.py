"""Over ONNX Runtime's caches: the tokens of PEFT, for every family, mode and option."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.frontend.capture.decoder_families import get_longest_sequence
from lorac.testing import assert_close
from tests.decoders import ONE_ROW_EACH, VOCABULARY
from tests.refusing import refuses
from tests.runtime.generation.test_artifacts import words
from tests.runtime.generation.texts import FAMILIES, LENGTHS, WRITTEN_OUT, adapted, padded, prompts

WIDTH = max(LENGTHS)
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "llama"]


def _reference(family: str) -> Any:
    return copy.deepcopy(adapted(family)).float()


def _made(peft: Any, mode: str = "live") -> Any:
    return lorac.compile(peft, target="onnxruntime", mode=mode, cache=True, self_test=False)


@pytest.mark.parametrize("family", ["llama", *SLOW])
def test_generates_as_peft(family: str, tmp_path: Path) -> None:
    peft = _reference(family)
    check_generates_as_peft(_made(peft), peft, tmp_path)


def check_generates_as_peft(made: Any, peft: Any, tmp_path: Path) -> None:
    """Batches padded on either side, beams, draws, pieces, rows of their own, drafts, prefixes; and once loaded."""
    rows = prompts()
    batch, right = padded(rows, "left"), padded(rows, "right")
    expected = peft.generate(**batch, **GREEDY)
    with peft.disable_adapter():
        base = peft.generate(**batch, **GREEDY)
    assert torch.equal(made.generate(**batch, **GREEDY), expected)
    assert torch.equal(made.generate(**right, **GREEDY)[:, WIDTH:], expected[:, WIDTH:])
    assert torch.equal(made.generate(**batch, **GREEDY, adapters=None), base)
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"eos_token_id": list(range(20, 60))},
    ):
        torch.manual_seed(3)
        drawn = peft.generate(**batch, **{**GREEDY, **options})
        assert torch.equal(made.generate(**batch, **{**GREEDY, **options}, seed=3), drawn), options
    mixed = made.generate(**batch, **GREEDY, adapters=["default", None, "default", None])
    for place, row in enumerate(mixed):
        assert torch.equal(row, (base if place % 2 else expected)[place])
    assert torch.equal(made.generate(**batch, **GREEDY, draft=None), expected)
    cache = lorac.PromptCache()
    for _ in range(2):
        assert torch.equal(made.generate(**batch, **GREEDY, prompt_cache=cache), expected)
    assert 0 < cache.used <= cache.bytes
    made.save(tmp_path / "text", tokenizer=words())
    loaded = lorac.load(tmp_path / "text")
    assert torch.equal(loaded.generate(**batch, **GREEDY), expected)
    stop = loaded.tokenizer.decode(expected[0, WIDTH + 2 : WIDTH + 3])
    assert loaded.generate(rows[0][None], **GREEDY, stop_strings=[stop]).shape[1] <= WIDTH + 3


@pytest.mark.slow
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_attention_that_is_written_out_generates_as_peft_does(family: str) -> None:
    peft = _reference(family)
    made, batch, right = _made(peft), padded(prompts(), "left"), padded(prompts(), "right")
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = peft.generate(**batch, **{**GREEDY, **options})
        assert torch.equal(made.generate(**batch, **{**GREEDY, **options}), expected), options
        assert torch.equal(made.generate(**right, **{**GREEDY, **options})[:, WIDTH:], expected[:, WIDTH:])
    with peft.disable_adapter():
        base = peft.generate(**batch, **GREEDY)
    assert torch.equal(made.generate(**batch, **GREEDY, adapters=None), base)
    assert not torch.equal(base, peft.generate(**batch, **GREEDY))


@pytest.mark.medium("passes/test_cache_attention.py compares the parts of their sequences")
@pytest.mark.slow("a short one", keep=["falcon, slopes"])
@pytest.mark.parametrize("family", ONE_ROW_EACH)
def test_families_of_one_row_generate_as_the_model_does(family: str) -> None:
    host = ONE_ROW_EACH[family]().float()
    compiled = lorac.compile(host, target="onnxruntime", cache=True)
    settings = {**GREEDY, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    expected, found = host.generate(ids, **settings), compiled.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_choice_of_tokens_bounds_the_sequence() -> None:
    """Up to there a module chooses all of them."""
    assert get_longest_sequence(ONE_ROW_EACH["deepseek_v32"]()) == 48
    assert get_longest_sequence(ONE_ROW_EACH["falcon, slopes"]()) == 64


def test_rejects_an_example_of_which_tokens_are_chosen() -> None:
    host, ids = ONE_ROW_EACH["deepseek_v32"](), torch.full((2, 49), 5)
    with refuses("unavailable", match=r"attends to only 48 \(index_topk\) of the example's 49 tokens"):
        lorac.compile(host, target="onnxruntime", cache=True, example_inputs={"input_ids": ids})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_merged(mode: str) -> None:
    peft = _reference("llama")
    made, batch = _made(peft, mode), padded(prompts(), "left")
    assert torch.equal(made.generate(**batch, **GREEDY), peft.generate(**batch, **GREEDY))


@pytest.mark.slow
def test_positions_end() -> None:
    """GPT-2 has learned 64 of them: the last token that is made needs none."""
    made, row = _made(_reference("gpt2")), prompts()[0][None]
    assert made.generate(row, max_new_tokens=56, do_sample=False, eos_token_id=None).shape[1] == 65
    with pytest.raises(lorac.InputMismatch, match="more than the model has positions for: 64"):
        made.generate(row, max_new_tokens=57)


@pytest.fixture(scope="module")
def small(llama_folder: Path) -> Any:
    """Return a model with few positions, and its table of angles."""
    return lorac.load(llama_folder)


@pytest.mark.medium("padded rows of a Llama")
def test_padding_may_exceed_the_table_of_positions(small: Any) -> None:
    """One row is known up to its last token, and the other brings more than there are positions left in the first."""
    rows, cache = prompts(0, (60, 40)), lorac.PromptCache()
    small.generate(rows[0][None], **GREEDY | {"max_new_tokens": 2}, prompt_cache=cache, eos_token_id=None)
    told = {**padded(rows, "right"), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(small.generate(**told, prompt_cache=cache), small.generate(**told))


def test_accepts_a_call_of_one_token(small: Any) -> None:
    ids = torch.tensor([[5, 6], [7, 6]])
    whole = small(input_ids=ids).logits
    assert_close(small(input_ids=ids[:, :1]).logits, whole[:, :1])
    assert torch.equal(small.generate(ids[:1, :1], max_new_tokens=1, do_sample=False)[0, 1], whole[0, 0].argmax())


def test_a_call_without_numbers(small: Any) -> None:
    for value in ("a text", ["a"], [[3, 4], [5]]):
        with refuses("choice_error", match="'input_ids' is not an array of numbers"):
            small(input_ids=value)
    assert small(input_ids=[[3, 4]]).logits.shape == (1, 2, VOCABULARY)


def test_accepts_a_row_of_padding_only(small: Any) -> None:
    ids, mask = torch.full((2, 3), 5), torch.tensor([[0, 0, 0], [1, 1, 1]])
    answer = small(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(answer[1], small(input_ids=ids).logits[1])
    assert not answer[0].any()


def test_a_call_ends_where_positions_do(small: Any) -> None:
    ids = torch.full((1, 65), 5)
    assert small(input_ids=ids[:, 1:]).logits.shape == (1, 64, VOCABULARY)
    with pytest.raises(lorac.InputMismatch, match="65 tokens are more than the model has positions for: 64"):
        small(input_ids=ids)
