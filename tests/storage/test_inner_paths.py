"""Paths from files: those that stay inside a folder, and all the others."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import pytest

from lorac.storage.paths import find_inner_path


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "a b", "ü/…", ".hidden", "a..b", "nullable.x", "console"])
def test_inside(name: str, tmp_path: Path) -> None:
    assert find_inner_path(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        ".",
        "./a",
        "C:/x",
        "a\\b",
        "\\\\host\\x",
        "c:x",
        "NUL",
        "a/con.txt",
        "Aux/x",
        "lpt1.a.b",
        "a.",
        "a /b",
        "a\0b",
        "a\nb",
        "a" * 256,
        "ü" * 128,
    ],
)
def test_outside(name: str, tmp_path: Path) -> None:
    assert find_inner_path(tmp_path, name) is None


@pytest.mark.parametrize("name", ["a/b.safetensors", "a b", "ü/…", ".hidden", "nullable.x"])
def test_windows_takes_an_inside_name_for_a_path_below_the_folder(name: str, tmp_path: Path) -> None:
    assert (PureWindowsPath("C:/folder") / name).is_relative_to("C:/folder")
    assert find_inner_path(tmp_path, name) is not None


@pytest.mark.parametrize("name", ["D:x", "\\\\host\\share\\x", "a\\..\\..\\x", "COM7", "x/prn", "a:stream"])
def test_rejects_names_that_windows_takes_for_another_place(name: str, tmp_path: Path) -> None:
    assert find_inner_path(tmp_path, name) is None


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "inside")
    (tmp_path / "inside" / "file").symlink_to("/etc/passwd")
    for name in ("link", "link/x", "inside/file"):
        assert find_inner_path(tmp_path, name) is None
