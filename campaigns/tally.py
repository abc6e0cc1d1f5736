"""What came of a soak: a table of what was done, and what must not have happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

BAD = ("wrong", "untyped", "hang")
"""How kinds of what must not happen begin."""
GROWTH = 64 << 20
"""Bytes by which a process may grow from its first tenth on: what an allocator keeps varies by some tens of MiB."""


def _counted(found: Sequence[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(part["count"]) for part in found), Counter[str]())


def wrong(found: Sequence[dict[str, Any]]) -> dict[str, int]:
    """List what must not have happened, and did."""
    bad = {kind: n for kind, n in _counted(found).items() if kind.startswith(BAD) and n}
    grown = [part["end"] - part["start"] for part in found]
    return bad | ({"bytes grown": max(grown)} if max(grown) > GROWTH else {})


def report(found: Sequence[dict[str, Any]]) -> str:
    """Format a table of what was done."""
    count = _counted(found)
    told = {kind: n for kind, n in sorted(count.items()) if not kind.startswith(BAD)}
    rows = [("operation", "done", "wrong")]
    rows += [(kind, f"{n:,}", str(count[f"wrong {kind}"])) for kind, n in told.items()]
    untyped = sum(n for kind, n in count.items() if kind.startswith("untyped"))
    mismatches = sum(n for kind, n in count.items() if kind.startswith("wrong"))
    rows.append(("all", f"{sum(told.values()):,}", str(mismatches)))
    lines = [f"{kind:45} {done:>12} {bad:>7}" for kind, done, bad in rows]
    lines.append(f"untyped errors {untyped}, hangs {count['hang']}")
    for index, part in enumerate(found):
        sizes = f"{part['start'] / 2**20:.0f} -> {part['end'] / 2**20:.0f} MiB"
        lines.append(f"process {index}: resident {sizes}, {part['seconds']:.0f} s")
    return "\n".join(lines)
