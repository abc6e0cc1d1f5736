"""Single models of transformers that the rules do not cover: settings, arguments and adapters of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from campaigns.zoo import calls, shrinking

TILED = ("llava_next", "llava_next_video", "llava_onevision")
"""Vision-language models that see an image whole and in tiles."""
SECTIONED = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
"""Rotations by time, height and width, of heads of eight."""
_SECTIONED = ("paddleocr_vl", "qwen2_vl", "glm4v", "glm46v", "glmga", "glm_ocr")
_DENSE: Mapping[str, Any] = {
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.0, 0.0],
    "num_kv_shared_layers": 0,
}
_CODEC = {"num_filters": 2, "depths": [1] * 7}
"""Of a codec whose channels double in each of seven stages."""
_WINDOWED = ("exaone4_5", "hyperclovax_vision_v2")
_WINDOWS = {"vision_config": {"window_size": 32}}
"""Windows of four by four patches, which are eight wide, merged by two."""
_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_ROTATED: Mapping[str, Any] = {"rope_parameters": {kind: _PLAIN for kind in ("full_attention", "sliding_attention")}}
_INDEXED: Mapping[str, Any] = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
}
_FOUR: Mapping[str, Any] = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
"""Of a backbone that is read after four of its layers."""
_DEEP: Mapping[str, Any] = {"backbone_config": _FOUR, "neck_hidden_sizes": [16, 32, 48, 64]}
_STAGES = ["stage2", "stage3", "stage4"]
"""Where detectors read their backbone."""
_WIDE: Mapping[str, Any] = {
    "backbone_config": {"hidden_sizes": [256, 512, 1024, 2048], "out_features": _STAGES},
    "decoder_in_channels": [32, 32, 32],
}
"""Of detectors whose backbone stays as wide as it is."""
_MASKING: Mapping[str, Any] = {"backbone_config": {"out_features": ["stage1", *_STAGES]}}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    **{name: _DEEP for name in ("depth_anything", "prompt_depth_anything", "tipsv2_dpt")},
    **{name: _WIDE for name in ("d_fine", "deimv2", "pp_doclayout_v4")},
    **{name: _MASKING for name in ("mask2former", "oneformer")},
    **{
        name: {"backbone_config": {"out_features": _STAGES}, "decoder_in_channels": [32, 32, 32]}
        for name in ("rt_detr", "rt_detr_v2")
    },
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "align": {"projection_dim": 640},
    "bit": {"num_groups": 4},
    "chmv2": {"backbone_config": _FOUR, "post_process_channels": [16, 32, 48, 64]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass": {"text_config": _ROTATED},
    "cohere_compass_text": _ROTATED,
    "depth_pro": {"intermediate_hook_ids": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "zoedepth": {**_DEEP, "bottleneck_features": 32},
    "upernet": {"backbone_config": {"out_indices": [1, 2, 3, 4]}},
    "efficientnet": {"hidden_dim": 2560},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "laguna": {"num_attention_heads_per_layer": None},
    "levit": {"patch_size": 16, "image_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "neomme": {"head_dim": 16},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "hash_seed": 0},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "textnet": {"stem_out_channels": 16},
    "hunyuan_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]}}
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "blip-2": {"image_token_index": 105},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
    },
    "esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gemma3n_text": _DENSE,
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "instructblip": {"image_token_index": 105},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "embedding_size": 16},
    "mobilevitv2": {"image_size": 64},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{name: {"embed_dim": 16, "image_size": 64, "window_size": 2} for name in ("swin", "swinv2", "donut-swin")},
    **{name: {"image_grid_pinpoints": [[32, 32]]} for name in TILED},
    **{name: {"text_config": {"rope_parameters": SECTIONED}} for name in _SECTIONED},
    **{name: _WINDOWS for name in _WINDOWED},
    "qwen2_5_vl": {"text_config": {"rope_parameters": SECTIONED}, **_WINDOWS},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "vibevoice": {"audio_config": _CODEC, "semantic_model_config": _CODEC},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "wav2vec2-bert": {"vocab_size": 40},
    "wav2vec2-conformer": {"vocab_size": 40},
    "xmod": {"default_language": "en_XX"},
}


def _several(context: calls.Context) -> Any:
    """One image a row, in a list of images."""
    return calls.pixels(context).unsqueeze(1)  # type: ignore[union-attr]  # they have a vision configuration


def _spectrogram(context: calls.Context) -> Any:
    return context.noise(context.batch, context.config.max_length, context.config.num_mel_bins)


def _question(context: calls.Context) -> Any:
    return context.integers(3, shrinking.SPECIAL, context.batch, context.length)


def _tiles(context: calls.Context) -> Any:
    """Return the whole image, and one tile of it."""
    return context.noise(context.batch, 2, 3, 32, 32)


def _queried(context: calls.Context) -> Any:
    """Words behind one placeholder for each query that a Q-Former puts to the image."""
    marks = torch.full((context.batch, context.config.num_query_tokens), context.config.image_token_index)
    return torch.cat([marks, _question(context)], 1)


def _series(context: calls.Context) -> Any:
    """As many series as rows, each of 64 moments."""
    return list(context.noise(context.batch, 64))


def _noise(context: calls.Context) -> Any:
    """Return the noise by which a model orders the patches that it masks."""
    return torch.rand(context.batch, 16, generator=context.generator)


def _codes(context: calls.Context) -> Any:
    """Answers of all channels of a codec."""
    return context.integers(3, shrinking.SPECIAL, context.batch, context.length, 9)


def _boxes(context: calls.Context) -> Any:
    return calls.boxes(context) / 16


def _stacked(context: calls.Context) -> Any:
    """Frames of a spectrogram with their differences, in pairs."""
    return context.noise(context.batch, calls.FRAMES, 4 * context.config.encoder_config.num_mel_bins)


def _channel(context: calls.Context) -> Any:
    return calls.sound(context).unsqueeze(1)


def _task(context: calls.Context) -> Any:
    return context.integers(3, shrinking.SPECIAL, context.batch, context.config.task_seq_len)


def _image(context: calls.Context) -> Any:
    return context.noise(context.batch, 3, 32, 32)


def _cut(context: calls.Context) -> Any:
    """Patches of four by four, of all images one after another."""
    side = context.vision.patch_size
    return context.noise(context.batch * 16, 3, side, side)


_PATCHES: dict[str, Callable[[calls.Context], Any]] = {
    "pixel_values": lambda context: context.noise(context.batch, 16, 3 * 8 * 8),
    "pixel_attention_mask": lambda context: torch.ones(context.batch, 16, dtype=torch.int64),
    "spatial_shapes": lambda context: torch.tensor([[4, 4]] * context.batch),
}
_SEVERAL: dict[str, Callable[[calls.Context], Any]] = {"pixel_values": _several}
CALLS: Mapping[str, Mapping[str, Callable[[calls.Context], Any]]] = {
    **{name: _SEVERAL for name in ("idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert")},
    **{name: {"pixel_values": calls.video} for name in ("timesformer", "videomae", "vivit")},
    "audio-spectrogram-transformer": {"input_values": _spectrogram},
    "blip": {"input_ids": calls.ids, "attention_mask": calls.mask},
    "blip-2": {"input_ids": _queried},
    "paligemma": {"token_type_ids": calls.prefix},
    "instructblip": {"qformer_input_ids": _question, "input_ids": _queried},
    **{name: {"pixel_values": _tiles} for name in TILED},
    "dia": {"decoder_input_ids": _codes},
    "granite_speech5_ctc": {"input_features": _stacked},
    "omniasr_ctc": {"input_values": _channel},
    "oneformer": {"task_inputs": _task},
    "paddleocr_vl": {"pixel_values": _cut},
    "t5gemma2": {"pixel_values": _image},
    "kimi_k25": {"pixel_values": _cut},
    "udop": {"bbox": _boxes},
    "vit_mae": {"noise": _noise},
    "lfm2_vl": _PATCHES,
    "siglip2": _PATCHES,
    **{name: {"past_values": _series} for name in ("timesfm", "timesfm2_5")},
    "whisper": {"input_features": calls.spectrum_channels_first},
    "speech-encoder-decoder": {"input_values": calls.sound},
}
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(("timm_backbone", "timm_wrapper"), "timm's models are a family of their own"),
    **dict.fromkeys(("fast_vlm", "gemma3n"), "its images are seen by a model of timm, which no rule makes tiny"),
    **dict.fromkeys(
        ("pp_ocrv5_server_det", "pp_ocrv6_medium_det", "sapiens2"), "its configuration has no head by default"
    ),
    **dict.fromkeys(("lw_detr", "pp_doclayout_v3"), "its encoder, made tiny, reads other sizes than its backbone has"),
    "pp_doclayout_v2": "its configuration has no thresholds by default",
    "deepseek_vl_hybrid": "it counts placeholders from two images of each kind",
    "dinat": "it needs natten, which PyPI has for no processor alone",
    "dots3_note_text": "its configuration, made tiny, has no two widths of heads that agree",
    "emu3": "it needs a table of the codes that stand for pixels",
    "kyutai_speech_to_text": "its codec has groups that no tiny width divides by",
    "molmo2": "it needs a table of the patches that are pooled",
    "musicgen_melody": "its table names a decoder, and the configuration is of the whole",
    "zamba": "its shared layers are at places that a tiny model does not have",
    "zamba2": "its shared layers are at places that a tiny model does not have",
}
"""Kinds that transformers' tables name and no entry builds -> why."""
AUTO = torch.export.Dim.AUTO


def _time_too(call: Mapping[str, Any]) -> dict[str, Any]:
    """Batch and time of a sound; neither has a name that would tell lorac."""
    return {name: {0: AUTO, 1: AUTO} for name in call}


SHAPES: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
FAMILY_SHAPES: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {"CTC": _time_too}


def experts_too(model: nn.Module) -> Any:
    """Return what PEFT adapts for "all-linear", experts included."""
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
