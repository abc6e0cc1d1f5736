"""Architectures that the other tests do not use, adapted and not, with rows padded on either side.

What is emitted for attention, rotations and rows has to hold for every model's own way of writing them: partial,
interleaved and scaled rotations, sliding windows, softcaps, biases added to scores, packed projections, norms of heads.
"""

import pytest
import torch
import transformers

import lorac
from lorac.testing import assert_close
from tests import parity

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2}
NARROW = {"head_dim": 8}
PADDED = {"pad_token_id": 0}
GPT = {"vocab_size": 60, "n_layer": 2, "n_head": 4}
OWN = {
    "Bloom": {**GPT, "hidden_size": 32},
    "GPTJ": {**GPT, "n_embd": 32, "rotary_dim": 4},
    "Mpt": {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "OPT": {
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
}
CAUSAL = {
    **{name: {**SIZES, **GROUPED} for name in ("Qwen2", "Starcoder2", "Olmo2", "Granite", "Cohere")},
    **{name: {**SIZES, **GROUPED, **NARROW} for name in ("Qwen3", "Gemma2", "Gemma3")},
    **{name: {**SIZES, **GROUPED, **PADDED} for name in ("Phi3", "SmolLM3")},
    **{name: dict(SIZES) for name in ("Phi", "GPTNeoX")},
    "Mistral": {**SIZES, **GROUPED, "sliding_window": 4},
    **OWN,
}
ENCODERS = {
    "DistilBert": {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    **{name: {**SIZES, "max_position_embeddings": 64} for name in ("Roberta", "Electra", "MPNet", "DebertaV2")},
}


def made(name):
    """The model, and the name of what it answers."""
    settings = {**CAUSAL, **ENCODERS}[name]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    causal = name in CAUSAL
    kind = getattr(transformers, f"{name}ForCausalLM" if causal else f"{name}Model")
    torch.manual_seed(0)
    cache = {"use_cache": False} if causal else {}
    return kind(config(**settings, **cache)).eval(), "logits" if causal else "last_hidden_state"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
@torch.no_grad()
def test_onnxruntime_is_eager(name):
    model, output = made(name)
    eager = lorac.compile(model, {"a": lorac.LoRA(r=3, alpha=6)})
    for tensor in eager.adapters["a"].parameters():
        tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(tensor.numel()))
    emitted = lorac.compile(model, {"a": eager.adapters["a"]}, target="onnxruntime")
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 5:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    base = model(**inputs)[output]
    # So strong that it decides something, whatever the architecture makes of it.
    (moved,) = parity.contribution(eager(**inputs)[output], base).values()
    choice = {"a": 0.1 / moved}
    parity.assert_parity(emitted(**inputs, adapters=choice)[output], eager(**inputs, adapters=choice)[output], base)
    emitted.swap(None)
    assert_close(emitted(**inputs)[output], base)
