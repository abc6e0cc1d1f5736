"""Errors cross processes whole, and name a release that lorac was not tested with."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import lorac
from campaigns.version_table import TORCH, TRANSFORMERS
from lorac.errors import TESTED, find_untested, translate_import_errors
from tests.refusing import refuses


@pytest.mark.parametrize(
    "error",
    [lorac.OverBudget("3 wait", nearest="2", next_step="wait", code="queue_full"), lorac.MissingExtra("ray", "ray")],
)
def test_a_copy_is_the_error(error: lorac.LoracError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


NEWER = r"pip install 'torch==\d+\.\d+\.\*': lorac was tested up to that release, and this is 99.1.0"


class Private(nn.Module):
    """A model whose trace fails as a function of torch does that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise AttributeError("module 'torch._private' has no attribute 'gone'")
        return self.fc(x)


def test_names_no_release_while_all_are_tested() -> None:
    assert find_untested() is None


def test_names_a_newer_torch_where_a_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "99.1.0")
    with refuses("unavailable", match=NEWER), translate_import_errors():
        from torch._guards import gone  # noqa: F401  (it is not there)


def test_keeps_import_errors_of_tested_releases() -> None:
    with pytest.raises(ImportError, match="gone"), translate_import_errors():
        from torch._guards import gone  # noqa: F401  (it is not there)


def test_names_a_newer_torch_where_a_trace_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "99.1.0")
    with refuses("capture_failed", match=NEWER):
        lorac.compile(
            Private().eval(),
            {"a": lorac.LoRA(r=1)},
            target="onnxruntime",
            example_inputs=(torch.randn(2, 4),),
        )


def test_tested_releases_are_the_newest_of_the_table() -> None:
    assert {"torch": TORCH[-1], "transformers": TRANSFORMERS[-1]} == TESTED
