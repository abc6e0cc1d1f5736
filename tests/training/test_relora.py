"""ReLoRA: restarts that change no answer, sums of a rank above each part's, and a result that is an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing.eager_checks import assert_close
from lorac.training import ReLoRA
from tests.limits import rank_of
from tests.training.loops import trained
from tests.training.rules import drawn, linear

R, EVERY = 2, 3


def compiled_with(into: Any, **lora: Any) -> Any:
    adapters = {"a": lorac.LoRA(**{"r": R, "alpha": 4, "targets": ("site",), **lora}), "sum": into}
    return lorac.compile(linear(7, 6), adapters, active={"a": 1.0, "sum": 1.0}).train()  # type: ignore[attr-defined]


def takers() -> dict[str, Any]:
    return {"lora": lorac.LoRA(r=3 * R, alpha=9, targets=("site",)), "full": lorac.Full(targets=("site",))}


def step(compiled: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    (compiled(drawn(8, 7, seed=seed)) - drawn(8, 6, seed=seed + 50)).square().mean().backward()
    optimizer.step()


def answers(compiled: Any) -> Tensor:
    return compiled(drawn(4, 7, seed=99)).detach()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_restarts_add_up(kind: str) -> None:
    compiled = compiled_with(takers()[kind])
    optimizer = torch.optim.AdamW(trained(compiled), lr=0.05)
    rule = ReLoRA(compiled, optimizer, into="sum", every=EVERY, prune=1.0)
    own, target = (compiled.adapters[name].tensors["site"] for name in ("a", "sum"))
    base = compiled.host.site.weight.detach().clone()
    for restart in range(3):
        for seed in range(EVERY - 1):
            step(compiled, optimizer, 10 * restart + seed)
        assert own["lora_B"].any()
        step(compiled, optimizer, 10 * restart + 9)
        assert rule.restarts == restart + 1 and not own["lora_B"].any()
        assert all(not optimizer.state[own[name]]["exp_avg"].any() for name in own)
        moved = target["weight"].detach() - base if kind == "full" else 1.5 * target["lora_B"] @ target["lora_A"]
        assert rank_of(moved.detach()) == R * (restart + 1)
    assert torch.equal(compiled.host.site.weight, base)
    before = answers(compiled)
    alone = compiled(drawn(4, 7, seed=99), adapters="sum").detach()
    assert_close(alone, before)
    exported = compiled.export(target="eager", active="sum")
    assert_close(exported(drawn(4, 7, seed=99)).detach(), before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_folding_changes_no_answer(kind: str) -> None:
    compiled = compiled_with(takers()[kind])
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    with ReLoRA(compiled, optimizer, into="sum", every=100) as rule:
        for seed in range(4):
            step(compiled, optimizer, seed)
        before = answers(compiled)
        rule.fold()
    assert_close(answers(compiled), before)
    assert rule.restarts == 1


def test_the_smallest_moments_become_nothing() -> None:
    compiled = compiled_with(takers()["lora"])
    optimizer = torch.optim.AdamW(trained(compiled), lr=0.05)
    rule = ReLoRA(compiled, optimizer, into="sum", every=100, prune=0.5)
    for seed in range(3):
        step(compiled, optimizer, seed)
    moment = optimizer.state[compiled.adapters["a"].tensors["site"]["lora_A"]]["exp_avg"]
    before = moment.abs().flatten().sort().values
    rule.fold()
    assert (
        torch.equal(moment.abs().flatten().sort().values[7:], before[7:])
        and not moment.flatten().abs().sort().values[:7].any()
    )
    assert optimizer.state[compiled.adapters["a"].tensors["site"]["lora_A"]]["step"] == 3


def test_what_it_does_not_apply_to() -> None:
    compiled = compiled_with(takers()["lora"])
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    with pytest.raises(lorac.AdapterNotFound, match="'none' must be a LoRA or Full to fold into, and there is none"):
        ReLoRA(compiled, optimizer, into="none", every=2)
    for wrong in ({"every": 0}, {"every": 2, "prune": 1.1}):
        with pytest.raises(lorac.ChoiceError, match="ReLoRA does not take"):
            ReLoRA(compiled, optimizer, into="sum", **wrong)
    assert all(tensor.requires_grad for tensor in compiled.adapters["sum"].parameters()), "half changed"
    small = compiled_with(lorac.LoRA(r=1, targets=("site",)))
    with pytest.raises(lorac.ChoiceError, match="'sum' has less rank than what it is to take"):
        ReLoRA(small, torch.optim.SGD(trained(small), lr=0.05), into="sum", every=2)
    dora = compiled_with(lorac.DoRA(r=2, targets=("site",)))
    with pytest.raises(lorac.AdapterNotFound, match="it is dora"):
        ReLoRA(dora, torch.optim.SGD(trained(dora), lr=0.05), into="sum", every=2)


def test_a_restart_that_cannot_be_is_refused_before_its_step() -> None:
    compiled = compiled_with(lorac.LoRA(r=R, targets=("site",)))
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    rule = ReLoRA(compiled, optimizer, into="sum", every=2)
    own = compiled.adapters["a"].tensors["site"]
    for seed in range(3):
        step(compiled, optimizer, seed)
    before = own["lora_A"].detach().clone()
    with pytest.raises(lorac.ChoiceError, match="'sum' has taken 1 restarts and has no rank left"):
        step(compiled, optimizer, 3)
    assert torch.equal(own["lora_A"], before) and rule.restarts == 1
    rule.restarts = 0
    compiled.swap("a")
    with pytest.raises(lorac.ChoiceError, match="needs both adapters active at strength 1, and active is") as error:
        step(compiled, optimizer, 3)
    assert error.value.next_step == "swap to {'a': 1, 'sum': 1}"
