"""What is drawn of a dump: modules as boxes in one another, identical neighbours once, and what flows between them.

A box stands for a module, for a call of a site, for an input or output, or for the loose operations of a module that
depend on the same of its boxes. Neighbours of one list of modules are folded where the same happens in them, adapters
included, and where each reads what the one before it reads, or what that one gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lorac.report.dump import Dump, Row, short_path
from lorac.report.sections import Section, hash_lines, nest_rows, path_stem

_LAYOUT_OPS = frozenset(
    {"_assert_tensor_metadata", "_to_copy", "alias", "arange", "cast", "clone", "concat", "constant", "contiguous"}
    | {"copy", "detach", "expand", "flatten", "getitem", "identity", "permute", "range", "reshape", "select", "shape"}
    | {"slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
)
"""Operations, in lower case, that only lay values out; boxes of loose operations are named after the others."""
_MAX_NAMED_OPS = 2
"""Operations that such a box is named after."""


@dataclass(frozen=True, eq=False)
class BoxLink:
    """A value that flows between two boxes of a box.

    Attributes:
        value: the row that computes it.
        source: the box inside that it comes from; None: from outside.
        target: the box inside that reads it; None: what is outside reads it.
    """

    value: int
    source: Box | None
    target: Box | None


@dataclass(eq=False)
class Box:
    """One box.

    Attributes:
        kind: ``"graph"``, ``"module"``, ``"site"``, ``"ops"`` (loose operations), ``"in"`` or ``"out"``.
        call: path of the module; ``@n`` for its n-th further call.
        title: what it is called within the box around it.
        about: its class, its operations or its type, in a few words.
        rows: the rows it stands for, nested boxes' too.
        parts: the boxes inside; empty where nothing inside is drawn.
        links: what flows between those.
        sites: paths of the sites that are marked on it.
        copies: calls of the neighbours that are identical to it.
    """

    kind: str
    call: str
    title: str
    about: str = ""
    rows: tuple[int, ...] = ()
    parts: tuple[Box, ...] = ()
    links: tuple[BoxLink, ...] = ()
    sites: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def all(self) -> Iterator[Box]:
        """This box and every box inside."""
        yield self
        for part in self.parts:
            yield from part.all()


def build_boxes(dump: Dump, said: Mapping[str, str]) -> Box:
    """The boxes of a dump.

    Args:
        dump: what to draw.
        said: site path -> what is told about it, by which sites count as identical; each of them is marked on a box.
    """
    return _BoxBuilder(dump, said).graph()


@dataclass
class _BoxItems:
    """What becomes one box: neighbouring identical sections, a site's row, or loose rows that belong together.

    Attributes:
        items: what it is made of.
        loose: these are loose rows.
        given: this is an input of the graph.
        depends: the boxes that it depends on, by number, loose rows and inputs aside.
    """

    items: list[int | Section]
    loose: bool = False
    given: bool = False
    depends: frozenset[int] = field(default_factory=frozenset)


class _BoxBuilder:
    def __init__(self, dump: Dump, said: Mapping[str, str]) -> None:
        self.dump, self.said = dump, said
        self.rows = dump.rows
        self.stands_for = {n: row.refs[0] for n, row in enumerate(dump.rows) if _is_redundant_cast(row, dump.rows)}
        self._digests: dict[int, str] = {}
        seen = {row.site for row in dump.rows if row.site}
        self.unseen = [site for site in said if site not in seen]

    def graph(self) -> Box:
        root = nest_rows(row.modules for row in self.rows)
        part = Box("graph", "", self.dump.name, self.dump.level, tuple(root.rows()), self._inside(root))
        for site in self.unseen:
            box = _innermost_box(part, site)
            if box is not None:
                box.sites = (*box.sites, site)
        _connect_boxes(part, self.rows, self.stands_for)
        while _drop_unread(part):
            pass
        return part

    # --- boxes -------------------------------------------------------------------------------------------------

    def _inside(self, section: Section) -> tuple[Box, ...]:
        bundles = _bundle_items(section, self.rows, self._runs(section))
        return tuple(self._part(bundle, section.path) for bundle in bundles)

    def _part(self, bundle: _BoxItems, around: str) -> Box:
        first = bundle.items[0]
        if isinstance(first, int):
            return self._of_rows(sorted(item for item in bundle.items if isinstance(item, int)), around)
        copies = [item for item in bundle.items[1:] if isinstance(item, Section)]
        for copy in copies:
            self.stands_for |= dict(zip(copy.rows(), first.rows(), strict=True))
        part = self._of_section(first, around)
        part.copies = tuple(copy.call for copy in copies)
        return part

    def _of_rows(self, rows: Sequence[int], around: str) -> Box:
        row = self.rows[rows[0]]
        if row.kind != "value":
            title = row.name if row.kind == "in" else "output"
            return Box(row.kind, "", title, row.type, tuple(rows))
        if row.site is not None:
            return Box("site", around, _inner_path(row.site, around), _op_name(row), tuple(rows), sites=(row.site,))
        title, about = _summarize_ops([_op_name(self.rows[index]) for index in rows])
        return Box("ops", around, title, about, tuple(rows))

    def _of_section(self, section: Section, around: str) -> Box:
        rows = tuple(section.rows())
        title, name = _inner_path(section.path, around), self.dump.classes.get(section.path, "")
        sites = {row.site for index in rows if (row := self.rows[index]).site}
        alone = all(isinstance(item, int) for item in section.items)
        if alone and sites == {section.path}:
            about = _op_name(self.rows[rows[0]]) if len(rows) == 1 else name
            return Box("site", section.call, title, about, rows, sites=(section.path,))
        if alone and not sites:
            return Box(
                "module", section.call, title, name or _summarize_ops([_op_name(self.rows[i]) for i in rows])[0], rows
            )
        return Box("module", section.call, title, name, rows, self._inside(section))

    # --- what is identical -------------------------------------------------------------------------------------

    def _runs(self, section: Section) -> list[list[int | Section]]:
        """The items of a section, neighbours in which the same happens together."""
        runs: list[list[int | Section]] = []
        for item in section.items:
            if runs and self._alike(runs[-1][-1], item):
                runs[-1].append(item)
            else:
                runs.append([item])
        return runs

    def _alike(self, one: int | Section, other: int | Section) -> bool:
        if isinstance(one, int) or isinstance(other, int) or path_stem(one.path) != path_stem(other.path):
            return False
        if self._digest(one) != self._digest(other):
            return False
        made = set(one.rows())
        pairs = zip(self._reads(one), self._reads(other), strict=True)
        return all(before == after or after in made for before, after in pairs)

    def _digest(self, section: Section) -> str:
        if id(section) not in self._digests:
            self._digests[id(section)] = self._digested(section)
        return self._digests[id(section)]

    def _digested(self, section: Section) -> str:
        inside = {index: place for place, index in enumerate(section.rows())}
        outside = {index: f"x{place}" for place, index in enumerate(self._reads(section))}
        told = []
        for index in inside:
            row = self.rows[index]
            refs = [str(inside.get(ref, outside.get(ref))) for ref in row.refs]
            around = (call.partition("@")[0] for call in row.modules)
            modules = [path[len(section.path) :] for path in around if path.startswith(section.path)]
            said = self.said.get(row.site or "", "")
            told.append("\t".join([row.text, row.type, row.source, *refs, *modules, said]))
        sites = [site for site in self.unseen if f"{site}.".startswith(f"{section.path}.")]
        return hash_lines([*told, *(f"{site[len(section.path) :]} {self.said[site]}" for site in sites)])

    def _reads(self, section: Section) -> list[int]:
        """Rows outside that a section reads, in order of first use."""
        inside = set(section.rows())
        return list(
            dict.fromkeys(ref for index in section.rows() for ref in self.rows[index].refs if ref not in inside)
        )


def _bundle_items(section: Section, rows: Sequence[Row], runs: Sequence[list[int | Section]]) -> list[_BoxItems]:
    """What becomes one box each; between boxes so made no circle of dependence can be.

    Loose rows are together where one reads the other and both depend on the same of the section's own boxes.
    """
    bundles: list[_BoxItems] = []
    home: dict[int, int] = {}
    for run in runs:
        own = [row for item in run for row in ([item] if isinstance(item, int) else item.rows())]
        read = {home[ref] for index in own for ref in rows[index].refs if ref in home}
        boxes = {n for n in read if not bundles[n].loose and not bundles[n].given}
        depends = frozenset(boxes).union(*(bundles[n].depends for n in read))
        first = rows[run[0]] if isinstance(run[0], int) else None
        loose = first is not None and first.kind == "value" and first.site is None
        joined = [n for n in sorted(read) if loose and bundles[n].loose and bundles[n].depends == depends]
        place = joined[0] if joined else len(bundles)
        if not joined:
            bundles.append(_BoxItems([], loose, first is not None and first.kind == "in", depends))
        bundles[place].items.extend(run)
        home |= dict.fromkeys(own, place)
        for other in joined[1:]:
            home |= {row: place for row, n in home.items() if n == other}
            bundles[place].items.extend(bundles[other].items)
            bundles[other].items.clear()
    return [bundle for bundle in bundles if bundle.items]


def _inner_path(path: str, around: str) -> str:
    """A module's path as it is called inside another's box."""
    inner = path[len(around) :].removeprefix(".") if path.startswith(around) else path
    return inner or short_path(path)


def _op_name(row: Row) -> str:
    return row.text.removeprefix("adapted ").partition(" ")[0]


def _is_redundant_cast(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row is a cast to what its operand is already: links begin where that is computed."""
    return bool(row.refs) and _op_name(row) == "to" and rows[row.refs[0]].type == row.type


def _summarize_ops(ops: Sequence[str]) -> tuple[str, str]:
    """A few operations by which others know the loose rows, and how many those are."""
    telling = [op for op in ops if op.lower() not in _LAYOUT_OPS] or ops
    named = list(dict.fromkeys(telling))
    more = f" +{len(named) - _MAX_NAMED_OPS}" if len(named) > _MAX_NAMED_OPS else ""
    return " · ".join(named[:_MAX_NAMED_OPS]) + more, f"{len(ops)} ops" if len(ops) > 1 else ""


def _innermost_box(part: Box, site: str) -> Box | None:
    """The innermost box that a site lies in; None where it lies in a copy of one that is drawn."""
    for inner in part.parts:
        if any(_contains_site(call, site) for call in inner.copies):
            return None
        if inner.kind == "module" and _contains_site(inner.call, site):
            return _innermost_box(inner, site)
    return part


def _contains_site(call: str, site: str) -> bool:
    return f"{site}.".startswith(f"{call.partition('@')[0]}.")


def _connect_boxes(graph: Box, rows: Sequence[Row], stands_for: Mapping[int, int]) -> None:
    """Give every box the links between the boxes inside it, through the borders that a value crosses."""
    chains: dict[int, tuple[Box, ...]] = {}
    _collect_chains(graph, (graph,), chains)
    found: dict[Box, dict[tuple[int, int, int], BoxLink]] = {}
    pairs = ((_drawn_row(ref, stands_for), readers) for index, readers in chains.items() for ref in rows[index].refs)
    for value, readers in pairs:
        for around, link in _link_path(value, chains[value], readers):
            found.setdefault(around, {})[link.value, id(link.source), id(link.target)] = link
    for part, links in found.items():
        part.links = tuple(links.values())


def _drop_unread(part: Box) -> bool:
    """Drop loose rows that nothing reads; whether any were."""
    dropped = [_drop_unread(inner) for inner in part.parts]
    read = {link.source for link in part.links}
    unread = {inner for inner in part.parts if inner.kind == "ops" and inner not in read}
    part.parts = tuple(inner for inner in part.parts if inner not in unread)
    part.links = tuple(link for link in part.links if link.target not in unread)
    return bool(unread) or any(dropped)


def _collect_chains(part: Box, around: tuple[Box, ...], chains: dict[int, tuple[Box, ...]]) -> None:
    for inner in part.parts:
        _collect_chains(inner, (*around, inner), chains)
    if not part.parts:
        chains.update(dict.fromkeys(part.rows, around))


def _drawn_row(index: int, stands_for: Mapping[int, int]) -> int:
    while index in stands_for:
        index = stands_for[index]
    return index


def _link_path(value: int, source: tuple[Box, ...], target: tuple[Box, ...]) -> Iterator[tuple[Box, BoxLink]]:
    """(box, link in it) from the box that gives a value to the one that reads it."""
    common = 0
    while common < min(len(source), len(target)) and source[common] is target[common]:
        common += 1
    if common in (len(source), len(target)):
        return  # within one box of which no inside is drawn
    for outer, inner in zip(source[common:], source[common + 1 :], strict=False):
        yield outer, BoxLink(value, inner, None)
    yield source[common - 1], BoxLink(value, source[common], target[common])
    for outer, inner in zip(target[common:], target[common + 1 :], strict=False):
        yield outer, BoxLink(value, None, inner)
