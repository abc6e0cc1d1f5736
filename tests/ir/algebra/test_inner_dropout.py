"""Dropout between the factors of a branch is inserted once, with the bias, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from lorac.ir.algebra.reduction import insert_inner_dropout, run_with_dropout
from lorac.testing import assert_close

IN, RANK, OUT = 5, 2, 4
SHAPES = {"d": (RANK, IN), "c": (RANK,), "m": (RANK, RANK), "u": (OUT, RANK), "e": (OUT,), "w": (OUT, IN)}


def scaled(x: Any, y: Any, d: Any, c: Any, m: Any, u: Any, e: Any, w: Any) -> Any:
    return y + 0.5 * F.linear(2 * F.linear(x, d, c), u, e)


def by_matmul(x: Any, y: Any, d: Any, c: Any, m: Any, u: Any, e: Any, w: Any) -> Any:
    return y + (x @ d.t() + c) @ u.t() + e


def of_three(x: Any, y: Any, d: Any, c: Any, m: Any, u: Any, e: Any, w: Any) -> Any:
    return y + F.linear(F.linear(F.linear(x, d, c), m), u, e)


def of_one(x: Any, y: Any, d: Any, c: Any, m: Any, u: Any, e: Any, w: Any) -> Any:
    return y + F.linear(x, w) + F.linear(x, u @ d)


def traced(branch: Any) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y, *params = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, IN), (5, OUT), *SHAPES.values())
    )
    return make_fx(branch, pre_dispatch=True)(x, y, *params), params


@pytest.mark.parametrize("branch", [scaled, by_matmul, of_three])
def test_drops_values_between_two_factors(branch: Any) -> None:
    module, params = traced(branch)
    dropped = insert_inner_dropout(module)
    assert dropped is not None
    assert [node.target for node in dropped.graph.nodes].count(F.dropout) == 1
    p = dict(zip(SHAPES, params, strict=True))
    for tokens in ((3,), (2, 7), ()):
        x, y = torch.randn(*tokens, IN, dtype=torch.float64), torch.randn(*tokens, OUT, dtype=torch.float64)
        assert_close(run_with_dropout(dropped, x, y, tuple(params), 0.0), branch(x, y, *params))
        scale = 0.5 if branch is scaled else 1
        assert_close(run_with_dropout(dropped, x, y, tuple(params), 1.0), y + scale * p["e"])


def test_ignores_a_single_product() -> None:
    assert insert_inner_dropout(traced(of_one)[0]) is None
