"""The printed graph: one value per line, types and source lines aligned, a line per adapter at every adapted site.

Identical blocks are printed once. Of the weights only shapes are shown, so equal graphs print equal text. ``!`` marks
tensors that can be replaced at run time.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorac.errors import escape_controls
from lorac.report.dump import Dump, Row
from lorac.report.sections import (
    Section,
    build_sections,
    find_runs,
    group_items,
    path_stem,
    relative_path,
    spell_reference,
    spell_row,
)
from lorac.report.terms import TermRow

_TYPE_COLUMN, _SOURCE_COLUMN = 80, 22
"""The widest column of operands that is aligned, and the width of the column of types."""


@dataclass(frozen=True)
class AdapterNotes:
    """The adapters that a dump is printed with, which may change while the graph does not.

    Attributes:
        adapters: name -> one line on its method and hyper-parameters.
        terms: site path -> its terms.
        trainable: site path -> number of trainable elements; None where that is not known.
        calls: site path -> number of calls in a run.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, Sequence[TermRow]] = field(default_factory=dict)
    trainable: Mapping[str, int] | None = None
    calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PrintedLine:
    """A printed line before alignment: its text, the type, and the note on the right.

    Attributes:
        role: ``"row"``, ``"term"``, ``"block"`` (the heading of a block) or ``"more"`` (its number of repetitions).
    """

    left: str
    type: str = ""
    note: str = ""
    role: str = "row"

    def indent(self) -> "PrintedLine":
        """Return the line, indented by two spaces."""
        return replace(self, left=f"  {self.left}" if self.left else "")


def to_text(dump: Dump, notes: AdapterNotes | None = None) -> str:
    """Return a dump as text, with the adapters at its sites."""
    notes = notes or AdapterNotes()
    head = f"graph {dump.name} @{dump.level}"
    if notes.adapters:
        head += "  {" + " · ".join(f"{name}: {text}" for name, text in notes.adapters.items()) + "}"
    rows = [line.indent() for line in SectionPrinter(dump, notes).format_section(build_sections(dump))]
    lines = [head, *align_columns(rows), format_summary(dump, notes)]
    return escape_controls("\n".join(lines) + "\n")


def align_columns(rows: Sequence[PrintedLine]) -> list[str]:
    """Return lines with types and notes in columns; a long line pushes its own to the right."""
    widths = [len(row.left) for row in rows if row.type or row.note]
    column = min(max(widths, default=0), _TYPE_COLUMN) + 2
    lines = []
    for row in rows:
        aligned = f"{row.left.ljust(column - 2)}  {row.type.ljust(_SOURCE_COLUMN)}  {row.note}"
        lines.append((aligned if row.type or row.note else row.left).rstrip())
    return lines


def format_summary(dump: Dump, notes: AdapterNotes) -> str:
    """Return a line of counts: sites by state, slots, trainable elements, operations per token."""
    states = Counter(dump.sites.values())
    shown = ", ".join(f"{states[state]} {state}" for state in ("fused", "live", "bare") if states[state])
    parts = [f"sites {len(dump.sites)}" + (f": {shown}" if shown else ""), f"slots {len(dump.slots)}"]
    if notes.trainable is not None:
        trainable = sum(count for site, count in notes.trainable.items() if site in dump.sites)
        parts.append(f"trainable {trainable:,}".replace(",", " "))
        parts.append(f"+{count_added_flops(dump, notes) / 1000:.1f} kFLOP/token")
    return " · ".join(parts)


def diff_dumps(before: Dump, after: Dump, notes: AdapterNotes | None = None) -> str:
    """Return the differences of two dumps of a graph, block by block; identical ones of neighbours are shown once."""
    notes = notes or AdapterNotes()
    old, new = (_lines_by_section(d, notes) for d in (before, after))
    changes = []
    for path in dict.fromkeys([*new, *old]):
        _, _, *lines = [*difflib.unified_diff(old.get(path, []), new.get(path, []), n=0, lineterm="")] or ("", "")
        changes.append((path, [line for line in lines if not line.startswith("@@")]))
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
    return escape_controls("\n".join(shown) + "\n") if len(shown) > 2 else ""


class SectionPrinter:
    """The lines of a dump's sections, each made once.

    Args:
        notes: the adapters at its sites.
    """

    def __init__(self, dump: Dump, notes: AdapterNotes) -> None:
        self.dump, self.notes = dump, notes
        self._lines: dict[int, list[PrintedLine]] = {}

    def format_section(self, section: Section) -> list[PrintedLine]:
        """Return the lines of a section, with identical nested blocks collapsed."""
        if id(section) not in self._lines:  # by identity: a block may be left and entered again
            lines: list[PrintedLine] = []
            for part in group_items(section):
                if isinstance(part, int):
                    lines += self.format_row(self.dump.rows[part], section)
                else:
                    lines += self._blocks(part, section)
            self._lines[id(section)] = lines
        return self._lines[id(section)]

    def format_row(self, row: Row, section: Section) -> list[PrintedLine]:
        """Return the line of a row, and those of its terms."""
        text = spell_row(row, section, self.dump)
        if row.kind != "value":
            return [PrintedLine(f"{row.kind} %{row.name}" if row.kind == "in" else f"out {text}", row.type)]
        terms = self.notes.terms.get(row.site or "", ()) if row.adapted else ()
        return [PrintedLine(f"%{row.name} = {text}", row.type, row.source), *(format_term(term) for term in terms)]

    def runs(self, blocks: Sequence[Section]) -> list[tuple[int, int]]:
        """Return the runs (start, length) of neighbours with identical lines."""
        return find_runs([(path_stem(block.path), self.format_section(block)) for block in blocks])

    def _blocks(self, blocks: list[Section], around: Section) -> list[PrintedLine]:
        found: list[PrintedLine] = []
        for start, length in self.runs(blocks):
            block = blocks[start]
            read = ((f"%{letter}", spell_reference(around, ref, self.dump)) for ref, letter in block.inputs.items())
            bound = ", ".join(f"{letter} = {value}" for letter, value in read if letter != value)
            call = relative_path(block.call, around.path)
            heading = f"{call if not around.call else call.partition('@')[0]}:  {bound}".rstrip()
            found.append(PrintedLine(heading, role="block"))
            found.extend(line.indent() for line in self.format_section(block))
            if length > 1:
                others = [relative_path(block.call, around.path) for block in blocks[start + 1 : start + length]]
                found.append(PrintedLine(_format_repeats(others), role="more"))
        return found


def _format_repeats(others: Sequence[str]) -> str:
    span = others[0] if len(others) == 1 else f"{others[0]} … {others[-1]}"
    return f"… x {len(others)}   {span}"


def format_term(term: TermRow) -> PrintedLine:
    """Return ``+ style  low-rank r=8  A[8, 64]! B[96, 8]!``, with a note on merging it into the weight."""
    mark = "" if term.state == "baked" else "!"
    parts = " ".join(f"{p.name}{list(p.shape)}{mark}" for p in term.parts)
    strength = "" if term.strength == 1 else "  off" if not term.strength else f"  x {term.strength:g}"
    note = f"not fusable: {term.unfusable}" if term.unfusable else "fusable" if term.state == "live" else term.state
    return PrintedLine(f"     + {term.adapter}  {term.form}  {parts}{strength}", "", note, "term")


def count_added_flops(dump: Dump, notes: AdapterNotes) -> int:
    """Return the multiplications and additions per token of the active adapters in a graph."""
    here = {path: terms for path, terms in notes.terms.items() if path in dump.sites}
    return sum(t.flops * notes.calls.get(path, 1) for path, terms in here.items() for t in terms if t.strength)


def _lines_by_section(dump: Dump, notes: AdapterNotes) -> dict[str, list[str]]:
    """Return the unaligned lines of each block by its call, without nested blocks and source lines."""
    printer = SectionPrinter(dump, notes)
    found: dict[str, list[str]] = {}
    for section in build_sections(dump).sections():
        rows = (dump.rows[item] for item in section.items if isinstance(item, int))
        lines = (line for row in rows for line in printer.format_row(row, section))
        texts = (f"{line.left}  {line.type or line.note}".rstrip() for line in lines)
        found.setdefault(section.call, []).extend(texts)
    return found
