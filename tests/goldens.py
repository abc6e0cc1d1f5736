"""Golden texts: what a person sees, kept in tests/golden. `LORAC_UPDATE_GOLDEN=1 make test` writes them anew."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
_LINE = re.compile(r"(\w+\.py):\d+")


def check(name: str, text: str) -> None:
    """Assert that `text` is the golden text called `name`.

    Source lines are those of the installed library: their files are compared, not their numbers.
    """
    path, text = FOLDER / f"{name}.txt", _LINE.sub(r"\1", text)
    if os.environ.get("LORAC_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8").splitlines()
    changed = "\n".join(difflib.unified_diff(expected, text.splitlines(), f"{name}.txt", "now", lineterm=""))
    assert not changed, f"{changed}\n\nLORAC_UPDATE_GOLDEN=1 accepts it"
