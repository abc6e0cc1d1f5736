"""A dump in Graphviz's language."""

from __future__ import annotations

from collections.abc import Iterator

from lorac.ir.view.dump import REF, Dump
from lorac.ir.view.printer import Body, Notes
from lorac.ir.view.sections import Section, dataflow, grouped, sections

_COLOURS = {"in": "#dbe9f6", "out": "#dbe9f6", "live": "#fde3c8", "fused": "#e4dcf3", "bare": "#f2f2f2"}


def to_dot(dump: Dump, notes: Notes | None = None) -> str:
    """The values and what they read, in Graphviz's language; identical blocks are drawn once."""
    root = sections(dump)
    standing = _representatives(root, Body(dump, notes or Notes()))
    edges = {(standing[a], standing[b]) for a, b in dataflow(dump).edges}
    body = [*_cluster(root, dump, standing, "  "), *(f"  n{a} -> n{b};" for a, b in sorted(edges) if a != b)]
    head = [f"digraph {_quoted(dump.name)} {{", '  node [shape=box, style=filled, fontname="monospace", fontsize=10];']
    return "\n".join([*head, *body, "}"]) + "\n"


def _representatives(root: Section, body: Body) -> dict[int, int]:
    """Row -> the row drawn for it: of identical blocks, the first one's."""
    standing = {index: index for index in root.rows()}
    for block, first in _repeats(root, body):
        standing |= dict(zip(block.rows(), first.rows(), strict=True))
    return {index: _drawn_for(standing, index) for index in standing}


def _repeats(root: Section, body: Body) -> Iterator[tuple[Section, Section]]:
    """Each block that is identical to one before it, and the first such; outer blocks before those inside."""
    groups = (part for section in root.sections() for part in grouped(section) if isinstance(part, list))
    for blocks in groups:
        for start, length in body.runs(blocks):
            yield from ((block, blocks[start]) for block in blocks[start + 1 : start + length])


def _drawn_for(standing: dict[int, int], index: int) -> int:
    while standing[index] != index:
        index = standing[index]
    return index


def _cluster(section: Section, dump: Dump, standing: dict[int, int], indent: str) -> Iterator[str]:
    for item in section.items:
        if isinstance(item, Section):
            yield from _subgraph(item, dump, standing, indent)
        elif standing[item] == item:
            yield f"{indent}{_box(item, dump)}"


def _subgraph(section: Section, dump: Dump, standing: dict[int, int], indent: str) -> Iterator[str]:
    """A block in a frame of its own; nothing where all of it is drawn elsewhere."""
    if not any(standing[index] == index for index in section.rows()):
        return
    yield f"{indent}subgraph {_quoted('cluster_' + section.call)} {{ label={_quoted(section.call)};"
    yield from _cluster(section, dump, standing, indent + "  ")
    yield f"{indent}}}"


def _box(index: int, dump: Dump) -> str:
    row = dump.rows[index]
    label = row.text.replace(REF, "·") if row.kind == "value" else row.kind
    state = dump.sites.get(row.site or "", "bare") if row.kind == "value" else row.kind
    shown = "\\n".join(part for part in (row.name, label, row.type) if part)
    return f"n{index} [label={_quoted(shown)}, fillcolor={_quoted(_COLOURS[state])}];"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
