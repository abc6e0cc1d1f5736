"""Attention in few ops: every form of it, rows that attend to nothing and rotations too, answers as torch's does."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import lorac
from lorac.testing import assert_close
from tests.emitted import load_emitted


class Attends(nn.Module):
    """A layer whose output is attended to, in ``heads`` heads that share ``key_heads``."""

    def __init__(self, heads=4, key_heads=4, **settings):
        super().__init__()
        self.up, self.heads, self.key_heads, self.settings = nn.Linear(8, 6 * heads), heads, key_heads, settings

    def forward(self, x, mask=None):
        query = self.up(x).unflatten(-1, (self.heads, 6)).transpose(1, 2)
        key, value = query[:, : self.key_heads].flip(-1), query[:, : self.key_heads].sin()
        return F.scaled_dot_product_attention(query, key, value, mask, **self.settings)


def ops(compiled):
    return [node.op_type for node in load_emitted(compiled).graph]


def bool_mask():
    """(2, 1, 5, 5): the second row of the first sequence attends to nothing."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[0, 0, 1] = False
    return mask


@pytest.mark.medium("grouped heads with a mask, and causal ones", keep=["gqa bool", "causal"])
@pytest.mark.parametrize(
    ("settings", "mask"),
    [
        ({}, None),
        ({"scale": 0.3}, None),
        ({"is_causal": True}, None),
        ({"key_heads": 2, "enable_gqa": True}, None),
        ({}, bool_mask()),
        ({"key_heads": 2, "enable_gqa": True}, bool_mask()),
        ({}, torch.zeros(2, 1, 5, 5).masked_fill(~bool_mask(), -math.inf)),
        ({}, torch.linspace(-2, 2, 25).reshape(1, 1, 5, 5)),
    ],
    ids=["plain", "scale", "causal", "gqa", "bool", "gqa bool", "infinite", "bias"],
)
@torch.no_grad()
def test_answers_as_torch(settings, mask):
    torch.manual_seed(0)
    model, x = Attends(**settings).eval(), torch.randn(2, 5, 8)
    inputs = (x,) if mask is None else (x, mask)
    options = {"example_inputs": inputs, "self_test": False}
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2)}, target="onnxruntime", **options)
    assert_close(compiled(*inputs), model(*inputs))
    assert "IsNaN" not in ops(compiled)


def llama(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        use_cache=False,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def scaled(factor):
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor}}


@pytest.mark.medium("the golden nodes of a Llama, and generation of left-padded rows")
@pytest.mark.slow("plain angles", cases=["scaled angles"])
@pytest.mark.parametrize("settings", [{}, scaled(4.0)], ids=["plain", "scaled angles"])
@torch.no_grad()
def test_fuses_rotary_positions_and_matches_torch_with_left_padding(settings):
    model = llama(**settings)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2)}, target="onnxruntime", self_test=False)
    assert ops(compiled).count("RotaryEmbedding") == 2 * 2
    assert "Neg" not in ops(compiled)
    ids = torch.arange(14).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(compiled(**inputs).logits, model(**inputs).logits)
    inputs["attention_mask"][0, :2] = 0  # padded on the left: those positions attend to nothing
    assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow("rotations of padded rows")
@torch.no_grad()
def test_rotations_by_positions_of_each_row():
    model, ids = llama(), torch.arange(14).reshape(2, 7)
    inputs = {"input_ids": ids, "position_ids": torch.stack([torch.arange(7), torch.arange(3, 10)])}
    options = {"example_inputs": inputs, "self_test": False}
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2)}, target="onnxruntime", **options)
    assert ops(compiled).count("RotaryEmbedding") == 2 * 2
    inputs["position_ids"] = inputs["position_ids"].flip(0)
    assert_close(compiled(**inputs).logits, model(**inputs).logits)


class Turns(nn.Module):
    """``x·cos + rotate(x)·sin`` of a layer's output in 2 heads of 6, turned and by angles as ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.up, self.how = nn.Linear(8, 12), how
        self.register_buffer("rates", torch.linspace(0.3, 2.0, 6))

    def forward(self, x):
        heads = self.up(x).unflatten(-1, (2, 6)).transpose(1, 2)
        positions = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[None, :, None]
        cut = 2 if self.how == "unevenly" else 3
        turned = torch.cat((-heads[..., cut:], heads[..., :cut]), dim=-1)
        if self.how == "by other angles":
            angles = positions * self.rates
        else:
            half = positions * self.rates[:3]
            angles = torch.cat((half, half), dim=-1)
        return heads * angles.cos().unsqueeze(1) + turned * angles.sin().unsqueeze(1)


@pytest.mark.medium("one that is split unevenly", keep=["unevenly-0"])
@pytest.mark.parametrize(("how", "fused"), [("by halves", 1), ("unevenly", 0), ("by other angles", 0)])
@torch.no_grad()
def test_leaves_ops_that_only_resemble_a_rotation(how, fused):
    torch.manual_seed(0)
    model, x = Turns(how).eval(), torch.randn(3, 5, 8)
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    compiled = lorac.compile(
        model, {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=(x,), dynamic_shapes=free
    )
    assert ops(compiled).count("RotaryEmbedding") == fused
    assert_close(compiled(x), model(x))
