"""Mistakes with ``generate`` and tokenizers, as those of ``tests/mistakes.py``."""

from __future__ import annotations

from typing import Any

import torch

import lorac
from tests.mistakes import Mistake, World
from tests.runtime.generation.recompute import over
from tests.runtime.generation.test_artifacts import words
from tests.runtime.generation.texts import adapted, compiled, padded, prompts

LIMIT = 16


def hosted(**options: Any) -> Any:
    """Two rows, by the host itself."""
    return compiled("llama").generate(**{**padded(prompts(0, (5, 3)), "left"), "max_new_tokens": 2, **options})


def cached(**options: Any) -> Any:
    """The same over a cache, of a model with few positions."""
    made = over(compiled("llama"), LIMIT)
    return made.generate(**{**padded(prompts(0, (5, 3)), "left"), "max_new_tokens": 2, **options})


def _uncached(w: World) -> Any:
    made = over(compiled("llama"))
    made.engine.spec = None
    return made.generate(prompts()[0][None], max_new_tokens=2)


def _says(what: str) -> Any:
    def check(w: World, said: str) -> None:
        assert what in said

    return check


def _fused(**options: Any) -> Any:
    return lorac.compile(adapted("llama"), mode="fused").generate(prompts()[0][None], max_new_tokens=2, **options)


def _swapped_within(w: World) -> Any:
    model = lorac.compile(adapted("llama"), mode="fused")
    return model.generate(prompts()[0][None], max_new_tokens=2, logits_processor=[lambda *_: model.swap(None)])


class _Words:
    """A streamer that shows nothing."""

    def put(self, ids: Any) -> None:
        """It is not called."""

    def end(self) -> None:
        """It is not called."""


GENERATING = [
    Mistake(
        "text of a model that has none", lambda w: w.eager.generate(torch.tensor([[1, 2]])), _says("can_generate()")
    ),
    Mistake("text of a program without a cache", _uncached, _says("cache=True for target='onnxruntime'")),
    Mistake("no prompt", lambda w: cached(input_ids=None), lambda w, said: cached()),
    Mistake("prompts without a token", lambda w: cached(input_ids=torch.zeros(2, 0).long(), attention_mask=None)),
    Mistake(
        "a row that is all padding",
        lambda w: cached(attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])),
    ),
    Mistake("a mask of another length", lambda w: cached(attention_mask=torch.ones(2, 4))),
    Mistake(
        "ids as lists",
        lambda w: cached(input_ids=[[3, 4], [5, 6]], attention_mask=None),
        lambda w, said: cached(input_ids=torch.tensor([[3, 4], [5, 6]]), attention_mask=None),
    ),
    Mistake(
        "text as a prompt",
        lambda w: hosted(input_ids="Once upon a time", attention_mask=None),
        lambda w, said: hosted(),
    ),
    Mistake("an id that is no token", lambda w: cached(input_ids=torch.full((2, 5), 96))),
    Mistake(
        "more than there are positions for",
        lambda w: cached(max_new_tokens=LIMIT),
        lambda w, said: cached(max_new_tokens=LIMIT + 1 - 5) if "max_new_tokens=12 or less" in said else 1 / 0,
    ),
    Mistake("an option that is misspelt", lambda w: cached(max_new_token=3)),
    Mistake("another library's option", lambda w: hosted(max_tokens=3)),
    Mistake("a text as a stop criterion", lambda w: cached(stopping_criteria=["."]), lambda w, said: cached()),
    Mistake(
        "texts that end it, without a tokenizer",
        lambda w: cached(stop_strings=["."]),
        _says("set compiled.tokenizer"),
    ),
    Mistake("a number of beams that is none", lambda w: cached(num_beams=-1)),
    Mistake("a prompt in pieces of less than a token", lambda w: cached(prefill_chunk_size=-1)),
    Mistake("a prompt in pieces of half a token", lambda w: hosted(prefill_chunk_size=1.5)),
    Mistake("an end as text", lambda w: cached(eos_token_id="</s>")),
    Mistake("a configuration as a dict", lambda w: cached(generation_config={"max_new_tokens": 2})),
    Mistake("a function as a streamer", lambda w: cached(streamer=print)),
    Mistake("a processor of logits by its name", lambda w: cached(logits_processor=["temperature"])),
    Mistake("a model that guesses ahead by its name", lambda w: hosted(assistant_model="small")),
    Mistake(
        "two that guess ahead",
        lambda w: cached(draft=None, prompt_lookup_num_tokens=2),
        lambda w, said: cached(draft=None),
    ),
    Mistake(
        "texts kept in a dict",
        lambda w: cached(prompt_cache={}),
        lambda w, said: cached(prompt_cache=lorac.PromptCache()),
    ),
    Mistake("the prompts twice", lambda w: cached(inputs=torch.ones(2, 5).long())),
    Mistake("a mask as ids", lambda w: cached(input_ids=torch.ones(2, 5).bool()), lambda w, said: cached()),
    Mistake("no prompt for the host", lambda w: compiled("llama").generate(max_new_tokens=2), _says("no prompt")),
    Mistake(
        "one row without a batch",
        lambda w: hosted(input_ids=torch.tensor([3, 4]), attention_mask=None),
        lambda w, said: hosted(input_ids=torch.tensor([[3, 4]]), attention_mask=None),
    ),
    Mistake(
        "a prompt that is longer than there are positions for",
        lambda w: cached(input_ids=torch.full((2, LIMIT + 2), 5), attention_mask=None),
        lambda w, said: cached(input_ids=torch.full((2, LIMIT), 5), attention_mask=None, max_new_tokens=1),
    ),
    Mistake("a seed of many bits", lambda w: cached(do_sample=True, seed=1 << 70)),
    Mistake("fewer choices than prompts", lambda w: cached(adapters=["default"])),
    Mistake("a choice of nobody's for a row", lambda w: cached(adapters=["default", "sql"]), lambda w, said: cached()),
    Mistake("fewer seeds than prompts", lambda w: cached(do_sample=True, seed=[1])),
    Mistake("a seed as text", lambda w: hosted(do_sample=True, seed="7")),
    Mistake("a draft next to weights", lambda w: _fused(draft=None), lambda w, said: hosted(draft=None)),
    Mistake(
        "what happens inside a program",
        lambda w: cached(output_attentions=True),
        lambda w, said: hosted(output_attentions=True),
    ),
    Mistake(
        "a cache that the program does not use",
        lambda w: cached(cache_implementation="static"),
        lambda w, said: cached(),
    ),
    Mistake("keys and values by an older name", lambda w: cached(past_key_values=object()), _says("cache= in")),
    Mistake(
        "positions of one's own",
        lambda w: cached(position_ids=torch.arange(10).reshape(2, 5)),
        lambda w, said: hosted(position_ids=torch.arange(10).reshape(2, 5)),
    ),
    Mistake(
        "logits of all tokens",
        lambda w: cached(logits_to_keep=0),
        lambda w, said: cached(output_logits=True, return_dict_in_generate=True).logits[0],
    ),
    Mistake(
        "the first layers as a draft",
        lambda w: cached(assistant_early_exit=1),
        lambda w, said: cached(draft=None),
    ),
    Mistake(
        "stop strings in a draft that samples",
        lambda w: cached(draft=None, do_sample=True, stop_strings=["w3"], tokenizer=words()),
        lambda w, said: cached(draft=None, do_sample=False, stop_strings=["w3"], tokenizer=words()),
    ),
    Mistake("a swap in the middle of a fused call", _swapped_within, _says("mode='live'")),
    Mistake(
        "another library's cache",
        lambda w: cached(cache=object()),
        lambda w, said: cached(prompt_cache=lorac.PromptCache()),
    ),
    Mistake(
        "prefixes of the host's", lambda w: hosted(prompt_cache=lorac.PromptCache()), _says("target='onnxruntime'")
    ),
    Mistake("a budget as text", lambda w: lorac.PromptCache("1 GB")),
    Mistake(
        "a stream of rows that choose their own adapters",
        lambda w: cached(adapters=["default", None], streamer=_Words()),
    ),
    Mistake(
        "a tokenizer by its name",
        lambda w: w.eager.save(w.path("named"), tokenizer="gpt2"),
        _says("save_pretrained(folder)"),
    ),
]
