"""Generation equals that of transformers and PEFT, by the model itself and over the cache contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorac
from tests.runtime.generation.recompute import over
from tests.runtime.generation.texts import FAMILIES, LENGTHS, adapted, compiled, padded, prompts

NEW = 10
WIDTH = max(LENGTHS)


@pytest.fixture(scope="module", params=["eager", "cached"])
def model(request: pytest.FixtureRequest) -> Any:
    return compiled("llama") if request.param == "eager" else over(compiled("llama"))


@pytest.mark.medium("a Llama, and test_options.py's texts", keep=["llama"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_peft(family: str) -> None:
    """One prompt; and a batch, padded on either side, each of whose rows gives what it gives alone."""
    peft, eager = adapted(family), compiled(family)
    rows = prompts()
    batch = padded(rows, "left")
    expected = peft.generate(**batch, max_new_tokens=NEW, do_sample=False)
    alone = peft.generate(input_ids=rows[0][None], max_new_tokens=NEW, do_sample=False)
    with peft.disable_adapter():
        base = peft.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(base, expected)
    for made in (eager, over(eager)):
        assert torch.equal(made.generate(rows[0][None], max_new_tokens=NEW, do_sample=False), alone)
        assert torch.equal(made.generate(**batch, max_new_tokens=NEW, do_sample=False), expected)
        assert torch.equal(made.generate(**batch, max_new_tokens=NEW, do_sample=False, adapters=None), base)
        right = padded(rows, "right")
        answer = made.generate(**right, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(answer[:, :WIDTH], right["input_ids"])
        assert torch.equal(answer[:, WIDTH:], expected[:, WIDTH:])


OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams that return several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beams that draw": {"num_beams": 2, "do_sample": True},
    "several drawn": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.8, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "many ends": {"eos_token_id": list(range(20, 60)), "min_new_tokens": 2},
    "forced": {"forced_eos_token_id": 7, "suppress_tokens": [5, 6, 9], "bad_words_ids": [[11, 12]]},
    "in pieces": {"prefill_chunk_size": 4},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.medium(
    "beams, and what is drawn, cut and guided; over a cache", keep=["cached-beams", "cached-nucleus", "cached-guided"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_transformers(name: str, model: Any) -> None:
    batch, options = padded(prompts(), "left"), OPTIONS[name]
    torch.manual_seed(3)
    expected = adapted("llama").generate(**batch, max_new_tokens=NEW, **{"do_sample": False, **options})
    before = torch.get_rng_state()
    answer = model.generate(**batch, max_new_tokens=NEW, seed=3, **{"do_sample": False, **options})
    assert torch.equal(answer, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.medium("over a cache", cases=["eager"])
def test_without_a_seed_the_random_numbers_are_torchs(model: Any) -> None:
    batch = padded(prompts(), "left")
    torch.manual_seed(8)
    expected = adapted("llama").generate(**batch, max_new_tokens=NEW, do_sample=True)
    after = torch.get_rng_state()
    torch.manual_seed(8)
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=True), expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.medium("one row over a cache", keep=["cached-1"])
@pytest.mark.parametrize("beams", [1, 2])
def test_seeds_by_row(beams: int, model: Any) -> None:
    """Each row is drawn as if it was alone, whatever is beside it."""
    rows, seeds = prompts(), [4, 4, 9, 2**40]
    options = {"max_new_tokens": NEW, "do_sample": True, "num_beams": beams}
    answer = model.generate(**padded(rows, "right"), seed=seeds, **options)
    for row, seed, given in zip(rows, seeds, answer, strict=True):
        alone = model.generate(row[None], seed=seed, **options)[0, len(row) :]
        own = given[WIDTH:]
        assert torch.equal(own[: len(alone)], alone)
        assert not own[len(alone) :].any()


@pytest.mark.medium("over a cache", cases=["eager"])
def test_returns_scores_and_logits_as_transformers(model: Any) -> None:
    """Scores and logits of every step, as far as a row goes on; transition scores are computed from them."""
    rows = prompts()
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": NEW}
    expected = adapted("llama").generate(**padded(rows, "left"), do_sample=False, temperature=None, **told)
    answer = model.generate(**padded(rows, "left"), do_sample=False, **told)
    assert torch.equal(answer.sequences, expected.sequences)
    assert len(answer.scores) == len(answer.logits) == len(expected.scores)
    ends = (expected.sequences[:, WIDTH:] == 2).int().cumsum(1) - (expected.sequences[:, WIDTH:] == 2).int() == 0
    for step, (own, other) in enumerate(zip(answer.logits, expected.logits, strict=True)):
        assert torch.equal(own[ends[:, step]].argmax(-1), other[ends[:, step]].argmax(-1))


@pytest.mark.medium("over a cache", cases=["eager"])
def test_returns_scores_of_beams_as_transformers(model: Any) -> None:
    told = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3, "max_new_tokens": NEW}
    expected = adapted("llama").generate(**padded(prompts(), "left"), do_sample=False, **told)
    answer = model.generate(**padded(prompts(), "left"), do_sample=False, **told)
    assert torch.equal(answer.sequences, expected.sequences)
    assert torch.equal(answer.beam_indices, expected.beam_indices)


class _Collected:
    """A streamer that collects its tokens."""

    def __init__(self) -> None:
        self.put_in: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.put_in.append(value.clone())

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token(model: Any) -> None:
    streamer = _Collected()
    row = prompts()[0][None]
    answer = model.generate(row, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat([part.flatten() for part in streamer.put_in]), answer[0])
    assert streamer.ended


def test_returns_numpy_for_numpy(model: Any) -> None:
    batch = padded(prompts(), "left")
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    answer = model.generate(**{name: t.numpy() for name, t in batch.items()}, max_new_tokens=4, do_sample=False)
    assert isinstance(answer, np.ndarray)
    assert np.array_equal(answer, expected.numpy())


@pytest.mark.medium("over a cache", cases=["eager"])
def test_infers_padding_as_transformers(model: Any) -> None:
    """Without a mask, by its id, unless that ends a text too."""
    ids = padded(prompts(), "left")["input_ids"]
    for options in ({}, {"pad_token_id": 2}):
        expected = adapted("llama").generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **options)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **options), expected)


CHOICES: list[lorac.ir.slots.choice.ChoiceSpec] = ["default", None, {"default": 0.5}, None]


@pytest.mark.medium("greedy rows; over a cache", cases=["cached-beams", "eager-*"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_rows_choose_their_own_adapters(options: dict[str, Any], model: Any) -> None:
    rows = prompts()
    told = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    answer = model.generate(**padded(rows, "right"), adapters=CHOICES, **told, **options)
    each, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    for place, (row, choice) in enumerate(zip(rows, CHOICES, strict=True)):
        alone = model.generate(row[None], adapters=choice, **told, **options)
        new = alone.sequences[:, len(row) :]
        assert torch.equal(answer.sequences[place * each : (place + 1) * each, WIDTH:][:, : new.shape[1]], new)
        scores = answer.scores[0][place * beams : (place + 1) * beams]
        assert torch.equal(scores.argmax(-1), alone.scores[0].argmax(-1))
        if beams > 1:
            steps = alone.beam_indices.shape[1]
            own = answer.beam_indices[place * each : (place + 1) * each, :steps]
            assert torch.equal(own, torch.where(alone.beam_indices < 0, -1, alone.beam_indices + place * beams))
    assert model.active == {"default": 1.0}


@pytest.mark.medium("a draft at half the strength; over a cache", cases=["cached-base", "eager-*"])
@pytest.mark.parametrize("draft", [None, {"default": 0.5}], ids=["base", "half"])
def test_a_draft_changes_no_token(draft: Any, model: Any) -> None:
    rows = prompts()
    expected = model.generate(**padded(rows, "left"), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        model.generate(**padded(rows, "left"), max_new_tokens=NEW, do_sample=False, draft=draft), expected
    )
    assert model.active == {"default": 1.0}


@pytest.mark.medium("over a cache", cases=["eager"])
def test_a_seed_determines_sampling_with_a_draft(model: Any) -> None:
    row = prompts()[0][None]
    told = {"max_new_tokens": NEW, "do_sample": True, "draft": {"default": 0.5}}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = model.generate(row, seed=5, **told)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(model.generate(row, seed=5, **told), first)
    others = [model.generate(row, seed=seed, **told) for seed in (6, 7, 8)]
    assert not all(other.shape == first.shape and torch.equal(other, first) for other in others)
    batch = padded(prompts(), "left")
    whole = model.generate(**batch, seed=[5, 6, 7, 8], **told)
    assert torch.equal(whole[0, : first.shape[1]], first[0])


@pytest.mark.medium("eager, and drafts over a cache", cases=["cached"])
def test_accepts_assistant_models_of_transformers(model: Any) -> None:
    import transformers

    torch.manual_seed(1)
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    row = prompts()[0][None]
    expected = model.generate(row, max_new_tokens=NEW, do_sample=False)
    for own in ({"assistant_model": small}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(row, max_new_tokens=NEW, do_sample=False, **own), expected)
