"""The structure of a graph: its repeated blocks, and the values that flow between them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorac.report.dump import REF, Dump, Row, short_path


@dataclass
class Section:
    """A block of rows: the whole graph, or one element of a list of modules.

    Attributes:
        call: module path of the block, ``""`` for the whole graph; ``@n`` for its n-th further call.
        items: rows (by index) and blocks, in order.
        parent: the block around it.
        inputs: rows outside that the block reads -> the letters for them, in order of first use.
    """

    call: str
    items: "list[int | Section]" = field(default_factory=list)
    parent: "Section | None" = None
    inputs: dict[int, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The module path."""
        return self.call.partition("@")[0]

    def rows(self) -> Iterator[int]:
        """Yield every row inside, including nested blocks."""
        for item in self.items:
            if isinstance(item, int):
                yield item
            else:
                yield from item.rows()

    def sections(self) -> "Iterator[Section]":
        """Yield this block and every block inside."""
        yield self
        for item in self.items:
            if isinstance(item, Section):
                yield from item.sections()


def build_sections(dump: Dump) -> Section:
    """Return the blocks of a dump as a tree."""
    root = nest_rows(row.blocks for row in dump.rows)
    _bind_inputs(root, dump)
    return root


def nest_rows(around: Iterable[Sequence[str]]) -> Section:
    """Return rows as a tree by the calls around each; a call that is left and entered again is a new section."""
    root = Section("")
    here = root
    for index, calls in enumerate(around):
        chain = _enclosing_chain(here)
        common = 0
        while common < min(len(chain), len(calls)) and chain[common].call == calls[common]:
            common += 1
        here = chain[common - 1] if common else root
        for call in calls[common:]:
            inner = Section(call, parent=here)
            here.items.append(inner)
            here = inner
        here.items.append(index)
    return root


def path_stem(path: str) -> str:
    """Return the path of a block without its number, which blocks of one list have in common."""
    return path.partition("@")[0].rstrip("0123456789")


def group_items(section: Section) -> Iterator[int | list[Section]]:
    """Yield the items of a section in order, with neighbouring blocks together."""
    for _, items in itertools.groupby(section.items, type):
        group = list(items)
        blocks = [item for item in group if isinstance(item, Section)]
        yield from [blocks] if blocks else (item for item in group if isinstance(item, int))


def find_runs(items: Sequence[object]) -> list[tuple[int, int]]:
    """Return (start, length) of each run of equal neighbours, in order."""
    lengths = [len(list(run)) for _, run in itertools.groupby(items)]
    return list(zip(itertools.accumulate(lengths, initial=0), lengths, strict=False))


def find_drawn(index: int, drawn_as: Mapping[int, int]) -> int:
    """Follow a mapping of rows to the rows drawn in their place, from a row to the one that is drawn."""
    while index in drawn_as:
        index = drawn_as[index]
    return index


def extract_module(dump: Dump, path: str) -> Dump | None:
    """Return the part of a dump inside a module, or None if nothing lies there.

    The values that it reads from outside become inputs.
    """
    inside = [i for i, row in enumerate(dump.rows) if _is_inside(_full_path(row), path)]
    if not inside:
        return None
    within = set(inside)
    outside = list(dict.fromkeys(ref for i in inside for ref in dump.rows[i].refs if ref not in within))
    rows = [Row("in", f"x{n}" if n else "x", "", (), dump.rows[ref].type) for n, ref in enumerate(outside)]
    index = {ref: n for n, ref in enumerate(outside)}
    for i in inside:
        row = dump.rows[i]
        blocks = tuple(call for call in row.blocks if call.startswith(f"{path}."))
        outer = blocks[-1].partition("@")[0] if blocks else path
        name = _full_path(row)[len(outer) :].removeprefix(".") or short_path(path)
        index[i] = len(rows)
        rows.append(replace(row, name=name, blocks=blocks, refs=tuple(index[ref] for ref in row.refs)))
    read = {ref for i, row in enumerate(dump.rows) if i not in within for ref in row.refs}
    rows.extend(Row("out", "", REF, (index[i],), dump.rows[i].type) for i in inside if i in read)
    sites = {site: state for site, state in dump.sites.items() if _is_inside(site, path)}
    slots = {name: site for name, site in dump.slots.items() if _is_inside(site, path)}
    return Dump(f"{dump.name}.{path}", dump.level, tuple(rows), sites, slots, dump.calls)


def _is_inside(inner: str, path: str) -> bool:
    return inner == path or inner.startswith(f"{path}.")


def _full_path(row: Row) -> str:
    if row.kind != "value":
        return ""
    return f"{row.blocks[-1].partition('@')[0]}.{row.name}" if row.blocks else row.name


def _enclosing_chain(section: Section) -> list[Section]:
    found: list[Section] = []
    here: Section | None = section
    while here is not None and here.call:
        found.append(here)
        here = here.parent
    return found[::-1]


def _bind_inputs(root: Section, dump: Dump) -> None:
    """Give each block letters for the values that it reads from outside.

    Values that several outermost blocks read (a mask, rotary tables) keep their names, since these are the same in
    every layer. Other values (the hidden state) get letters, so that layers that differ only in them are identical.
    """
    readers: dict[int, set[str]] = {}
    for row in (row for row in dump.rows if row.blocks):
        for ref in (ref for ref in row.refs if not dump.rows[ref].blocks):
            readers.setdefault(ref, set()).add(row.blocks[0])
    common = {ref for ref, blocks in readers.items() if len(blocks) > 1}
    for section in root.sections():
        if not section.call:
            continue
        inside = set(section.rows())
        read = dict.fromkeys(ref for index in section.rows() for ref in dump.rows[index].refs)
        outside = [ref for ref in read if ref not in inside and ref not in common]
        section.inputs.update({ref: f"x{count or ''}" for count, ref in enumerate(outside)})


def spell_reference(section: Section, ref: int, dump: Dump) -> str:
    """Return the reference to a row from inside a section: its name, relative to the section if it lies there."""
    row = dump.rows[ref]
    depth = len(_enclosing_chain(section))
    if section.call and ref in section.inputs:
        return f"%{section.inputs[ref]}"
    inner = row.blocks[depth:]
    if section.call and row.blocks[:depth] != tuple(s.call for s in _enclosing_chain(section)):
        inner = row.blocks
        depth = 0
    if not inner:
        return f"%{row.name}"
    outer = section.path if depth else ""
    return f"%{relative_path(inner[-1], outer)}.{row.name}"


def relative_path(call: str, outer: str) -> str:
    """Return the path of a block, relative to the one around it."""
    return call[len(outer) :].removeprefix(".") if outer and call.startswith(outer) else call


def spell_row(row: Row, section: Section, dump: Dump) -> str:
    """Return a row's op and operands, with its references spelled."""
    parts = row.text.split(REF)
    names = [spell_reference(section, ref, dump) for ref in row.refs]
    return "".join(part + name for part, name in zip(parts, [*names, ""], strict=True))
