"""Preconditioned gradients: the values by hand, and steps that do not depend on how a product is factored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import Preconditioned
from tests.limits import assert_apart
from tests.training.loops import TARGETS, by_trainer, data, host, plain_loop, trained
from tests.training.rules import drawn, linear


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def split(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Two factors as PLP holds them."""
    top, left = len(up) // 2, down.shape[1] // 2
    names = ("up_frozen", "up_learned", "down_frozen", "down_learned")
    return dict(zip(names, (up[:top], up[top:], down[:, :left], down[:, left:]), strict=True))


def whole(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """up (out, r) and down (r, in) of either method, detached."""
    if "lora_A" in own:
        return own["lora_B"].detach(), own["lora_A"].detach()
    up, down = (torch.cat([own[f"{s}_frozen"], own[f"{s}_learned"]], dim=d) for d, s in enumerate(("up", "down")))
    return up.detach(), down.detach()


def compiled_with(method: str, up: Tensor, down: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """One layer with the product up·down, and the adapter's own tensors."""
    rank = len(down)
    if method == "lora":
        variant: Any = lorac.LoRA(r=rank, alpha=rank, targets=("site",))
        tensors = {"lora_A": down, "lora_B": up}
    else:
        variant, tensors = lorac.PLP(r=rank, basis="none", targets=("site",)), split(up, down)
    model = linear(down.shape[1], len(up))
    compiled = lorac.compile(model, {"a": lorac.Adapter("a", variant, {"site": tensors})}).train()
    return compiled, compiled.adapters["a"].tensors["site"]


def stepped(method: str, up: Tensor, down: Tensor, x: Tensor, *, rule: bool = True) -> Tensor:
    """The product after one SGD step of both factors on a fixed loss."""
    compiled, own = compiled_with(method, up, down)
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    if rule:
        Preconditioned(compiled, optimizer)
    (compiled(x) - 1).square().mean().backward()
    optimizer.step()
    after = whole(own)
    return after[0] @ after[1]


def test_gradients_by_hand() -> None:
    """down·downᵀ = diag(2, 4) and upᵀ·up = diag(2, 1); all gradients are 1."""
    up, down = tensor([[1, 0], [0, 1], [1, 0]]), tensor([[1, 0, 1], [0, 2, 0]])
    compiled, own = compiled_with("lora", up, down)
    optimizer = torch.optim.SGD(trained(compiled), lr=1)
    expected = {0.0: ([0.5, 0.25], [0.5, 1]), 2.0: ([1 / 4, 1 / 6], [1 / 4, 1 / 3])}
    for reg, (rows_up, rows_down) in expected.items():
        own["lora_A"].data.copy_(down)
        own["lora_B"].data.copy_(up)
        for factor in own.values():
            factor.grad = torch.ones_like(factor)
        with Preconditioned(compiled, optimizer, reg=reg):
            optimizer.step()
        assert_close(own["lora_B"].grad, tensor([rows_up] * 3))
        assert_close(own["lora_A"].grad, tensor([[row] * 3 for row in rows_down]))
        assert_close(own["lora_B"].detach(), up - own["lora_B"].grad)
    for factor in own.values():
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    assert (own["lora_B"].grad == 1).all() and (own["lora_A"].grad == 1).all()


def test_frozen_halves_count_and_have_no_gradient() -> None:
    """The same factors as PLP's: with the learned halves alone the Grams would be diag(1, 4) and diag(1, 1)."""
    up, down = tensor([[1, 0], [0, 1], [1, 0]]), tensor([[1, 0, 1], [0, 2, 0]])
    compiled, own = compiled_with("plp", up, down)
    optimizer = torch.optim.AdamW(trained(compiled), lr=1, weight_decay=0.1)
    before = {name: value.detach().clone() for name, value in own.items()}
    for name in ("up_learned", "down_learned"):
        own[name].grad = torch.ones_like(own[name])
    with Preconditioned(compiled, optimizer):
        optimizer.step()
    assert_close(own["up_learned"].grad, tensor([[0.5, 0.25]] * 2))
    assert_close(own["down_learned"].grad, tensor([[0.5, 0.5], [1, 1]]))
    same = {name for name, value in own.items() if torch.equal(value, before[name])}
    assert same == {"up_frozen", "down_frozen"}
    assert all(own[name].grad is None for name in same)


@pytest.mark.parametrize("method", ["lora", "plp"])
def test_a_step_does_not_depend_on_the_factors(method: str) -> None:
    """(up·M, M⁻¹·down) is the same product, and is so after one step; without the rule it is not."""
    up, down, x = drawn(7, 3, seed=1), drawn(3, 6, seed=2), drawn(4, 6, seed=3)
    m = drawn(3, 3, seed=4)
    products = [stepped(method, u, d, x) for u, d in ((up, down), (up @ m, torch.linalg.solve(m, down)))]
    assert_apart(products[0], up @ down)
    assert_close(products[1], products[0])
    unruled = stepped(method, up @ m, torch.linalg.solve(m, down), x, rule=False)
    assert_apart(unruled, stepped(method, up, down, x, rule=False))


def test_a_vanishing_factor_leaves_the_others_gradient() -> None:
    """‖upᵀ·up‖ = 1e-6 counts as nothing and 1.1e-6 does not; rank 1, so that the inverse is 1/‖·‖."""
    down = tensor([[2, 0]])
    for size, factor in ((1e-6, 1), (1.1e-6, 1 / 1.1e-6)):
        compiled, own = compiled_with("lora", tensor([[size**0.5], [0], [0]]), down)
        for value in own.values():
            value.grad = torch.ones_like(value)
        optimizer = torch.optim.SGD(trained(compiled), lr=1)
        with Preconditioned(compiled, optimizer):
            optimizer.step()
        assert_close(own["lora_A"].grad, tensor([[factor, factor]]))
        assert (own["lora_B"].grad == 0.25).all()


@pytest.mark.parametrize("last", [0.0, 6e-8, math.nan])
def test_a_factor_without_full_rank_needs_reg(last: float) -> None:
    """The second one passes a Cholesky factorisation, with an inverse made of rounding."""
    down = tensor([[1, 1, 1], [2, 2, 2 + last]])
    compiled, own = compiled_with("lora", drawn(4, 2, seed=1), drawn(2, 3, seed=2))
    own["lora_A"].data.copy_(down)
    for value in own.values():
        value.grad = torch.ones_like(value)
    optimizer = torch.optim.SGD(trained(compiled), lr=1)
    with (
        Preconditioned(compiled, optimizer),
        pytest.raises(lorac.Unavailable, match="down·downᵀ of 'a' at 'site' has no inverse"),
    ):
        optimizer.step()
    assert torch.equal(own["lora_A"].detach().nan_to_num(), down.nan_to_num()), "the step that was refused was taken"
    if math.isnan(last):
        return
    with Preconditioned(compiled, optimizer, reg=0.1):
        optimizer.step()
    assert own["lora_B"].grad.isfinite().all()


def test_a_half_that_does_not_train_needs_no_optimizer() -> None:
    compiled, own = compiled_with("plp", drawn(5, 2, seed=1), drawn(2, 6, seed=2))
    own["up_learned"].requires_grad_(False)
    optimizer = torch.optim.SGD([own["down_learned"]], lr=0.1)
    Preconditioned(compiled, optimizer)
    before = own["up_learned"].clone()
    compiled(drawn(3, 6, seed=3)).square().mean().backward()
    plain_grad = own["down_learned"].grad.clone()
    optimizer.step()
    up = whole(own)[0]
    assert_close(own["down_learned"].grad, torch.linalg.solve(up.T @ up, plain_grad))
    assert torch.equal(own["up_learned"], before)


def ruled(method: str) -> tuple[Any, Any]:
    """A small BERT with an adapter, and AdamW with the rule on."""
    targets = TARGETS["tiny_bert"]
    variant: Any = lorac.LoRA(r=4, targets=targets) if method == "lora" else lorac.PLP(r=4, targets=targets)
    compiled = lorac.compile(host("tiny_bert"), {"a": variant})
    optimizer = torch.optim.AdamW(trained(compiled), lr=1e-2)
    Preconditioned(compiled, optimizer, reg=1e-3)
    return compiled, optimizer


@pytest.mark.medium("LoRA", cases=["plp"])
@pytest.mark.parametrize("method", ["lora", "plp"])
def test_learns_with_every_method(method: str) -> None:
    compiled, optimizer = ruled(method)
    frozen = {key: value.clone() for key, value in compiled.named_buffers()}
    batches = data("tiny_bert", 12, distinct=False)
    before = compiled(**batches[0]).loss.item()  # in eval mode, for BERT's own dropout moves the loss, too
    plain_loop(compiled, batches, optimizer=optimizer)
    after = compiled(**batches[0]).loss.item()
    assert after <= 0.9 * before
    assert all(torch.equal(value, frozen[key]) for key, value in compiled.named_buffers())


@pytest.mark.slow("test_every_rule.py has Trainer run one")
def test_trainer_runs_the_rule(tmp_path: Path) -> None:
    """One step of SGD: both factors move by what the rule makes of their gradients."""
    batches = data("tiny_llama", 2, distinct=False)
    moved = []
    for reg in (None, 1e-2):
        variant = lorac.LoRA(r=4, targets=TARGETS["tiny_llama"])
        compiled = lorac.compile(host("tiny_llama"), {"a": variant})
        optimizer = torch.optim.SGD(trained(compiled), lr=1e-2)
        if reg is not None:
            Preconditioned(compiled, optimizer, reg=reg)
        losses = by_trainer(compiled, batches, tmp_path, optimizer=optimizer)
        moved.append((losses, next(iter(compiled.adapters["a"].tensors.values()))["lora_B"]))
    (_, unruled), (losses, ruled_b) = moved
    assert losses[-1] < losses[0]
    assert_apart(ruled_b, unruled)


def test_rejects_incomplete_optimizers_and_other_methods() -> None:
    model = linear(5, 4)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=("site",))})
    a = compiled.adapters["a"].tensors["site"]["lora_A"]
    optimizer = torch.optim.SGD(trained(compiled), lr=1)
    with pytest.raises(lorac.ChoiceError, match="does not hold lora_B of 'a' at 'site'"):
        Preconditioned(compiled, torch.optim.SGD([a], lr=1))
    with pytest.raises(lorac.ChoiceError, match="reg=-1 is out of range"):
        Preconditioned(compiled, optimizer, reg=-1)
    dora = lorac.compile(model, {"b": lorac.DoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match=r"of method plp or lora; there is 'b' \(dora\)"):
        Preconditioned(dora, torch.optim.SGD(trained(dora), lr=1))
    with Preconditioned(compiled, optimizer), pytest.raises(lorac.Unavailable, match="without a closure"):
        optimizer.step(lambda: 0.0)
