"""Traces of functions are those of torch's make_fx, whose private classes make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lorac.ir.traces.functions import record_function

LINEAR = nn.Linear(4, 4)


def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.silu(x @ y).T, x.new_zeros(2, 3)


def reads_what_is_around(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (LINEAR(x) + torch.arange(4) + nn.functional.linear(y, LINEAR.weight),)


def takes_any(*tensors: Tensor) -> tuple[Tensor]:
    return (torch.stack(tensors),)


def branches(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (torch.cond(x.sum() > 0, torch.add, torch.sub, (x, y)),)


@pytest.mark.medium("before dispatch", cases=["branches-True"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("function", [products, reads_what_is_around, takes_any, branches])
def test_the_graph_is_that_of_make_fx(function: Callable[..., Any], pre_dispatch: bool) -> None:
    table: Any = None if pre_dispatch else get_decompositions([torch.ops.aten.silu.default])
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x, y = torch.empty(4, 4), torch.empty(4, 4)
        expected = make_fx(function, table, pre_dispatch=pre_dispatch)(x, y)
        found = record_function(function, x, y, decompositions=table, pre_dispatch=pre_dispatch)
    assert _nodes(found) == _nodes(expected)
    found(torch.ones(4, 4), torch.ones(4, 4))


def _nodes(module: fx.GraphModule) -> list[tuple[object, ...]]:
    return [(n.op, n.name, n.target, str(n.args), n.kwargs, n.meta.keys()) for n in module.graph.nodes]


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_no_gradient_flows_through_detach(pre_dispatch: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x * torch.detach(x.norm()) / x.sum().detach()

    x = torch.arange(1.0, 4.0, requires_grad=True)
    traced = record_function(function, torch.ones(3), pre_dispatch=pre_dispatch)
    assert torch.equal(*(torch.autograd.grad(each(x).sum(), x)[0] for each in (function, traced)))


def test_leaves_classes_of_modules_unchanged() -> None:
    seen: list[tuple[object, object]] = []

    def function(x: Tensor) -> Tensor:
        seen.append((nn.Module.__call__, nn.Module.__getattr__))
        return x + 1

    before = (nn.Module.__call__, nn.Module.__getattr__)
    record_function(function, torch.ones(2))
    assert seen == [before]
