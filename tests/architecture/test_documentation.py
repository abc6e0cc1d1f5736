"""Names in the documentation and citations in code exist, and the documentation's tables are the code's."""

import importlib
import re
from pathlib import Path

import peft
import pytest

from docs.make_benchmarks import MILLISECONDS, QUOTES, RESULTS, quote
from lorac.backends.onnx.legalize import Legalize
from lorac.formats.peft.config import peft_types
from lorac.frontend.capture.pipeline import capture_passes
from lorac.frontend.host import GROUP as ENTRY_POINTS_OF_HOSTS
from lorac.ir.slots.roles import ROLES
from lorac.passes.pipelines import lowering_passes
from tests.docs.pages import PAGES as READ
from tests.docs.pages import name

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ARCHITECTURE, ROOT / "docs" / "without-lorac.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
FOLDERS = ("lorac", "tests", "benchmarks", "campaigns", "examples", "experiments")
CODE = {source for folder in FOLDERS for source in (ROOT / folder).rglob("*.py")} - {Path(__file__)}

QUOTED = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
NAME = re.compile(r"(?<![\w./:])lorac(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w./])(?:lorac|tests|docs|benchmarks|examples)/[\w./]*")
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SECTION = re.compile(r'docs/architecture\.md, "([^"]+)"')
INVARIANT = re.compile(r"\binvariants? (\d+(?:(?:, | and )\d+)*)")
NUMBERED = re.compile(r"^(\d+)\. ", re.MULTILINE)


def _section(page, title):
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _quoted(page):
    return " ".join(QUOTED.findall(page.read_text(encoding="utf-8")))


# --- what pages name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_name_resolves(page):
    names = sorted(set(NAME.findall(_quoted(page))))
    assert names, "the page names nothing: the pattern is wrong"
    assert [name for name in names if not _resolves(name) and name != ENTRY_POINTS_OF_HOSTS] == []


def _resolves(name):
    """Whether a dotted name is a module, or leads from one to an attribute or a field."""
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    for i, part in enumerate(rest):
        path = ".".join([first, *rest[: i + 1]])
        if not hasattr(found, part) and not _is_module(path):
            return part in getattr(found, "__annotations__", {}) and part == rest[-1]
        found = getattr(found, part)
    return True


def _is_module(path):
    try:
        importlib.import_module(path)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_exists(page):
    # A path goes as far as its first placeholder.
    assert [path for path in sorted(set(FILE.findall(_quoted(page)))) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*READ, ROOT / "CONTRIBUTING.md"], ids=name)
def test_every_link_leads_somewhere(page):
    for path, anchor in LINK.findall(QUOTED.sub("", page.read_text(encoding="utf-8"))):
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if not anchor:
            continue
        anchors = [title.lower().replace(" ", "-") for title in HEADING.findall(target.read_text(encoding="utf-8"))]
        assert anchor in anchors, anchor


@pytest.mark.parametrize(
    ("name", "resolves"),
    [
        ("lorac.compile", True),
        ("lorac.ir.slots.roles.ROLES", True),
        ("lorac.ir.slots.plans.SitePlan.site", True),
        ("lorac.target.engine.Engine.bind", True),
        ("lorac.ir.slots.roles.ROLE", False),
        ("lorac.ir.slot", False),
        ("lorac.ir.slots.plans.SitePlan.site.path", False),
    ],
)
def test_resolves_names(name, resolves):
    assert _resolves(name) is resolves


# --- what code cites -------------------------------------------------------------------------------------------------


def test_invariants_are_numbered_through():
    numbers = NUMBERED.findall(_section(ARCHITECTURE.read_text(encoding="utf-8"), "Invariants"))
    assert numbers == [str(number) for number in range(1, 11)]


def test_cited_sections_and_invariants_exist():
    page = ARCHITECTURE.read_text(encoding="utf-8")
    known = {*HEADING.findall(page), *NUMBERED.findall(_section(page, "Invariants"))}
    cited = {(source.name, what) for source in CODE for what in _cited(source.read_text(encoding="utf-8"))}
    assert {what for _, what in cited} >= {"1", "7", "8", "The one idea"}, "the patterns are wrong"
    assert {(name, what) for name, what in cited if what not in known} == set()


def _cited(text):
    """Sections and numbers of invariants that a source speaks of, wherever its lines break."""
    joined = re.sub(r"\s*\n\s*(?:# )?", " ", text)
    numbers = [number for found in INVARIANT.findall(joined) for number in re.findall(r"\d+", found)]
    return [*SECTION.findall(joined), *numbers]


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("see docs/architecture.md,\n    # invariant 7", ["7"]),
        ("(invariants 1 and 7)", ["1", "7"]),
        ('(docs/architecture.md, "The one\n    idea")', ["The one idea"]),
        ("invariant under 3 rotations", []),
    ],
)
def test_finds_citations(text, cited):
    assert _cited(text) == cited


# --- tables that are the code's --------------------------------------------------------------------------------------


def test_the_table_of_roles():
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("\n### The roles\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    expected = [f"| {role.letter} | `{role.name}` | {role.meaning} | {role.stage.value} |" for role in ROLES.values()]
    assert rows == expected


def test_the_table_of_passes():
    section = _section(ARCHITECTURE.read_text(encoding="utf-8"), "Levels")
    rows = [line.rpartition(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    steps = [*capture_passes(attention=True), *lowering_passes(), Legalize()]
    assert rows == [f"| `{step.name}` | {step.reads.name.lower()} | {step.leaves.name.lower()}" for step in steps]


# --- figures of the README and the start page ------------------------------------------------------------------------


@pytest.mark.parametrize("page", QUOTES)
def test_pages_quote_the_measured_swaps(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert quote(page, text, RESULTS) == text
    assert quote(page, MILLISECONDS.sub("0", text), RESULTS) == text, "no line of the page quotes them"


def test_the_readme_counts_peft_s_types_and_links_to_the_tables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| adapter methods .*$", readme, re.MULTILINE)
    assert re.findall(r"(\d+) types, a closed", row) == [f"{len(peft.PeftType)}"]
    assert "(docs/methods.md)" in row and "(docs/peft.md#types)" in row  # both pages are made from the code
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    assert f"Of PEFT's {len(peft.PeftType)} types lorac reads {len(peft_types())}, each below." in page
