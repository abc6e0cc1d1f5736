"""A bias that depends on the weight, alone and within methods of methods."""

import pytest
import torch
from torch import nn

import lorac
from lorac import Chain, GLoRAHadamard, LoRA, Residual, Split
from lorac.testing import assert_close

SITE = lorac.Site("site", lorac.SiteKind.LINEAR, 6, 4, torch.float64, "site.weight", "site.bias")


def drawn(variant, prefix="", seed=0):
    """Random tensors of a method, by prefixed names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: spec.shape for name, spec in variant.params(SITE).items()}
    return {
        f"{prefix}{name}": torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def layer(weight, bias):
    host = nn.Sequential()
    host.add_module("site", nn.Linear(4, 6).double())
    host.site.weight.data, host.site.bias.data = weight, bias
    return host


@pytest.fixture
def host():
    generator = torch.Generator().manual_seed(9)
    return layer(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (6,))))


def adapted(host, variant, tensors):
    """W' and b' of the layer, read off a live program."""
    compiled = lorac.compile(host, {"a": lorac.Adapter("a", variant, {"site": tensors})})
    bias = compiled(torch.zeros(1, 4, dtype=torch.float64))[0]
    return compiled(torch.eye(4, dtype=torch.float64)).t() - bias[:, None], bias


@torch.no_grad()
@pytest.mark.parametrize("form", ["lora", "vector"])
def test_c_moves_the_input(form, host):
    """b' = W·C where nothing else is trained: the layer as it is, at its input moved by C."""
    variant = GLoRAHadamard(r=2, config_A_B="none", config_C=form, config_D_E="none", targets=("site",))
    tensors = drawn(variant)
    moved = tensors.get("glora_C_X", torch.zeros(4, 1))
    if form == "lora":
        moved = tensors["glora_C_Xd"] @ tensors["glora_C_Xu"]
    weight, bias = adapted(host, variant, tensors)
    assert_close(weight, host.site.weight)
    assert_close(bias, host(moved.t())[0])


@torch.no_grad()
def test_a_chain_reads_the_weight_of_the_part_before(host):
    first, second = LoRA(r=2, targets=("site",)), GLoRAHadamard(r=2, targets=("site",))
    one, two = drawn(first), drawn(second, seed=1)
    both = {f"part0_{name}": t for name, t in one.items()} | {f"part1_{name}": t for name, t in two.items()}
    found = adapted(host, Chain(parts=(first, second), targets=("site",)), both)
    between = layer(*adapted(host, first, one))
    for got, expected in zip(found, adapted(between, second, two), strict=True):
        assert_close(got, expected)


@torch.no_grad()
def test_a_residual_reads_the_weight_that_is_left(host):
    inner = GLoRAHadamard(r=2, targets=("site",))
    variant = Residual(method=inner, r=2, targets=("site",))
    tensors = drawn(variant)
    left = layer(host.site.weight - tensors["start_B"] @ tensors["start_A"], host.site.bias.clone())
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("start_")}
    for got, expected in zip(adapted(host, variant, tensors), adapted(left, inner, own), strict=True):
        assert_close(got, expected)


@torch.no_grad()
def test_a_part_of_a_split_reads_its_own_rows(host):
    inner = GLoRAHadamard(r=2, config_D_E="none")
    variant = Split(parts={"q": inner, "k": LoRA(r=2)}, among=("q", "k"), targets=("site",))
    tensors = drawn(variant)
    bias = adapted(host, variant, tensors)[1]
    offset = tensors["q_glora_C_Xd"] @ tensors["q_glora_C_Xu"]
    assert_close(bias[:3], host.site.bias[:3] + (host.site.weight[:3] @ offset)[:, 0])
    assert_close(bias[3:], host.site.bias[3:])


def test_layers_without_a_bias_have_no_changes_of_one():
    bare = lorac.Site("site", lorac.SiteKind.LINEAR, 6, 4, torch.float64, "site.weight")
    assert {name.split("_")[1] for name in GLoRAHadamard().params(bare)} == {"A", "B"}
    assert {name.split("_")[1] for name in GLoRAHadamard().params(SITE)} == set("ABCDE")
