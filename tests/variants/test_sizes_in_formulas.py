"""Formulas that read the number of rows: right for every batch, or refused when they are traced for one batch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses


@dataclass(frozen=True, kw_only=True)
class Shared(lorac.BranchVariant):
    """``y' = y + w / rows``, which has a weight's form for one number of rows."""

    name: ClassVar[str] = "shared"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {"w": lorac.ParamSpec((site.out_features,), lambda context: torch.ones(context.shape))}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.w / x.shape[0]


@dataclass(frozen=True, kw_only=True)
class Counted(Shared):
    """The same by Python's number, which a trace fixes."""

    name: ClassVar[str] = "counted"

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.w / len(x)


@dataclass(frozen=True, kw_only=True)
class Looped(Shared):
    """A loop over the rows, which a trace unrolls."""

    name: ClassVar[str] = "looped"

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + torch.stack([p.w * row.mean() for row in x])


def _compile(variant: lorac.Variant, target: str, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 3)).eval()
    made = lorac.compile(host, {"a": variant}, target=target, example_inputs=(torch.ones(2, 4),), **options)
    return host, made


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "target"),
    [(Shared, "eager"), (Shared, "onnxruntime"), (Counted, "eager"), (Looped, "eager")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_batch_gets_its_own_number(variant: type[Shared], target: str) -> None:
    host, made = _compile(variant(targets=["0"]), target)
    for rows in (1, 2, 3, 5):
        x = torch.randn(rows, 4)
        moved = x.mean(-1, keepdim=True) if variant is Looped else torch.full((rows, 1), 1 / rows)
        assert_close(made(x) - host(x), moved.expand(rows, 3))


@pytest.mark.medium("with places for rows", cases=["False-*"])
@pytest.mark.parametrize("variant", [Counted, Looped])
@pytest.mark.parametrize("by_row", [False, True])
def test_rejects_a_formula_that_fixes_the_number_of_rows(variant: type[Shared], by_row: bool) -> None:
    said = rf"(?s)the formula of {variant.name} at '0' makes a number of a size .*test_sizes_in_formulas\.py.*x\.shape"
    with refuses("formula_failed", match=said):
        _compile(variant(targets=["0"]), "onnxruntime", branch_rows=by_row)
