"""Balancing: the specification's values, the counted tokens, and loads that become even."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.testing import assert_close
from lorac.training import Balanced
from tests.training.every_rule import Host, batch
from tests.training.loops import trained
from tests.training.rules import drawn, linear, tensor


def compiled_with(**host: Any) -> tuple[Any, Any]:
    compiled: Any = lorac.compile(
        Host(**host), {"a": lorac.FlyLoRA(r=6, top_k=2, targets=("first", "second"))}, example_inputs=batch(0)
    )
    return compiled.train(), torch.optim.SGD(trained(compiled), lr=0.1)


def test_values_by_hand() -> None:
    compiled: Any = lorac.compile(linear(4, 3), {"a": lorac.FlyLoRA(r=4, top_k=2, targets=("site",))})
    optimizer = torch.optim.SGD(trained(compiled.train()), lr=0.1)
    own = compiled.adapters["a"].tensors["site"]
    own["lora_A"].copy_(torch.eye(4))
    with Balanced(compiled, optimizer, rate=0.25):
        # Each row chooses its two largest entries: rank 0 four times, 1 and 2 twice each, 3 never.
        x = tensor([[3, 2, 1, 0], [3, 1, 2, 0], [3, 2, 1, 0], [3, 1, 2, 0]])
        compiled(x).sum().backward()
        optimizer.step()
        assert_close(own["lora_topk_bias"], tensor([-0.25, 0, 0, 0.25]))
        optimizer.step()  # nothing was counted
        assert_close(own["lora_topk_bias"], tensor([-0.25, 0, 0, 0.25]))


def test_a_moved_model_chooses_by_the_bias_that_the_rule_moves() -> None:
    """As accelerate moves it, to ``cpu:0``: modules copy their buffers then."""
    biases = []
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        compiled, optimizer = compiled_with()
        compiled.to(device)
        with Balanced(compiled, optimizer, rate=0.25):
            for step in range(2):
                compiled(**batch(step))["loss"].backward()
                optimizer.step()
        biases.append(compiled.adapters["a"].tensors["first"]["lora_topk_bias"])
    assert torch.equal(*biases)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_counts_its_calls_that_train_once(checkpointing: bool) -> None:
    compiled, optimizer = compiled_with(checkpointing=checkpointing)
    rule = Balanced(compiled, optimizer)
    for rows in (slice(0, 3), slice(3, 8)):
        compiled(**batch(0, rows))["loss"].backward()
    assert {path: int(count.sum()) for path, count in rule._counts.items()} == {"first": 16, "second": 16}
    optimizer.step()
    before = compiled.adapters["a"].tensors["first"]["lora_topk_bias"].clone()
    compiled.eval()
    with torch.no_grad():
        compiled(**batch(0))
    optimizer.step()
    assert torch.equal(before, compiled.adapters["a"].tensors["first"]["lora_topk_bias"])


def test_loads_come_to_be_even() -> None:
    compiled: Any = lorac.compile(linear(6, 5), {"a": lorac.FlyLoRA(r=6, top_k=2, targets=("site",))}, aux=("chosen",))
    optimizer = torch.optim.SGD(trained(compiled.train()), lr=0.0)
    x = drawn(256, 6, seed=1) + tensor([1.0, 0.5, 0, 0, 0, 0])

    def spread() -> float:
        compiled(x).sum().backward()
        return float(compiled.aux["chosen"]["site"].sum(0).std())

    before = spread()
    with Balanced(compiled, optimizer, rate=0.02):
        for _ in range(60):
            spread()
            optimizer.step()
    assert spread() < 0.3 * before


def test_rejects_adapters_without_a_router() -> None:
    lora: Any = lorac.compile(linear(4, 3), {"a": lorac.LoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match=r"no adapter emits 'chosen' .* there is 'a' \(lora\)"):
        Balanced(lora, torch.optim.SGD(trained(lora), lr=1))
    compiled, optimizer = compiled_with()
    with pytest.raises(lorac.AdapterNotFound, match="holds a buffer 'bias'"):
        Balanced(compiled, optimizer, bias="bias")
    with pytest.raises(lorac.ChoiceError, match="Balanced does not take rate=-1"):
        Balanced(compiled, optimizer, rate=-1.0)
    assert not optimizer._optimizer_step_pre_hooks
