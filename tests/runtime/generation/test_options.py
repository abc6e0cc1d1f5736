"""Each option of transformers' generate is honoured over a cache, or refused: none is accepted and ignored."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import lorac
from lorac.runtime.generation.option_support import MISPLACED, REFUSED
from lorac.runtime.generation.request import translate_errors
from tests.refusing import refuses
from tests.runtime.generation.recompute import over
from tests.runtime.generation.test_artifacts import words
from tests.runtime.generation.texts import adapted, compiled, padded, prompts

PLAIN = {"max_new_tokens": 4, "do_sample": False}
DRAWN = {"max_new_tokens": 4, "do_sample": True, "seed": 5}
AHEAD = {"max_new_tokens": 6, "do_sample": False, "prompt_lookup_num_tokens": 3}

HONOURED: dict[str, dict[str, Any]] = {
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 60))},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 60)]},
    "bos_token_id": {"bos_token_id": 5},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    "disable_compile": {"disable_compile": True},
    "do_sample": DRAWN,
    "early_stopping": {"num_beams": 3, "early_stopping": True},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "eos_token_id": {"eos_token_id": list(range(20, 60))},
    "epsilon_cutoff": {**DRAWN, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**DRAWN, "eta_cutoff": 0.02},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 9.0)},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "guidance_scale": {"guidance_scale": 1.5},
    "length_penalty": {"num_beams": 3, "length_penalty": -2.0},
    "max_length": {"max_length": 11, "max_new_tokens": None},
    "max_matching_ngram_size": {**AHEAD, "max_matching_ngram_size": 1},
    "max_new_tokens": {"max_new_tokens": 2},
    "max_time": {"max_time": 0.0},
    "min_length": {"min_length": 13, "eos_token_id": list(range(20, 60))},
    "min_new_tokens": {"min_new_tokens": 3, "eos_token_id": list(range(20, 60))},
    "min_p": {**DRAWN, "min_p": 0.3},
    "negative_prompt_attention_mask": {
        "guidance_scale": 1.5,
        "negative_prompt_ids": torch.full((2, 3), 9),
        "negative_prompt_attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    },
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": torch.full((2, 3), 9)},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "num_beams": {"num_beams": 2},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "pad_token_id": {"pad_token_id": 4, "eos_token_id": list(range(20, 60))},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7]},
    "prompt_lookup_num_tokens": AHEAD,
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "num_beams": 2, "repetition_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "sequence_bias": {"sequence_bias": [[[5], 9.0]]},
    "stop_strings": {"stop_strings": ["w3", "w4", "w5"], "tokenizer": words()},
    "suppress_tokens": {"suppress_tokens": list(range(3, 60))},
    "temperature": {**DRAWN, "temperature": 3.0},
    "tokenizer": {"stop_strings": ["w6"], "tokenizer": words()},
    "top_h": {**DRAWN, "top_h": 0.4},
    "top_k": {**DRAWN, "top_k": 3},
    "top_p": {**DRAWN, "top_p": 0.4},
    "transformers_version": {"transformers_version": "5.0"},
    "typical_p": {**DRAWN, "typical_p": 0.4},
    "watermarking_config": {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 5.0}},
}
"""Option -> a call that uses it."""
ELSEWHERE = {
    *("assistant_model", "generation_config", "inputs", "logits_processor", "stopping_criteria", "streamer"),
    *("output_logits", "output_scores", "return_dict_in_generate", "token_healing"),
    # Read from the configuration of an assistant, or of one with another tokenizer.
    *("assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_ensemble_weight", "assistant_lookbehind", "assistant_tokenizer", "target_lookbehind"),
}
"""Options that other tests use."""


def _transformers_options() -> set[str]:
    import transformers

    arguments = {*inspect.signature(transformers.GenerationMixin.generate).parameters} - {"self", "kwargs"}
    fields = {name for name in vars(transformers.GenerationConfig()) if name[0] != "_"}
    return arguments | fields | {"tokenizer", "assistant_tokenizer", "trust_remote_code"}


def test_every_option_of_transformers_is_known() -> None:
    """An option that a new release of transformers adds fails here, until it is honoured or refused."""
    assert _transformers_options() - REFUSED.keys() == HONOURED.keys() | ELSEWHERE
    assert not (HONOURED.keys() | ELSEWHERE) & (REFUSED.keys() | MISPLACED.keys())


@pytest.mark.parametrize("name", HONOURED)
def test_an_option_is_honoured(name: str) -> None:
    options = {**PLAIN, **HONOURED[name]}
    lengths = (9,) if "prompt_lookup_num_tokens" in options else (9, 4)
    batch = padded(prompts(0, lengths), "left")
    torch.manual_seed(options.pop("seed", 5))
    expected = adapted("llama").generate(**batch, **options)
    assert torch.equal(over(compiled("llama")).generate(**batch, seed=5, **options), expected)


ASKED: dict[str, Any] = {
    **dict.fromkeys(REFUSED, True),
    **{"use_cache": False, "cache_implementation": "static", "cache_config": {"nbits": 4}, "max_cache_len": 64},
    **{"num_beam_groups": 2, "diversity_penalty": 0.5, "penalty_alpha": 0.6, "dola_layers": "low"},
    **{"inputs_embeds": torch.ones(1, 9, 64), "position_ids": torch.arange(9)[None]},
    **{"labels": torch.ones(1, 9).long(), "logits_to_keep": 1},
    **dict.fromkeys(MISPLACED, torch.ones(1, 9).long()),
}


@pytest.mark.parametrize("name", ASKED)
def test_rejects_unsupported_options(name: str) -> None:
    import transformers

    model, row = over(compiled("llama")), prompts()[0][None]
    with refuses("unavailable", match=f"{name}= "):
        model.generate(row, **PLAIN, **{name: ASKED[name]})
    if name in vars(transformers.GenerationConfig()) and name != "continuous_batching_config":
        config = transformers.GenerationConfig(max_new_tokens=2)
        setattr(config, name, ASKED[name])
        with refuses("unavailable", match=f"{name}= "):
            model.generate(row, generation_config=config)


@pytest.mark.medium("each option, one by one")
def test_accepts_neutral_values_of_unsupported_options() -> None:
    model, row = over(compiled("llama")), prompts()[0][None]
    expected = model.generate(row, **PLAIN)
    for name, refusal in REFUSED.items():
        for value in (None, *refusal.neutral):
            assert torch.equal(model.generate(row, **PLAIN, **{name: value}), expected), name


def test_an_error_inside_transformers_is_not_called_a_refusal() -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, _get_ngrams

    with refuses("input_mismatch", match=r"fails at .*logits_process\.py:\d+ in this call: 'NoneType'"):
        translate_errors(lambda: _get_ngrams(2, None, 1))  # type: ignore[arg-type]  # as a model without ids gives it
    with refuses("input_mismatch", match="refuses this call: `temperature`"):
        translate_errors(lambda: TemperatureLogitsWarper(-1.0))


def test_says_that_transformers_has_no_search_step_by_step() -> None:
    with refuses("unavailable", match="low_memory= asks for a beam search step by step"):
        over(compiled("llama")).generate(prompts()[0][None], **PLAIN, num_beams=2, low_memory=True)


def test_the_models_own_generation_names_the_cache() -> None:
    with refuses("unavailable", match="cache= in transformers"):
        compiled("llama").generate(prompts()[0][None], **PLAIN, past_key_values=object())


# ── Drafts ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(params=["eager", "cached"])
def model(request: pytest.FixtureRequest) -> Any:
    return compiled("llama") if request.param == "eager" else over(compiled("llama"))


@pytest.mark.medium("test_generate.py: a draft changes no token; two other drafts; over a cache")
@pytest.mark.parametrize("draft", ["default", None, {"default": 0.95}], ids=["itself", "base", "nearly"])
def test_a_draft_stops_where_the_model_does(draft: Any, model: Any) -> None:
    """At a stop string and at a criterion, whichever of the drafted tokens it is."""
    row, tokenizer = prompts()[0][None], words()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = model.generate(row, **options)
    for place in (10, 12, 15):
        last = int(whole[0, place])
        for stop in (
            {"stop_strings": [tokenizer.decode([last])], "tokenizer": tokenizer},
            {"stopping_criteria": [lambda ids, scores, last=last: torch.tensor([bool(ids[0, -1] == last)])]},
        ):
            expected = model.generate(row, **options, **stop)
            assert expected.shape[1] <= place + 1
            assert torch.equal(model.generate(row, **options, **stop, draft=draft), expected)


def test_a_sampling_draft_rejects_stop_strings(model: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": True, "stop_strings": ["w3"], "tokenizer": words()}
    with refuses("unavailable", match="several sampled tokens"):
        model.generate(prompts()[0][None], **options, draft=None)


def test_an_assistant_rejects_stop_strings(model: Any) -> None:
    options = {**PLAIN, "stop_strings": ["w3"], "tokenizer": words()}
    with refuses("unavailable", match="has no tokenizer there"):
        model.generate(prompts()[0][None], **options, assistant_model=adapted("llama"))


def test_a_draft_has_the_requested_length() -> None:
    model = over(compiled("llama"))
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "draft": "default"}
    for count in (1, 4):
        own = {"num_assistant_tokens": count, "num_assistant_tokens_schedule": "constant"}
        model.engine.fed.clear()
        model.generate(prompts()[0][None], **options, **own, assistant_confidence_threshold=0.0)
        assert max(tokens for (tokens,) in model.engine.fed if tokens < 9) == count + 1  # 9: the prompt


@pytest.mark.parametrize("ids", ["a text", [[3, 4], [5, 6]], [3, 4], ["a", "b"]], ids=str)
def test_rejects_inputs_that_are_not_a_batch_of_ids(ids: Any, model: Any) -> None:
    for given in ({"inputs": ids}, {"input_ids": ids}):
        with pytest.raises(lorac.WrongType, match="not a batch of tokens"):
            model.generate(**given, **PLAIN)
