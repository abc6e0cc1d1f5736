"""Training with a sparse change merges it into the weight again in the backward pass, and keeps no copy until then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.slots import live_terms
from lorac.testing import assert_close
from tests.refusing import refuses


@pytest.fixture
def compiled():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    made = lorac.compile(network, {"a": lorac.SHiRA(r=1, targets=["0", "2"])}, example_inputs=(torch.randn(2, 6),))
    made.swap("a")
    return made.train()


@pytest.fixture
def merges(monkeypatch):
    """The weights that were merged, one after another."""
    found, merge = [], live_terms.merge_weight
    monkeypatch.setattr(live_terms, "merge_weight", lambda *given: found.append(merge(*given)) or found[-1])
    return found


def test_gradients_are_those_of_the_formula(compiled, merges):
    x = torch.randn(5, 6, requires_grad=True)
    compiled(x).square().sum().backward()
    assert len(merges) == 4
    weights = [weight.detach().requires_grad_() for weight in merges[:2]]
    first, _, last = compiled.host
    y = nn.functional.linear(nn.functional.linear(x, weights[0], first.bias).relu(), weights[1], last.bias)
    expected = torch.autograd.grad(y.square().sum(), [x, *weights])
    assert_close(x.grad, expected[0])
    for path, gradient in zip(("0", "2"), expected[1:], strict=True):
        tensors = compiled.adapters["a"].tensors[path]
        rows, columns = tensors["indices"]
        assert_close(tensors["values"].grad, gradient[rows, columns])


def test_rejects_a_base_weight_that_changed_before_backward(compiled):
    loss = compiled(torch.randn(5, 6)).sum()
    with torch.no_grad():
        compiled.host[2].weight.add_(1)
    with refuses("unavailable", match="changed between a forward and its backward pass"):
        loss.backward()


def test_transforms_of_torch_differentiate_it(compiled):
    tensors = dict(compiled.named_parameters())
    x = torch.randn(5, 6)
    found = torch.func.grad(lambda given: torch.func.functional_call(compiled, given, (x,)).square().sum())(tensors)
    compiled(x).square().sum().backward()
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            assert_close(found[name], tensor.grad)
