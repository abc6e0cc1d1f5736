"""Tensors are traced to the parts of given ones that they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorac.ir.traces.tensor_origins import OriginRecorder, Unrecordable

VALUES = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda t: t.t()[None, 1:],
    "copy": lambda t: t.t().contiguous().view(2, 2, 3)[:, 1],
    "scaled": lambda t: (t * 3).t().clone() / 7,
    "cast": lambda t: (-t).bfloat16().t().float() * 0.1,
    "part": lambda t: torch.cat([t.split(2, 1)[1]]).t(),
    "without values": lambda t: torch.ones(2),
}
REFUSED: dict[str, Callable[[Tensor], object]] = {
    "read": lambda t: t.sum().item(),
    "compared": lambda t: torch.equal(t, t.clone()),
    "written": lambda t: t.mul_(2),
    "summed": lambda t: t.sum(0),
    "added": lambda t: t + t,
    "joined": lambda t: torch.cat([t, t]),
    "mixed": lambda t: t * torch.ones(4, device="meta"),
    "copied and joined": lambda t: t.t().contiguous().view(2, 6),
    "other numbers": lambda t: t.view(torch.int32),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_origin_gives_the_same_bits_for_other_values(name: str) -> None:
    given = {"x": torch.empty(3, 4, device="meta")}
    with OriginRecorder(given) as recorder:
        made = FOLLOWED[name](given["x"])
    origin, expected = recorder.find(made), FOLLOWED[name](VALUES)
    if origin is None:
        assert name == "without values"
        return
    part = origin.view({"x": VALUES})
    for step in origin.steps:
        part = step.apply(part)
    assert part.dtype == expected.dtype
    assert torch.equal(part, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_rejects_ops_that_depend_on_values(name: str) -> None:
    given = {"x": torch.empty(3, 4, device="meta")}
    with pytest.raises((Unrecordable, RuntimeError)), OriginRecorder(given):
        REFUSED[name](given["x"])
