"""The residual stream of a model and its repeated blocks, on models with misleading names."""

import pytest
import torch
from torch import nn

from lorac import ExampleInputsNeeded
from lorac.frontend.components import Components
from lorac.frontend.model_view import ModelView
from lorac.frontend.residual_stream import (
    find_common_norm_eps,
    find_stream_end,
    find_stream_start,
    find_sublayer_sites,
    trace_residual_stream,
)
from lorac.frontend.transformer_blocks import find_transformer_blocks
from tests.refusing import refuses

WIDTH, X = 8, torch.randn(2, 5, 8)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        heads = self.one(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.other(nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2))


class Misnamed(nn.Module):
    """An attention called ``mlp`` and an MLP called ``self_attn``; norms behind the sums, or in front of each."""

    def __init__(self, behind):
        super().__init__()
        self.behind, self.mlp = behind, Attends()
        self.self_attn = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        if self.behind:
            x = self.first(self.mlp(x) + x)
            return self.second(x + self.self_attn(x))
        x = x + self.mlp(self.first(x))
        return self.self_attn(self.second(x)) + x


class Network(nn.Module):
    def __init__(self, behind=False):
        super().__init__()
        self.begin, self.stages = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(nn.ModuleList([Misnamed(behind)]) for _ in "ab"),
        )

    def forward(self, x):
        x = self.begin(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


@pytest.mark.parametrize("behind", [False, True])
def test_finds_kinds_residuals_and_norms_by_the_computation(behind):
    model = Network(behind)
    stream = trace_residual_stream(ModelView.of(model), (X,))
    block = stream.blocks[0]
    attention, mlp = (found for found in stream.sublayers if found.block == block)
    assert (attention.kind, mlp.kind) == ("attention", "mlp")
    assert (attention.modules, mlp.modules) == ((f"{block}.mlp",), (f"{block}.self_attn",))
    reads = ("mlp", "self_attn") if behind else ("first", "second")
    assert (attention.residual, mlp.residual) == tuple(f"{block}.{name}" for name in reads)
    norms = (f"{block}.first", f"{block}.second") if behind else (None, None)
    assert (attention.norm, mlp.norm) == norms
    assert list(find_sublayer_sites(ModelView.of(model), stream))[:2] == [
        n or found.modules[0] for n, found in zip(norms, (attention, mlp), strict=True)
    ]
    assert find_stream_start(ModelView.of(model), stream) == "begin"
    assert find_stream_end(ModelView.of(model), stream, ()) is None


def test_blocks_are_found_inside_stages_and_in_components():
    assert find_transformer_blocks(ModelView.of(Network()), (X,)) == ("stages.0.0", "stages.1.0")
    both = Components({"a": Network(), "b": Network()})
    assert find_transformer_blocks(ModelView.of(both), {"a": (X,), "b": (X,)})[::2] == ("a.stages.0.0", "b.stages.0.0")
    assert trace_residual_stream(ModelView.of(both), {"a": (X,), "b": (X,)}).blocks[2] == "b.stages.0.0"
    assert (
        find_transformer_blocks(ModelView.of(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))), (X,))
        == ()
    )


def test_leaves_the_model_unchanged():
    model = Network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace_residual_stream(ModelView.of(model), (X,))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rejects_missing_inputs_and_ambiguous_eps():
    with pytest.raises(ExampleInputsNeeded):
        trace_residual_stream(ModelView.of(Network()))
    with refuses("site_unsupported", match="eps"):
        find_common_norm_eps([nn.LayerNorm(3), nn.LayerNorm(3, eps=0.5)], 1.0)
    with refuses("site_unsupported", match="no weight"):
        find_common_norm_eps([nn.LayerNorm(3, elementwise_affine=False)], 1.0)
