"""A base with a quantised weight: adapters run next to it, and nothing is merged into it."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses


class Rounded(torch.Tensor):
    """A float weight stored as int8 with one scale for each row."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        args, kwargs = tree_map(lambda t: t.dequantized() if isinstance(t, cls) else t, (args, kwargs or {}))
        return function(*args, **kwargs)

    def dequantized(self):
        return self.whole.to(self.scale.dtype) * self.scale


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("site", nn.Linear(12, 7, dtype=torch.float64))
    made.site.weight = nn.Parameter(Rounded.of(made.site.weight.detach()), requires_grad=False)
    return made.eval()


def adapter(variant, model):
    made = lorac.compile(model, {"a": variant}, active=None).adapters["a"]
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("mode", ["live", "auto"])
@torch.no_grad()
def test_adapts_a_layer_with_a_packed_weight(mode, model):
    own, x = adapter(lorac.LoRA(r=2, alpha=2), model), torch.randn(3, 12, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": own}, mode=mode)
    p = own.tensors["site"]
    assert_close(compiled(x), model(x) + x @ p["lora_A"].t() @ p["lora_B"].t())
    compiled.swap(None)
    assert torch.equal(compiled(x), model(x))
    assert type(compiled.host.site.weight) is type(model.site.weight) is Rounded


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_merging_into_a_packed_weight(mode, model):
    own = adapter(lorac.LoRA(r=2), model)
    with refuses("not_mergeable", match="into the Rounded weight of 'site'") as error:
        lorac.compile(model, {"a": own}, mode=mode)
    assert "mode='live'" in str(error.value)
    assert type(model.site.weight) is Rounded


def test_rejects_reserving_a_packed_weight(model):
    with refuses("not_mergeable", match="Rounded"):
        lorac.compile(model, {}, mode="fused", reserve=lorac.Reserve(targets="all-linear", rank=2))
