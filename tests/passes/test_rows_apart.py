"""Branches that torch.vmap does not batch do not run for rows with their own adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lorac
from lorac.ir.graph.symbolic_shapes import make_size
from lorac.ir.slots.execution import FormulaContext, run_formula
from lorac.ir.slots.plans import ValueAxis
from lorac.passes.rows_apart import FormulaCall


class Through(lorac.BranchVariant):
    """y' = y + s∘tanh(x)."""

    name = "through"

    def params(self, site: lorac.Site) -> dict[str, lorac.ParamSpec]:
        return {"s": lorac.ParamSpec((1,), lambda context: torch.ones(context.shape))}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.s * torch.tanh(x)


@pytest.mark.parametrize(
    ("op", "why"),
    [
        (torch.tanh, ""),
        (lambda x: x.mean(0, keepdim=True).expand_as(x), "a branch computes the rows of a batch together"),
        (torch.special.airy_ai, "torch.vmap does not batch an op of a branch"),
    ],
    ids=["batched", "of all rows", "not batched"],
)
def test_why(op: Callable[[Tensor], Tensor], why: str) -> None:
    compiled = lorac.compile(nn.Sequential(nn.Linear(6, 6)), {"a": Through(targets=["0"])}, active=None)
    plan = compiled.plans["0"]
    slot = replace(plan.branches[0], axes={})
    environment = ShapeEnv()
    batch = make_size(environment, "batch", 2, 1)
    with FakeTensorMode(shape_env=environment):
        rows = [torch.empty(batch, 5, 6), torch.empty(batch, 5, 6)]

    def run(params: Any, rows: Any, ctx: Any) -> dict[str, Tensor]:
        return {"y": run_formula(slot, params, op(rows[0]), rows[1], ctx, "")[0]}

    call = FormulaCall(run, slot, rows, {}, FormulaContext(plan.site), {"y": ValueAxis.ROWS})
    assert call.why_together(batch) == why
