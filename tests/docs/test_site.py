"""The site: its navigation, how its pages begin, their length, and the pages that its search finds."""

import re
import subprocess
import sys

import pytest
import yaml

from tests.docs.pages import ROOT, name

DOCS = ROOT / "docs"
MADE = {"benchmarks", "cli", "engines", "experiments", "formats", "methods", "models", "packages", "peft"}
MADE |= {"taxonomy", "trainers", "troubleshooting", "versions", "ways"}
BY_HAND = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in MADE]
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
FOOT = re.compile(r"\*Made by `[^*]*\*\n$")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose fences name a function."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)
NAV = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]


def _entries(items):
    """List the (title, value) pairs of a navigation, sections included."""
    for item in items:
        ((title, value),) = item.items()
        yield title, value
        if isinstance(value, list):
            yield from _entries(value)


def test_navigation_names_each_page_and_each_title_once():
    titles = [title for title, _ in _entries(NAV)]
    pages = [value for _, value in _entries(NAV) if isinstance(value, str)]
    assert sorted(titles) == sorted(set(titles))
    assert sorted(pages) == sorted(set(pages))


def test_navigation_has_the_six_sections():
    assert [title for title, value in _entries(NAV) if isinstance(value, list)][-5:] == [
        "How to", "Concepts", "Reference", "Research", "Contributing",
    ]  # fmt: skip


HOW_TO = [page for title, value in _entries(NAV) if title == "How to" for _, page in _entries(value)]


@pytest.mark.parametrize("page", [page for page in HOW_TO if page not in {"which.md", "troubleshooting.md"}])
def test_a_how_to_begins_with_code(page):
    """Two pages have a table first: one that compares, one that lists."""
    before = (DOCS / page).read_text(encoding="utf-8").partition("\n```")[0]
    assert len(before.split()) < 60 and "\n## " not in before


def test_pages_by_hand_stay_short():
    pages = [*BY_HAND, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    words = {name(page): len(FENCE.sub("", page.read_text(encoding="utf-8")).split()) for page in pages}
    assert sum(words.values()) <= 22_000, words


@pytest.mark.parametrize("page", sorted(MADE - {"experiments"}))
def test_a_made_page_says_at_its_foot_how_it_is_made(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert FOOT.search(text) and "Made by" not in text[:400]


@pytest.mark.slow
def test_search_finds_the_page_that_answers(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    command = ["node", "docs/search_words.mjs", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=name)
def test_no_blank_line_splits_a_table(page):
    blocks = FENCE.sub("", page.read_text(encoding="utf-8")).split("\n\n")
    tables = [block.strip().splitlines() for block in blocks if block.lstrip().startswith("|")]
    assert [lines[0] for lines in tables if len(lines) < 2 or not set(lines[1]) <= set("|-: ")] == []
