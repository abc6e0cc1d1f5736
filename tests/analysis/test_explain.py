"""explain: what became of each adapter at each site, what it costs, and why not something cheaper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.analysis.explain import Report, TermRow
from tests import goldens
from tests.captured import Stack

ADAPTERS: dict[str, Any] = {
    "style": lorac.DoRA(r=3, alpha=6, targets=["query"]),
    "task": lorac.LoRA(r=2, alpha=4, targets=["query", "key"], layers=[0, 1]),
    "patch": lorac.SHiRA(r=1, targets=["out"]),
}
BRANCH = {"bottleneck": lorac.AdapterTune(r=4, targets="body.layers.[0-9]+")}


def _compiled(adapters: dict[str, Any] = ADAPTERS, **options: Any) -> Any:
    inputs = (torch.randn(2, 5, 10),)
    return lorac.compile(Stack(), adapters=adapters, example_inputs=inputs, **options)


def _row(report: Report, site: str, adapter: str) -> TermRow:
    (row,) = (row for row in report.terms if row.site == f"body.layers.0.{site}" and row.adapter == adapter)
    return row


def test_golden() -> None:
    goldens.check("explain_live", str(_compiled({**ADAPTERS, **BRANCH}, active="style").explain()))
    goldens.check("explain_fused", str(_compiled(mode="fused", active="style").explain()))


def test_live() -> None:
    report = _compiled(active={"style": 1.0, "patch": 0.5}).explain()
    style = _row(report, "query", "style")
    assert (style.form, style.state, style.slots) == ("low-rank r=3", "live", ("a", "b", "c"))
    assert style.nbytes == 4 * (3 * 10 + 14 * 3 + 14)
    assert (style.strength, style.reasons, style.swap) == (1.0, (), "rebinding, no copy")
    patch = _row(report, "out", "patch")
    assert (patch.state, patch.slots, patch.strength) == ("bound", ("weight",), 0.5)
    assert patch.reasons == ("bound weight: 'patch' is sparse",)
    assert "560 B" in patch.swap, "14 x 10 numbers of 4 bytes, once"
    assert _row(report, "key", "task").strength == 0
    assert report.bare == ("body.layers.2.key",)
    assert report.casts == ()


def test_a_branch_is_not_affine() -> None:
    report = _compiled(BRANCH).explain()
    (row, *_) = report.terms
    assert (row.form, row.state) == ("branch", "live")
    assert row.reasons


def test_fused() -> None:
    report = _compiled(mode="fused", active="patch").explain()
    style, patch = _row(report, "query", "style"), _row(report, "out", "patch")
    assert style.state == patch.state == "fused"
    assert "mode='fused'" in style.reasons[0]
    assert style.swap == "one pass over 560 B"
    assert patch.swap.startswith("restore and write of"), "sparse to sparse costs what both hold, not the weight"


def test_baked() -> None:
    report = _compiled({"style": ADAPTERS["style"]}, mode="baked").explain()
    style = _row(report, "query", "style")
    assert (style.state, style.slots, style.swap) == ("baked", (), "none: constants of the program")


def test_reserved_sites() -> None:
    report = _compiled({}, reserve=lorac.Reserve(targets=["key"], rank=4)).explain()
    assert report.reserved == tuple(f"body.layers.{i}.key" for i in range(3))
    assert report.terms == report.adapters == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_onnxruntime_computes_in_float32_is_said(dtype: torch.dtype) -> None:
    model, inputs = Stack().to(dtype), (torch.randn(2, 5, 10, dtype=dtype),)
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    eager = lorac.compile(model, adapters={"task": ADAPTERS["task"]}, example_inputs=inputs).explain()
    assert eager.casts == ()
    assert _row(eager, "key", "task").dtype == "f32", "factors are held in float32 over half precision"
    wide = (inputs[0].float(),)
    options = {"example_inputs": wide, "target": "onnxruntime"}
    report = lorac.compile(model, adapters={"task": ADAPTERS["task"]}, **options).explain()
    assert report.casts == ((short, "f32"),)
    assert f"computed in f32: onnxruntime has no kernels for the model's {short}" in str(report)


def test_it_follows_swaps_and_additions() -> None:
    compiled = _compiled({"task": ADAPTERS["task"]}, reserve=lorac.Reserve(rank=4))
    assert "active: task*1" in str(compiled.explain())
    compiled.swap(None)
    assert "active: none" in str(compiled.explain())
    compiled.add_adapter(lorac.LoRA(r=1, targets=["out"]), name="more")
    assert _row(compiled.explain(), "out", "more").form == "low-rank r=1"
