"""The adaptable places of a model, and how they present their weights."""

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorac
from lorac import SiteKind
from lorac.frontend.site_discovery import is_gpt2_conv1d
from lorac.frontend.skeleton import build_skeleton, describe_skeleton
from lorac.ir.sites.patterns import select_sites
from lorac.testing import HOSTS, adapter_away, assert_close
from tests.parity import assert_parity
from tests.refusing import refuses

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
def test_presents_a_grouped_convolution_as_a_dense_one(groups):
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


def test_finds_no_sites_in_other_layers():
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


def test_lists_a_shared_module_once():
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


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 9), nn.Linear(9, 4)

    def forward(self, x):
        return x + self.down(self.up(x))


def blocks_of(model):
    return {site.path: site.number for site in select_sites(lorac.sites(model), "all-blocks")}


def test_blocks_by_structure():
    """Siblings of one class in whatever holds them, whatever they are called; a stage is no block, nor a lone head."""
    named = OrderedDict((f"encoder_layer_{i}", Layer()) for i in range(3))
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"layers": nn.Sequential(named), "norm": nn.LayerNorm(4)}),
            "towers": nn.ModuleDict({"text": Layer(), "image": Layer()}),
            "stages": nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer())),
            "pairs": nn.ModuleList([nn.ModuleList([Layer(), nn.LayerNorm(4)])]),
            "heads": nn.Sequential(OrderedDict(dense=nn.Linear(4, 4), act=nn.Tanh(), out=Layer())),
        }
    )
    assert blocks_of(model) == {
        "encoder.layers.encoder_layer_0": 0,
        "encoder.layers.encoder_layer_1": 1,
        "encoder.layers.encoder_layer_2": 2,
        "towers.text": 0,
        "towers.image": 1,
        "stages.0.0": 0,
        "stages.0.1": 1,
        "stages.1.0": 0,
        "stages.1.1": 1,
        "pairs.0.0": 0,
    }


def test_torchvisions_blocks():
    vit = torchvision.models.VisionTransformer(32, 16, 3, 2, 8, 16)
    assert list(blocks_of(vit).values()) == [0, 1, 2]
    swin = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=3)
    assert list(blocks_of(swin)) == ["features.1.0", "features.1.1", "features.2", "features.3.0", "features.3.1"]


@pytest.mark.medium("variants/test_adaptertune.py finds the blocks of every network")
@torch.no_grad()
def test_an_adapter_of_named_blocks_runs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(32, 16, 3, 2, 8, 16, num_classes=3).double().eval()
        nn.init.normal_(model.heads.head.weight)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    adapter = adapter_away(lorac.AdapterTune(r=2, layers=(0, 2)), model, x, name="a", seed=1)
    assert list(adapter.tensors) == [f"encoder.layers.encoder_layer_{i}" for i in (0, 2)]
    model, x = model.float(), x.float()
    eager = lorac.compile(model, {"a": adapter})
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=(x,))
    assert_parity(emitted(x), eager(x), model(x), own_base=emitted(x, adapters=None))


def test_padding_of_convolutions():
    """What the op can pad is its own; the rest, and more on one side, comes before it."""
    model = nn.ModuleDict(
        {
            "valid": nn.Conv2d(3, 4, 3, padding="valid", padding_mode="reflect"),
            "same": nn.Conv2d(3, 4, (3, 5), padding="same"),
            "lopsided": nn.Conv2d(3, 4, (3, 2), padding="same"),
            "circular": nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"),
        }
    )
    conv = {path: site.conv for path, site in lorac.sites(model).items()}
    assert {path: (c.padding, c.before) for path, c in conv.items()} == {
        "valid": ((0, 0), ()),
        "same": ((1, 2), ()),
        "lopsided": ((0, 0), (0, 1, 1, 1)),
        "circular": ((0, 0), (2, 2, 1, 1)),
    }
    described = lorac.sites(build_skeleton(describe_skeleton(model)))
    assert {path: site.conv for path, site in described.items()} == conv


@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.medium("eager"))])
@torch.no_grad()
def test_padding_is_that_of_the_call_where_it_was_changed_after_construction(target):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).eval()  # as Wan's convolutions, which pad by themselves
    model[0].padding = (0, 0)
    x = torch.linspace(-1, 1, 2 * 3 * 25).reshape(2, 3, 5, 5)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=1, targets="all-conv")}, target=target, example_inputs=(x,))
    assert_close(compiled(x), model(x))
    assert_close(compiled(x, adapters=None), model(x))


def test_an_attentions_weights():
    """Its packed projection is the module's site; where keys or values have a width of their own there are three."""
    model = nn.ModuleDict(
        {"same": nn.MultiheadAttention(6, 2), "cross": nn.MultiheadAttention(6, 2, kdim=4, vdim=5, bias=False)}
    )
    sites = lorac.sites(model)
    apart = {f"cross.{name}_proj_weight": width for name, width in (("q", 6), ("k", 4), ("v", 5))}
    assert list(sites) == ["same", "same.out_proj", *apart, "cross.out_proj"]
    packed, out, *others, other = sites.values()
    assert [(site.out_features, site.in_features, site.within) for site in others] == [
        (6, width, "cross") for width in apart.values()
    ]
    assert (packed.out_features, packed.in_features, packed.within) == (18, 6, "same")
    assert (packed.weight, packed.bias) == ("same.in_proj_weight", "same.in_proj_bias")
    assert (out.within, out.weight, other.within, other.bias) == ("same", "same.out_proj.weight", "cross", None)
    assert lorac.sites(build_skeleton(describe_skeleton(model))) == sites


def test_the_kits_conv1d_counts_as_gpt2s():
    assert is_gpt2_conv1d(HOSTS["transposed"].model().site)
    assert is_gpt2_conv1d(Conv1D(3, 2))
    assert not is_gpt2_conv1d(nn.Linear(3, 2))


def test_rejects_tensors_for_layers_that_are_not_sites():
    """torch's layers of two inputs and of bags of ids; what has tensors for one says so."""
    model = nn.Sequential(nn.Bilinear(4, 4, 5), nn.EmbeddingBag(7, 4), nn.Linear(5, 3))
    assert list(lorac.sites(model)) == ["2"]
    for path, name in (("0", "Bilinear"), ("1", "EmbeddingBag")):
        tensors = {"lora_A": torch.zeros(1, 4), "lora_B": torch.zeros(5, 1)}
        adapter = lorac.Adapter("a", lorac.LoRA(r=1, targets=(path,)), {path: tensors})
        with refuses("site_unsupported", match=f"'{path}', a {name} that lorac cannot adapt"):
            lorac.compile(model, {"a": adapter})
