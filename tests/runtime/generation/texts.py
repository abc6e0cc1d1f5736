"""Tiny causal models with an adapter of PEFT's, and prompts for them: the references of generation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import lorac

SIZES = {
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
LAYERS = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", {**LAYERS, "num_key_value_heads": 2}, ["q_proj", "down_proj"]),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, ["c_attn", "c_proj"]),
    "qwen3": ("Qwen3", {**LAYERS, "num_key_value_heads": 2, "head_dim": 16}, ["k_proj", "o_proj"]),
    "gemma3": (
        "Gemma3Text",
        {**LAYERS, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 20.0},
        ["v_proj", "up_proj"],
    ),
    "phi": ("Phi", LAYERS, ["q_proj", "fc1"]),
    "mistral": ("Mistral", {**LAYERS, "num_key_value_heads": 2, "sliding_window": 6}, ["q_proj", "o_proj"]),
}
"""Name -> the family's, its sizes, and what is adapted. Windows are shorter than the texts."""
WRITTEN_OUT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, ["query_key_value", "dense_h_to_4h"]),
    "mpt": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}, ["Wqkv", "down_proj"]),
    "rembert": ("RemBert", {**LAYERS, "is_decoder": True, "input_embedding_size": 16}, ["query", "value"]),
    "gpt_neox_japanese": ("GPTNeoXJapanese", {**LAYERS, "intermediate_multiple_size": 2}, ["query_key_value"]),
    "bert_generation": ("BertGeneration", {**LAYERS, "is_decoder": True}, ["query", "dense"]),
}
"""Families whose attention does not go through transformers' interface; two of them add slopes to its scores."""


@functools.cache
def adapted(family: str) -> Any:
    """Return a PeftModel with an adapter away from its init, in float64, so that every computation chooses alike."""
    import peft
    import transformers

    name, sizes, targets = {**FAMILIES, **WRITTEN_OUT}[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    fan_in = name == "GPT2"
    told = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan_in, init_lora_weights=False)
    made = peft.get_peft_model(model, told).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.15)
    return made


@functools.cache
def compiled(family: str) -> Any:
    """Compile it for target eager; tests leave it unchanged."""
    return lorac.compile(adapted(family))


LENGTHS = (9, 4, 7, 1)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return rows of tokens that are neither padding nor an end."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Return rows as a batch, padded on a side."""
    masks = [torch.ones_like(row) for row in rows]
    made = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side=side) for part in (rows, masks)]
    return {"input_ids": made[0], "attention_mask": made[1]}
