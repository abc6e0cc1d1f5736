"""The adaptable places of a model, and how they present their weights."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorac
from lorac.ir.host.sites import SiteKind, is_conv1d_of_gpt2
from lorac.testing import HOSTS
from lorac.testing.checks import assert_close

MODULES = {
    "linear": (lambda: nn.Linear(5, 7), SiteKind.LINEAR, (7, 5)),
    "transposed": (lambda: Conv1D(7, 5), SiteKind.LINEAR, (7, 5)),
    "embedding": (lambda: nn.Embedding(13, 6), SiteKind.EMBEDDING, (6, 13)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 5), SiteKind.CONV1D, (8, 15)),
    "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2)), SiteKind.CONV2D, (8, 18)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 3), SiteKind.CONV3D, (5, 54)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), SiteKind.CONV2D, (4, 54)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), SiteKind.CONV1D, (8, 12)),
}


def only_site(make):
    model = nn.ModuleDict({"site": make()})
    return lorac.sites(model)["site"], model["site"]


@pytest.mark.parametrize(("make", "kind", "shape"), MODULES.values(), ids=MODULES)
def test_kind_and_shape(make, kind, shape):
    site, module = only_site(make)
    assert (site.kind, site.out_features, site.in_features) == (kind, *shape)
    assert site.weight == "site.weight"
    assert site.bias == (None if kind is SiteKind.EMBEDDING else "site.bias")
    assert site.present(module.weight).shape == shape


@pytest.mark.parametrize("make", [m[0] for m in MODULES.values()], ids=MODULES)
def test_present_and_store_are_inverse(make):
    site, module = only_site(make)
    weight = module.weight.detach()
    matrix = site.present(weight)
    assert torch.equal(site.store(matrix), weight)
    assert site.store(matrix).shape == weight.shape
    assert torch.equal(site.present(site.store(matrix)), matrix)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_presented_convolution_is_its_dense_one(groups):
    site, module = only_site(lambda: nn.Conv2d(6, 4, 3, groups=groups))
    x = torch.randn(2, 6, 5, 5)
    dense = site.present(module.weight).reshape(site.kernel)
    assert dense.shape == (4, 6, 3, 3)
    assert_close(nn.functional.conv2d(x, dense, module.bias), module(x))


def test_leaving_the_blocks_of_a_grouped_convolution():
    site, module = only_site(MODULES["grouped"][0])
    matrix = site.present(module.weight.detach())
    assert not site.leaves_blocks(matrix * 2)
    outside = matrix.clone()
    outside[0, -1] = 1
    assert site.leaves_blocks(outside)
    assert not only_site(MODULES["conv2d"][0])[0].leaves_blocks(outside[:, :18])


def test_what_is_no_site():
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(4),
            "batch": nn.BatchNorm1d(4),
            "integers": nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2), requires_grad=False)}),
            "gelu": nn.GELU(),
        }
    )
    assert lorac.sites(model) == {}
    assert lorac.sites(nn.Linear(3, 2)) == {}


def test_tied_weights_know_of_each_other():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(13, 6), "head": nn.Linear(6, 13, bias=False), "other": nn.Linear(6, 13)}
    )
    model["head"].weight = model["embed"].weight
    sites = lorac.sites(model)
    assert {path: site.shares for path, site in sites.items()} == {"embed": ("head",), "head": ("embed",), "other": ()}


def test_a_module_under_two_paths_is_one_site():
    shared = nn.Linear(3, 2)
    assert list(lorac.sites(nn.ModuleDict({"one": shared, "two": shared}))) == ["one"]


def test_padding_index():
    sites = lorac.sites(nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Embedding(5, 3, padding_idx=2)}))
    assert [site.padding_idx for site in sites.values()] == [-1, 2]


def test_blocks():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 4)

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "plain": nn.ModuleList([nn.Linear(4, 3)])})
    sites = lorac.sites(model)
    blocks = {path: site for path, site in sites.items() if site.kind is SiteKind.BLOCK}
    assert list(blocks) == ["layers.0", "layers.1"]
    assert (blocks["layers.0"].out_features, blocks["layers.0"].weight) == (4, None)
    assert sites["plain.0"].kind is SiteKind.LINEAR


def test_the_kits_conv1d_counts_as_gpt2s():
    assert is_conv1d_of_gpt2(HOSTS["transposed"].model().site)
    assert is_conv1d_of_gpt2(Conv1D(3, 2))
    assert not is_conv1d_of_gpt2(nn.Linear(3, 2))
