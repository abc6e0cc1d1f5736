"""The package's sources, parsed once for all tests that read them."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lorac").rglob("*.py"))


@functools.cache
def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))
