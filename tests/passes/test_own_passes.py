"""Passes of other packages: entry points of the group ``lorac.passes``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorac
from lorac.passes.pipelines import GROUP, lowering_passes
from lorac.testing import assert_close
from tests.captured import Stack
from tests.refusing import refuses

NAMES = ("fuse_projections", "insert", "values", "expand", "cache", "cleanup", "idle-casts")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that installs a package with one entry point."""

    def installed(target: str) -> None:
        folder = tmp_path / "casts-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: casts\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\nidle = {target}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return installed


def test_a_pass_of_another_package_runs_behind_the_others_of_its_level(install) -> None:
    install("tests.passes.idle_casts:IDLE_CASTS")
    assert tuple(step.name for step in lowering_passes()) == NAMES
    model, x = Casting().eval(), torch.randn(2, 10)
    compiled = lorac.compile(
        model, {"a": lorac.LoRA(r=2, targets=["layer"])}, target="onnxruntime", example_inputs=(x,)
    )
    assert compiled.graph["main"].stages[-3:] == ("expand", "idle-casts", "legalize")
    assert_close(compiled(x), model(x))


class Casting(torch.nn.Module):
    """Casts to the type that its input has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(torch.float32))


@pytest.mark.parametrize("target", ["tests.passes.idle_casts:IdleCasts", "lorac.passes.pipelines:lowering_passes"])
def test_rejects_entry_points_that_are_not_passes(install, target: str) -> None:
    install(target)
    with refuses("wrong_level", match="the entry point 'idle' .* is not a pass that stays on its level"):
        lorac.compile(Stack(), target="onnxruntime", example_inputs=(torch.randn(2, 5, 10),))
