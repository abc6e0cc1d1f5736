"""Paths as people give them: the home folder, and text that is no path of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorac
from tests.mistakes import Tiny, lora
from tests.refusing import refuses


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Tiny().eval()
    compiled = lorac.compile(model, {"a": lora()})
    lorac.save_adapter(compiled.adapters["a"], "~/mine", model=model)
    assert (tmp_path / "mine" / "adapter_config.json").is_file()
    assert lorac.load_adapter("~/mine").name == "mine"
    assert list(lorac.compile(model, "~/mine").adapters) == ["mine"]


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000], ids=["NUL", "surrogate", "long"])
def test_rejects_text_that_names_no_file(path: str) -> None:
    with refuses("unreadable"):
        lorac.load_adapter(path)
    with refuses("artifact_error"):
        lorac.load(path)


@pytest.mark.parametrize("path", ["ftp://server/a/b", Path("hf://a"), "file:///a"])
def test_rejects_addresses(path: str | Path) -> None:
    with refuses("unreadable", match="is an address"):
        lorac.load_adapter(path)
