"""Counts the ops of eager artifacts, and adds them to ``captured_ops.txt``: those that strangers' files may name.

``python -m campaigns.captured_ops FOLDER ...``: artifacts of models whose programs the list lacks, saved by
``compiled.save(folder)``. What is there came from models of ``campaigns.zoo`` and ``tests.zoo``, and from every method.
Afterwards ``make fuzz`` calls new ones with hostile operands.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import lorac

LIST = Path(lorac.__file__).parent / "storage" / "captured_ops.txt"


def main(folders: Sequence[str]) -> None:
    """Count each op once for each artifact, and write the list."""
    counts = collections.Counter[str]()
    for line in LIST.read_text(encoding="ascii").splitlines():
        count, op = line.split()
        counts[op] += int(count)
    for folder in folders:
        graphs = json.loads((Path(folder) / "program.json").read_text(encoding="utf-8")).values()
        names = {node["op"] for graph in graphs for node in graph["nodes"] if "op" in node}
        counts.update({name.split(".")[1] for name in names if name.startswith("aten.")})
    lines = [f"{count} {op}\n" for op, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    LIST.write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
