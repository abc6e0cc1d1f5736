"""Methods on parts of packed layers, by hand, and as PEFT can hold them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorac
from lorac import load_adapter, save_adapter
from lorac.testing import adapter_away, assert_parity
from tests.limits import assert_apart
from tests.peft_files import load_peft
from tests.refusing import refuses

WIDTH = 6


class Packed(nn.Module):
    """Attention whose q, k and v come of one layer: GPT-2's way, or by heads."""

    def __init__(self, heads=0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if heads else Conv1D(3 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.qkv(x)
        if self.heads:
            y = y.unflatten(-1, (self.heads, 3, -1)).movedim(-2, -3).flatten(-2)
        q, k, v = y.unflatten(-1, (3, -1)).unbind(-2) if not self.heads else y.unbind(-2)
        return torch.softmax(q @ k.mT, -1) @ v


def packed(heads=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Packed(heads).double().eval()
        nn.init.normal_(model.qkv.weight, std=0.4)
        return model, torch.randn(2, 5, WIDTH, dtype=torch.float64)


def rows_of(part, heads):
    """The rows of W that are a part's."""
    if not heads:
        return list(range(part * WIDTH, (part + 1) * WIDTH))
    size = WIDTH // heads
    return [3 * size * head + part * size + row for head in range(heads) for row in range(size)]


@pytest.mark.medium("another layer", cases=["0"])
@pytest.mark.parametrize("heads", [0, 2])
@torch.no_grad()
def test_queries_and_values_of_a_packed_layer(heads, tmp_path):
    model, x = packed(heads)
    parts = {"q": lorac.LoRA(r=2, alpha=3), "v": lorac.LoRA(r=1, alpha=2)}
    variant = lorac.Split(parts=parts, groups=heads or 1, targets=("qkv",))
    adapter = adapter_away(variant, model, x, name="a", seed=1)
    at, site = adapter.tensors["qkv"], lorac.sites(model)["qkv"]
    W = site.present(model.qkv.weight.clone())
    W[rows_of(0, heads)] += 1.5 * at["q_lora_B"] @ at["q_lora_A"]
    W[rows_of(2, heads)] += 2.0 * at["v_lora_B"] @ at["v_lora_A"]
    by_hand, _ = packed(heads)
    by_hand.qkv.weight.copy_(site.store(W))
    expected, base = by_hand(x), model(x)
    assert_apart(expected, base)
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": adapter}, mode=mode)
        assert_parity(compiled(x), expected, base)
        if mode == "live":
            assert compiled.plans["qkv"].room == {"a": 3, "b": 3}, "q's and v's factors do not run beside the weight"
    save_adapter(adapter, tmp_path / "own", format="native")
    assert load_adapter(tmp_path / "own", model).variant == variant
    with refuses("unsupported_field", match=r"'split'(.|\n)*lorac\.to_lora"):
        save_adapter(adapter, tmp_path / "peft", model=model)
    save_adapter(lorac.to_lora(adapter, model), tmp_path / "peft", model=model)
    assert_parity(load_peft(model, tmp_path / "peft")(x), expected, base)
    held = load_adapter(tmp_path / "peft", model).tensors["qkv"]["lora_B"]
    assert not held[rows_of(1, heads)].any() and held[rows_of(0, heads)].any()


@torch.no_grad()
def test_parts_of_other_sizes_and_methods():
    """Four heads of queries to one of keys and one of values; DoRA's magnitudes are of its own part's rows."""
    variant = lorac.Split(
        parts={"q": lorac.DoRA(r=1, alpha=1), "v": lorac.SHiRA(r=1)}, among={"q": 4, "k": 1, "v": 1}, targets=("0",)
    )
    model = nn.Sequential(nn.Linear(5, 12)).double()
    sites = lorac.sites(model)
    shapes = {name: spec.shape for name, spec in variant.specs(sites["0"]).items()}
    assert shapes["q_lora_B"] == (8, 1) and shapes["q_magnitude"] == (8,)
    adapter = adapter_away(variant, model, torch.randn(3, 5).double(), name="a", seed=1)
    p = SimpleNamespace(**adapter.tensors["0"])
    W = model[0].weight
    moved = variant.weight(W, p)
    q = lorac.DoRA(r=1, alpha=1).weight(
        W[:8], SimpleNamespace(lora_A=p.q_lora_A, lora_B=p.q_lora_B, magnitude=p.q_magnitude)
    )
    assert torch.equal(moved[:8], q) and torch.equal(moved[8:10], W[8:10])
    assert moved[10:].ne(W[10:]).any()
    fresh = lorac.compile(model, {"a": variant})
    assert torch.equal(fresh(torch.ones(1, 5).double()), model(torch.ones(1, 5).double()))


def test_a_part_trains_with_the_dropout_of_the_split():
    model, x = packed()
    compiled = lorac.compile(model, {"a": lorac.Split(parts={"k": lorac.LoRA(r=2)}, dropout=0.5, targets=("qkv",))})
    compiled.train()
    nn.init.normal_(compiled.adapters["a"].tensors["qkv"]["k_lora_B"])
    assert_apart(compiled(x), compiled(x))
    compiled(x).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in compiled.parameters() if parameter.requires_grad)


def test_rejects_invalid_parts():
    with pytest.raises(lorac.OptionError, match="there is no part 'query'"):
        lorac.Split(parts={"query": lorac.LoRA()})
    with pytest.raises(lorac.OptionError, match=r"part 'q' has dropout=0\.1"):
        lorac.Split(parts={"q": lorac.LoRA(dropout=0.1)})
    with pytest.raises(lorac.WrongType, match=r"it takes dict\[str, WeightVariant\]"):
        lorac.Split(parts={"q": lorac.MeteoRA()})
    model, _ = packed()
    with refuses("site_unsupported", match="the 18 rows of 'qkv' do not divide into 4 groups of q: 1, k: 1, v: 1"):
        lorac.compile(model, {"a": lorac.Split(parts={"q": lorac.LoRA()}, groups=4, targets=("qkv",))})
