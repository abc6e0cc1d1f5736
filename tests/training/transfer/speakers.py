"""Tiny language models that read and write characters."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers

import lorac

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = LETTERS + LETTERS.upper() + " .,:?()-'\n"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def characters() -> Any:
    """A tokenizer of single characters, with an end and a filler."""
    names = ["<pad>", "<end>", "<unk>", *ALPHABET]
    model = tokenizers.models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def llama(width: int, seed: int) -> Any:
    """A Llama that knows nothing."""
    tokenizer = characters()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def speaking(model: Any, **adapters: Any) -> Any:
    """A model compiled with its tokenizer, and with a LoRA called ``a`` where no adapters are given."""
    compiled = lorac.compile(model, adapters or {"a": lorac.LoRA(r=2, targets=ALL)})
    compiled.tokenizer = characters()
    return compiled
