"""Dumps in Graphviz's language."""

from __future__ import annotations

from collections.abc import Iterator

from lorac.report.dump import REF, Dump
from lorac.report.printer import AdapterNotes, SectionPrinter
from lorac.report.sections import Section, build_sections, group_items

_COLORS = {"in": "#dbe9f6", "out": "#dbe9f6", "live": "#fde3c8", "fused": "#e4dcf3", "bare": "#f2f2f2"}


def to_dot(dump: Dump, notes: AdapterNotes | None = None) -> str:
    """Return a dump in Graphviz's language, with identical blocks drawn once."""
    root = build_sections(dump)
    shown_as = _map_to_representatives(root, SectionPrinter(dump, notes or AdapterNotes()))
    edges = {(shown_as[ref], shown_as[index]) for index, row in enumerate(dump.rows) for ref in row.refs}
    body = [*_cluster_lines(root, dump, shown_as, "  "), *(f"  n{a} -> n{b};" for a, b in sorted(edges) if a != b)]
    head = [f"digraph {_quote(dump.name)} {{", '  node [shape=box, style=filled, fontname="monospace", fontsize=10];']
    return "\n".join([*head, *body, "}"]) + "\n"


def _map_to_representatives(root: Section, body: SectionPrinter) -> dict[int, int]:
    """Return the row that is drawn for each row: of identical blocks, the first block's."""
    shown_as = {index: index for index in root.rows()}
    for block, first in _repeated_sections(root, body):
        shown_as |= dict(zip(block.rows(), first.rows(), strict=True))
    return {index: _find_representative(shown_as, index) for index in shown_as}


def _repeated_sections(root: Section, body: SectionPrinter) -> Iterator[tuple[Section, Section]]:
    """Yield each block that is identical to an earlier one, and the first such; outer blocks come before inner ones."""
    groups = (part for section in root.sections() for part in group_items(section) if isinstance(part, list))
    for blocks in groups:
        for start, length in body.runs(blocks):
            yield from ((block, blocks[start]) for block in blocks[start + 1 : start + length])


def _find_representative(shown_as: dict[int, int], index: int) -> int:
    while shown_as[index] != index:
        index = shown_as[index]
    return index


def _cluster_lines(section: Section, dump: Dump, shown_as: dict[int, int], indent: str) -> Iterator[str]:
    for item in section.items:
        if isinstance(item, Section):
            yield from _subgraph_lines(item, dump, shown_as, indent)
        elif shown_as[item] == item:
            yield f"{indent}{_node_line(item, dump)}"


def _subgraph_lines(section: Section, dump: Dump, shown_as: dict[int, int], indent: str) -> Iterator[str]:
    """Yield the lines of a block in a frame, or none where all of it is drawn elsewhere."""
    if not any(shown_as[index] == index for index in section.rows()):
        return
    yield f"{indent}subgraph {_quote('cluster_' + section.call)} {{ label={_quote(section.call)};"
    yield from _cluster_lines(section, dump, shown_as, indent + "  ")
    yield f"{indent}}}"


def _node_line(index: int, dump: Dump) -> str:
    row = dump.rows[index]
    label = row.text.replace(REF, "·") if row.kind == "value" else row.kind
    state = dump.sites.get(row.site or "", "bare") if row.kind == "value" else row.kind
    shown = "\\n".join(part for part in (row.name, label, row.type) if part)
    return f"n{index} [label={_quote(shown)}, fillcolor={_quote(_COLORS[state])}];"


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
