"""The printed graph: one value per line, types and source lines aligned, a line per adapter at every adapted site.

Identical blocks are printed once. Nothing of the weights but shapes is shown, so equal graphs print equal text. ``!``
marks what can be replaced at run time.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorac.report.dump import Dump, Row
from lorac.report.sections import (
    Section,
    build_sections,
    find_runs,
    group_items,
    hash_lines,
    path_stem,
    relative_path,
    spell_reference,
    spell_row,
)
from lorac.report.terms import TermDescription

_TYPE_COLUMN, _SOURCE_COLUMN = 80, 22
"""Widest operand column that others are aligned with, and the width of the type column."""


@dataclass(frozen=True)
class AdapterNotes:
    """What a dump is printed with: the adapters, which may change while the graph does not.

    Attributes:
        adapters: name -> one line on its method and hyper-parameters.
        terms: site path -> its terms.
        trainable: site path -> elements of the tensors that train there; None where that is not known.
        calls: site path -> how often a run calls it.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, Sequence[TermDescription]] = field(default_factory=dict)
    trainable: Mapping[str, int] | None = None
    calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PrintedLine:
    """A printed line before alignment: what stands left, the type, and the note on the right.

    Attributes:
        role: ``"row"``, ``"term"``, ``"block"`` (a block's heading) or ``"more"`` (how often it repeats).
    """

    left: str
    type: str = ""
    note: str = ""
    role: str = "row"

    def indented(self, by: str) -> PrintedLine:
        """The same, further right."""
        return replace(self, left=by + self.left if self.left else "")


def to_text(dump: Dump, notes: AdapterNotes | None = None) -> str:
    """A dump as text.

    Args:
        dump: what to print.
        notes: the adapters at its sites.
    """
    notes = notes or AdapterNotes()
    head = f"graph {dump.name} @{dump.level}{_format_adapters(notes)}"
    return "\n".join([head, *align_columns(format_lines(dump, notes)), format_summary(dump, notes)]) + "\n"


def format_lines(dump: Dump, notes: AdapterNotes) -> list[PrintedLine]:
    """The lines of a dump, identical blocks collapsed."""
    return [line.indented("  ") for line in SectionPrinter(dump, notes).of(build_sections(dump))]


def align_columns(rows: Sequence[PrintedLine]) -> list[str]:
    """Lines with types and notes in columns; a longer line pushes its own to the right."""
    widths = [len(row.left) for row in rows if row.type or row.note]
    column = min(max(widths, default=0), _TYPE_COLUMN) + 2
    return [_align_line(row, column).rstrip() for row in rows]


def format_summary(dump: Dump, notes: AdapterNotes) -> str:
    """Counts: sites by how they run, slots, elements that train, operations per token."""
    states = Counter(dump.sites.values())
    shown = ", ".join(f"{states[state]} {state}" for state in ("fused", "live", "bare") if states[state])
    parts = [f"sites {len(dump.sites)}" + (f": {shown}" if shown else ""), f"slots {len(dump.slots)}"]
    if notes.trainable is not None:
        trainable = sum(count for site, count in notes.trainable.items() if site in dump.sites)
        parts.append(f"trainable {trainable:,}".replace(",", " "))
        parts.append(f"+{count_added_flops(dump, notes) / 1000:.1f} kFLOP/token")
    return " · ".join(parts)


def diff(before: str, after: str, name: str = "") -> str:
    """What changed between two printed graphs, unchanged lines left out; empty where nothing did."""
    left, right = before.splitlines(), after.splitlines()
    changed = difflib.unified_diff(left, right, f"{name} before".strip(), f"{name} after".strip(), n=1, lineterm="")
    return "\n".join(changed)


def diff_dumps(before: Dump, after: Dump, notes: AdapterNotes | None = None) -> str:
    """What changed between two dumps of a graph, block by block; identical changes of neighbours are shown once."""
    notes = notes or AdapterNotes()
    old, new = (_lines_by_section(d, notes) for d in (before, after))
    changes = [(path, _diff_lines(old.get(path, []), new.get(path, []))) for path in _merge_paths(list(old), list(new))]
    shown: list[str] = [f"--- {before.name} @{before.level}", f"+++ {after.name} @{after.level}"]
    runs = find_runs([(path_stem(path), "\n".join(lines)) for path, lines in changes])
    for start, length in runs:
        path, text = changes[start]
        if not text:
            continue
        shown.append(f"@@ {path or after.name} @@")
        shown.extend(text)
        if length > 1:
            shown.append("  " + _format_repeats([path for path, _ in changes[start + 1 : start + length]]))
    ends = [format_summary(d, notes) for d in (before, after)]
    if ends[0] != ends[1]:
        shown.extend((f"-{ends[0]}", f"+{ends[1]}"))
    return "\n".join(shown) + "\n" if len(shown) > 2 else ""


class SectionPrinter:
    """Writes the lines of a dump's sections.

    Args:
        dump: what to print.
        notes: the adapters at its sites.
    """

    def __init__(self, dump: Dump, notes: AdapterNotes) -> None:
        self.dump, self.notes = dump, notes
        self._written: dict[int, list[PrintedLine]] = {}

    def of(self, section: Section) -> list[PrintedLine]:
        """The lines of a section, nested blocks collapsed where identical."""
        if id(section) not in self._written:  # not by its call: a block that is left may be entered again
            self._written[id(section)] = [line for part in group_items(section) for line in self._part(part, section)]
        return self._written[id(section)]

    def row(self, row: Row, section: Section) -> list[PrintedLine]:
        """A row, and its terms."""
        text = spell_row(row, section, self.dump)
        if row.kind != "value":
            return [PrintedLine(f"{row.kind} %{row.name}" if row.kind == "in" else f"out {text}", row.type)]
        terms = self.notes.terms.get(row.site or "", ()) if row.adapted else ()
        return [PrintedLine(f"%{row.name} = {text}", row.type, row.source), *(format_term(term) for term in terms)]

    def runs(self, blocks: Sequence[Section]) -> list[tuple[int, int]]:
        """Runs (start, length) of neighbours with identical lines."""
        marks = [hash_lines([repr(line) for line in self.of(block)]) for block in blocks]
        return find_runs([(path_stem(block.path), mark) for block, mark in zip(blocks, marks, strict=True)])

    def _part(self, part: int | list[Section], section: Section) -> list[PrintedLine]:
        return self.row(self.dump.rows[part], section) if isinstance(part, int) else self._blocks(part, section)

    def _blocks(self, blocks: list[Section], around: Section) -> list[PrintedLine]:
        found: list[PrintedLine] = []
        for start, length in self.runs(blocks):
            found.append(PrintedLine(self._heading(blocks[start], around), role="block"))
            found.extend(line.indented("  ") for line in self.of(blocks[start]))
            if length > 1:
                others = [relative_path(block.call, around.path) for block in blocks[start + 1 : start + length]]
                found.append(PrintedLine(_format_repeats(others), role="more"))
        return found

    def _heading(self, block: Section, around: Section) -> str:
        spelled_out = ((f"%{letter}", spell_reference(around, ref, self.dump)) for ref, letter in block.inputs.items())
        bound = (f"{letter} = {value}" for letter, value in spelled_out if letter != value)
        call = relative_path(block.call, around.path)
        return "  ".join((f"{call if not around.call else call.partition('@')[0]}:", ", ".join(bound))).rstrip()


def _format_repeats(others: Sequence[str]) -> str:
    span = others[0] if len(others) == 1 else f"{others[0]} … {others[-1]}"
    return f"… x {len(others)}   {span}"


def format_term(term: TermDescription) -> PrintedLine:
    """``+ style  low-rank r=8  A[8, 64]! B[96, 8]!``, and whether it can be merged into the weight."""
    mark = "" if term.state == "baked" else "!"
    parts = " ".join(f"{p.name}{list(p.shape)}{mark}" for p in term.parts)
    what = " ".join(part for part in (term.form, term.size) if part)
    strength = "" if term.strength == 1 else "  off" if not term.strength else f"  x {term.strength:g}"
    note = f"not fusable: {term.unfusable}" if term.unfusable else "fusable" if term.state == "live" else term.state
    return PrintedLine(f"     + {term.adapter}  {what}  {parts}{strength}", "", note, "term")


def _align_line(row: PrintedLine, column: int) -> str:
    if not (row.type or row.note):
        return row.left
    left = row.left.ljust(column - 2) + "  "
    return left + row.type.ljust(_SOURCE_COLUMN) + "  " + row.note


def _format_adapters(notes: AdapterNotes) -> str:
    if not notes.adapters:
        return ""
    return "  {" + " · ".join(f"{name}: {text}" for name, text in notes.adapters.items()) + "}"


def count_added_flops(dump: Dump, notes: AdapterNotes) -> int:
    """Multiplications and additions per token that the active adapters cost in a graph."""
    here = {path: terms for path, terms in notes.terms.items() if path in dump.sites}
    return sum(t.flops * notes.calls.get(path, 1) for path, terms in here.items() for t in terms if t.strength)


def _lines_by_section(dump: Dump, notes: AdapterNotes) -> dict[str, list[str]]:
    """Block -> its own lines, unaligned and without source lines, nested blocks apart."""
    body = SectionPrinter(dump, notes)
    found: dict[str, list[str]] = {}
    for section in build_sections(dump).sections():
        own = [line for item in section.items if isinstance(item, int) for line in body.row(dump.rows[item], section)]
        shown = (f"{line.left}  {line.type or line.note}".rstrip() for line in own)
        found.setdefault(section.call, []).extend(shown)
    return found


def _diff_lines(before: Sequence[str], after: Sequence[str]) -> list[str]:
    changed = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line for line in changed if not line.startswith("@@")]


def _merge_paths(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Paths of both, in order."""
    return list(dict.fromkeys([*after, *(path for path in before if path not in after)]))
