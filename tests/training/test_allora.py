"""ALLoRA: the specification's values by hand, gradients against autograd's own, and layers of several kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import ALLoRA
from tests.limits import assert_apart
from tests.refusing import refuses
from tests.training.loops import trained
from tests.training.rules import backward, drawn, linear, pair, tensor


def rows(a: Tensor, b: Tensor, eta2: float) -> Tensor:
    """c by its definition."""
    return 1 / ((b @ a).norm(dim=1) + 1 / eta2).sqrt()


def test_the_example_by_hand() -> None:
    a, b, gradient = tensor([[3, 4]]), tensor([[0], [1]]), tensor([[1, 1], [2, 0]])
    compiled, own_a, own_b, optimizer = pair(a, b)
    rule = ALLoRA(compiled, optimizer, eta2=4.0)
    last = 1 / math.sqrt(5.25)
    assert_close(rule.rates(rule.pairs[0]), tensor([2, last]))
    backward(compiled, gradient)
    assert_close(own_b.grad, tensor([[14], [6 * last]]))
    assert_close(own_a.grad, tensor([[2 * last, 0]]))
    optimizer.step()
    assert_close(own_b.detach(), b - tensor([[14], [6 * last]]))


def test_scales_the_rows_of_the_gradient() -> None:
    """Over two micro-batches and at another strength; what reaches the layers below is not scaled."""
    a, b, eta2 = drawn(3, 6, seed=1), drawn(5, 3, seed=2), 2.0
    compiled, own_a, own_b, optimizer = pair(a, b)
    compiled.swap({"a": 0.5})
    whole = compiled.host.site.weight
    gradient = torch.zeros(5, 6).double()
    inputs = []
    for ruled in (False, True):
        rule = ALLoRA(compiled, optimizer, eta2=eta2) if ruled else None
        for seed in (3, 4):
            x = drawn(2, 4, 6, seed=seed).requires_grad_()
            (compiled(x).sin() * drawn(2, 4, 5, seed=seed + 2)).sum().backward()
            inputs.append(x.grad)
            dense = (0.5 * b @ a).requires_grad_()
            ((x.detach() @ (whole + dense).t()).sin() * drawn(2, 4, 5, seed=seed + 2)).sum().backward()
            gradient = gradient + (0.5 * dense.grad if ruled else 0)
        if rule is None:
            optimizer.zero_grad()
    assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[1], inputs[3])
    scaled = rows(a, b, eta2)[:, None] * gradient
    assert_close(own_b.grad, scaled @ a.t())
    assert_close(own_a.grad, b.t() @ scaled)


@pytest.mark.parametrize("layer", ["conv", "embedding", "plain"])
def test_layers_of_other_kinds(layer: str) -> None:
    """Against autograd through the merged weight."""
    made: dict[str, nn.Module] = {
        "conv": nn.Conv2d(3, 4, 3, padding=1, stride=2),
        "embedding": nn.Embedding(7, 4),
        "plain": nn.Linear(6, 4),
    }
    x = {"conv": drawn(2, 3, 5, 5, seed=1), "embedding": torch.tensor([[1, 2, 2]]), "plain": drawn(2, 6, seed=1)}[layer]
    model = nn.Sequential(made[layer]).double()
    compiled: Any = lorac.compile(model, {"a": lorac.LoRA(r=2, alpha=2, targets=["0"])}).train()  # type: ignore[attr-defined]  # in eager it is a module
    own = compiled.adapters["a"].tensors["0"]
    with torch.no_grad():
        for seed, name in enumerate(("lora_A", "lora_B")):
            own[name].copy_(drawn(*own[name].shape, seed=seed))
    a, b = own["lora_A"].detach().clone(), own["lora_B"].detach().clone()
    ALLoRA(compiled, torch.optim.SGD(trained(compiled), lr=1), eta2=4.0)
    compiled(x).square().sum().backward()
    weight = model[0].weight
    dense = (b @ a).requires_grad_()
    stored = dense.t() if layer == "embedding" else dense.view(weight.shape)
    torch.func.functional_call(model, {"0.weight": weight + stored}, (x,)).square().sum().backward()
    scaled = rows(a, b, 4.0)[:, None] * dense.grad
    assert_close(own["lora_B"].grad, scaled @ a.t())
    assert_close(own["lora_A"].grad, b.t() @ scaled)


def test_a_small_eta_is_plain_lora_at_eta_times_the_rate() -> None:
    a, b, gradient = drawn(2, 4, seed=1), drawn(3, 2, seed=2), drawn(3, 4, seed=3)
    compiled, own_a, _, optimizer = pair(a, b)
    backward(compiled, gradient)
    plain = own_a.grad.clone()
    found = []
    for eta2 in (1.0, 1e-30):
        optimizer.zero_grad()
        with ALLoRA(compiled, optimizer, eta2=eta2):
            backward(compiled, gradient)
        found.append(own_a.grad / math.sqrt(eta2))
    assert_apart(found[0], plain)
    assert_close(found[1], plain)
    optimizer.zero_grad()
    backward(compiled, gradient)
    assert torch.equal(own_a.grad, plain), "it was taken off and acts"


def test_clipping_uses_the_scaled_gradients() -> None:
    compiled, own_a, own_b, optimizer = pair(drawn(2, 4, seed=1), drawn(3, 2, seed=2))
    ALLoRA(compiled, optimizer)
    backward(compiled, drawn(3, 4, seed=3))
    norm = torch.nn.utils.clip_grad_norm_(trained(compiled), 1e-3)
    assert norm > 1
    before = own_a.detach().clone(), own_b.detach().clone()
    optimizer.step()
    moved = torch.cat([(now.detach() - then).flatten() for now, then in zip((own_a, own_b), before, strict=True)])
    assert_close(moved.norm().float(), torch.tensor(1e-3))


def test_rejects_adapters_that_it_does_not_support() -> None:
    host = linear(4, 3)
    for fields, what in (({"alpha": 4}, "a scale of 2"), ({"alpha": 2, "dropout": 0.1}, "dropout=0.1")):
        compiled: Any = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=("site",), **fields)})  # type: ignore[arg-type]
        with pytest.raises(lorac.ChoiceError, match=f"neither dropout nor a scale, and 'a' at 'site' has {what}"):
            ALLoRA(compiled, torch.optim.SGD(trained(compiled), lr=1))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    compiled = lorac.compile(
        attention, {"a": lorac.LoRA(r=2, alpha=2, targets=["out_proj"])}, example_inputs=(torch.ones(1, 2, 8),) * 3
    )
    with refuses("site_unsupported", match="'out_proj' has none"):
        ALLoRA(compiled, torch.optim.SGD(trained(compiled), lr=1))
    compiled, _, _, optimizer = pair(drawn(2, 4, seed=1), drawn(3, 2, seed=2))
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(lorac.ChoiceError, match=f"ALLoRA does not take eta2={wrong}"):
            ALLoRA(compiled, optimizer, eta2=wrong)
