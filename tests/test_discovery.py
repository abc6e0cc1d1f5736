"""Entry points of packages that are installed or removed while the process runs."""

from pathlib import Path

import pytest

from lorac.discovery import list_entry_points

GROUP = "lorac.tests.things"


def test_finds_newly_installed_packages_and_forgets_removed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list_entry_points(GROUP) == {}
    monkeypatch.syspath_prepend(tmp_path)
    assert list_entry_points(GROUP) == {}
    installed = tmp_path / "things-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: things\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[{GROUP}]\nfirst = things:FIRST\n")
    assert list_entry_points(GROUP)["first"].value == "things:FIRST"
    installed.rename(tmp_path / "elsewhere")
    assert list_entry_points(GROUP) == {}
