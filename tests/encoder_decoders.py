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
IMAGE, FEATURES, PIXELS = 96, 5, (3, 8, 8)
"""The id of the placeholder, how many features each image has, and its shape."""
_FLORENCE = {
    "text_config": {**_BART, "model_type": "bart", "vocab_size": VOCABULARY},
    "vision_config": {
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 4],
        "window_size": 3,
        "projection_dim": 32,
        "max_temporal_embeddings": 5,
        "max_position_embeddings": 8,
    },
    "image_token_id": IMAGE,
}
_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
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
    "t5gemma2": (
        "T5Gemma2",
        {
            "encoder": {
                "text_config": {**_GEMMA, **_TYPES, "vocab_size": VOCABULARY},
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 8,
                    "patch_size": 4,
                },
            },
            "decoder": {**_GEMMA, **_TYPES, "vocab_size": VOCABULARY},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    ),
    "florence2": ("Florence2", _FLORENCE, ["q_proj", "fc1", "qkv", "image_projection"]),
}
"""Name -> the family's, its sizes, and what is adapted: positions that are learned, computed, or counted by tokens;
biases by distance, sounds, windows and soft caps, attention that is written out, images next to the text."""
LENGTHS = (9, 4, 7, 2)


def made(family: str) -> Any:
    """A model, its weights large enough that texts go different ways."""
    import transformers

    name, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.mul_(1 if parameter.dim() < 2 or "vision_tower" in path else 6)
    if family == "whisper":
        settings = {"no_timestamps_token_id": 90, "is_multilingual": False, "max_initial_timestamp_index": 3}
        for field, value in settings.items():
            setattr(model.generation_config, field, value)
    if family == "fsmt":  # over its own cache it counts padding within an answer
        model.generation_config.update(num_beams=1, suppress_tokens=[0])
    if family in {"t5gemma", "t5gemma2", "florence2"}:
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


def example(model: Any) -> dict[str, Tensor] | None:
    """Example inputs of a model that lorac makes none for, as it finds no size of the images that it may read."""
    family = model.config.model_type
    if family not in {"florence2", "t5gemma2"}:
        return None
    two = {name: value[:2] for name, value in batches(family)[1].items()}
    if family == "t5gemma2":  # transformers and ONNX part at padding whose whole window is padding
        two["attention_mask"] = torch.ones_like(two["input_ids"])
    return {**two, "decoder_input_ids": torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])}


def batches(family: str) -> list[dict[str, Tensor]]:
    """Four rows to encode: texts padded on either side, or sounds."""
    generator = torch.Generator().manual_seed(0)
    if family == "whisper":
        return [{"input_features": torch.randn(4, 8, 40, generator=generator)}]
    seeing, images = family == "florence2", dict[str, Tensor]()
    words = IMAGE if seeing else VOCABULARY
    rows = [torch.randint(3, words, (length,), generator=generator) for length in LENGTHS]
    if seeing:
        rows = [torch.cat([torch.full((FEATURES,), IMAGE), row]) for row in rows]
        images["pixel_values"] = torch.randn(4, *PIXELS, generator=generator)
    masks = [torch.ones_like(row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        {
            "input_ids": pad(rows, batch_first=True, padding_side=side),
            "attention_mask": pad(masks, batch_first=True, padding_side=side),
            **images,
        }
        for side in ("left", "right")
    ]
