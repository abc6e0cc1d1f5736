"""A weight in memory of another device than the adapters': written values are copied there once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.frontend.site_discovery import find_sites
from lorac.ir.algebra.changes import Dense, LowRank, Sparse, map_tensors
from lorac.ir.slots import buffers
from lorac.ir.slots.buffers import FusedBuffer

OUT, IN = 6, 4
LAYER = nn.ModuleDict({"it": nn.Linear(IN, OUT)})


def _buffer() -> FusedBuffer:
    weight = torch.empty(IN, OUT, device="meta")
    return FusedBuffer(find_sites(LAYER)["it"], weight, lambda held: held.t(), lambda: weight.t().clone())


@pytest.mark.parametrize(
    "change",
    [LowRank(torch.ones(IN, 2), torch.ones(2, OUT)), Dense(torch.ones(OUT, IN))],
    ids=["low-rank", "dense"],
)
def test_a_change_is_brought_to_the_weights_memory_once(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    brought, buffer = [], _buffer()

    def counted(edit: Any, given: Any) -> Any:
        brought.append(given)
        return map_tensors(edit, given)

    monkeypatch.setattr(buffers, "map_tensors", counted)
    assert buffer.write(change) == OUT * IN * 4
    assert buffer.write(change) == 0
    buffer.write(None)
    assert buffer.write(change) == OUT * IN * 4 and brought == [change]


def test_frees_a_copied_change_when_it_is_replaced() -> None:
    buffer, change = _buffer(), Dense(torch.ones(OUT, IN))
    buffer.write(change)
    there = weakref.ref(buffer.current)
    buffer.write(None)
    del change
    gc.collect()
    assert there() is None


def test_keeps_a_change_on_the_right_device() -> None:
    weight = torch.zeros(IN, OUT)
    buffer = FusedBuffer(find_sites(LAYER)["it"], weight, lambda held: held.t(), lambda: torch.zeros(OUT, IN))
    change = Sparse(torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0]))
    buffer.write(change)
    assert buffer.current is change and weight[1, 0] == 2


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_writes_weights_that_were_allocated_in_inference_mode(target: str) -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT)), torch.ones(2, IN)
    methods = {
        "sparse": lorac.SHiRA(ratio=0.5, targets="all-linear"),
        "low rank": lorac.LoRA(r=2, targets="all-linear"),
    }
    with torch.inference_mode():
        compiled = lorac.compile(model, methods, target=target, mode="fused", active=None, example_inputs=(x,))
        before = compiled(x)
    for choice in (*methods, None):
        compiled.swap(choice)
    assert torch.equal(compiled(x), before)
