"""Squeezing: the specification's values, the dropped components, and stages of one training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import LoRAPro, Squeeze, rank_stages, reduce_rank
from tests.limits import assert_at_most
from tests.training.loops import trained
from tests.training.rules import drawn, linear, tensor


def lora(a: Tensor, b: Tensor, scale: float = 1.0, **fields: Any) -> lorac.Adapter:
    variant = lorac.LoRA(r=len(a), alpha=scale * len(a), targets=("site",), **fields)
    return lorac.Adapter("a", variant, {"site": {"lora_A": a, "lora_B": b}})


def change(adapter: lorac.Adapter) -> Tensor:
    own: Any = adapter.tensors["site"]
    variant: Any = adapter.variant
    return variant.at_path("site").scale * own["lora_B"].detach() @ own["lora_A"].detach()


def test_values_by_hand() -> None:
    found = reduce_rank(lora(torch.eye(2).double(), tensor([[3, 0], [0, 1]])), 1)
    assert_close(change(found), tensor([[3, 0], [0, 0]]))
    assert found.variant.own_settings["alpha"] == 1 and found.tensors["site"]["lora_A"].shape == (1, 2)


def test_reduce_rank_drops_the_smallest_singular_values() -> None:
    """The error is the tail of σ; both factors have one size; ranks are nested, and the whole one loses nothing."""
    a, b, scale = drawn(4, 5, seed=1), drawn(6, 4, seed=2), 2.0
    whole = scale * b @ a
    sizes = torch.linalg.svdvals(whole)
    for rank in (1, 2, 3, 4):
        small = reduce_rank(lora(a, b, scale), rank)
        assert_close(
            change(small) if rank == 4 else (whole - change(small)).square().sum(),
            whole if rank == 4 else sizes[rank:4].square().sum(),
        )
        own = small.tensors["site"]
        assert_close(own["lora_A"].norm(), (sizes[:rank].sum() / scale).sqrt())
        assert_close(own["lora_B"].norm(), own["lora_A"].norm())
        assert small.variant.own_settings["alpha"] == scale * rank
    assert_close(change(reduce_rank(reduce_rank(lora(a, b, scale), 3), 1)), change(reduce_rank(lora(a, b, scale), 1)))
    turn = drawn(4, 4, seed=3)
    assert_close(
        change(reduce_rank(lora(turn @ a, b @ torch.linalg.inv(turn), scale), 2)),
        change(reduce_rank(lora(a, b, scale), 2)),
    )
    first = scale * b[:, :2] @ a[:2]
    assert_at_most((whole - change(reduce_rank(lora(a, b, scale), 2))).norm(), (whole - first).norm())


def test_chooses_the_rank_by_the_energy() -> None:
    made = lora(torch.eye(3, 5).double(), torch.diag(tensor([3, 2, 1])))
    ranks = [len(reduce_rank(made, energy=share).tensors["site"]["lora_A"]) for share in (0.5, 0.65, 0.9, 0.95, 1.0)]
    assert ranks == [1, 2, 2, 3, 3]


def test_components_of_nothing_can_learn() -> None:
    made = reduce_rank(lora(drawn(3, 5, seed=1), torch.zeros(4, 3).double()), 2).tensors["site"]
    assert not made["lora_B"].any()
    assert_close(made["lora_A"].norm(dim=1), tensor([1, 1]))


@pytest.mark.parametrize(
    ("first", "last", "steps", "expected"),
    [
        (32, 4, 10, ((32, 2), (16, 3), (8, 2), (4, 3))),
        (6, 2, 3, ((6, 1), (3, 1), (2, 1))),
        (4, 4, 7, ((4, 7),)),
    ],
)
def test_stages(first: int, last: int, steps: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert rank_stages(first, last, steps) == expected


def trainable(rank: int = 8, bias: bool = True) -> tuple[Any, Any]:
    model = linear(9, 8)
    adapters = {
        "a": lorac.LoRA(r=rank, alpha=2 * rank, targets=("site",), lora_bias=bias),
        "b": lorac.LoRA(r=3, targets=("site",)),
    }
    compiled: Any = lorac.compile(model, adapters, active={"a": 0.5, "b": 1.0})
    return compiled.train(), torch.optim.AdamW(trained(compiled), lr=0.02)


def step(compiled: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    (compiled(drawn(12, 9, seed=seed)) - drawn(12, 8, seed=50 + seed)).square().mean().backward()
    optimizer.step()


def test_lowers_the_rank_during_training() -> None:
    compiled, optimizer = trainable()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    Squeeze(compiled, optimizer, stages=rank_stages(8, 2, 9))
    ranks = []
    for seed in range(9):
        own = compiled.adapters["a"].tensors["site"]
        ranks.append(len(own["lora_A"]))
        before = own["lora_A"].detach().clone()
        step(compiled, optimizer, seed)
        schedule.step()
        moved = compiled.adapters["a"].tensors["site"]["lora_A"]
        assert len(moved) < len(before) or not torch.equal(moved, before), "it stands still"
        assert {id(t) for group in optimizer.param_groups for t in group["params"]} == {
            id(t) for t in trained(compiled)
        }
        assert len(optimizer.state) <= 5 and all(
            state["exp_avg"].shape == t.shape for t, state in optimizer.state.items()
        )
    assert ranks == [8, 8, 8, 4, 4, 4, 2, 2, 2]
    assert compiled.active == {"a": 0.5, "b": 1.0}
    assert compiled.adapters["a"].variant.own_settings["alpha"] == 4
    assert compiled.adapters["b"].tensors["site"]["lora_A"].shape == (2, 9)
    exported = compiled.eval().export(target="eager")
    assert torch.equal(exported(drawn(3, 9, seed=1)), compiled(drawn(3, 9, seed=1)))


def test_other_rules_need_a_new_attachment_after_a_change() -> None:
    compiled, optimizer = trainable(bias=False)
    Squeeze(compiled, optimizer, stages=((8, 1), (4, 9)))
    other = LoRAPro(compiled, optimizer)
    step(compiled, optimizer, 0)
    before = compiled.adapters["a"].tensors["site"]["lora_A"].detach().clone()
    with pytest.raises(lorac.Unavailable, match="'a' has changed since LoRAPro was attached"):
        step(compiled, optimizer, 1)
    assert torch.equal(compiled.adapters["a"].tensors["site"]["lora_A"], before)
    other.remove()
    with LoRAPro(compiled, optimizer):
        step(compiled, optimizer, 1)


def test_rejects_other_methods_and_invalid_ranks() -> None:
    dora: Any = lorac.compile(linear(4, 3), {"a": lorac.DoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterError, match="'a' is dora, which is not LoRA"):
        reduce_rank(dora.adapters["a"], 1)
    made = lora(drawn(2, 4, seed=1), drawn(3, 2, seed=2))
    for wrong in ({}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(lorac.OptionError):
            reduce_rank(made, **wrong)  # type: ignore[arg-type]
    compiled, optimizer = trainable()
    for stages in ((), ((4, 1), (8, 1)), ((4, 0),)):
        with pytest.raises(lorac.ChoiceError, match="with falling ranks"):
            Squeeze(compiled, optimizer, stages=stages)
    for wrong_ranks in ((2, 4, 9), (4, 0, 9), (8, 2, 2)):
        with pytest.raises(lorac.ChoiceError):
            rank_stages(*wrong_ranks)
    assert isinstance(compiled, nn.Module) and not optimizer._optimizer_step_pre_hooks
