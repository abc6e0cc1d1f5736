"""Tiny decoders with prompts that PEFT made, and the tokens that PEFT's own forward gives for them.

PEFT 0.21 hands its prompts to ``generate`` by a name that transformers 5.24 no longer has, and its tokens are then the
base's; its forward is right, so tokens are taken from that, one after the other.
"""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from tests.peft_files import quiet

VOCABULARY, NEW = 97, 6
CAUSAL = {"task_type": "CAUSAL_LM"}
MASKS = {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 1, 1]}
CONFIGS: dict[str, Any] = {
    "PROMPT_TUNING": functools.partial(peft.PromptTuningConfig, num_virtual_tokens=4, **CAUSAL),
    "P_TUNING": functools.partial(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "CPT": functools.partial(peft.CPTConfig, **MASKS, **CAUSAL),
    "PREFIX_TUNING": functools.partial(peft.PrefixTuningConfig, num_virtual_tokens=3, **CAUSAL),
    "CARTRIDGE": functools.partial(peft.CartridgeConfig, num_virtual_tokens=5, **CAUSAL),
}
KEYS_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None}


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SIZES, **sizes, **changes})).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SIZES, **sizes)).eval()


def save_prompt(model: Any, config: Any, folder: Path, size: float = 0.7) -> Any:
    """Save an adapter away from its start; return PEFT's model with it, as PEFT loads it."""
    with quiet():
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, tensor in made.named_parameters():
                if "prompt_encoder" in name:
                    tensor.normal_(0, size)
                elif "lora" in name:
                    tensor.normal_(0, 0.1)
        made.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """Return PEFT's logits of the tokens, without those of virtual ones."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT gives the old name
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
    return whole[:, -ids.shape[1] :]


def continued(model: Any, ids: Tensor, new: int = NEW, **given: Any) -> Tensor:
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids, **given)[:, -1:].argmax(-1)], 1)
    return ids
