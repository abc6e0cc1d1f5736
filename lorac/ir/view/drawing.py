"""Pictures of a dump: Graphviz text, and a page of HTML that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from lorac.ir.view.dump import REF, Dump
from lorac.ir.view.printer import Body, Line, Notes, aligned, footer, lines
from lorac.ir.view.sections import Section, dataflow, grouped, sections

_COLOURS = {"in": "#dbe9f6", "out": "#dbe9f6", "live": "#fde3c8", "fused": "#e4dcf3", "bare": "#f2f2f2"}
_VALUE = re.compile(r"%[\w.@]+")


# ── Graphviz ─────────────────────────────────────────────────────────────────────────────────────────────────────────
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


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
_STYLE = """
body { font: 13px/1.5 ui-monospace, monospace; margin: 2em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; }
.line { white-space: pre; } .line:hover { background: #f4f4f4; }
.v { color: #1f5fa8; } .v.on { background: #ffe58a; } .t { color: #2d7d46; } .s { color: #999; }
.term { color: #a8541f; } .more { color: #777; } summary { cursor: pointer; white-space: pre; }
.add { background: #e6f6e6; } .del { background: #fbe9e9; } footer { margin: .6em 0 2em; color: #555; }
"""
_SCRIPT = """
document.addEventListener("mouseover", e => {
  const name = e.target.dataset && e.target.dataset.v;
  document.querySelectorAll(".v.on").forEach(n => n.classList.remove("on"));
  if (!name) return;
  const block = e.target.closest("section");
  block.querySelectorAll(".v").forEach(n => { if (n.dataset.v === name) n.classList.add("on"); });
});
"""


def to_html(title: str, parts: Sequence[tuple[str, Dump]], notes: Notes, changes: Sequence[tuple[str, str]]) -> str:
    """A page with dumps and diffs.

    Args:
        title: its heading.
        parts: (heading, dump) of each.
        notes: the adapters.
        changes: (heading, diff) of each.
    """
    adapters = "".join(f"<li>{_escaped(f'{name}: {text}')}</li>" for name, text in notes.adapters.items())
    body = [f"<h1>{_escaped(title)}</h1>", f"<ul>{adapters}</ul>" if adapters else ""]
    body.extend(_page_part(heading, dump, notes, last=i == len(parts) - 1) for i, (heading, dump) in enumerate(parts))
    body.extend(_page_diff(heading, text) for heading, text in changes if text)
    head = f"<meta charset='utf-8'><title>{_escaped(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"


def _page_part(heading: str, dump: Dump, notes: Notes, *, last: bool) -> str:
    rows = lines(dump, notes)
    body = "".join(_page_lines(list(zip(rows, aligned(rows), strict=True))))
    opened = " open" if last else ""
    foot = f"<footer>{_escaped(footer(dump, notes))}</footer>"
    return f"<section><details{opened}><summary><b>{_escaped(heading)}</b></summary>{body}{foot}</details></section>"


def _page_lines(rows: Sequence[tuple[Line, str]]) -> Iterator[str]:
    """Lines, each block in an element that opens and closes."""
    depths: list[int] = []
    for line, text in rows:
        depth = len(line.left) - len(line.left.lstrip())
        while depths and depth <= depths[-1]:
            depths.pop()
            yield "</details>"
        if line.role == "block":
            depths.append(depth)
            yield f"<details open><summary>{_values(text)}</summary>"
            continue
        yield f"<div class='line {line.role}'>{_coloured(line, text)}</div>"
    yield "</details>" * len(depths)


def _coloured(line: Line, text: str) -> str:
    left = text[: len(line.left)]
    rest = text[len(line.left) :]
    kind, note = rest[: rest.rfind(line.note)] if line.note else rest, line.note
    return f"{_values(left)}<span class='t'>{_escaped(kind)}</span><span class='s'>{_escaped(note)}</span>"


def _page_diff(heading: str, text: str) -> str:
    classes = {"+": "add", "-": "del"}
    rows = (f"<div class='line {classes.get(row[:1], '')}'>{_escaped(row)}</div>" for row in text.splitlines())
    return f"<section><details><summary><b>{_escaped(heading)}</b></summary>{''.join(rows)}</details></section>"


def _values(text: str) -> str:
    return _VALUE.sub(lambda m: f"<span class='v' data-v='{m.group()}'>{m.group()}</span>", _escaped(text))


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
