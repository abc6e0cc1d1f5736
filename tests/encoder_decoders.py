"""Models with an encoder next to a decoder, tiny and random, with an adapter of PEFT's, for the tests of caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 97
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
_WHISPER = {
    **_BART,
    "decoder_start_token_id": 3,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "begin_suppress_tokens": None,
}
_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bart": ("Bart", _BART, ["q_proj", "v_proj", "fc1"]),
    "t5": ("T5", _T5, ["q", "v", "wi"]),
    "whisper": ("Whisper", _WHISPER, ["q_proj", "v_proj", "fc1"]),
    "mbart": ("MBart", _BART, ["k_proj", "fc2"]),
    "pegasus": ("Pegasus", _BART, ["q_proj", "out_proj"]),
    "blenderbot": ("Blenderbot", _BART, ["q_proj", "v_proj"]),
    "mt5": ("MT5", _T5, ["k", "o"]),
    "umt5": ("UMT5", _T5, ["q", "v"]),
    "m2m_100": ("M2M100", _BART, ["q_proj", "v_proj"]),
    "mvp": ("Mvp", _BART, ["q_proj", "fc1"]),
    "bigbird_pegasus": ("BigBirdPegasus", {**_BART, "attention_type": "original_full"}, ["q_proj", "fc1"]),
    "fsmt": (
        "FSMT",
        {**_BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
        ["q_proj", "fc1"],
    ),
    "pegasus_x": ("PegasusX", {**_BART, "num_global_tokens": 4, "block_size": 4}, ["q_proj", "fc1"]),
    "t5gemma": (
        "T5Gemma",
        {"encoder": _GEMMA, "decoder": _GEMMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ["q_proj", "down_proj"],
    ),
}
"""Name -> the family's, its sizes, and what is adapted: positions that are learned, computed, or counted by tokens;
biases by distance, sounds, windows and soft caps, attention that is written out."""
LENGTHS = (9, 4, 7, 2)


def made(family: str) -> Any:
    """A model, its weights large enough that texts go different ways."""
    import transformers

    name, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    if family == "whisper":
        settings = {"no_timestamps_token_id": 90, "is_multilingual": False, "max_initial_timestamp_index": 3}
        for field, value in settings.items():
            setattr(model.generation_config, field, value)
    if family == "fsmt":  # over its own cache it counts padding within an answer
        model.generation_config.update(num_beams=1, suppress_tokens=[0])
    if family == "t5gemma":
        model.generation_config.decoder_start_token_id = 1
    return model


def adapted(family: str) -> Any:
    """A PeftModel over one, with an adapter away from its init."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=FAMILIES[family][2], init_lora_weights=False)
    wrapped = peft.get_peft_model(made(family), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return wrapped


def batches(family: str) -> list[dict[str, Tensor]]:
    """Four rows to encode: texts padded on either side, or sounds."""
    generator = torch.Generator().manual_seed(0)
    if family == "whisper":
        return [{"input_features": torch.randn(4, 8, 40, generator=generator)}]
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    masks = [torch.ones_like(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        {
            "input_ids": pad(rows, batch_first=True, padding_side=side),
            "attention_mask": pad(masks, batch_first=True, padding_side=side),
        }
        for side in ("left", "right")
    ]
