"""Errors cross processes whole, and name a release that lorac was not tested with."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import lorac
from campaigns.version_table import TORCH, TRANSFORMERS
from lorac.errors import TESTED, check_release, find_untested, translate_import_errors
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


@pytest.mark.parametrize("cause", [None, ModuleNotFoundError("no onnx", name="onnx.helper")])
def test_names_the_extra_of_a_missing_library(cause: Exception | None) -> None:
    """Of transformers' lazy imports the cause alone has the library's name."""
    with refuses("missing_extra", match=r"onnx is not installed\n.*lorac\[onnxruntime\]"), translate_import_errors():
        raise ModuleNotFoundError("none", name="onnx" if cause is None else None) from cause
    with pytest.raises(ModuleNotFoundError, match="mine"), translate_import_errors():
        raise ModuleNotFoundError("no module named mine", name="mine")


def test_rejects_an_older_release() -> None:
    """Numbers are compared, not letters."""
    for found in ("4.10", "4.10.0", "4.11.1", "5.0.0.dev0"):
        check_release("generation", "transformers", found, "4.10", otherwise="compile without cache=True")
    step = r"pip install 'transformers>=4.10', or compile without cache=True"
    with refuses("unavailable", match=rf"generation needs transformers ≥ 4.10, found 4.9.1\n  {step}"):
        check_release("generation", "transformers", "4.9.1", "4.10", otherwise="compile without cache=True")


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
