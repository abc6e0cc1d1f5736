"""The table of engines: every row names a format that lorac writes, and files of the engine."""

from dataclasses import replace

import pytest
import torch
import transformers

import lorac
from lorac.formats import formats
from lorac.formats.engines import ENGINES, find_engine
from lorac.frontend.model_view import ModelView


@pytest.mark.parametrize("name", ENGINES)
def test_names_a_format_that_is_written_and_the_files_of_its_rules(name):
    engine = ENGINES[name]

    assert formats()[engine.format].writes
    assert engine.version and engine.source and "{path}" in engine.usage
    assert set(engine.refused).isdisjoint(engine.ignored)


def test_rejects_an_engine_that_the_table_lacks_and_names_the_nearest():
    with pytest.raises(lorac.OptionError, match="there is no engine 'vlm'") as caught:
        find_engine("vlm")

    assert caught.value.nearest == "vllm"


def make(kind, **fields):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind.config_class(**sizes, num_key_value_heads=2, vocab_size=16, **fields)
    with torch.device("meta"):
        return ModelView.of(kind(config))


def test_names_the_reason_why_an_engine_takes_no_lora_of_a_site():
    tied = make(transformers.LlamaForCausalLM, tie_word_embeddings=True)
    assert "whose weight is that of" in ENGINES["llama.cpp"].why_not(tied.sites["lm_head"], tied)
    assert ENGINES["vllm"].why_not(tied.sites["lm_head"], tied) is None

    own = make(transformers.LlamaForCausalLM, tie_word_embeddings=False)
    assert ENGINES["genai"].why_not(own.sites["lm_head"], own) == "an embedding or output layer"
    assert ENGINES["llama.cpp"].why_not(own.sites["lm_head"], own) is None

    fields = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 4}
    mixture = make(transformers.Qwen3MoeForCausalLM, **fields)
    stack = next(site for site in mixture.sites.values() if site.stack)
    assert ENGINES["genai"].why_not(stack, mixture) == "a stack of experts"
    assert ENGINES["vllm"].why_not(stack, mixture) is None


def test_takes_layers_of_the_language_model_alone():
    view = make(transformers.LlamaForCausalLM)
    view.module.config.get_text_config = type(view.module.config)
    site = view.sites["model.layers.0.self_attn.q_proj"]
    assert ENGINES["vllm"].why_not(site, view) == "outside the language model"
    inside = replace(site, path=f"model.language_model.{site.path.removeprefix('model.')}")
    assert ENGINES["vllm"].why_not(inside, view) is None
