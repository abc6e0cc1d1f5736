"""LoRA-Pro: the specification's values by hand, the optimality of its closed forms, and AdamW's full form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import LoRAPro
from tests.limits import assert_at_most
from tests.training.loops import trained
from tests.training.rules import backward, drawn, linear, pair, tensor

M, N, R, S = 5, 4, 2, 2.0


def adjusted(a: Tensor, b: Tensor, gradient: Tensor, scale: float = S, **options: Any) -> tuple[Tensor, ...]:
    """Raw g_A and g_B, and what the rule makes of them."""
    compiled, own_a, own_b, optimizer = pair(a, b, scale=scale)
    backward(compiled, gradient)
    raw = own_a.grad.clone(), own_b.grad.clone()
    with LoRAPro(compiled, optimizer, damping=0.0, **options):
        optimizer.step()
    assert_close(a - own_a.detach(), own_a.grad)
    assert_close(b - own_b.detach(), own_b.grad)
    return *raw, own_a.grad, own_b.grad


def moved(a: Tensor, b: Tensor, grads: tuple[Tensor, Tensor]) -> Tensor:
    """g̃ = s·B·g^A + s·g^B·A."""
    return S * (b @ grads[0] + grads[1] @ a)


def projector(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def test_the_example_by_hand() -> None:
    a, b, gradient = tensor([[1, 0]]), tensor([[0], [2]]), tensor([[1, 2], [3, 4]])
    raw_a, raw_b, grad_a, grad_b = adjusted(a, b, gradient)
    assert_close(raw_a, tensor([[12, 16]]))
    assert_close(raw_b, tensor([[2], [6]]))
    assert_close(grad_a, tensor([[0.6, 1.0]]))
    assert_close(grad_b, tensor([[0.5], [0.3]]))
    assert_close(moved(a, b, (grad_a, grad_b)), tensor([[1, 0], [3, 4]]))


def test_the_step_is_the_nearest_to_the_full_gradient() -> None:
    """g̃ = G − (1 − P_B)·G·(1 − P_A) however it is factored; and of all such pairs it is the nearest to the raw one."""
    a, b, gradient = drawn(R, N, seed=1), drawn(M, R, seed=2), drawn(M, N, seed=3)
    raw_a, raw_b, grad_a, grad_b = adjusted(a, b, gradient)
    left, right = projector(b), projector(a.t())
    eye = torch.eye
    expected = gradient - (eye(M) - left).double() @ gradient @ (eye(N) - right).double()
    assert_close(moved(a, b, (grad_a, grad_b)), expected)
    turn = drawn(R, R, seed=4)
    other_a, other_b = torch.linalg.solve(turn, a), b @ turn
    assert_close(moved(other_a, other_b, adjusted(other_a, other_b, gradient)[2:]), expected)

    def distance(x: Tensor) -> Tensor:
        return (grad_a + x @ a - raw_a).square().sum() + (grad_b - b @ x - raw_b).square().sum()

    best = distance(torch.zeros(R, R).double())
    for seed in range(200):
        assert_at_most(best, distance(0.1 * drawn(R, R, seed=seed)))
    decrease = (raw_a * grad_a).sum() + (raw_b * grad_b).sum()
    assert_close(decrease, (gradient * expected).sum())
    assert decrease > 0


def test_factors_of_full_rank_follow_the_full_gradient() -> None:
    gradient = drawn(M, N, seed=3)
    a, b = drawn(N, N, seed=1), drawn(M, N, seed=2)
    assert_close(moved(a, b, adjusted(a, b, gradient)[2:]), gradient)


@pytest.mark.parametrize("full", [False, True], ids=["sgd", "adamw"])
def test_a_first_step_from_nothing(full: bool) -> None:
    """B = 0: A stands still; SGD moves W by −γ·G·P_A, AdamW's first direction is the sign of that."""
    a, b, gradient = drawn(R, N, seed=1), torch.zeros(M, R).double(), drawn(M, N, seed=3)
    grad_a, grad_b = adjusted(a, b, gradient, full=full, eps=0.0)[2:] if full else adjusted(a, b, gradient)[2:]
    assert not grad_a.any()
    projected = gradient @ projector(a.t())
    wanted = (projected.sign() @ torch.linalg.pinv(a)) / S if full else None
    assert_close(moved(a, b, (grad_a, grad_b)), projected) if wanted is None else assert_close(grad_b, wanted)


def test_adamw_by_its_listing() -> None:
    """Three steps of the full form with weight decay against the listing, written out; what else trains gets AdamW."""
    a, b = drawn(R, N, seed=1), drawn(M, R, seed=2)
    rate, decay = 0.05, 0.1
    compiled, own_a, own_b, _ = pair(a, b, scale=S)
    unpaired, alone = (torch.nn.Parameter(drawn(3, seed=8)) for _ in range(2))
    optimizer = torch.optim.SGD([*trained(compiled), unpaired], lr=rate, weight_decay=decay)
    plain = torch.optim.AdamW([alone], lr=rate, weight_decay=decay)
    LoRAPro(compiled, optimizer, full=True, damping=0.0)
    mean = square = torch.zeros(M, N).double()
    for t in (1, 2, 3):
        optimizer.zero_grad()
        gradient = drawn(M, N, seed=10 + t)
        backward(compiled, gradient)
        unpaired.grad, alone.grad = (drawn(3, seed=20 + t) for _ in range(2))
        optimizer.step()
        plain.step()
        best = gradient - (torch.eye(M) - projector(b)).double() @ gradient @ (torch.eye(N) - projector(a.t())).double()
        mean, square = 0.9 * mean + 0.1 * best, 0.999 * square + 0.001 * best**2
        direction = (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        grad_a, grad_b = adjusted(a, b, direction)[2:]
        a, b = a - rate * (grad_a + decay * a), b - rate * (grad_b + decay * b)
        assert_close(own_a.detach(), a)
        assert_close(own_b.detach(), b)
    assert_close(unpaired.detach(), alone.detach())


def test_the_state_is_of_the_weights_size_in_the_full_form_alone() -> None:
    for full, expected in ((True, 2 * M * N), (False, 0)):
        compiled, _, _, optimizer = pair(drawn(R, N, seed=1), drawn(M, R, seed=2))
        LoRAPro(compiled, optimizer, full=full)
        backward(compiled, drawn(M, N, seed=3))
        optimizer.step()
        kept = [value for own in optimizer.state_dict()["lora_pro"][0]["moments"] for value in own.values()]
        assert sum(value.numel() for value in kept if isinstance(value, Tensor)) == expected


def test_a_stack_of_matrices_is_each_matrix_for_itself() -> None:
    from lorac.training.rule import TrainedTerm
    from lorac.training.rules.lora_pro import find_equivalent_gradients
    from lorac.training.rules.pairs import Pair

    variant = lorac.LoRA(r=R)
    a, b = drawn(3, R, N, seed=1), drawn(3, M, R, seed=2)
    grad_a, grad_b = drawn(3, R, N, seed=3), drawn(3, M, R, seed=4)
    term = TrainedTerm("a", "site", {}, variant)
    found = find_equivalent_gradients(Pair(term, a, b, S), 1e-8, grad_a, grad_b, nearest=True)
    for i in range(3):
        one = find_equivalent_gradients(Pair(term, a[i], b[i], S), 1e-8, grad_a[i], grad_b[i], nearest=True)
        assert_close(found[0][i], one[0])
        assert_close(found[1][i], one[1])


def test_rejects_unsupported_optimizers_and_adapters() -> None:
    compiled, a, _, optimizer = pair(drawn(R, N, seed=1), drawn(M, R, seed=2))
    for other in (torch.optim.AdamW(trained(compiled)), torch.optim.SGD(trained(compiled), lr=1, momentum=0.9)):
        LoRAPro(compiled, other).remove()
        with pytest.raises(lorac.ChoiceError, match="computes the moments itself") as error:
            LoRAPro(compiled, other, full=True)
        assert error.value.nearest == "torch.optim.SGD(parameters, lr=lr)"
        assert not other._optimizer_step_pre_hooks, "the rule that was refused is on"
    with LoRAPro(compiled, optimizer, full=True):
        saved = optimizer.state_dict()
    with LoRAPro(compiled, optimizer), pytest.raises(lorac.ChoiceError, match="has moments of 1 tensors"):
        optimizer.load_state_dict(saved)
    with pytest.raises(lorac.ChoiceError, match="does not take damping=-1"):
        LoRAPro(compiled, optimizer, damping=-1.0)
    a.requires_grad_(False)
    with pytest.raises(lorac.ChoiceError, match="updates both factors of 'a' at 'site', but only lora_B trains"):
        LoRAPro(compiled, optimizer)
    dora: Any = lorac.compile(linear(N, M), {"d": lorac.DoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match=r"of method lora; there is 'd' \(dora\)"):
        LoRAPro(dora, torch.optim.SGD(trained(dora), lr=1))
