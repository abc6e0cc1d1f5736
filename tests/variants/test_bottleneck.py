"""Bottlenecks: every placement against its equations, at models of every build, and rejected settings."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

import lorac
from lorac import Site, SiteKind
from lorac.ir.slots.execution import FormulaContext
from lorac.testing import assert_close
from lorac.variants._bottleneck_layers import ACTIVATIONS, apply_coupling, coupling_specs, invert_coupling
from tests.oracles import bottleneck as oracle
from tests.refusing import refuses
from tests.zoo import ZOO

D, EPS = 8, 1e-12
SITE = Site("block.mlp", SiteKind.BLOCK, D, D, torch.float64, None, named=True)
WEIGHT, BIAS = 1 + 0.3 * torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
PLACED = {"residuals": {"mlp": "in:block.norm"}}
BEHIND = {**PLACED, "inner": {"mlp": "block.dropout"}, "norm_eps": EPS}
SETTINGS = {
    "houlsby": {},
    "pfeiffer": {"original_ln_before": True, "non_linearity": "relu"},
    "parallel": {"is_parallel": True, "scaling": 4.0},
    "plus": {
        "original_ln_before": True,
        "original_ln_after": False,
        "residual_before_ln": False,
        "non_linearity": "gelu",
        "scaling": "channel",
    },
    "post": {"original_ln_before": True, "residual_before_ln": "post_add", "scaling": "learned"},
    "bare": {"original_ln_after": False},
    "normed": {"ln_before": True, "ln_after": True, "use_gating": True},
    "inside": {"original_ln_before": True, "ln_after": True, "adapter_residual_before_ln": True},
    "inside-z": {
        "original_ln_before": True,
        "ln_after": True,
        "adapter_residual_before_ln": True,
        "residual_before_ln": False,
    },
    "inside-bare": {"ln_after": True, "adapter_residual_before_ln": True, "original_ln_after": False},
    "compacter": {"phm_layer": True, "phm_dim": 2, "non_linearity": "gelu"},
    "own-rule": {"phm_layer": True, "phm_dim": 2, "phm_rank": 2, "shared_phm_rule": False},
}


def drawn(variant, site=SITE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    specs = variant.params(site)
    return {n: 0.5 * torch.randn(s.shape, generator=generator, dtype=torch.float64) for n, s in specs.items()}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("behind", [False, True], ids=["pre-LN", "post-LN"])
def test_a_placement_is_its_equation(name, behind):
    variant = lorac.Bottleneck(reduction_factor=2.0, **SETTINGS[name], **(BEHIND if behind else PLACED))
    tensors = drawn(variant)
    h, r = (torch.randn(3, 5, D, dtype=torch.float64) for _ in range(2))
    ln = (lambda z: F.layer_norm(z, (D,), WEIGHT, BIAS, EPS)) if behind else (lambda z: z)
    values = {"in:block.norm": r, "block.dropout": h, "param:block.mlp.weight": WEIGHT, "param:block.mlp.bias": BIAS}
    values = {key: values[key] for key in variant.reads(SITE)}  # what it reads is all that it gets
    x, y = (h + r, ln(h + r)) if behind else (torch.zeros_like(h), h)
    found = variant.branch(x, y, SimpleNamespace(**tensors), FormulaContext(SITE, values=values).within(torch.float64))
    p = SimpleNamespace(**{key: tensor.numpy() for key, tensor in tensors.items()})
    own = (lambda z: oracle.norm(z, WEIGHT.numpy(), BIAS.numpy(), EPS)) if behind else None
    expected = torch.from_numpy(oracle.stream(h.numpy(), r.numpy(), p, variant, own))
    assert_close(found if behind else found + r, expected)


@pytest.mark.parametrize(("name", "answer"), [("pfeiffer", [7, -2]), ("houlsby", [5, 0]), ("parallel", [10, -5])])
def test_the_examples_computed_by_hand(name, answer):
    site = dataclasses.replace(SITE, out_features=2, in_features=2)
    variant = lorac.Bottleneck(**{**SETTINGS[name], **PLACED, "non_linearity": "relu"})
    row = {"down": [[1, 1]], "down_bias": [0], "up": [[1], [-1]], "up_bias": [0, 0]}
    p = SimpleNamespace(**{key: torch.tensor(value, dtype=torch.float64) for key, value in row.items()})
    h, r = torch.tensor([1.0, 2], dtype=torch.float64), torch.tensor([1.0, 1], dtype=torch.float64)
    assert (
        variant.branch(h, h, p, FormulaContext(site, values={"in:block.norm": r}).within(torch.float64)) + r
    ).tolist() == answer


@pytest.mark.parametrize(("preset", "blocks", "total"), [("seq_bn", 12, 894_528), ("double_seq_bn", 24, 1_789_056)])
def test_the_counts_of_bert_base(preset, blocks, total):
    site = dataclasses.replace(SITE, out_features=768, in_features=768)
    specs = lorac.Bottleneck.preset(preset).params(site)
    assert blocks * sum(torch.Size(spec.shape).numel() for spec in specs.values()) == total


def test_an_invertible_block_is_undone_and_is_its_equation():
    specs, act = coupling_specs(7, 2.0), ACTIVATIONS["relu"]
    p = SimpleNamespace(**{key: torch.randn(spec.shape, dtype=torch.float64) for key, spec in specs.items()})
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    assert_close(invert_coupling(apply_coupling(x, p, act), p, act), x)
    arrays = SimpleNamespace(**{key: tensor.numpy() for key, tensor in vars(p).items()})
    assert_close(apply_coupling(x, p, act), torch.from_numpy(oracle.coupled(x.numpy(), arrays, oracle.ACTS["relu"])))


# ── In models ────────────────────────────────────────────────────────────────────────────────────────────────────────
SMALL = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
BART = {**SMALL, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
NEOX = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def sites_of(model, **fields):
    return lorac.compile(model, {"a": lorac.Bottleneck(**fields)}).adapters["a"].sites


def test_places_are_found_by_structure():
    assert sites_of(ZOO["tiny_llama"].model(), leave_out=(1, 2)) == ("model.layers.0.self_attn", "model.layers.0.mlp")
    bert = sites_of(ZOO["tiny_bert"].model(), mh_adapter=False, leave_out=(1,))
    assert [path.rpartition("layer.0.")[2] for path in bert] == ["output.LayerNorm"]
    t5 = sites_of(ZOO["tiny_t5"].model(), cross_adapter=True, mh_adapter=False, output_adapter=False)
    assert {path.rpartition(".")[2] for path in t5} == {"EncDecAttention"}
    bart = sites_of(transformers.BartModel(transformers.BartConfig(**BART)).eval())
    norms = ("self_attn_layer_norm", "final_layer_norm")
    assert bart == tuple(f"{half}.layers.0.{norm}" for half in ("encoder", "decoder") for norm in norms)


def test_rejects_default_targets_for_parallel_sublayers():
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX)).eval()
    with refuses("site_unsupported", match="no sublayer was found in GPTNeoX"):
        sites_of(model)
    assert sites_of(model, targets=["mlp"]) == ("gpt_neox.layers.0.mlp",)


def test_trains_with_dropout():
    entry = ZOO["tiny_bert"]
    model = entry.fresh()
    fields = {"reduction_factor": 8.0, "dropout": 0.2, "stochastic_depth": 0.2, "scaling": "learned"}
    compiled = lorac.compile(model, {"a": lorac.Bottleneck.preset("compacter", phm_dim=2, **fields)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = list(compiled.adapters["a"].parameters())
    with torch.no_grad():
        for tensor in own:
            tensor.add_(0.1 * torch.randn_like(tensor))
    start = [tensor.detach().clone() for tensor in own]
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
    compiled.train()
    for _ in range(3):
        optimizer.zero_grad()
        compiled(**entry.inputs()).logits.square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(map(torch.equal, own, start))
    compiled.eval()
    with torch.no_grad():
        assert torch.equal(*(compiled(**entry.inputs()).logits for _ in range(2)))


@torch.no_grad()
def test_par_bn_starts_as_the_base():
    entry = ZOO["tiny_llama"]
    compiled = lorac.compile(entry.model(), {"a": lorac.Bottleneck.preset("par_bn")})
    assert torch.equal(compiled(**entry.inputs()).logits, entry.model()(**entry.inputs()).logits)


@torch.no_grad()
def test_saves_and_runs_in_half_precision(tmp_path):
    entry = ZOO["tiny_bert"]
    adapter = lorac.compile(entry.model(), {"a": lorac.Bottleneck.preset("seq_bn_inv")}).adapters["a"]
    for tensor in adapter.parameters():
        tensor.add_(0.2 * torch.randn_like(tensor))
    lorac.save_adapter(adapter, tmp_path / "a", format="native", model=entry.model())
    again = lorac.load_adapter(tmp_path / "a", entry.model())
    assert again.variant == adapter.variant
    compiled = lorac.compile(entry.model(), {"a": again})
    reference = lorac.compile(entry.model(), {"a": adapter})(**entry.inputs()).logits
    assert torch.equal(compiled(**entry.inputs()).logits, reference)
    assert not torch.equal(reference, entry.model()(**entry.inputs()).logits)
    half = lorac.compile(copy.deepcopy(entry.model()).half(), {"a": again})(**entry.inputs()).logits
    assert half.dtype is torch.float16 and torch.isfinite(half).all()


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_fusing_and_baking(mode):
    with refuses("not_mergeable"):
        lorac.compile(ZOO["tiny_bert"].model(), {"a": lorac.Bottleneck()}, mode=mode, active="a")


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"non_linearity": "gulu"}, lorac.OptionError, "gelu"),
        ({"scaling": "learnt"}, lorac.OptionError, "learned"),
        ({"inv_adapter": "glow"}, lorac.OptionError, "nice"),
        ({"residual_before_ln": "pre"}, lorac.OptionError, "post_add"),
        ({"init_weights": "zero"}, lorac.OptionError, "bert"),
        ({"phm_layer": True, "phm_dim": 7}, lorac.SiteError, "phm_dim=7"),
        ({"targets": ("word_embeddings",)}, lorac.SiteError, "embedding"),
    ],
)
def test_rejects_invalid_settings(fields, error, match):
    with pytest.raises(error, match=match):
        lorac.compile(ZOO["tiny_bert"].model(), {"a": lorac.Bottleneck(**fields)})


def test_an_embedding_that_two_stacks_share_cannot_be_inverted():
    model = ZOO["tiny_t5"].fresh()
    model.decoder.embed_tokens = model.encoder.embed_tokens
    with refuses("site_unsupported", match="does only that and shows its width"):
        lorac.compile(model, {"a": lorac.Bottleneck.preset("seq_bn_inv")})


@torch.no_grad()
def test_rejects_two_bottlenecks_at_one_module():
    """BART's last norm gets a bottleneck, so the inverse follows its block; named by hand it is refused."""
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=30, max_position_embeddings=16, d_model=D, **sizes, **heads)
    model = transformers.BartForConditionalGeneration(config).eval()
    last = "model.decoder.layers.1"
    variant = lorac.compile(model, {"a": lorac.Bottleneck.preset("seq_bn_inv")}).adapters["a"].variant
    assert variant.heads == (last,) and f"{last}.final_layer_norm" in variant.inner
    fields = {"embeddings": ("model.encoder.layernorm_embedding",), "heads": (f"{last}.final_layer_norm",)}
    with refuses("site_unsupported", match=f"'{last}.final_layer_norm' would get a bottleneck and"):
        lorac.compile(model, {"a": lorac.Bottleneck.preset("seq_bn_inv", **fields)})
    with pytest.raises(lorac.OptionError, match="seq_bn"):
        lorac.Bottleneck.preset("seq_bm")
