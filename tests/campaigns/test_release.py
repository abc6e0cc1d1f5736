"""The parts of `make release`, which itself takes minutes and a network."""

from __future__ import annotations

import re
from pathlib import Path

from markdown_it import MarkdownIt

from campaigns import release
from campaigns.release import description, relative_addresses


def test_finds_addresses_that_lead_nowhere_without_the_files_next_to_a_page() -> None:
    page = '<a href="docs/a.md">a</a> <img src="b.png"> <a href="/c">c</a> <a href="#use">use</a> <a href="https://d">d</a>'
    assert relative_addresses(page) == ["docs/a.md", "b.png", "/c"]
    assert relative_addresses(MarkdownIt().render("![a](b.png) [c](d.md#e)")) == ["b.png", "d.md#e"]


def test_reads_the_description_of_a_distribution() -> None:
    assert description("Name: lorac\nVersion: 1\n\n# lorac\n\nIt compiles.\n") == "# lorac\n\nIt compiles.\n"


def test_uploads_nothing() -> None:
    """The one place that names the command is the sentence that says what is left to do."""
    source = Path(release.__file__).read_text(encoding="utf-8")
    assert re.findall(r"twine.{0,3} upload|\"upload\"", source) == ["twine upload"]
