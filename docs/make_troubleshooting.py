"""The page docs/troubleshooting.md, made from the mistakes that tests make: what was done, and what lorac answers.

``python -m docs.make_troubleshooting`` prints it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import lorac.errors
from docs.foot import FOOT

MISTAKES = Path(__file__).parents[1] / "tests" / "golden" / "mistakes.txt"
"""What ``tests/test_mistakes.py`` holds: it makes every one of them, and runs what the answers suggest."""
HEAD = """# When something is refused

An error of lorac's says what is wrong and where, then the nearest valid choice where there is one, then the next step.
Look for the words of yours; the list is by the code of the error (`error.code`), as in the
[reference](reference/errors.md). Whatever is refused has changed nothing.
`tests/test_mistakes.py` makes every one of these mistakes and runs what the answers suggest.
"""
_ENTRY = re.compile(r"^# (?P<done>.+)\n(?P<said>lorac\.(?P<kind>\w+) \[(?P<code>\w+)\]: (?:.+\n)+)", re.MULTILINE)


def page() -> str:
    """Make the whole page."""
    by_code = defaultdict(list)
    for entry in _ENTRY.finditer(MISTAKES.read_text(encoding="utf-8")):
        by_code[entry["kind"], entry["code"]].append((entry["done"], entry["said"]))
    lines = [HEAD]
    for kind, code in sorted(by_code):
        lines += [f"## {code}", "", _meaning(kind, code), ""]
        for done, said in by_code[kind, code]:
            lines += [f"**{done[0].upper()}{done[1:]}**", "", "```text", *said.splitlines(), "```", ""]
    return "\n".join([*lines, FOOT]) + "\n"


def _meaning(kind: str, code: str) -> str:
    """Return what a code of an error class means."""
    error = getattr(lorac.errors, kind)
    meaning = error.codes.get(code) or (error.__doc__ or "").partition("\n")[0].rstrip(".")
    return f"`{kind}`: {meaning[0].lower()}{meaning[1:]}."


if __name__ == "__main__":
    print(page(), end="")
