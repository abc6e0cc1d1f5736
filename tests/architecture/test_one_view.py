"""A public operation searches the model for its sites once, and makes one view of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorac
from lorac.frontend import model_view


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were searched for sites since the test began."""
    searched: list[nn.Module] = []
    find_sites = model_view.find_sites

    def counted(module: nn.Module) -> dict[str, lorac.ir.sites.site.Site]:
        searched.append(module)
        return find_sites(module)

    monkeypatch.setattr(model_view, "find_sites", counted)
    return searched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a LoRA as PEFT saves it."""
    host = model()
    adapter = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["0", "2"])}).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a", format="peft", model=host)
    return tmp_path / "a"


def test_compiling_with_a_path(folder: Path, searches: list[nn.Module]) -> None:
    lorac.compile(model(), [folder])
    assert len(searches) == 1


def test_loading_and_saving_an_adapter(folder: Path, tmp_path: Path, searches: list[nn.Module]) -> None:
    adapter = lorac.load_adapter(folder, model())
    assert len(searches) == 1
    lorac.save_adapter(adapter, tmp_path / "b", format="peft", model=model())
    assert len(searches) == 2


def test_adding_an_adapter(folder: Path, searches: list[nn.Module]) -> None:
    compiled = lorac.compile(model(), reserve=lorac.Reserve(targets=["0", "2"], rank=2))
    searches.clear()
    compiled.add_adapter(folder, name="later")
    assert searches == []  # the session has its view


def test_converting_an_adapter(folder: Path, searches: list[nn.Module]) -> None:
    adapter = lorac.load_adapter(folder)
    lorac.to_lora(adapter, model(), rank=1)
    lorac.factors(adapter, model())
    assert len(searches) == 2
