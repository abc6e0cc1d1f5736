"""Any transformers configuration made tiny, by what its settings are called.

A setting is a number or a list of numbers whose name says what it counts: layers, heads, widths, words. Each kind has a
largest value that is left, so that what is small stays as it is. Nested configurations shrink with the same rules and
so still fit one another. What a model needs besides is an exception in ``campaigns.zoo.exceptions``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY, SPECIAL = 128, 100
"""Words there are; ids from ``SPECIAL`` on are the placeholders of images and sounds, and no input draws them."""
WIDTH, HEADS, LAYERS = 32, 4, 2
LARGEST: tuple[tuple[str, int], ...] = (
    (r"num_feat_extract_layers|num_conv_pos\w*|cross_attention_frequency|num_feature_levels|\w*kernel\w*", 1 << 30),
    (r"type_vocab_size", 4),
    (r"\w*vocab_size\w*|\w*num_embeddings|codebook_size|num_hash_buckets", VOCABULARY),
    (r"qk_head_dim", 16),
    (r"rotary_dim", 4),
    (r"\w*head_dim|d_kv|dim_head|d_head|head_size|\w*d_rel|mamba_d_head|query_pre_attn_scalar|kv_channels", 8),
    (r"\w*(key_value|kv)_heads|\w*num_key_value_groups|linear_num_key_heads", 2),
    (r"(\w*_)?n?_?heads?|\w*attention_heads|\w*num_heads|nhead", HEADS),
    (r"(\w*_)?(n_|num_)?(\w*_)?layers?(_\w*replace)?|depth|\w*depths?|num_blocks|\w*layers_block_nums", LAYERS),
    (r"first_k_dense_replace|\w*num_dense_layers", 1),
    (r"num_nextn_predict_layers", 0),
    (r"\w*(experts_per_tok\w*|num_experts_per_token|moe_topk?|moe_k|top_?k)", 2),
    (r"n_group|topk_group|\w*num_expert_group", 1),
    (r"(\w*_)?(num|n)_(\w*_)?experts", 4),
    (r"\w*lora_rank|\w*_rank|laurel_rank", 8),
    (r"\w*position_embeddings|n_positions|n_ctx|\w*max_seq_len|max_(source|target)_positions|max_ep_len", 64),
    (r"\w*(intermediate|ffn_dim|ffn_hidden|feed_?forward)\w*|d_ff|dff|dim_ff|d_inner|n_inner|mlp_dim", 48),
    (r"\w*linear_units", 48),
    (r"\w*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim)", WIDTH),
    (r"\w*(projection_dim|project_dim|projection_size|projector_dim|proj_size|output_dim|codevector_dim)", WIDTH),
    (r"\w*(channels_dim|hidden_channels|classifier_proj_size|lqe_hidden\w*|pooler_output_size|query_dim)", WIDTH),
    (r"dim|hidden_units|lru_width|mamba_d_ssm|neck_out_channels|fusion_hidden_size|xvector_output_dim", WIDTH),
    (r"\w*(_d_state|state_size|mamba_d_state|ssm_state_size)|state_dim", 8),
    (r"\w*image_size|\w*input_size|img_size|pretrain_image_size|resolution", 32),
    (r"\w*patch_size", 8),
    (r"window_size|sliding_window\w*|\w*_window|local_attention|attention_window", 4),
    (r"chunk_size|mamba_chunk_size|attention_chunk_size|block_size", 4),
    (r"num_queries|num_query_tokens|num_denoising|two_stage_num_proposals|\w*n(um)?_latents|train_num_points", 4),
    (r"num_frames|temporal_num_frames|mm_tokens_per_image", 4),
    (r"(max_length|tpu_short_seq_length)", 64),
)  # fmt: skip
"""(name, the largest value that is left), the first that matches."""
HEAD_LISTS = re.compile(r"\w*(num|attention)_heads|num_heads_\w+")
LISTS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"mrope_section", (2, 1, 1)),
    (r"axes_dim\w*|rope_section", (4, 2, 2)),
)
_RULES = tuple((re.compile(name), value) for name, value in LARGEST)
_TOKEN = re.compile(r"\w*token_(id|index|idx)|\w*_(start|end|newline)_id")
_WIDTHS = re.compile(
    r"hidden_sizes|embed_dims|dims|neck_hidden_sizes|encoder_hidden_sizes|\w*(hidden_channels|embed_dim)"
)
_KINDS = re.compile(r"layer_types|layers_block_type|mlp_layer_types|block_types|\w*layer_types")
_INDICES = re.compile(
    r"\w*(out|skip|layer|attn|intermediate)\w*_(indices|index|indexes|layers|ids|idx)|stage_names|no_rope_layers"
)
_DROPPED = """
    _name_or_path architectures dtype out_features out_indices stage_names torch_dtype transformers_version
"""


def tiny(config: Any, **exceptions: Any) -> Any:
    """Return a configuration of the same class, small enough to be built in a second.

    Args:
        config: left as it is.
        exceptions: settings by name that are not as the rules have them; of a nested configuration as a mapping.
    """
    kind = type(config)
    return kind(**_merged(_settings(config), exceptions))


def _settings(config: Any) -> dict[str, Any]:
    given = config.to_dict()
    kinds = _kinds(given)
    nested = {name for name in getattr(type(config), "sub_configs", {}) if getattr(config, name, None) is not None}
    found = {
        name: _settings(getattr(config, name)) if name in nested else _shrunk(name, value, kinds)
        for name, value in given.items()
        if name not in _DROPPED.split()
    }
    if "head_dim" in found and found["head_dim"] is None and "num_attention_heads" in found:
        found["head_dim"] = WIDTH // HEADS
    heads = {name: given.get(name) for name in ("num_attention_heads", "num_key_value_heads")}
    if None not in heads.values() and len(set(heads.values())) == 1:  # latent attention cannot have fewer keys
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _merged(settings: dict[str, Any], exceptions: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in exceptions.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def _kinds(given: Mapping[str, Any]) -> int:
    """How many layers a model needs to have one of each kind."""
    lists = [set(map(str, v)) for k, v in given.items() if _KINDS.fullmatch(k) and isinstance(v, list)]
    return max([LAYERS, *map(len, lists)])


def _shrunk(name: str, value: Any, layers: int) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, layers)
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not str(k).isdigit() or int(k) < layers}
        return {k: _shrunk(str(k), v, layers) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return _list(name, list(value), layers)
    if name in ("initializer_range", "init_std") and isinstance(value, float):
        return 0.15
    return value


def _number(name: str, value: int, layers: int) -> int:
    if _TOKEN.fullmatch(name):
        return value if value < SPECIAL else SPECIAL + sum(map(ord, name)) % (VOCABULARY - SPECIAL)
    for pattern, largest in _RULES:
        if pattern.fullmatch(name):
            return min(value, layers if largest == LAYERS and "layer" in name else largest)
    return value


def _list(name: str, values: list[Any], layers: int) -> Any:
    fixed = next((list(value) for pattern, value in LISTS if re.fullmatch(pattern, name)), None)
    if fixed is not None:
        return fixed
    if _KINDS.fullmatch(name):
        kinds = list(dict.fromkeys(values))
        return (kinds + [kinds[-1]] * layers)[:layers]
    if _INDICES.fullmatch(name) and all(isinstance(v, int) for v in values):
        return [v for v in values if v < layers]
    if HEAD_LISTS.fullmatch(name) and all(isinstance(v, int) for v in values):
        return [2 for _ in values]
    if _WIDTHS.fullmatch(name) and all(isinstance(v, int) for v in values):
        return [16 * (1 + i) for i in range(len(values))]
    return [_shrunk(name, value, layers) for value in values]
