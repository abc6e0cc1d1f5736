"""What the picture tells: of the whole, of every box, and how the program looks at each level.

All of it is read: terms and reasons are those of ``compiled.explain()``, rows those of the graphs' dumps. What the
page's script shows is plain data here, in which equal texts are kept once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorac.ir.slots.plans import Reason
from lorac.ir.slots.roles import ROLES
from lorac.report.dump import Dump
from lorac.report.picture.boxes import Box
from lorac.report.picture.svg import AdapterMark
from lorac.report.printer import AdapterNotes, SectionPrinter
from lorac.report.sections import Section, build_sections
from lorac.report.terms import STATES, TermDescription, format_reason, format_size

ADAPTER_COLORS = 7
"""Colours of the page that adapters take in turn."""
_MAX_SOURCE_LINES = 6
"""Source lines of a box that are told."""


class ExplainedTerm(Protocol):
    """A row of ``compiled.explain()``: one adapter at one site."""

    @property
    def site(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def adapter(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def strength(self) -> float: ...
    @property
    def slots(self) -> tuple[str, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def swap(self) -> str: ...
    @property
    def reasons(self) -> tuple[Reason, ...]: ...


class ExplainedAdapter(Protocol):
    """A row of ``compiled.explain()``: one adapter."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def strength(self) -> float: ...


class ExplainedProgram(Protocol):
    """What ``compiled.explain()`` answers; its text is for people."""

    @property
    def target(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def active(self) -> str: ...
    @property
    def adapters(self) -> Sequence[ExplainedAdapter]: ...
    @property
    def terms(self) -> Sequence[ExplainedTerm]: ...
    @property
    def reserved(self) -> tuple[str, ...]: ...
    @property
    def bare(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class PictureContext:
    """What the page tells besides graphs.

    Attributes:
        report: what ``compiled.explain()`` answers.
        notes: the adapters, as printed graphs show them.
        parameters: adapter -> numbers that it holds, positions aside.
    """

    report: ExplainedProgram
    notes: AdapterNotes
    parameters: Mapping[str, int]

    def colour(self, adapter: str) -> int:
        """The number of an adapter's colour."""
        return [row.name for row in self.report.adapters].index(adapter) % ADAPTER_COLORS

    def marks(self) -> dict[str, list[AdapterMark]]:
        """Site path -> what is marked there, what is active first."""
        found: dict[str, list[AdapterMark]] = {}
        for row in sorted(self.report.terms, key=lambda row: not row.strength):
            mark = AdapterMark(row.adapter, row.form, row.state, row.strength, self.colour(row.adapter))
            found.setdefault(row.site, []).append(mark)
        return found


def describe_sites(facts: PictureContext) -> dict[str, dict[str, Any]]:
    """Site path -> what is told of it and of the terms there."""
    described = {(t.site, t.adapter): t for terms in facts.notes.terms.values() for t in terms}
    found: dict[str, dict[str, Any]] = {}
    for row in facts.report.terms:
        inputs, outputs = row.shape
        site = found.setdefault(row.site, {"kind": row.kind, "shape": f"{inputs} → {outputs}", "terms": []})
        site["terms"].append(_describe_term(row, described[row.site, row.adapter], facts))
    for path in facts.report.reserved:
        found[path] = {
            "kind": "",
            "shape": "",
            "terms": [],
            "note": "slots are reserved here, and no adapter fills them",
        }
    return found


def _describe_term(row: ExplainedTerm, term: TermDescription, facts: PictureContext) -> dict[str, Any]:
    why = [format_reason(reason, (row.adapter,)) for reason in row.reasons]
    more = term.unfusable is not None and term.unfusable not in why
    return {
        "adapter": row.adapter,
        "colour": facts.colour(row.adapter),
        "method": facts.notes.adapters.get(row.adapter, ""),
        "form": row.form,
        "state": row.state,
        "means": STATES[row.state],
        "strength": row.strength,
        "why": why,
        "tensors": " ".join(f"{part.name}{list(part.shape)}" for part in term.parts),
        "slots": [f"{ROLES[slot].letter} {ROLES[slot].meaning}" if slot in ROLES else slot for slot in row.slots],
        "dtype": row.dtype,
        "size": format_size(row.nbytes),
        "flops": f"{term.flops:,}".replace(",", " ") if term.flops else "",
        "swap": row.swap,
        "merged": f"cannot be merged: {term.unfusable}" if more else "",
    }


def serialize_sites(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Site path -> the same as text, by which sites are compared."""
    return {path: json.dumps(site, sort_keys=True) for path, site in sites.items()}


# ── Boxes ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def describe_boxes(root: Box, numbers: Mapping[Box, int], dump: Dump) -> list[dict[str, Any]]:
    """What is told of each box, by its number."""
    reads: list[dict[int, tuple[str, str]]] = [{} for _ in numbers]
    gives: list[dict[int, str]] = [{} for _ in numbers]
    for link in (link for around in root.all() for link in around.links):
        kind = dump.rows[link.value].type
        if link.target is not None:
            reads[numbers[link.target]][link.value] = (kind, link.source.title if link.source is not None else "")
        if link.source is not None:
            gives[numbers[link.source]][link.value] = kind
    flows = ({"reads": list(r.values()), "gives": list(g.values())} for r, g in zip(reads, gives, strict=True))
    return [_describe_box(part, dump) | flow for part, flow in zip(numbers, flows, strict=True)]


def _describe_box(part: Box, dump: Dump) -> dict[str, Any]:
    rows = [dump.rows[index] for index in part.rows]
    ops = Counter(row.text.partition(" ")[0] for row in rows if row.kind == "value")
    sources = list(dict.fromkeys(row.source for row in rows if row.source))
    return {
        "call": part.call,
        "kind": part.kind,
        "title": part.title,
        "about": part.about,
        "class": dump.classes.get(part.call.partition("@")[0], ""),
        "sites": list(part.sites),
        "copies": list(part.copies),
        "ops": [f"{op} × {count}" if count > 1 else op for op, count in ops.items()],
        "sources": sources[:_MAX_SOURCE_LINES] + (["…"] if len(sources) > _MAX_SOURCE_LINES else []),
        "type": rows[0].type if part.kind in ("in", "out") else "",
    }


# ── Levels ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class InternTable:
    """Texts that are kept once: each is a number from then on."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, text: Any) -> int:
        """The number of a text."""
        return self._numbers.setdefault(text, len(self._numbers))

    def all(self) -> list[Any]:
        """The texts, by number."""
        return list(self._numbers)


@dataclass(frozen=True)
class LevelTable:
    """The rows of programs, level by level, as data.

    Attributes:
        lines: (text, type, source line, role) of a row.
        groups: numbers of neighbouring rows of one module.
        calls: paths of modules.
    """

    lines: InternTable
    groups: InternTable
    calls: InternTable

    def told(self, title: str, dump: Dump, notes: AdapterNotes) -> dict[str, Any]:
        """One level: its title, and its rows as (module, group) pairs in one list."""
        pairs = [number for call, group in self._groups(dump, notes) for number in (call, group)]
        return {"title": title, "level": dump.level, "groups": pairs}

    def data(self) -> dict[str, Any]:
        """The texts themselves."""
        return {"lines": self.lines.all(), "groups": self.groups.all(), "calls": self.calls.all()}

    def _groups(self, dump: Dump, notes: AdapterNotes) -> Iterator[tuple[int, int]]:
        body, around = SectionPrinter(dump, notes), _enclosing_sections(build_sections(dump))
        call: str | None = None
        lines: list[int] = []
        for index, row in enumerate(dump.rows):
            here = row.modules[-1] if row.modules else ""
            if call is not None and here != call:
                yield self.calls.number(call), self.groups.number(tuple(lines))
                lines = []
            call = here
            for line in body.row(row, around[index]):
                lines.append(self.lines.number((line.left, line.type, line.note, line.role)))
        if call is not None:
            yield self.calls.number(call), self.groups.number(tuple(lines))


def _enclosing_sections(root: Section) -> dict[int, Section]:
    return {item: section for section in root.sections() for item in section.items if isinstance(item, int)}


def select_levels(stages: Mapping[str, Dump]) -> dict[str, Dump]:
    """The last stage of each level, under a title."""
    last = {dump.level: (stage, dump) for stage, dump in stages.items()}
    return {level if stage == level else f"{level}, after {stage}": dump for level, (stage, dump) in last.items()}
