"""Modules that become sites when they are named: how wide they are is read off their structure, or asked for."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn

import lorac
from lorac import SiteKind
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site, make_module_site
from lorac.frontend.site_discovery import find_sites
from lorac.frontend.skeleton import build_skeleton, describe_skeleton
from lorac.testing import assert_close
from tests.refusing import refuses
from tests.variants.modules import BLOCK, Bottleneck

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}


def named(kind: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**fields))


MODELS = {
    "llama": (
        lambda: named("Llama", **SIZES),
        {"layers.0.self_attn": (32, 32), "layers.0.mlp": (32, 32), "norm": (32, 32), "layers.0.mlp.act_fn": None},
    ),
    "heads have norms": (
        lambda: named("Qwen3", **SIZES, head_dim=8),
        {"layers.0.self_attn": (32, 32), "layers.0.self_attn.q_norm": (8, 8)},
    ),
    "experts, and a gate behind them": (
        lambda: named("Qwen2Moe", **SIZES, **EXPERTS),
        {"layers.0.mlp": (32, 32), "layers.0.mlp.experts": (32, 32)},
    ),
    "parts of a layer": (
        lambda: named("Bert", **SIZES),
        {
            "encoder": (32, 32),
            "embeddings": (61, 32),
            "encoder.layer.0.attention": (32, 32),
            "encoder.layer.0.intermediate": (32, 48),
            "encoder.layer.0.output": (48, 32),
        },
    ),
    "transposed weights": (
        lambda: named("GPT2", vocab_size=61, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2),
        {"h.0.attn": (32, 32), "h.0.mlp": (32, 32), "ln_f": (32, 32)},
    ),
    "a table of positions": (
        lambda: (
            named("T5Encoder", vocab_size=61, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            if hasattr(transformers, "T5EncoderConfig")
            else transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            )
        ),
        {"encoder.block.0.layer.0.SelfAttention": (24, 24), "encoder.block.0.layer.1.DenseReluDense": (24, 24)},
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))),
        {"0": (3, 6), "0.1": None},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_width_of_a_module(kind: str) -> None:
    made, expected = MODELS[kind]
    model = made()
    sites = find_sites(model)
    skeleton = build_skeleton(describe_skeleton(model))
    for path, widths in expected.items():
        for host in (model, skeleton):
            view = ModelView(host, sites)
            found = infer_module_site(path, view) if path not in sites else sites[path]
            assert (found and (found.in_features, found.out_features)) == widths, path
            assert found is None or (found.kind is SiteKind.BLOCK and path in view.callable_paths)


def test_a_list_is_not_called() -> None:
    assert ModelView.of(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))).callable_paths == ["0.0"]


def test_names_the_modules_that_were_inspected() -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(5, 3)), nn.Identity())
    with refuses("site_unsupported") as error:
        make_module_site("1", ModelView.of(host))
    assert "the scale of a norm" in str(error.value) and "(none found)" in str(error.value)
    assert "`lorac sites MODEL`" in str(error.value)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 3)

    odd = nn.ModuleDict({"odd": Odd()})
    with refuses("site_unsupported", match="the first takes 4, the last returns 3"):
        make_module_site("odd", ModelView.of(odd))


def test_rejects_listed_modules_without_widths_and_skips_matched_ones() -> None:
    model = named("Llama", **SIZES)
    with refuses("site_unsupported", match=r"'layers\.0\.mlp\.act_fn', a \w+, cannot be inferred"):
        lorac.compile(model, {"b": Bottleneck(targets=["act_fn"])})
    found = lorac.compile(model, {"b": Bottleneck(targets=r".*\.mlp(\.act_fn)?")}).adapters["b"].sites
    assert found == ("layers.0.mlp",)
    with refuses("site_not_found", match="matches no site"):
        lorac.compile(model, {"b": Bottleneck(targets=["self_atn"])})
    with refuses("site_not_found", match="targets 'mlp', which matches no site"):
        lorac.compile(model, {"l": lorac.LoRA(targets=["mlp"])})


def test_finds_the_networks_blocks_next_to_other_targets() -> None:
    model = named("Llama", **SIZES)
    both = {"a": Bottleneck(targets=["layers.0.mlp", "norm"]), "t": lorac.AdapterTune(r=2)}
    assert lorac.compile(model, both).adapters["t"].sites == ("layers.0",)
    assert lorac.compile(model, {"t": lorac.AdapterTune(r=2, targets=["mlp"])}).adapters["t"].sites == ("layers.0.mlp",)


def test_asks_for_module_names_where_there_are_no_blocks() -> None:
    with refuses("site_not_found", match="looked for elements of lists and sequences") as error:
        lorac.compile(nn.Bilinear(2, 2, 2), {"t": lorac.AdapterTune(r=2)})
    assert "name modules by the ends of their paths" in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Silent(lorac.BranchVariant):
    """A branch without parameters that gives what its site answers."""

    targets: tuple[str, ...] = ("norm",)
    name, kinds, emits = "test-silent", BLOCK | {SiteKind.LINEAR}, ("out",)

    def params(self, site):
        return {}

    def branch(self, x, y, p, ctx):
        ctx.emit("out", y)
        return 2 * y


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_branch_without_parameters(target: str) -> None:
    host, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4, dtype=torch.float32)
    compiled = lorac.compile(host, {"s": Silent(targets=["0"])}, target, (x,), aux=["out"])
    y = compiled(x)  # gradients are recorded
    assert_close(y, 2 * host(x))
    # An affine formula that emits stays the branch that does.
    assert_close(compiled.aux["out"]["0"], host(x))
    assert "has extra outputs (out)" in str(compiled.explain())
