"""explain: how each adapter runs at each site, its cost, and why nothing cheaper does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.ir.slots.plans import Reason
from lorac.report.explain import Explanation
from lorac.report.terms import TermRow
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


def _row(report: Explanation, site: str, adapter: str) -> TermRow:
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
    why = Reason("patch", "body.layers.0.out", "is sparse and so needs a merged weight")
    assert patch.reasons == (why,)
    assert "560 B" in patch.swap, "14 x 10 numbers of 4 bytes, once"
    assert _row(report, "key", "task").strength == 0
    assert report.bare == ("body.layers.2.key",)
    assert report.casts == ()


def test_a_branch_is_not_affine() -> None:
    report = _compiled(BRANCH).explain()
    (row, *_) = report.terms
    assert (row.form, row.state) == ("branch", "live")
    assert [reason.adapter for reason in row.reasons] == ["bottleneck"]


def test_fused() -> None:
    report = _compiled(mode="fused", active="patch").explain()
    style, patch = _row(report, "query", "style"), _row(report, "out", "patch")
    assert style.state == patch.state == "fused"
    assert "mode='fused'" in style.reasons[0].why
    assert style.swap == "one pass over 560 B"
    assert patch.swap.startswith("restore and write of"), "sparse to sparse costs what both hold, not the weight"


def test_changes_without_a_common_low_rank_form_are_bound_only_together() -> None:
    """Outputs and inputs are scaled: alone each runs next to the weight, their sum through a merged weight."""
    scales = lorac.IA3(targets=["query"], feedforward=["query"])
    compiled = _compiled({"style": ADAPTERS["style"], "scales": scales}, active={"style": 1.0, "scales": 1.0})
    for name in ("style", "scales"):
        row = _row(compiled.explain(), "query", name)
        assert (row.state, row.slots) == ("bound", ("weight",))
        assert [reason.why for reason in row.reasons] == ["changes of outputs and of inputs do not add up"]
        assert "merged weight" in row.swap
    compiled.swap("style")
    style, off = (_row(compiled.explain(), "query", name) for name in ("style", "scales"))
    assert (style.state, style.slots, style.reasons) == ("live", ("a", "b", "c"), ())
    assert (off.state, off.slots, off.strength) == ("live", ("d",), 0)


def test_a_low_rank_term_is_bound_in_a_mixture_with_bound_terms() -> None:
    compiled = _compiled({"task": ADAPTERS["task"], "patch": lorac.SHiRA(r=1, targets=["key"])})
    compiled.swap({"task": 1.0, "patch": 0.5})
    row = _row(compiled.explain(), "key", "task")
    assert (row.state, row.slots, [reason.adapter for reason in row.reasons]) == ("bound", ("weight",), ["patch"])
    assert "why: active together with it, 'patch' is sparse" in str(compiled.explain())
    compiled.swap("task")
    assert _row(compiled.explain(), "key", "task").state == "live"


def test_a_term_added_later_names_the_missing_slots() -> None:
    compiled = _compiled({"task": ADAPTERS["task"]}, reserve=lorac.Reserve(rank=2, weights=True))
    compiled.add_adapter(lorac.LoRA(r=5, targets=["key"]), name="wide")
    compiled.add_adapter(lorac.SHiRA(r=1, targets=["key"]), name="patch")
    report = compiled.explain()
    wide, patch = (_row(report, "key", name) for name in ("wide", "patch"))
    assert [str(reason) for reason in wide.reasons] == ["the site holds rank 4, not 5"]
    assert [str(reason) for reason in patch.reasons] == ["'patch' is sparse and so needs a merged weight"]
    assert wide.state == patch.state == "bound"


def test_abbreviates_adapters_of_equal_shape() -> None:
    report = _compiled({f"task{i}": lorac.LoRA(r=2, targets=["key"]) for i in range(9)}, active="task3").explain()
    assert len(report.terms) == 9 * 3
    lines = [line.split("  ")[1] for line in str(report).splitlines() if line.startswith("  ")]
    assert lines == ["task0 … task8 x 8", "task3"]


def test_the_letters_shown_are_explained() -> None:
    *_, legend = str(_compiled(active="style").explain()).splitlines()
    assert legend.startswith("slots: A ")
    assert [part.split()[0] for part in legend.removeprefix("slots: ").split(", ")] == ["A", "B", "c", "W"]


def test_an_adapter_left_out_of_a_baked_program() -> None:
    report = _compiled({name: ADAPTERS[name] for name in ("style", "task")}, mode="baked", active="style").explain()
    states = {row.adapter: (row.state, row.strength, row.slots) for row in report.terms}
    assert states == {"style": ("baked", 1.0, ()), "task": ("left out", 0.0, ())}


def test_baked() -> None:
    report = _compiled({"style": ADAPTERS["style"]}, mode="baked").explain()
    style = _row(report, "query", "style")
    assert (style.state, style.slots, style.swap) == ("baked", (), "none: constants of the program")


def test_reserved_sites() -> None:
    report = _compiled({}, reserve=lorac.Reserve(targets=["key"], rank=4)).explain()
    assert report.reserved == tuple(f"body.layers.{i}.key" for i in range(3))
    assert report.terms == report.adapters == ()


@pytest.mark.medium("the other dtype", cases=["dtype1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_onnxruntime_to_float32_are_reported(dtype: torch.dtype) -> None:
    model, inputs = Stack().to(dtype), (torch.randn(2, 5, 10, dtype=dtype),)
    short, name = {torch.bfloat16: ("bf16", "bfloat16"), torch.float16: ("f16", "float16")}[dtype]
    eager = lorac.compile(model, adapters={"task": ADAPTERS["task"]}, example_inputs=inputs).explain()
    assert eager.casts == ()
    assert _row(eager, "key", "task").dtype == "f32", "factors are held in float32 over half precision"
    wide = (inputs[0].float(),)
    options = {"example_inputs": wide, "target": "onnxruntime"}
    with pytest.warns(lorac.LoracWarning, match=f"no kernels for {name}: it computes in float32") as warned:
        report = lorac.compile(model, adapters={"task": ADAPTERS["task"]}, **options).explain()
    assert len(warned) == 1 and warned[0].filename == __file__
    assert report.casts == ((short, "f32"),)
    assert f"computed in f32: onnxruntime has no kernels for {short}" in str(report)


def test_follows_swaps_and_additions() -> None:
    compiled = _compiled({"task": ADAPTERS["task"]}, reserve=lorac.Reserve(rank=4))
    assert "active: task*1" in str(compiled.explain())
    compiled.swap(None)
    assert "active: none" in str(compiled.explain())
    compiled.add_adapter(lorac.LoRA(r=1, targets=["out"]), name="more")
    assert _row(compiled.explain(), "out", "more").form == "low-rank r=1"
