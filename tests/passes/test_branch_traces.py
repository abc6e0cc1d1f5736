"""Sites of one shape share the trace of a branch, unless its formula reads the site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.passes import expand
from lorac.testing import assert_close

X, OTHER = (torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5))
BY_ROW = pytest.mark.parametrize("by_row", [False, True])


class OfItsSite(lorac.BranchVariant):
    """y' = y + n·s∘tanh(x), n the number of the layer."""

    name = "of_its_site"

    def params(self, site: lorac.Site) -> dict[str, lorac.ParamSpec]:
        return {"s": lorac.ParamSpec((1,), lambda context: torch.ones(context.shape))}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + (1 + int(ctx.site.path)) * p.s * torch.tanh(x)


def _traces(variant: lorac.Variant, by_row: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often branches are traced for three equal layers; what they compute is compared with eager mode."""
    torch.manual_seed(0)
    host, counted = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).eval(), list[int]()
    for name in ("trace_function", "trace_in_places"):
        trace = getattr(expand, name)
        monkeypatch.setattr(expand, name, lambda *args, trace=trace: (counted.append(1), trace(*args))[1])
    options: dict[str, Any] = {"target": "onnxruntime", "example_inputs": (X,), "branch_rows": by_row}
    made: Any = lorac.compile(host, {"a": variant}, active=None, **options)
    for tensor in made.adapters["a"].parameters():
        with torch.no_grad():
            tensor.add_(0.3 * torch.randn_like(tensor))
    eager = lorac.compile(host, made.adapters)
    for x in (X, OTHER):
        assert_close(made(x, adapters={"a": 0.7}), eager(x, adapters={"a": 0.7}).detach())
        assert not torch.equal(made(x, adapters="a"), made(x, adapters=None))
    return len(counted)


@pytest.mark.medium("the program with places for rows", cases=["False"])
@BY_ROW
def test_traces_once_for_all_sites(by_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = lorac.MeteoRA(r=2, experts=2, targets=["0", "1", "2"])
    assert _traces(variant, by_row, monkeypatch) == 1


@pytest.mark.medium("the program with places for rows", cases=["False"])
@BY_ROW
def test_a_formula_that_reads_its_site_is_traced_at_each(by_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _traces(OfItsSite(targets=["0", "1", "2"]), by_row, monkeypatch) == 3
