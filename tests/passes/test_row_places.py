"""Slots with places: rows with their own adapters, and slots that all rows share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import run_pipeline
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.slots.places import stack_places
from lorac.passes.pipelines import lowering_passes
from tests.captured import captured_program, graph_of, interpret
from tests.limits import ROWS

X = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """Layers that read one input, one that reads what they make, and tokens that are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.o = nn.Linear(8, 12)
        self.table = nn.Embedding(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(x[..., 0].abs().long() % 7)
        y: Tensor = x + self.o(torch.tanh(self.q(x)) * self.k(x))
        return y


VARIANTS: dict[str, Any] = {
    "lora": lorac.LoRA(r=3, targets=["q", "o", "table"]),
    "dora": lorac.DoRA(r=2, targets=["k"]),
    "ia3": lorac.IA3(targets=["q", "k"]),
    "vera": lorac.VeRA(r=4, targets=["q", "k"]),
    "hydra": lorac.Hydra(r=2, targets=["k", "o"]),
    "oft": lorac.OFT(block_size=4, targets=["o"]),
}
CHOICES: list[Any] = [
    "lora",
    "dora",
    "ia3",
    "vera",
    "hydra",
    "oft",
    {"lora": 0.5, "vera": -0.5},
    None,
]


def _lowered(host: nn.Module, compiled: Any, shapes: Any, x: Tensor = X) -> Graph:
    graph = graph_of("main", captured_program(host, (x,), shapes), compiled.sites, compiled.plans)
    run_pipeline(graph, lowering_passes(rows=True))
    return graph


@pytest.mark.medium("runtime/test_rows.py")
@torch.no_grad()
def test_rows_are_computed_as_each_alone() -> None:
    """In float64, as eager mode computes each row by itself, with as many places as rows and with half as many."""
    torch.manual_seed(0)
    host = Block().double().eval()
    compiled = lorac.compile(host, dict(VARIANTS), active=None)
    for adapter in compiled.adapters.values():
        for tensor in adapter.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, dtype=tensor.dtype))
    graph = _lowered(host, compiled, ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},))
    assert all(slot.placed for slot in graph.slots.values())

    def tensors(choice: Any) -> dict[str, Tensor]:
        compiled.swap(choice)
        snapshot = compose_choice(compiled.plans, compiled.pool, compiled.choice, compiled.session.base)
        return collect_slot_tensors(
            graph.slots, compiled.plans, fill_slots(compiled.plans, snapshot, compiled.session.base)
        )

    for start in range(0, len(CHOICES), 4):
        for choices in (CHOICES[start : start + 4], CHOICES[start : start + 2]):
            each = [tensors(choice) for choice in choices]
            stacked = {name: stack_places([one[name] for one in each]) for name in graph.slots}
            y = interpret(graph, {"x": X}, stacked)
            for row in range(4):
                compiled.swap(choices[row * len(choices) // 4])
                alone = compiled(X[row : row + 1])
                assert float((y[row] - alone[0]).abs().max()) <= ROWS[y.dtype] * float(alone.abs().max())


class Shared(nn.Module):
    """A layer whose slots all rows share, and one whose slots they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.branch = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(self.flat(x.flatten(0, 1)).view_as(x))
        return y


def test_reports_inputs_that_all_rows_share() -> None:
    host = Shared().eval()
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["flat"])})
    graph = _lowered(host, compiled, ({0: torch.export.Dim("batch")},), X.float())
    assert not any(slot.placed for slot in graph.slots.values())
    why = "the rows of its input are not those of the batch"
    assert f"'flat': rows with adapters of their own take a call for each choice, since {why}" in graph.interface.notes


def test_makes_no_places_for_a_fixed_number_of_rows() -> None:
    host = Shared().eval()
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["branch"])})
    graph = _lowered(host, compiled, ({},), X.float())
    assert not any(slot.placed for slot in graph.slots.values())
    assert any("for one number of rows" in note for note in graph.interface.notes)
