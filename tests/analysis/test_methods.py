"""The table of methods, read from the code: a new method is a row without an edit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import lorac
from lorac import ParamSpec
from lorac.analysis.methods import HEADERS, WIDTH, MethodRow, render_markdown, row_cells
from lorac.cli.models import method_rows

BUILT_IN = {v.name: v for v in lorac.variants().values() if v.__module__.startswith("lorac.variants.")}


@dataclass(frozen=True, kw_only=True)
class Tabled(lorac.WeightVariant):
    """``W' = W + |s|·B·A``, with A shared."""

    r: int

    name: ClassVar[str] = "tabled"

    def params(self, site: Any) -> dict[str, ParamSpec]:
        return {
            "A": ParamSpec((self.r, site.in_features), torch.zeros, shared=True),
            "B": ParamSpec((site.out_features, self.r), torch.zeros),
        }

    def weight(self, W: torch.Tensor, p: Any) -> torch.Tensor:
        return W + p.B @ p.A


@dataclass(frozen=True, kw_only=True)
class TabledByDefault(Tabled):
    """Tabled, without a formula."""

    r: int = 2

    name: ClassVar[str] = "tabled_by_default"
    paper: ClassVar[str] = "One, arXiv 2401.01234v2; again, arXiv 1901.0123"


@pytest.fixture(scope="module")
def rows() -> dict[str, MethodRow]:
    return {row.name: row for row in method_rows(BUILT_IN.values())}


UNTRAINED = {"arrow"}
"""Methods that are made of trained adapters, and train nothing."""


def test_every_method_has_a_formula_a_form_and_a_file(rows: dict[str, MethodRow]) -> None:
    assert list(rows) == list(BUILT_IN)
    # What has no defaults (a chain, say) has the form of what it is given.
    given = {name for name, v in BUILT_IN.items() for f in dataclasses.fields(v) if f.default is f.default_factory}
    formed = {name: row for name, row in rows.items() if name not in given}
    for name, row in formed.items():
        assert row.form, f"the defaults of '{name}' fit no layer {WIDTH} x {WIDTH}"
        assert row.files[0] == "native"
        if row.form != "replace":
            assert "=" in row.formula, f"the docstring of '{name}' begins with no ``formula``"
            assert row.own + row.common > 0 or name in UNTRAINED


def test_rows(rows: dict[str, MethodRow]) -> None:
    assert rows["lora"] == MethodRow(
        name="lora",
        title="LoRA",
        formula="W' = W + s·B·A",
        adapts=("conv", "embedding", "linear", "matrix"),
        form="low-rank r=8",
        merges=True,
        shared=(),
        own=2 * 768 * 8,
        common=0,
        paper=lorac.LoRA.paper,
        files=("native", "LORA", "adapterhub", "diffusers", "gguf", "kohya", "mlx", "onnx_adapter"),
    )
    assert (rows["dora"].form, rows["dora"].files[:3]) == ("low-rank r=8 c", ("native", "LORA", "adapterhub"))
    assert (rows["hydra"].form, rows["hydra"].files) == ("low-rank r=4", ("native", "hydra"))
    assert (rows["shira"].form, rows["shira"].own) == ("sparse", 32 * 2 * 768)
    assert (rows["adaptertune"].form, rows["adaptertune"].merges) == ("branch", False)
    assert (rows["adaptertune"].adapts, rows["adaptertune"].own) == (("block",), 2 * 16 * 768 + 16 + 768)


def test_shared_tensors_and_missing_defaults() -> None:
    without, with_defaults = method_rows([Tabled, TabledByDefault])
    assert (without.form, without.trained, without.formula) == ("", "", "W' = W + |s|·B·A")
    assert row_cells(without)[4] == row_cells(without)[7] == "–"
    assert (with_defaults.form, with_defaults.shared) == ("low-rank r=2", ("A",))
    assert (with_defaults.own, with_defaults.common) == (2 * 768, 2 * 768)
    assert with_defaults.trained == "1,536 + 1,536 shared"
    assert with_defaults.formula == ""


def test_markdown() -> None:
    rows = method_rows([lorac.LoRA, Tabled, TabledByDefault])
    text = render_markdown(rows)
    assert text.partition("\n\n*Made by")[0].endswith("|")
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert head == f"| {' | '.join(HEADERS)} |"
    assert len(lines) == len(rows)
    assert all(line.replace(r"\|", "").count("|") == len(HEADERS) + 1 for line in lines)
    assert r"`W' = W + \|s\|·B·A`" in lines[1]
    assert "[arXiv 2401.01234v2](https://arxiv.org/abs/2401.01234v2); again, [arXiv 1901.0123](" in lines[2]
    assert all(len(row_cells(row)) == len(HEADERS) for row in rows)


@dataclass(frozen=True, kw_only=True)
class OfOneSize(lorac.WeightVariant):
    """``W' = W·p``, at layers of one size."""

    name: ClassVar[str] = "of-one-size"

    def params(self, site: Any) -> dict[str, ParamSpec]:
        return {"p": ParamSpec((7, 7), torch.zeros)}

    def weight(self, W: torch.Tensor, p: Any) -> torch.Tensor:
        return W @ p.p


def test_lists_a_method_for_layers_of_one_size_without_a_form() -> None:
    (row,) = method_rows([OfOneSize])
    assert (row.name, row.form, row.merges) == ("of-one-size", "", True)
