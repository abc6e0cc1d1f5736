"""Models that read images, tiny and random, with two adapters of PEFT's, for the tests of caches."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

PIXELS = "pixel_values"
IMAGE, FEATURES = 60, 4
"""The id of the placeholder, and how many features each image has."""
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_TOWER, "vocab_size": 64, "max_position_embeddings": 64}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
_SIGLIP = {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, "vision_use_head": False}
_GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
_PATCHES = {"patch_size": 4, "out_hidden_size": 16, "depth": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "llava": (
        "Llava",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4},
        {"image_token_index": IMAGE},
        (3, 8, 8),
    ),
    "smolvlm": (
        "SmolVLM",
        {"model_type": "llama", "pad_token_id": 0},
        {"image_size": 16, "patch_size": 4},
        {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0},
        (1, 3, 16, 16),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"num_key_value_heads": 1, "rope_scaling": _ROPE, "bos_token_id": 1, "eos_token_id": 2},
        {**_PATCHES, "num_heads": 2, "fullatt_block_indexes": [1], "window_size": 16},
        {"image_token_id": IMAGE, "vision_start_token_id": 62},
        (16, 96),
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_scaling": _ROPE,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.0125,
        },
        {**_PATCHES, "num_heads": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        {"image_token_id": IMAGE, "vision_start_token_id": 62},
        (16, 96),
    ),
    "gemma3": (
        "Gemma3",
        {**_GEMMA, **_WINDOWS, "model_type": "gemma3_text"},
        {**_SIGLIP, "image_size": 16},
        {"image_token_index": IMAGE, "mm_tokens_per_image": FEATURES},
        (3, 16, 16),
    ),
    "paligemma": (
        "PaliGemma",
        {**_GEMMA, "model_type": "gemma"},
        _SIGLIP,
        {"image_token_index": IMAGE, "projection_dim": 16},
        (3, 8, 8),
    ),
    "paligemma2": (
        "PaliGemma",
        {**_GEMMA, **_WINDOWS, "model_type": "gemma2", "attn_logit_softcapping": 1.5},
        _SIGLIP,
        {"image_token_index": IMAGE, "projection_dim": 16},
        (3, 8, 8),
    ),
    "internvl": (
        "InternVL",
        {"model_type": "llama"},
        {"image_size": [16, 16], "patch_size": [4, 4]},
        {"image_token_id": IMAGE},
        (3, 16, 16),
    ),
    "idefics3": (
        "Idefics3",
        {"model_type": "llama", "pad_token_id": 0},
        {"image_size": 16, "patch_size": 4},
        {"image_token_id": IMAGE, "pad_token_id": 0},
        (1, 3, 16, 16),
    ),
    "glm4v": (
        "Glm4v",
        {"num_key_value_heads": 1, "rope_parameters": {**_ROPE, "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {**_PATCHES, "num_heads": 2, "image_size": 16},
        {"image_token_id": IMAGE, "image_start_token_id": 62},
        (16, 96),
    ),
}
"""Name -> the family's, fields of its text, its tower and the whole, and the shape of the images of a row."""
TYPES = {"gemma3": lambda ids: ids.eq(IMAGE).long(), **dict.fromkeys(("paligemma", "paligemma2"), torch.zeros_like)}
"""Family -> the types of tokens by which they see each other, from their ids."""
LENGTHS = (3, 5, 4)
"""Tokens of each row behind its image."""


def opposite(family: str) -> dict[str, Tensor]:
    """The batch of a family with other images."""
    given, main = batch(family), PIXELS
    return given | {main: -given[main]}


def made(family: str) -> Any:
    """A PeftModel with adapters "one" (LoRA) and "two" (DoRA) on tower, connector and text, away from their init."""
    import peft
    import transformers

    name, text, tower, fields, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{"text_config": {**_TEXT, **text}, "vision_config": {**_TOWER, **tower}, **fields}
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("mm_input_projection_weight"):
                parameter.normal_(
                    0, 0.02, generator=torch.Generator().manual_seed(4)
                )  # Gemma 3's begins at 0, which no image passes
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    targets = {"r": 2, "target_modules": "all-linear"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**targets), "one")
    wrapped.add_adapter("two", peft.LoraConfig(**targets, use_dora=True))
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if "magnitude" in path:
                parameter.mul_(1.3)
            elif "lora_" in path:
                parameter.normal_(0, 0.2)
    return wrapped.eval()


def batch(family: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> dict[str, Tensor]:
    """Rows of an image and text of so many tokens, padded on the left, as a processor makes them."""
    generator = torch.Generator().manual_seed(seed)
    *_, shape = FAMILIES[family]
    words = [torch.randint(5, 50, (1 + length,), generator=generator) for length in lengths]
    rows = [torch.cat([row[:1], torch.full((FEATURES,), IMAGE), row[1:]]) for row in words]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = (
        pad([row.flip(0) for row in part], batch_first=True).flip(1)
        for part in (rows, [torch.ones_like(row) for row in rows])
    )
    pixels = torch.randn(len(rows), *shape, generator=generator)
    made = {"input_ids": ids, "attention_mask": mask}
    if family in TYPES:
        made["token_type_ids"] = TYPES[family](ids)
    if len(shape) > 2:
        return made | {PIXELS: pixels}
    grids = torch.tensor([[1, 4, 4]]).repeat(len(rows), 1)
    return made | {
        "pixel_values": pixels.flatten(0, 1),
        "image_grid_thw": grids,
        "mm_token_type_ids": ids.eq(IMAGE).int(),
    }


_TURNS = """{% for turn in messages %}{{ turn['role'][0] }}{% for part in turn['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"""


def make_processor(family: str = "qwen2_5_vl") -> Any:
    """A processor of a family's: a token for each of some characters, and images of about 16 x 16 pixels."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "Ġ", *string.ascii_lowercase, *string.digits, *".,;:!?AESTU"]
    words += [f"<{place}>" for place in range(len(words), IMAGE)]
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    inner = Tokenizer(models.BPE({word: place for place, word in enumerate([*words, *special])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"image_token": special[0], "boi_token": special[2], "eoi_token": special[3]}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=special, **(named if family == "gemma3" else {}),
    )  # fmt: skip
    if family == "gemma3":
        pixels = {"size": {"height": 16, "width": 16}, "image_seq_length": FEATURES}
        return transformers.Gemma3Processor(
            image_processor=transformers.Gemma3ImageProcessor(**pixels),
            tokenizer=tokenizer,
            image_seq_length=FEATURES,
            chat_template=_TURNS.replace("<|image_pad|><|vision_end|>", ""),
        )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"size": {"shortest_edge": 256, "longest_edge": 256}}
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes, **pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes, **pixels),
        chat_template=_TURNS,
    )


def row(whole: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row of a batch alone, without padding."""
    kept = whole["attention_mask"][index].bool()
    by_token = whole["input_ids"].shape
    return {
        name: part[:, kept] if value.shape == by_token else part
        for name, value in whole.items()
        for part in [value.chunk(by_token[0])[index]]
    }
