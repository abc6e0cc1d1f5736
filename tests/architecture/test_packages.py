"""Both packages as indexes and installers see them: metadata, the page of an index, wheels."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from campaigns.release import relative_addresses
from lorac.version import VERSION

ROOT = Path(__file__).parents[2]
LOWEST, NEWEST = 11, 14
"""Minor versions of Python 3 that are supported."""


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


OWN, NATIVE = project(ROOT), project(ROOT / "native")


def page_of_an_index() -> str:
    """The README as the build puts it into the metadata."""
    hook = OWN["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    parts = [part["text"] if "text" in part else (ROOT / part["path"]).read_text("utf-8") for part in hook["fragments"]]
    text = "".join(parts)
    for each in hook["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_the_page_of_an_index_has_no_relative_link_or_picture() -> None:
    text = page_of_an_index()
    assert relative_addresses(MarkdownIt().render(text)) == []
    # What stood in links is still there, and nothing else is changed.
    assert "44 of PEFT's types" in text and "*A chat with SmolLM2" in text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"```.*?```", text, re.S) == re.findall(r"```.*?```", readme, re.S)
    assert re.findall(r"^#.*", text, re.M) == re.findall(r"^#.*", readme, re.M)


def test_the_page_of_an_index_follows_the_projects_address() -> None:
    """Without [project.urls] a link is its text; with them it leads there, so both are changed together."""
    links = OWN["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    source = OWN["project"].get("urls", {}).get("Source")
    assert all(("https://" in each["replacement"]) == (source is not None) for each in links)
    assert source is None or all(source in each["replacement"] for each in links)


@pytest.mark.parametrize("package", [OWN, NATIVE], ids=["lorac", "lorac-native"])
def test_names_no_person_and_a_license(package: dict[str, Any]) -> None:
    assert package["project"]["authors"] == [{"name": "lorac contributors"}]
    assert package["project"]["license"].startswith("Apache-2.0")
    folder = ROOT if package is OWN else ROOT / "native"
    assert all((folder / name).is_file() for name in package["project"]["license-files"])
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_lists_the_pythons_and_systems() -> None:
    classifiers = OWN["project"]["classifiers"]
    prefix = "Programming Language :: Python :: 3."
    minors = [int(each.removeprefix(prefix)) for each in classifiers if each.startswith(prefix)]
    assert minors == list(range(LOWEST, NEWEST + 1))
    assert OWN["project"]["requires-python"] == NATIVE["project"]["requires-python"] == f">=3.{LOWEST}"
    assert sys.version_info[1] in minors
    assert {each.split(" :: ")[-1] for each in classifiers if "Operating System" in each} == {
        "Linux",
        "MacOS",
        "Windows",
    }
    assert classifiers == sorted(classifiers)


def test_versions_stand_in_one_place() -> None:
    assert "version" in OWN["project"]["dynamic"] and "version" in NATIVE["project"]["dynamic"]
    assert (ROOT / OWN["tool"]["hatch"]["version"]["path"]).read_text("utf-8").count(VERSION) == 1
    native = NATIVE["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert len(re.findall(r'^__version__ = "[\d.]+"', (ROOT / "native" / native).read_text("utf-8"), re.M)) == 1


def test_wheels_of_lorac_native_are_for_two_processors() -> None:
    wheels = NATIVE["tool"]["cibuildwheel"]
    assert wheels["build"] == "cp311-manylinux_{x86_64,aarch64}"
    assert wheels["linux"]["archs"] == ["x86_64", "aarch64"]
    kernels = (ROOT / "native" / "CMakeLists.txt").read_text(encoding="utf-8")
    assert all(f"{processor}|" in kernels for processor in wheels["linux"]["archs"])
