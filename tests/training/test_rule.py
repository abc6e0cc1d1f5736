"""The base of every rule: torch's hooks around a step, scaled gradients, and states of several rules of a class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close
from lorac.training import AltLoRA, LoRAPro, NestedRanks
from lorac.training.optimizer_state import view_optimizer
from tests.training.every_rule import RULES, tensors_of, through_a_file, train
from tests.training.loops import trained
from tests.training.rules import backward, drawn, pair

FORMS: dict[str, Any] = {
    "lora_pro": lambda compiled, optimizer: LoRAPro(compiled, optimizer, full=True),
    "altlora_plus": lambda compiled, optimizer: AltLoRA(compiled, optimizer, plus=True),
}


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(2, 4, seed=1), drawn(3, 2, seed=2)


def test_a_pre_hook_can_replace_groups_and_state() -> None:
    """torch hands the optimizer itself through the hook; its own groups and states stay."""
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([one], lr=1.0, momentum=0.5)
    states: dict[Any, Any] = {other: {}}
    groups = [{**optimizer.param_groups[0], "params": [other]}]
    optimizer.register_step_pre_hook(
        lambda _, args, kwargs: ((view_optimizer(args[0], param_groups=groups, state=states), *args[1:]), kwargs)
    )
    one.grad = other.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(one, torch.ones(2)) and torch.equal(other, torch.zeros(2))
    assert optimizer.param_groups[0]["params"] == [one] and not optimizer.state and states[other]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_scaled_gradients_are_those_of_the_loss(form: str, fused: bool) -> None:
    """A GradScaler unscales before the step, or within a fused one; a step with infinite gradients does nothing."""
    (compiled, _, _, optimizer), plain = pair(*factors(), lr=0.1, fused=fused), pair(*factors(), lr=0.1)
    FORMS[form](compiled, optimizer)
    FORMS[form](plain[0], plain[3])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(6):
        gradient = drawn(3, 4, seed=number)
        optimizer.zero_grad()
        if number == 2:
            backward(compiled, scaler.scale(torch.full((3, 4), torch.inf, dtype=torch.float64)))
        else:
            backward(compiled, scaler.scale(gradient))
            plain[3].zero_grad()
            backward(plain[0], gradient)
            plain[3].step()
        if number == 4:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    for found, expected in zip(tensors_of(compiled), tensors_of(plain[0]), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["nested_ranks", "lora_pro_full"])
def test_two_rules_of_one_class_keep_their_own_state(name: str) -> None:
    """Each gets its own state back, in the order in which they were attached."""

    def started() -> tuple[list[Any], Any]:
        nets = [RULES[name].compiled(), RULES[name].compiled()]
        for tensor in trained(nets[1]):
            tensor.data.mul_(0.5)
        optimizer: Any = torch.optim.SGD([t for net in nets for t in trained(net)], lr=0.05)
        for net in nets:
            rule = RULES[name].rule
            assert rule is not None
            rule(net, optimizer)
        return nets, optimizer

    def steps(nets: list[Any], optimizer: Any, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            for net in nets:
                train(net, _NoStep(), [number])
            optimizer.step()

    nets, optimizer = started()
    steps(nets, optimizer, range(3))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "nets": [net.state_dict() for net in nets]})
    steps(nets, optimizer, range(3, 5))
    others, other = started()
    for net, state in zip(others, saved["nets"], strict=True):
        net.load_state_dict(state)
    other.load_state_dict(saved["optimizer"])
    steps(others, other, range(3, 5))
    for net, resumed in zip(nets, others, strict=True):
        assert all(map(torch.equal, tensors_of(resumed), tensors_of(net)))
    assert not all(map(torch.equal, tensors_of(nets[0]), tensors_of(nets[1])))


class _NoStep:
    """In place of an optimizer that steps later."""

    def zero_grad(self) -> None:
        """Keep the gradients."""

    def step(self) -> None:
        """Do nothing."""


def test_a_failed_step_restores_the_groups() -> None:
    ruled = RULES["nested_ranks"]
    compiled = ruled.compiled()
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    whole = list(optimizer.param_groups[0]["params"])
    rule = NestedRanks(compiled, optimizer, generator=torch.Generator().manual_seed(3))
    train(compiled, _NoStep(), [0])
    kept = [tensor.detach().clone() for tensor in whole]
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert [id(t) for t in optimizer.param_groups[0]["params"]] == [id(t) for t in whole]
    assert set(map(id, optimizer.state)) <= set(map(id, whole)) and all(map(torch.equal, whole, kept))
    optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert not all(map(torch.equal, whole, kept)) and rule.rank
    assert isinstance(compiled.adapters["a"].variant, lorac.DyLoRA)
