"""An optimizer's state by the names of tensors: whatever their order, and refused for other tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.training import NestedRanks, name_optimizer_state
from tests.training.every_rule import RULES, batch, copies, tensors_of, through_a_file, train
from tests.training.loops import trained


def adamw(compiled: Any, *, turned: bool = False) -> Any:
    tensors = trained(compiled)
    groups = [{"params": tensors[::2]}, {"params": tensors[1::2], "lr": 0.01}]
    for group in groups if turned else ():
        group["params"] = group["params"][::-1]
    return torch.optim.AdamW(groups, lr=0.02)


def test_a_loop_resumes_with_tensors_in_another_order() -> None:
    ruled = RULES["nested_ranks"]
    compiled = ruled.compiled()
    optimizer = adamw(compiled)
    NestedRanks(compiled, optimizer)
    name_optimizer_state(compiled, optimizer)
    train(compiled, optimizer, range(3))
    adapters, state = copies(compiled), through_a_file(optimizer.state_dict())
    assert all(name.startswith("adapter_tensors.a.") for name in state["tensors"])
    train(compiled, optimizer, range(3, 5))

    resumed = ruled.compiled(adapters)
    other = adamw(resumed, turned=True)
    NestedRanks(resumed, other)
    name_optimizer_state(resumed, other)
    other.load_state_dict(state)
    train(resumed, other, range(3, 5))
    assert all(map(torch.equal, tensors_of(resumed), tensors_of(compiled)))


def test_rejects_a_state_of_other_tensors() -> None:
    ruled = RULES["lora_plus"]
    compiled = ruled.compiled()
    optimizer = adamw(compiled)
    compiled(**batch(0))["loss"].backward()
    optimizer.step()
    position = optimizer.state_dict()
    name_optimizer_state(compiled, optimizer)
    state = optimizer.state_dict()
    smaller = ruled.compiled({"a": lorac.LoRA(r=2, targets=("first", "second"))})
    fewer = ruled.compiled({"a": lorac.LoRA(r=4, targets=("first",))})
    for other, made, what in (
        (compiled, torch.optim.SGD(trained(compiled), lr=1.0), "belongs to AdamW, the optimizer is SGD"),
        (compiled, torch.optim.AdamW(trained(compiled)), "groups of the optimizer hold other tensors"),
        (
            smaller,
            adamw(smaller),
            r"first/lora_A' has the shape \[4, 9\] there, and \[2, 9\] here",
        ),
        (fewer, adamw(fewer), r"second/lora_A' has the shape \[4, 8\] there, and None here"),
    ):
        with pytest.raises(lorac.ChoiceError, match=what):
            name_optimizer_state(other, made)
            made.load_state_dict(state)
    with pytest.raises(lorac.ChoiceError, match="the state belongs to tensors by position"):
        optimizer.load_state_dict(position)
    foreign = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=1.0)
    with pytest.raises(lorac.ChoiceError, match=r"a tensor of shape \(3,\) that no adapter has"):
        name_optimizer_state(compiled, foreign)
