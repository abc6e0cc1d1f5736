"""ReLoRA: restarts that change no answer, sums of a rank above each part's, and a result that is an adapter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import ReLoRA, restart_schedule
from tests.limits import rank_of
from tests.training.loops import trained
from tests.training.rules import drawn, linear, tensor

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


def test_sets_the_smallest_moments_to_zero() -> None:
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


def released_pruning(moment: Tensor, ratio: float) -> Tensor:
    """The released ``magnitude_pruning_``."""
    sizes = moment.abs()
    return moment * (sizes > torch.quantile(sizes.flatten().to(torch.float32), ratio).to(moment.dtype))


@pytest.mark.parametrize("prune", [0.99, 0.9, 0.5, 0.29, 1.0])
def test_pruning_is_the_released_codes(prune: float) -> None:
    """Also of sizes on which the quantile falls exactly: 101 values at 0.29 and 0.99."""
    compiled = compiled_with(takers()["lora"])
    optimizer = torch.optim.AdamW(trained(compiled), lr=0.05)
    rule = ReLoRA(compiled, optimizer, into="sum", every=100, prune=prune)
    for size in (14, 101, 1000):
        factor, moment = torch.nn.Parameter(torch.zeros(size)), drawn(size, seed=size).float()
        optimizer.state[factor] = {"exp_avg": moment.clone(), "step": torch.tensor(3.0)}
        rule._prune(factor)
        assert torch.equal(optimizer.state[factor]["exp_avg"], released_pruning(moment, prune))


def released_factor(step: int, steps: int, every: int, first: int, again: int, least: float) -> float:
    """The released ``_get_cosine_schedule_with_multiple_warmups_lambda`` without ``adjust_step``."""
    if step < first:
        return float(step) / float(max(1, first))
    restart_step, restart_number = step % every, step // every
    if restart_step < again and step >= every:
        end = float(restart_number * every + again - first) / float(max(1, steps - first))
        peak = least + (1.0 - least) * (0.5 * (1.0 + math.cos(math.pi * end)))
        return float(restart_step) / float(max(1, again)) * peak
    progress = float(step - first) / float(max(1, steps - first))
    return least + (1.0 - least) * (0.5 * (1.0 + math.cos(math.pi * progress)))


@pytest.mark.parametrize(("warmup", "again", "least"), [(0, 2, 0.1), (4, 3, 0.05), (5, 0, 1.0)])
def test_the_schedule_is_the_released_codes(warmup: int, again: int, least: float) -> None:
    factor = restart_schedule(30, 6, warmup=warmup, restart_warmup=again, least=least)
    released = [released_factor(step, 30, 6, warmup, again, least) for step in range(30)]
    assert_close(tensor([factor(step) for step in range(30)]), tensor(released))
    with pytest.raises(lorac.ChoiceError, match="does not take restart_warmup=7"):
        restart_schedule(30, 6, restart_warmup=7)


def test_twenty_steps_are_the_released_codes_with_a_restart_at_the_same_steps() -> None:
    """W takes s·B·A, A is drawn anew, B becomes 0, moments are pruned, and the rate warms up again."""
    compiled = compiled_with(lorac.Full(targets=("site",)))
    optimizer = torch.optim.AdamW(trained(compiled), lr=0.05)
    rule = ReLoRA(compiled, optimizer, into="sum", every=5, prune=0.9)
    settings: Any = {"warmup": 2, "restart_warmup": 2}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, restart_schedule(20, 5, **settings))
    own = compiled.adapters["a"].tensors["site"]
    weight = compiled.host.site.weight.detach().clone()
    a, b = (own[name].detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    theirs = torch.optim.AdamW([a, b], lr=0.05)
    other = torch.optim.lr_scheduler.LambdaLR(theirs, lambda now: released_factor(now, 20, 5, 2, 2, 0.1))
    for number in range(20):
        step(compiled, optimizer, number)
        theirs.zero_grad()
        x, y = drawn(8, 7, seed=number), drawn(8, 6, seed=number + 50)
        (x @ (weight + 2.0 * b @ a).t() - y).square().mean().backward()
        theirs.step()
        if number % 5 == 4:
            with torch.no_grad():
                weight += 2.0 * b @ a
                a.copy_(own["lora_A"])
                b.zero_()
            for moment in (theirs.state[factor][name] for factor in (a, b) for name in ("exp_avg", "exp_avg_sq")):
                moment.copy_(released_pruning(moment, 0.9))
        schedule.step()
        other.step()
        assert_close(own["lora_A"].detach(), a.detach())
    assert rule.restarts == 4
    assert_close(compiled.adapters["sum"].tensors["site"]["weight"].detach(), weight)


def test_rejects_invalid_targets_and_settings() -> None:
    compiled = compiled_with(takers()["lora"])
    optimizer = torch.optim.SGD(trained(compiled), lr=0.05)
    with pytest.raises(lorac.AdapterNotFound, match="'none' must be a LoRA or Full to fold into, and there is none"):
        ReLoRA(compiled, optimizer, into="none", every=2)
    for wrong in ({"every": 0}, {"every": 2, "prune": 1.1}):
        with pytest.raises(lorac.ChoiceError, match="ReLoRA does not take"):
            ReLoRA(compiled, optimizer, into="sum", **wrong)
    assert all(tensor.requires_grad for tensor in compiled.adapters["sum"].parameters()), "half changed"
    small = compiled_with(lorac.LoRA(r=1, targets=("site",)))
    with pytest.raises(lorac.ChoiceError, match="'sum' has a smaller rank than one restart adds"):
        ReLoRA(small, torch.optim.SGD(trained(small), lr=0.05), into="sum", every=2)
    dora = compiled_with(lorac.DoRA(r=2, targets=("site",)))
    with pytest.raises(lorac.AdapterNotFound, match="it is dora"):
        ReLoRA(dora, torch.optim.SGD(trained(dora), lr=0.05), into="sum", every=2)


def test_rejects_an_impossible_restart_before_its_step() -> None:
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
