"""The norms of queries and keys: a case worked by hand, the adapter's share, and an unchanged model."""

import dataclasses
import math

import pytest
import torch
import transformers

import lorac
from lorac.analysis.attention_norms import HeadNorms, measure_attention, measure_projection
from lorac.testing import assert_close
from tests.limits import assert_at_most, decimals


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=17, num_key_value_heads=2, attention_bias=True, **sizes)
    return transformers.LlamaForCausalLM(config).double().eval()


INPUTS = {"input_ids": torch.arange(22).reshape(2, 11) % 17}


def adapter(model, *, alpha=4.0, b=0.3):
    """LoRA on queries and keys."""
    made = lorac.compile(model, {"a": lorac.LoRA(r=2, alpha=alpha, targets=["q_proj", "k_proj"])}).adapters["a"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in made.tensors.values():
            for name, size in (("lora_A", 1.0), ("lora_B", b)):
                tensors[name].copy_(size * torch.randn(tensors[name].shape, generator=generator))
    return made


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """X = (1, 2), W = 1, s·B·A = 2·(1, 0)ᵀ·(1, 1): Q = (7, 2), of which (1, 2) is the base's; d = 2, L = 1024."""
    delta = 2 * tensor([[1], [0]]) @ tensor([[1, 1]])
    norms = measure_projection(tensor([[1, 2]]), torch.eye(2).double() + delta, None, delta, 2**-0.5)
    assert decimals(tensor([norms.total, norms.base, norms.delta]), 3) == [5.886, 1.682, 5.045]
    head = HeadNorms(1024, norms.total, norms.base, 0.0, 0.0, norms)
    assert decimals(tensor([head.threshold, head.ratio]), 2) == [2.63, 2.24]
    assert head.status == "above"
    statuses = [dataclasses.replace(head, q_max=share * head.threshold, k_max=0.0).status for share in (0.4, 0.7, 1.1)]
    assert statuses == ["below", "near", "above"]
    assert HeadNorms(1, 1.0, 1.0, 1.0, 1.0).ratio == math.inf


def test_measures_the_logits_of_every_head(model):
    """The largest logit of a head is that of the attention map, before its softmax."""
    found = measure_attention(model, INPUTS)
    assert [*found] == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    first = model.model.layers[0]
    x = first.input_layernorm(model.model.embed_tokens(INPUTS["input_ids"]))
    turn = model.model.rotary_emb(x, torch.arange(11)[None])
    projections = first.self_attn.q_proj, first.self_attn.k_proj
    q, k = (project(x).unflatten(-1, (-1, 6)).transpose(1, 2) for project in projections)
    q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, *turn)
    logits = (q @ k.repeat_interleave(2, 1).mT).abs().amax((0, 2, 3)) / 6**0.5
    heads = found["model.layers.0.self_attn"]
    assert_close(tensor([head.max_logit for head in heads]), logits)
    assert_close(tensor([head.q_max for head in heads]), q.abs().amax((0, 2, 3)) / 6**0.25)
    assert_close(tensor([head.k_max for head in heads]), k.repeat_interleave(2, 1).abs().amax((0, 2, 3)) / 6**0.25)
    assert {head.length for head in heads} == {11}


def test_merged_weights_give_the_same(model):
    own = adapter(model)
    apart, merged = measure_attention(model, INPUTS, own), measure_attention(lorac.merge_into(model, own), INPUTS)
    for path, heads in apart.items():
        for name in ("q_max", "k_max", "v_max", "max_logit"):
            assert_close(tensor([getattr(h, name) for h in heads]), tensor([getattr(h, name) for h in merged[path]]))


def test_measures_the_adapters_share_of_the_logits(model):
    adapters = adapter(model, b=0.0), adapter(model), adapter(model, alpha=8.0)
    base, once, twice = (measure_attention(model, INPUTS, one) for one in adapters)
    assert all(part.delta == 0 and part.growth == 1 for part in parts(base))
    for part in parts(once):
        assert_at_most(tensor([part.total]), tensor([part.base + part.delta]))
        assert_at_most(tensor([abs(part.base - part.delta)]), tensor([part.total]))
    first = "model.layers.0.self_attn"  # whose inputs no adapter changes
    assert_close(*(tensor([scale * h.query.delta for h in own[first]]) for own, scale in ((once, 2), (twice, 1))))
    assert all(part.growth > 1 for part in parts(twice))


def parts(found):
    return [part for heads in found.values() for head in heads for part in (head.query, head.key)]


def test_leaves_the_model_unchanged(model):
    before = model.config._attn_implementation
    expected = model(**INPUTS).logits
    measure_attention(model, INPUTS, adapter(model))
    assert model.config._attn_implementation == before
    assert torch.equal(model(**INPUTS).logits, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("lorac" in name for name in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)


def test_rejects_a_model_without_the_interface():
    with pytest.raises(lorac.Unavailable, match="does not attend through"):
        measure_attention(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})
