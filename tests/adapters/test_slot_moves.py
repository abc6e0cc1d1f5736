"""Where the values of an adapter's file stand in its slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorac.adapters.slot_moves import SlotMoves
from lorac.ir.algebra.reduction import FACTOR
from lorac.ir.slots.composition import ComposedWeights

VALUES = torch.randn(64, generator=torch.Generator().manual_seed(0))[4:]
NUMBERS = torch.arange(1, 61)
Layout = Callable[[Tensor], dict[str, Tensor]]
EVEN: dict[str, Layout] = {
    "transposed": lambda v: {f"l{i}:a": v[20 * i : 20 * i + 20].view(5, 4).t() for i in range(3)},
    "in another order": lambda v: {f"l{i}:a": v[20 * at : 20 * at + 20].view(4, 5) for i, at in enumerate((2, 0, 1))},
    "padded": lambda v: {"l0:a": torch.cat([v[:12].view(4, 3).t(), v.new_zeros(3, 2)], dim=1)},
    "fused": lambda v: {"l0:a": torch.cat([v[20:32].view(3, 4).t(), v[:8].view(2, 4).t()], dim=1)},
    "fused, each of one column": lambda v: {"l0:a": torch.stack([v[8:12], v[4:8], v[0:4]], dim=1)},
    "of one value": lambda v: {"l0:b": v[7:8].view(1, 1), "l1:b": v[3:4].view(1, 1)},
}


def fill(layout: Layout, numbers: Tensor, factors: list[float], values: Tensor) -> dict[str, Tensor]:
    numbered = layout(numbers)
    moves = SlotMoves(ComposedWeights(()), numbered, dict.fromkeys(numbered, torch.float32), factors)
    memory = torch.full((moves.layout.nbytes,), 255, dtype=torch.uint8)
    moves.fill(values, memory)
    return moves.layout.view(memory)


@pytest.mark.parametrize("layout", EVEN.values(), ids=EVEN)
def test_writes_values_where_their_numbers_stand(layout: Layout) -> None:
    expected, filled = layout(VALUES), fill(layout, NUMBERS, [1.0], VALUES)
    assert expected.keys() == filled.keys()
    assert all(torch.equal(expected[name], filled[name]) for name in expected)


def test_multiplies_by_the_factor_of_each_value() -> None:
    scales = torch.cat([torch.ones(24), torch.full((16,), 5 / 3), torch.full((20,), 0.1)])
    numbers = NUMBERS + FACTOR * torch.cat([torch.zeros(24), torch.ones(16), torch.full((20,), 2)]).long()
    for layout in EVEN.values():
        filled = fill(layout, numbers, [1.0, 5 / 3, 0.1], VALUES)
        assert all(torch.equal(expected, filled[name]) for name, expected in layout(VALUES * scales).items())


def test_casts_values_before_it_multiplies_them() -> None:
    values = VALUES.bfloat16()
    filled = fill(EVEN["transposed"], NUMBERS + FACTOR, [1.0, 1 / 3], values)
    assert all(
        torch.equal(expected, filled[name]) for name, expected in EVEN["transposed"](values.float() * (1 / 3)).items()
    )


@pytest.mark.parametrize(
    "order", [torch.randperm(60, generator=torch.Generator().manual_seed(1)), torch.arange(60).flip(0) ** 2 % 59]
)
def test_rejects_places_without_a_pattern(order: Tensor) -> None:
    with pytest.raises(ValueError, match="numbers"):
        fill(lambda v: {"l0:a": v[order].view(6, 10)}, NUMBERS, [1.0], VALUES)
