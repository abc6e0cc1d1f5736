"""Adapters merged into the float values of weights that other libraries have quantised."""

import pytest
import torch
from torch import nn

import lorac
from lorac.frontend.quantised_weights import dequantise_weights
from lorac.testing import assert_close
from tests.end_to_end.test_came_quantised import MADE, X, model
from tests.merging.test_merged_model import drawn
from tests.refusing import refuses


@torch.no_grad()
@pytest.mark.parametrize("how", MADE)
def test_dequantize_merges_into_float_weights(how):
    own = model(MADE[how])
    before = type(own.site), type(own.site.weight)
    adapter = drawn(own, {"a": lorac.LoRA(r=2, targets=["site"])}, 0.1).adapters["a"]
    with refuses("not_mergeable", match=r"weight of 'site', which is quantised\n.*dequantize=True"):
        lorac.merge_into(own, adapter)
    merged = lorac.merge_into(own, adapter, dequantize=True)
    assert type(merged.site) is nn.Linear and type(merged.site.weight) is nn.Parameter
    assert (type(own.site), type(own.site.weight)) == before
    base = dequantise_weights(own)
    expected = lorac.compile(base, {"a": adapter})
    assert_close(merged(X), expected(X))
    other = drawn(own, {"a": lorac.LoRA(r=2, targets=["last"])}, 0.1).adapters["a"]
    untouched = lorac.merge_into(own, other)
    assert type(untouched.site) is before[0], "what is quantised and not adapted stays as it is"


@torch.no_grad()
def test_float_values_are_rounded_once_to_the_dtype_of_the_others():
    own = model(MADE["torchao, 8 bits"])
    own.last.bfloat16()
    adapter = drawn(own, {"a": lorac.LoRA(r=2, targets=["site"])}, 0.1).adapters["a"]
    found = lorac.merge_into(own, adapter, dequantize=True).site.weight
    own.last.float()
    expected = lorac.merge_into(own, adapter, dequantize=True).site.weight
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected.bfloat16())
