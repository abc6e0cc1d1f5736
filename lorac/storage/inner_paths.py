"""Paths that stand in files: none of them leads out of the folder of its file."""

from __future__ import annotations

import re
from pathlib import Path

_FOREIGN = re.compile(r"[\\:\x00-\x1f\x7f]")
"""Characters that separate folders, name drives or streams, or end names on some system."""


def find_inner_path(folder: Path, name: str) -> Path | None:
    """Return the path of what a file names, or None where that could lie outside the folder.

    Every path that lorac takes from a file goes through here. A name is relative and has slashes. It may not be
    absolute, have empty parts or dots for parts, or pass through a link.

    Args:
        folder: the folder that the name is relative to.
        name: what the file says.
    """
    parts = name.split("/")
    if _FOREIGN.search(name) or not {"", ".", ".."}.isdisjoint(parts):
        return None
    steps = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    return None if any(step.is_symlink() for step in steps) else steps[-1]
