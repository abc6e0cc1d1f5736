"""Causal language models of many architectures, tiny and random, for the tests of caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lorac
from lorac.testing import adapter_away

VOCABULARY = 97
IDS = torch.arange(20).reshape(2, 10) * 7 % (VOCABULARY - 3) + 3
"""Two rows of tokens, on which the adapters of the Llama are measured."""


def _decoder(kind: str, config: str | None = None, name: str | None = None, **fields: Any) -> Callable[[], nn.Module]:
    """A maker of a transformers model by the beginning of its classes' names."""

    def made() -> nn.Module:
        import transformers

        made_of = getattr(transformers, f"{config or kind}Config")(**{**_FIELDS, **fields})
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name or f"{kind}ForCausalLM")(made_of)
        return model.eval()

    return made


_FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""Keys and values of a latent kind, of two sizes, and experts behind the first layer."""
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _types(mixer: str, attention: str = "full_attention") -> dict[str, Any]:
    """Layers of a hybrid: two that mix tokens in one way, and one that attends between them."""
    return {"num_hidden_layers": 3, "layer_types": [mixer, attention, mixer]}


HYBRIDS: dict[str, Callable[[], nn.Module]] = {
    "lfm2": _decoder("Lfm2", block_multiple_of=16, **_types("conv")),
    "qwen3_next": _decoder(
        "Qwen3Next",
        **{**_types("linear_attention"), **_LINEAR, **_EXPERTS},
        head_dim=8,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=2,
    ),
    "kimi_linear": _decoder(
        "KimiLinear",
        **_types("linear_attention"),
        num_key_value_heads=4,
        linear_num_heads=4,
        linear_head_dim=8,
        linear_conv_kernel_dim=4,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        mlp_layer_types=["dense"] * 3,
    ),
    "bamba": _decoder("Bamba", num_hidden_layers=3, attn_layer_indices=[1], mamba_expand=2, **_MAMBA),
    "nemotron_h": _decoder(
        "NemotronH",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=6,
        n_groups=2,
        conv_kernel=4,
        chunk_size=4,
    ),
    "falcon_h1": _decoder("FalconH1", head_dim=8, mamba_d_ssm=64, **_MAMBA),
    "granitemoehybrid": _decoder(
        "GraniteMoeHybrid",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        mamba_expand=2,
        **_MAMBA,
    ),
    "jamba": _decoder(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=6,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=4,
    ),
    "recurrent_gemma": _decoder(
        "RecurrentGemma",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=8,
        head_dim=8,
        num_key_value_heads=1,
        conv1d_width=4,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "olmo_hybrid": _decoder("OlmoHybrid", **{**_types("linear_attention"), **_LINEAR, "linear_num_key_heads": 4}),
    "mamba": _decoder("Mamba", state_size=6, time_step_rank=4),
    "mamba2": _decoder("Mamba2", num_heads=8, head_dim=8, state_size=6, n_groups=2, chunk_size=4),
}
"""Short convolutions, gated delta rules, selective scans of both kinds, and RG-LRUs; the last two attend
nowhere."""
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama", head_dim=16),
    "gpt2": _gpt2,
    "qwen3": _decoder("Qwen3", head_dim=16),
    "mistral": _decoder("Mistral", sliding_window=4, head_dim=8),
    "gemma2": _decoder("Gemma2", sliding_window=4, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": _decoder("Gemma3", config="Gemma3Text", sliding_window=4, head_dim=8, query_pre_attn_scalar=8),
    "phi": _decoder("Phi", num_key_value_heads=4),
    "gpt_neox": _decoder("GPTNeoX", hidden_size=24),
    "opt": _decoder("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": _decoder("Mixtral", num_local_experts=4, head_dim=8),
    "deepseek_v3": _decoder("DeepseekV3", **_LATENT),
    "falcon": _decoder("Falcon", num_kv_heads=4, alibi=False),
    "rembert": _decoder("RemBert", is_decoder=True, input_embedding_size=16, output_embedding_size=24),
    "bert_generation": _decoder("BertGeneration", name="BertGenerationDecoder", is_decoder=True),
    "gpt_neox_japanese": _decoder("GPTNeoXJapanese", intermediate_multiple_size=2),
    "bloom": _decoder("Bloom"),
    "mpt": _decoder("Mpt", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=48),
    "xglm": _decoder("XGLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "gpt_neo": _decoder("GPTNeo", num_heads=4, attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4),
    "openai_gpt": _decoder("OpenAIGPT", name="OpenAIGPTLMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "ctrl": _decoder("CTRL", name="CTRLLMHeadModel", n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64),
    "doge": _decoder("Doge"),
    "llama4": _decoder(
        "Llama4",
        config="Llama4Text",
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "deepseek_v2": _decoder("DeepseekV2", **_LATENT, topk_method="greedy"),
    "gpt_oss": _decoder("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    **HYBRIDS,
}
"""Rotary positions, whole and partial, and learned ones; norms of queries and keys; values smaller than keys, and sizes
that are no multiple of 8; windows, soft caps and sinks; experts; attention that is written out, with
transformers' mask or one of the model's own, in a buffer or computed; a bias of keys; slopes; chunks; complex parts."""

_SPARSE = {
    **_LATENT,
    "index_topk": 48,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mlp_layer_types": ["dense", "sparse"],
}
ONE_ROW_EACH: dict[str, Callable[[], nn.Module]] = {
    "deepseek_v32": _decoder("DeepseekV32", **_SPARSE),
    "glm_moe_dsa": _decoder("GlmMoeDsa", **_SPARSE),
    "hy_v4": _decoder("HYV4", **_SPARSE, indexer_types=["full", "shared"]),
    "falcon, slopes": _decoder("Falcon", alibi=True, multi_query=False, new_decoder_architecture=False),
    "lfm2_moe": _decoder("Lfm2Moe", num_dense_layers=1, **_EXPERTS, **_types("conv")),
    "qwen3_5": _decoder("Qwen3_5", config="Qwen3_5Text", **_types("linear_attention"), **_LINEAR, head_dim=8),
}
"""Families that took their row alone here: modules that choose tokens, slopes in torch's attention, and hybrids."""


def adapt_llama(host: nn.Module) -> list[lorac.Adapter]:
    """Return two adapters of the Llama, away from their init."""
    variants = {"one": lorac.LoRA(r=3, targets="all-linear"), "two": lorac.DoRA(r=1, targets=["q_proj", "down_proj"])}
    return [adapter_away(variant, host, IDS, name=name, seed=1) for name, variant in variants.items()]
