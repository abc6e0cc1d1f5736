"""AltLoRA: the specification's values by hand, turns that are projections, and a path that no factoring changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import AlternatingFactors, AltLoRA
from tests.limits import assert_apart
from tests.training.loops import trained
from tests.training.rules import backward, drawn, pair, tensor

M, N, R, S = 6, 5, 2, 2.0


def gradients(count: int) -> list[Tensor]:
    return [drawn(M, N, seed=10 + t) for t in range(count)]


def path(a: Tensor, b: Tensor, steps: int = 4, *, scale: float = S, rule: bool = True, **options: Any) -> Tensor:
    """s·B·A after each step along gradients that depend on where it is."""
    compiled, own_a, own_b, optimizer = pair(a, b, scale=scale, lr=0.1, weight_decay=options.pop("decay", 0.0))
    if rule:
        AltLoRA(compiled, optimizer, **{"reg": 0.0, **options})
    found = []
    for gradient in gradients(steps):
        optimizer.zero_grad()
        product = scale * own_b.detach() @ own_a.detach()
        backward(compiled, gradient + product.sin())
        optimizer.step()
        found.append(scale * own_b.detach() @ own_a.detach())
    return torch.stack(found)


def start() -> tuple[Tensor, Tensor]:
    return drawn(R, N, seed=1), drawn(M, R, seed=2)


def test_the_example_by_hand() -> None:
    a, b, gradient = tensor([[1, 0]]), tensor([[0], [2]]), tensor([[1, 2], [3, 4]])
    expected = {"A": ([[0.75, 1.0]], [[0, 0], [3, 4]]), "B": ([[0.5], [1.5]], [[1, 0], [3, 0]])}
    for first, (moved, weight) in expected.items():
        compiled, own_a, own_b, optimizer = pair(a, b, scale=2.0)
        backward(compiled, gradient)
        AltLoRA(compiled, optimizer, turns=AlternatingFactors(first), betas=(0.0, 0.999), reg=0.0)
        optimizer.step()
        own, other, before = (own_a, own_b, a) if first == "A" else (own_b, own_a, b)
        assert_close(before - own.detach(), tensor(moved))
        assert torch.equal(other.detach(), b if first == "A" else a) and other.grad is None
        assert_close(2 * (b @ a - own_b.detach() @ own_a.detach()), tensor(weight))


@pytest.mark.parametrize("first", ["A", "B"])
def test_a_turn_is_a_projection_of_the_full_gradient(first: str) -> None:
    a, b = start()
    compiled, own_a, own_b, optimizer = pair(a, b, scale=S, lr=0.1)
    AltLoRA(compiled, optimizer, turns=AlternatingFactors(first), betas=(0.0, 0.999), reg=0.0)
    gradient = drawn(M, N, seed=3)
    backward(compiled, gradient)
    optimizer.step()
    moved = S * (own_b.detach() @ own_a.detach() - b @ a)
    expected = b @ torch.linalg.pinv(b) @ gradient if first == "A" else gradient @ torch.linalg.pinv(a) @ a
    assert_close(moved, -0.1 * expected)


def test_the_path_does_not_depend_on_the_factorisation() -> None:
    """Momentum included; that of AltLoRA+ does, and so does plain LoRA's."""
    a, b = start()
    turn = drawn(R, R, seed=4)
    other = torch.linalg.solve(turn, a), b @ turn
    assert_close(path(*other, steps=6), path(a, b, steps=6))
    assert_close(path(*other, decay=0.1), path(a, b, decay=0.1))
    assert_apart(path(*other, plus=True), path(a, b, plus=True))
    assert_apart(path(*other, rule=False), path(a, b, rule=False))
    assert_close(path(a, b / 3, scale=3 * S), path(a, b))


def test_the_listing_with_momentum_and_decay() -> None:
    """Five steps against the paper's listing, written out, of both forms."""
    for plus in (False, True):
        a, b = start()
        compiled, own_a, own_b, optimizer = pair(a, b, scale=S, lr=0.1, weight_decay=0.01)
        AltLoRA(compiled, optimizer, plus=plus)
        reg, eye = 1e-6, torch.eye(R).double()
        mean_a, mean_b, square_a, square_b = torch.zeros_like(a), torch.zeros_like(b), 0, 0
        old_a, old_b = a, b
        for t, gradient in enumerate(gradients(5)):
            optimizer.zero_grad()
            backward(compiled, gradient)
            optimizer.step()
            if t % 2 == 0:
                inverse = torch.linalg.inv(b.t() @ b + reg * eye)
                projected = inverse @ (S * b.t() @ gradient) / S**2
                mean_a = 0.9 * inverse @ b.t() @ old_b @ mean_a + 0.1 * projected
                square_a = 0.999 * square_a + 0.001 * projected**2
                direction = mean_a / (square_a.sqrt() + 1e-6) if plus else mean_a
                a, old_b = a - 0.1 * (direction + 0.01 * a), b
            else:
                inverse = torch.linalg.inv(a @ a.t() + reg * eye)
                projected = (S * gradient @ a.t()) @ inverse / S**2
                mean_b = 0.9 * mean_b @ old_a @ a.t() @ inverse + 0.1 * projected
                square_b = 0.999 * square_b + 0.001 * projected**2
                direction = mean_b / (square_b.sqrt() + 1e-6) if plus else mean_b
                b, old_a = b - 0.1 * (direction + 0.01 * b), a
        assert_close(own_a.detach(), a)
        assert_close(own_b.detach(), b)


def test_the_released_form_by_its_listing() -> None:
    """Both factors in each step, B by the A that moved; no scale; corrected by 1 − β₁ᵗ; decay at the end."""
    for plus in (False, True):
        a, b = start()
        rate, decay, reg, beta1, beta2 = 0.1, 0.01, 1e-3, 0.999, 0.98
        compiled, own_a, own_b, optimizer = pair(a, b, scale=S, lr=rate, weight_decay=decay)
        AltLoRA(compiled, optimizer, plus=plus, released=True)
        means, squares, olds = [torch.zeros_like(a), torch.zeros_like(b.t())], [0, 0], [b, a.t()]
        for t, gradient in enumerate(gradients(4), 1):
            optimizer.zero_grad()
            backward(compiled, gradient)
            optimizer.step()
            raw = S * b.t() @ gradient, (S * gradient @ a.t()).t()
            for side in (0, 1):
                own, other = (a, b) if side == 0 else (b.t(), a.t())
                inverse = torch.linalg.inv(other.t() @ other + reg * torch.eye(R).double())
                projected = inverse @ raw[side]
                direction = beta1 * inverse @ other.t() @ olds[side] @ means[side] + (1 - beta1) * projected
                means[side] = beta1 * means[side] + (1 - beta1) * projected if plus else direction
                squares[side] = beta2 * squares[side] + (1 - beta2) * projected**2
                olds[side] = other
                over = squares[side].sqrt() + 1e-6 if plus else 1
                own = (own - rate / (1 - beta1**t) * direction / over) * (1 - rate * decay)
                a, b = (own, b) if side == 0 else (a, own.t())
        assert_close(own_a.detach(), a)
        assert_close(own_b.detach(), b)


@pytest.mark.parametrize("skip", [False, True], ids=["zeroed", "skipped"])
def test_the_idle_factor_is_not_measured_and_stands_still(skip: bool) -> None:
    a, b = start()
    compiled, own_a, own_b, optimizer = pair(a, b, lr=0.1)
    rule = AltLoRA(compiled, optimizer, turns=AlternatingFactors(period=2, skip_idle=skip))
    turns = []
    for gradient in gradients(5):
        turns.append(rule.turn)
        before = own_a.detach().clone(), own_b.detach().clone()
        optimizer.zero_grad()
        backward(compiled, gradient)
        assert [factor.grad is not None and bool(factor.grad.any()) for factor in (own_a, own_b)] == [
            rule.turn == "A",
            rule.turn == "B",
        ]
        assert (rule.turn == "A" and own_b.grad is None) or (rule.turn == "B" and own_a.grad is None) or not skip
        optimizer.step()
        moved = [not torch.equal(now, then) for now, then in zip((own_a, own_b), before, strict=True)]
        assert moved == [turns[-1] == "A", turns[-1] == "B"]
    assert "".join(turns) == "AABBA"
    rule.remove()
    assert own_a.requires_grad and own_b.requires_grad


@pytest.mark.parametrize(("plus", "tensors"), [(False, 2), (True, 3)])
def test_the_state_has_the_documented_size(plus: bool, tensors: int) -> None:
    compiled, _, _, optimizer = pair(*start())
    AltLoRA(compiled, optimizer, plus=plus)
    for gradient in gradients(2):
        backward(compiled, gradient)
        optimizer.step()
    kept = [
        value for sides in optimizer.state_dict()["altlora"][0]["sides"] for side in sides for value in side.values()
    ]
    assert sum(value.numel() for value in kept if isinstance(value, Tensor)) == tensors * R * (M + N)


def test_rejects_unsupported_optimizers_and_settings() -> None:
    compiled, _, _, optimizer = pair(*start())
    with pytest.raises(lorac.ChoiceError, match="AltLoRA computes the moments itself, and AdamW"):
        AltLoRA(compiled, torch.optim.AdamW(trained(compiled)))
    with pytest.raises(lorac.OptionError, match="no factor 'C'"):
        AlternatingFactors("C")
    with pytest.raises(lorac.ChoiceError, match="AltLoRA does not take period=0"):
        AlternatingFactors(period=0)
    for wrong in ({"reg": -1.0}, {"betas": (1.0, 0.9)}):
        with pytest.raises(lorac.ChoiceError, match="AltLoRA does not take"):
            AltLoRA(compiled, optimizer, **wrong)
    assert not optimizer._optimizer_step_pre_hooks
    with AltLoRA(compiled, optimizer), pytest.raises(lorac.Unavailable, match="without a closure"):
        optimizer.step(lambda: 0.0)
