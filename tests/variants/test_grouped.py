"""Grouped convolutions: changes across their blocks run next to the kernel, or are rejected at once."""

from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac.testing import Case, assert_close
from tests.refusing import refuses
from tests.variants.convs import conv_host

GROUPED = conv_host("grouped", 4, 8, (3, 1), (6, 5), groups=2)


@pytest.mark.parametrize(
    "variant", [lorac.LoRA(r=8), lorac.DoRA(r=8), lorac.AdaLoRA(r=9), lorac.VeRA(r=64), lorac.PLP(r=16)], ids=repr
)
def test_factors_too_wide_to_pay_stay_factors(variant):
    """Their product has no place in the kernel, which shows only once they are trained."""
    case = Case(variant, GROUPED)
    compiled = lorac.compile(case.model, {"a": case.variant})
    compiled.train()
    compiled(case.x).square().sum().backward()
    adapter = compiled.adapters["a"]
    with torch.no_grad():
        for tensor in adapter.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        compiled.eval()
        here = case.variant.at(case.site)
        W = here.weight(case.weight, SimpleNamespace(**adapter.tensors[GROUPED.path]))
        expected = torch.from_numpy(GROUPED.apply(case.x.numpy(), W.numpy(), case.bias.numpy()))
        assert_close(compiled(case.x), expected)


@pytest.mark.parametrize("variant", [lorac.TeRA(), lorac.LoLDU(r=2)], ids=lambda v: v.name)
def test_rejects_methods_of_a_full_matrix(variant):
    with refuses("site_unsupported", match=r"makes one full matrix; 'site' is a convolution of \d groups"):
        lorac.compile(GROUPED.model(), {"a": Case(variant, GROUPED).variant})
