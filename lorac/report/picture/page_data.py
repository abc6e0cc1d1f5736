"""The data that the page's script shows: the boxes of each graph, the adapters at each site, the rows of each level.

All data comes from other reports: the adapters and the reasons from ``compiled.explain()``, the rows from the dumps of
the graphs. Equal texts are stored once. ``page.js`` reads the keys of the records by the same names.
"""

import itertools
import operator
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lorac.ir.slots.roles import ROLES
from lorac.report.dump import Dump
from lorac.report.explain import Explanation
from lorac.report.picture.boxes import Box
from lorac.report.printer import AdapterNotes, SectionPrinter
from lorac.report.sections import build_sections
from lorac.report.terms import STATES, TermRow, format_reason, format_size

ADAPTER_COLORS = 7
"""The number of colors of the page; adapters beyond it repeat the colors in order."""
_MAX_SOURCE_LINES = 6

Record: TypeAlias = dict[str, object]
"""A JSON object."""


@dataclass(frozen=True)
class PictureContext:
    """The facts that a page shows next to its graphs.

    Attributes:
        explanation: the result of ``compiled.explain()``.
        notes: the descriptions of adapters that printed graphs show.
        parameters: name of an adapter -> number of its parameters, without index tensors.
    """

    explanation: Explanation
    notes: AdapterNotes
    parameters: Mapping[str, int]

    def color(self, adapter: str) -> int:
        """Return the number of an adapter's color."""
        return [row.name for row in self.explanation.adapters].index(adapter) % ADAPTER_COLORS


def describe_sites(context: PictureContext) -> dict[str, Record]:
    """Return the records of the sites that have adapters or reserved slots, by site path."""
    by_site: dict[str, list[TermRow]] = {}
    for row in context.explanation.terms:
        by_site.setdefault(row.site, []).append(row)
    adapted: dict[str, Record] = {}
    for path, rows in by_site.items():
        inputs, outputs = rows[0].shape
        terms = [_describe_term(row, context) for row in rows]
        adapted[path] = {"kind": rows[0].kind, "shape": f"{inputs} → {outputs}", "terms": terms}
    reserved: Record = {
        "kind": "",
        "shape": "",
        "terms": (),
        "note": "slots are reserved here, and no adapter fills them",
    }
    return adapted | dict.fromkeys(context.explanation.reserved, reserved)


def _describe_term(row: TermRow, context: PictureContext) -> Record:
    """Return the record of one adapter at one site."""
    why = [format_reason(reason, (row.adapter,)) for reason in row.reasons]
    # A reason against merging that is already among the reasons for the state is not shown twice.
    unfusable = f"cannot be merged: {row.unfusable}" if row.unfusable and row.unfusable not in why else ""
    return {
        "adapter": row.adapter,
        "color": context.color(row.adapter),
        "method": context.notes.adapters.get(row.adapter, ""),
        "form": row.form,
        "state": row.state,
        "means": STATES[row.state],
        "strength": row.strength,
        "why": why,
        "tensors": " ".join(f"{part.name}{list(part.shape)}" for part in row.parts),
        "slots": [f"{ROLES[slot].letter} {ROLES[slot].meaning}" if slot in ROLES else slot for slot in row.slots],
        "dtype": row.dtype,
        "size": format_size(row.nbytes),
        "flops": f"{row.flops:,}".replace(",", " ") if row.flops else "",
        "swap": row.swap,
        "unfusable": unfusable,
    }


def describe_boxes(root: Box, dump: Dump) -> Record:
    """Return the records of all boxes, and the types of the values that flow between them.

    The number of a box is its position in the list: the outermost box is 0.
    """
    numbers: dict[Box | None, int] = {box: number for number, box in enumerate(root.all())}
    numbers[None] = -1  # a link that starts or ends outside
    boxes = []
    for box in root.all():
        rows = [dump.rows[index] for index in box.rows]
        ops = Counter(row.text.partition(" ")[0] for row in rows if row.kind == "value")
        sources = list(dict.fromkeys(row.source for row in rows if row.source))
        record = {
            "call": box.call,
            "kind": box.kind,
            "title": box.title,
            "about": box.about,
            "class": dump.classes.get(box.call.partition("@")[0], ""),
            "sites": box.sites,
            "copies": box.copies,
            "ops": [f"{op} × {count}" if count > 1 else op for op, count in ops.items()],
            "sources": sources[:_MAX_SOURCE_LINES] + (["…"] if len(sources) > _MAX_SOURCE_LINES else []),
            "type": rows[0].type if box.kind in ("in", "out") else "",
            "parts": [numbers[part] for part in box.parts],
            "links": [(link.value, numbers[link.source], numbers[link.target]) for link in box.links],
        }
        boxes.append(record)
    types = {link.value: dump.rows[link.value].type for box in root.all() for link in box.links}
    return {"boxes": boxes, "types": types}


class LevelTable:
    """The printed rows of all graphs at all levels. Equal values are stored once, and are referred to by number.

    Attributes:
        lines: (text, type, source line, role) of a printed line -> its number.
        groups: numbers of neighbouring lines of one module -> number of the group.
        modules: path of a module (``@n`` for its n-th further call) -> its number.
    """

    def __init__(self) -> None:
        self.lines, self.groups, self.modules = (dict[Hashable, int]() for _ in range(3))

    def describe(self, title: str, dump: Dump, notes: AdapterNotes) -> Record:
        """Return the record of one level: its title, and its rows as a flat list: module, group, module, group, …."""
        printer, sections = SectionPrinter(dump, notes), build_sections(dump).sections()
        section_of = {item: section for section in sections for item in section.items if isinstance(item, int)}
        innermost = (row.modules[-1] if row.modules else "" for row in dump.rows)
        pairs: list[int] = []
        for module, rows in itertools.groupby(enumerate(innermost), key=operator.itemgetter(1)):
            lines = (line for index, _ in rows for line in printer.format_row(dump.rows[index], section_of[index]))
            group = tuple(_number(self.lines, (line.left, line.type, line.note, line.role)) for line in lines)
            pairs += _number(self.modules, module), _number(self.groups, group)
        return {"title": title, "level": dump.level, "pairs": pairs}

    def data(self) -> Record:
        """Return the values of each table, in the order of their numbers."""
        return {"lines": [*self.lines], "groups": [*self.groups], "modules": [*self.modules]}


def _number(numbers: dict[Hashable, int], value: Hashable) -> int:
    """Return the number of a value; give a new value the next number."""
    return numbers.setdefault(value, len(numbers))


def select_levels(stages: Mapping[str, Dump]) -> dict[str, Dump]:
    """Return the dump of the last stage at each level, by title: the level, and the stage if its name differs."""
    last = {dump.level: (stage, dump) for stage, dump in stages.items()}
    return {level if stage == level else f"{level}, after {stage}": dump for level, (stage, dump) in last.items()}
