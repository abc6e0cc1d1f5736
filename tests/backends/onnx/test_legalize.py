"""Checks of input values: a program makes the model's checks, or runs without them and says so."""

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close


def _counted(y, ids):
    torch._check((ids == 1).sum().item() == 2, lambda: "no two marks")
    return y


def _none_negative(y, ids):
    torch._check(torch._is_all_true(ids >= 0).item(), lambda: "negative")
    return y


def _scattered(y, ids):
    """As vision-language models put the features of images in the places of their marks."""
    mask = (ids == 1).unsqueeze(-1).expand_as(y)
    torch._check(y[mask].numel() == 8, lambda: "features and marks do not match")
    return y.masked_scatter(mask, torch.arange(8.0))


class Checking(nn.Module):
    def __init__(self, check):
        super().__init__()
        self.site, self.check = nn.Linear(4, 4), check

    def forward(self, x, ids):
        return self.check(self.site(x), ids)


@pytest.mark.medium("one of the checks", keep=["_none_negative"])
@pytest.mark.parametrize("check", [_counted, _none_negative, _scattered], ids=lambda check: check.__name__)
@torch.no_grad()
def test_a_model_that_checks_values_is_emitted(check):
    model, x = Checking(check).eval(), torch.randn(3, 2, 4)
    ids = torch.tensor([[1, 2], [1, 3], [4, 5]])
    compiled = lorac.compile(model, [lorac.LoRA(r=2)], target="onnxruntime", example_inputs=(x, ids))
    assert_close(compiled(x, ids), model(x, ids))
    four = torch.randn(4, 2, 4), torch.tensor([[1, 2], [1, 3], [4, 5], [6, 7]])
    assert_close(compiled(*four), model(*four))
    if check is not _none_negative:  # of truths a program keeps track, of numbers it does not
        assert "leaves out the model's own checks of input values" in str(compiled.explain())
        return
    with pytest.raises(lorac.InputMismatch, match=r"the model checks them at .*test_legalize\.py:\d+: "):
        compiled(x, ids - 2)
