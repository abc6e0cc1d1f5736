"""Paths and dotted names in pages, docstrings and comments exist. ``make check`` runs this file."""

import ast
import functools
import io
import re
import tokenize

import pytest

from tests.sources import ROOT, SOURCES, parse

FOLDERS = ("lorac", "tests", "benchmarks", "campaigns", "docs", "examples", "experiments", "native")
PATH = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/]+\.(?:py|pyi|md|jsonl|js|cc|html|h|toml|txt)\b")
NAME = re.compile(r"\blorac(?:\.[A-Za-z_]\w*)+")
PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"))]
CODE = [file for folder in FOLDERS if folder != "lorac" for file in sorted((ROOT / folder).rglob("*.py"))]


def test_names_and_paths_exist():
    """All lines of pages and of the package are read, of other code docstrings and comments."""
    texts = [*((file, file.read_text()) for file in [*PAGES, *SOURCES]), *((file, _prose(file)) for file in CODE)]
    stale = {
        f"{file.relative_to(ROOT)}:{number} {name}"
        for file, text in texts
        for number, line in enumerate(text.splitlines(), 1)
        for name in _stale(line)
    }
    assert stale == set()


def _prose(file):
    """Return a module's docstrings and comments, on their lines."""
    source = file.read_text()
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.line.lstrip().startswith('"""')):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                lines[number - 1] += line
    return "\n".join(lines)


def _stale(line):
    """List the paths of a line that do not exist, and its dotted names whose module lacks the name after it."""
    paths = [path for path in PATH.findall(line) if not (ROOT / path).exists()]
    return paths + [name for name in NAME.findall(line) if not _exists(name)]


def _exists(name):
    """Return whether a name's module has the part behind it; ``lorac.name`` alone may be an op or a group."""
    parts = name.split(".")
    length = max(length for length in range(1, len(parts) + 1) if _names(tuple(parts[:length])) is not None)
    folder = ROOT.joinpath(*parts[: length + 1])
    return length in (1, len(parts)) or parts[length] in _names(tuple(parts[:length])) or folder.is_dir()


@functools.cache
def _names(module):
    """Return all names that a module defines or imports, None if there is no such module."""
    path = ROOT.joinpath(*module)
    file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    if file is None:
        return None
    nodes = list(ast.walk(parse(file)))
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return defined | assigned | {(node.asname or node.name) for node in nodes if isinstance(node, ast.alias)}


@pytest.mark.parametrize(
    ("line", "stale"),
    [
        ("see `lorac/errors.py` and lorac.errors.nearest_name(x)", []),
        ("lorac.formats.peft.types, lorac.ir.slots.roles.ROLES and lorac.native", []),
        ("tests/oracles/<key>.py", []),
        ("(lorac/variants/_routing.py)", ["lorac/variants/_routing.py"]),
        ("lorac.ir.slots.roles.ROLE", ["lorac.ir.slots.roles.ROLE"]),
        ("lorac.ir.slot.roles", ["lorac.ir.slot.roles"]),
    ],
)
def test_finds_stale_names(line, stale):
    assert _stale(line) == stale
