"""LoRA+: B at its own rate, against PEFT's, under schedules, and with groups that are as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close
from lorac.training import LoRAPlus
from tests.refusing import refuses
from tests.training.every_rule import through_a_file
from tests.training.loops import trained
from tests.training.rules import backward, drawn, pair


def test_a_step_of_sgd() -> None:
    a, b, gradient = drawn(2, 4, seed=1), drawn(3, 2, seed=2), drawn(3, 4, seed=3)
    compiled, own_a, own_b, optimizer = pair(a, b, lr=0.1)
    with LoRAPlus(compiled, optimizer, ratio=4.0):
        backward(compiled, gradient)
        optimizer.step()
        assert_close(own_a.detach(), a - 0.1 * b.t() @ gradient)
        assert_close(own_b.detach(), b - 0.4 * gradient @ a.t())
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
        assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    optimizer.zero_grad()
    before = own_b.detach().clone()
    backward(compiled, gradient)
    optimizer.step()
    assert_close(before - own_b.detach(), 0.1 * own_b.grad)


def test_matches_peft() -> None:
    """AdamW, eight steps from PEFT's start, with weight decay."""
    import peft
    from peft.optimizers import create_loraplus_optimizer

    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    compiled: Any = lorac.compile(model, {"a": lorac.LoRA(r=2, alpha=4, targets=["0", "2"])}).train()  # type: ignore[attr-defined]
    layers = {path: theirs.base_model.model.get_submodule(path) for path in ("0", "2")}
    with torch.no_grad():
        for path, layer in layers.items():
            for name in ("lora_A", "lora_B"):
                compiled.adapters["a"].tensors[path][name].copy_(getattr(layer, name)["default"].weight)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, **settings
    )
    optimizer = torch.optim.AdamW(trained(compiled), **settings)
    LoRAPlus(compiled, optimizer, ratio=8.0)
    for seed in range(8):
        x, y = drawn(4, 5, seed=seed), drawn(4, 3, seed=100 + seed)
        for one, net in ((optimizer, compiled), (other, theirs)):
            one.zero_grad()
            (net(x) - y).square().mean().backward()
            one.step()
    for path, layer in layers.items():
        for name in ("lora_A", "lora_B"):
            found = compiled.adapters["a"].tensors[path][name].detach()
            assert_close(found, getattr(layer, name)["default"].weight.detach().to(found.dtype))


def test_a_schedule_made_before_or_after_holds_for_both_rates() -> None:
    a, b, gradient = drawn(2, 4, seed=1), drawn(3, 2, seed=2), drawn(3, 4, seed=3)
    compiled, own_a, own_b, optimizer = pair(a, b, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    LoRAPlus(compiled, optimizer, ratio=2.0)
    for rate in (0.1, 0.05):
        optimizer.zero_grad()
        backward(compiled, gradient)
        before = own_a.detach().clone(), own_b.detach().clone()
        optimizer.step()
        schedule.step()
        assert_close(before[0] - own_a.detach(), rate * own_a.grad)
        assert_close(before[1] - own_b.detach(), 2 * rate * own_b.grad)


class ScheduleFree(torch.optim.Optimizer):
    """Averages its steps, weighted by the largest rate so far, and keeps what it knows in its groups (Defazio 2024)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "lr_max": -1.0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = group["lr"] * min(1.0, (group["k"] + 1) / 3)
            group["lr_max"] = max(rate, group["lr_max"])
            group["weight_sum"] += group["lr_max"] ** 2
            share = group["lr_max"] ** 2 / group["weight_sum"]
            for tensor in group["params"]:
                fast = self.state[tensor].setdefault("z", tensor.clone())
                tensor.lerp_(fast, share).add_(tensor.grad, alpha=rate * (0.9 * (1 - share) - 1))
                fast.sub_(tensor.grad, alpha=rate)
            group["k"] += 1


def test_an_optimizer_that_writes_into_its_groups() -> None:
    """As with a group for each rate, also after it was read from a state dict."""
    a, b, gradient = drawn(2, 4, seed=1), drawn(3, 2, seed=2), drawn(3, 4, seed=3)
    one, two = pair(a, b), pair(a, b)
    other: Any = ScheduleFree([{"params": [two[1]]}, {"params": [two[2]], "lr": 0.4}], lr=0.1)
    optimizer: Any = ScheduleFree(trained(one[0]), lr=0.1)
    LoRAPlus(one[0], optimizer, ratio=4.0)
    for number in range(20):
        if number == 10:
            saved = through_a_file(optimizer.state_dict())
            optimizer = ScheduleFree(trained(one[0]), lr=0.1)
            LoRAPlus(one[0], optimizer, ratio=4.0)
            optimizer.load_state_dict(saved)
        for compiled, steps in ((one[0], optimizer), (two[0], other)):
            steps.zero_grad()
            backward(compiled, gradient + number)
            steps.step()
    assert torch.equal(one[1], two[1]) and torch.equal(one[2], two[2])
    written = [{key: group[key] for key in ("k", "lr_max", "lr")} for group in optimizer.param_groups]
    assert written == [{"k": 20, "lr_max": 0.1, "lr": 0.1}]


def test_an_optimizer_that_hands_its_step_on() -> None:
    compiled, _, _, inner = pair(drawn(2, 4, seed=1), drawn(3, 2, seed=2), lr=0.1)
    outer: Any = torch.optim.SGD(trained(compiled), lr=0.1)
    outer.inner = inner
    LoRAPlus(compiled, outer)
    backward(compiled, drawn(3, 4, seed=3))
    with refuses("choice_error", match="SGD hands its step on to SGD") as error:
        outer.step()
    assert error.value.next_step == "attach the rule to that SGD"


def test_embeddings_and_biases() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    variant = lorac.LoRA(r=2, targets=["0", "1"], lora_bias=True)
    compiled: Any = lorac.compile(model, {"a": variant}).train()  # type: ignore[attr-defined]
    tensors = compiled.adapters["a"].tensors
    optimizer = torch.optim.SGD(trained(compiled), lr=0.1)
    LoRAPlus(compiled, optimizer, ratio=4.0, embedding_lr=0.7)
    before = {(path, name): value.detach().clone() for path, own in tensors.items() for name, value in own.items()}
    compiled(torch.tensor([[1, 3]])).square().sum().backward()
    optimizer.step()
    rates = {("0", "lora_A"): 0.7, ("0", "lora_B"): 0.7, ("1", "lora_A"): 0.1, ("1", "lora_B"): 0.4}
    for (path, name), rate in {**rates, ("1", "lora_bias"): 0.4}.items():
        own = tensors[path][name]
        assert_close(before[path, name] - own.detach(), rate * own.grad)


def test_a_failed_step_restores_the_groups() -> None:
    compiled, own_a, _, optimizer = pair(drawn(2, 4, seed=1), drawn(3, 2, seed=2), lr=0.1)
    rule = LoRAPlus(compiled, optimizer)

    def fails() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(2, 0.1)]
    backward(compiled, drawn(3, 4, seed=3))
    before = own_a.detach().clone()
    optimizer.step()
    assert_close(before - own_a.detach(), 0.1 * own_a.grad)
    rule.remove()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_rejects_invalid_settings() -> None:
    compiled, _, _, optimizer = pair(drawn(2, 4, seed=1), drawn(3, 2, seed=2))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(lorac.ChoiceError, match="LoRAPlus does not take ratio"):
            LoRAPlus(compiled, optimizer, ratio=wrong)
    with pytest.raises(lorac.ChoiceError, match="does not take embedding_lr=-1"):
        LoRAPlus(compiled, optimizer, embedding_lr=-1.0)
    from transformers import Adafactor

    own = Adafactor(trained(compiled), lr=None)
    with pytest.raises(lorac.ChoiceError, match="Adafactor has one without"):
        LoRAPlus(compiled, own)
    LoRAPlus(compiled, Adafactor(trained(compiled), lr=1e-3, relative_step=False, scale_parameter=False)).remove()
