"""The boxes of a picture: modules within modules, identical neighbours once, and the values that flow between them.

A box stands for a module, for a call of a site, for an input or output, or for the loose operations of a module that
depend on the same of its boxes. Neighbours in one list of modules are drawn as one box where they compute the same,
adapters included, and where each reads its predecessor's inputs or its outputs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorac.report.dump import Dump, Row, short_path
from lorac.report.sections import Section, find_drawn, nest_rows, path_stem, relative_path

_LAYOUT_OPS = frozenset(
    {"_assert_tensor_metadata", "_to_copy", "alias", "arange", "cast", "clone", "concat", "constant", "contiguous"}
    | {"copy", "detach", "expand", "flatten", "getitem", "identity", "permute", "range", "reshape", "select", "shape"}
    | {"slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view"}
)
"""Operations, in lower case, that only change layouts; boxes of loose operations are named after the others."""
_MAX_NAMED_OPS = 2
"""The number of operations that such a box is named after."""


@dataclass(frozen=True)
class BoxLink:
    """A value that flows between two boxes of a box.

    Attributes:
        value: the row that computes it.
        source: the inner box that it comes from; None: it comes from outside.
        target: the inner box that reads it; None: it is read outside.
    """

    value: int
    source: "Box | None"
    target: "Box | None"


@dataclass(eq=False)
class Box:
    """One box.

    Attributes:
        kind: ``"graph"``, ``"module"``, ``"site"``, ``"ops"`` (loose operations), ``"in"`` or ``"out"``.
        call: path of the module; ``@n`` for its n-th further call.
        title: its name within the box around it.
        about: its class, its operations or its type, in a few words.
        rows: its rows, including those of nested boxes.
        parts: the inner boxes; empty where nothing inside is drawn.
        links: the values that flow between those.
        sites: paths of the sites that are marked on it.
        copies: calls of the neighbours that are identical to it.
    """

    kind: str
    call: str
    title: str
    about: str = ""
    rows: tuple[int, ...] = ()
    parts: "tuple[Box, ...]" = ()
    links: tuple[BoxLink, ...] = ()
    sites: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def all(self) -> "Iterator[Box]":
        """Yield this box and every box inside."""
        yield self
        for part in self.parts:
            yield from part.all()


def build_boxes(dump: Dump, site_keys: Mapping[str, str]) -> Box:
    """Return the boxes of a dump.

    Args:
        site_keys: path of each site to mark -> a text; blocks whose sites differ in it are not identical.
    """
    return _BoxBuilder(dump, site_keys).build()


class _BoxBuilder:
    def __init__(self, dump: Dump, site_keys: Mapping[str, str]) -> None:
        self.dump, self.site_keys = dump, site_keys
        self.rows = dump.rows
        # Links begin at the operand of a cast that changes no type.
        casts = [(n, row) for n, row in enumerate(dump.rows) if row.refs and row.op == "to"]
        self.drawn_as = {n: row.refs[0] for n, row in casts if dump.rows[row.refs[0]].type == row.type}
        self._keys: dict[int, tuple[object, ...]] = {}
        with_rows = {row.site for row in dump.rows if row.site}
        self.sites_without_rows = [site for site in site_keys if site not in with_rows]

    def build(self) -> Box:
        root = nest_rows(row.modules for row in self.rows)
        graph = Box("graph", "", self.dump.name, self.dump.level, tuple(root.rows()), self._inner_boxes(root))
        for site in self.sites_without_rows:
            box = _innermost_box(graph, site)
            if box is not None:
                box.sites = (*box.sites, site)
        chains: dict[int, tuple[Box, ...]] = {}
        _collect_chains(graph, (graph,), chains)
        found: dict[Box, dict[BoxLink, None]] = {}  # through the borders that a value crosses
        reads = ((find_drawn(ref, self.drawn_as), to) for index, to in chains.items() for ref in self.rows[index].refs)
        for value, readers in reads:
            for inner, link in _link_path(value, chains[value], readers):
                found.setdefault(inner, {})[link] = None
        for inner, links in found.items():
            inner.links = tuple(links)
        while _drop_unread(graph):
            pass
        return graph

    def _inner_boxes(self, section: Section) -> tuple[Box, ...]:
        runs: list[list[int | Section]] = []  # neighbours that compute the same are together
        for item in section.items:
            if runs and self._are_identical(runs[-1][-1], item):
                runs[-1].append(item)
            else:
                runs.append([item])
        return tuple(self._box(bundle, section.path) for bundle in _bundle_items(self.rows, runs))

    def _box(self, items: list[int | Section], outer: str) -> Box:
        first = items[0]
        if isinstance(first, int):
            rows = [item for item in items if isinstance(item, int)]
            row = self.rows[rows[0]]
            if row.kind != "value":
                title = row.name if row.kind == "in" else "output"
                return Box(row.kind, "", title, row.type, tuple(rows))
            if row.site is not None:
                return Box("site", outer, _inner_path(row.site, outer), row.op, tuple(rows), sites=(row.site,))
            return Box("ops", outer, *self._summarize(rows), tuple(rows))
        copies = [item for item in items[1:] if isinstance(item, Section)]
        for copy in copies:
            self.drawn_as |= dict(zip(copy.rows(), first.rows(), strict=True))
        box = self._box_of_section(first, outer)
        box.copies = tuple(copy.call for copy in copies)
        return box

    def _box_of_section(self, section: Section, outer: str) -> Box:
        rows = tuple(section.rows())
        title, name = _inner_path(section.path, outer), self.dump.classes.get(section.path, "")
        sites = {row.site for index in rows if (row := self.rows[index]).site}
        is_leaf = all(isinstance(item, int) for item in section.items)
        if is_leaf and sites == {section.path}:
            about = self.rows[rows[0]].op if len(rows) == 1 else name
            return Box("site", section.call, title, about, rows, sites=(section.path,))
        if is_leaf and not sites:
            return Box("module", section.call, title, name or self._summarize(rows)[0], rows)
        return Box("module", section.call, title, name, rows, self._inner_boxes(section))

    def _summarize(self, rows: Sequence[int]) -> tuple[str, str]:
        """Return the first few telling operations of loose rows, and the number of all."""
        ops = [self.rows[index].op for index in rows]
        named = list(dict.fromkeys([op for op in ops if op.lower() not in _LAYOUT_OPS] or ops))
        more = f" +{len(named) - _MAX_NAMED_OPS}" if len(named) > _MAX_NAMED_OPS else ""
        return " · ".join(named[:_MAX_NAMED_OPS]) + more, f"{len(ops)} ops" if len(ops) > 1 else ""

    def _are_identical(self, one: int | Section, other: int | Section) -> bool:
        if isinstance(one, int) or isinstance(other, int) or path_stem(one.path) != path_stem(other.path):
            return False
        if self._key(one) != self._key(other):
            return False
        inside = set(one.rows())
        pairs = zip(self._reads(one), self._reads(other), strict=True)
        return all(before == after or after in inside for before, after in pairs)

    def _key(self, section: Section) -> tuple[object, ...]:
        """Return the contents of a section, in names relative to it."""
        if id(section) not in self._keys:
            inside = {index: place for place, index in enumerate(section.rows())}
            outside = {index: f"x{place}" for place, index in enumerate(self._reads(section))}
            keys: list[tuple[object, ...]] = []
            for index in inside:
                row = self.rows[index]
                refs = [inside.get(ref, outside.get(ref)) for ref in row.refs]
                paths = (call.partition("@")[0] for call in row.modules)
                modules = [path[len(section.path) :] for path in paths if path.startswith(section.path)]
                keys.append((row.text, row.type, row.source, refs, modules, self.site_keys.get(row.site or "", "")))
            here = (site for site in self.sites_without_rows if _contains_site(section.path, site))
            self._keys[id(section)] = (*keys, *((site[len(section.path) :], self.site_keys[site]) for site in here))
        return self._keys[id(section)]

    def _reads(self, section: Section) -> list[int]:
        """Return the rows outside that a section reads, in order of first use."""
        inside = set(section.rows())
        refs = (ref for index in section.rows() for ref in self.rows[index].refs)
        return list(dict.fromkeys(ref for ref in refs if ref not in inside))


def _bundle_items(rows: Sequence[Row], runs: Sequence[list[int | Section]]) -> Iterator[list[int | Section]]:
    """Yield the items of each box of a section, such that no boxes depend on each other in a circle.

    Loose rows are together where one reads the other and both depend on the same boxes of the section.
    """
    import networkx

    run_of = {row: n for n, run in enumerate(runs) for item in run for row in _rows_of(item)}
    reads = networkx.DiGraph()
    reads.add_nodes_from(range(len(runs)))
    reads.add_edges_from((run_of[ref], n) for row, n in run_of.items() for ref in rows[row].refs if ref in run_of)
    single = {n: rows[run[0]] for n, run in enumerate(runs) if isinstance(run[0], int)}
    loose = {n for n, row in single.items() if row.kind == "value" and row.site is None}
    boxes = {n for n in reads if n not in loose and (n not in single or single[n].kind != "in")}
    depends: dict[int, frozenset[int]] = {}
    for n in reads:  # a run reads itself and earlier ones
        depends[n] = frozenset().union(*(depends[m] | ({m} & boxes) for m in reads.pred[n] if m != n))
    alike = networkx.Graph()
    alike.add_nodes_from(reads)
    alike.add_edges_from((m, n) for m, n in reads.edges if {m, n} <= loose and depends[m] == depends[n])
    for together in networkx.connected_components(alike):
        yield [item for n in sorted(together) for item in runs[n]]


def _rows_of(item: int | Section) -> Iterable[int]:
    return [item] if isinstance(item, int) else item.rows()


def _inner_path(path: str, outer: str) -> str:
    """Return a module's path, relative to the module around it."""
    return relative_path(path, outer) or short_path(path)


def _innermost_box(box: Box, site: str) -> Box | None:
    """Return the innermost box that a site lies in, or None where it lies in a copy of a box."""
    for inner in box.parts:
        if any(_contains_site(call, site) for call in inner.copies):
            return None
        if inner.kind == "module" and _contains_site(inner.call, site):
            return _innermost_box(inner, site)
    return box


def _contains_site(call: str, site: str) -> bool:
    return f"{site}.".startswith(f"{call.partition('@')[0]}.")


def _drop_unread(box: Box) -> bool:
    """Drop loose rows that nothing reads, and return whether there were any."""
    dropped = [_drop_unread(inner) for inner in box.parts]
    read = {link.source for link in box.links}
    unread = {inner for inner in box.parts if inner.kind == "ops" and inner not in read}
    box.parts = tuple(inner for inner in box.parts if inner not in unread)
    box.links = tuple(link for link in box.links if link.target not in unread)
    return bool(unread) or any(dropped)


def _collect_chains(box: Box, chain: tuple[Box, ...], chains: dict[int, tuple[Box, ...]]) -> None:
    """Collect the boxes around each row, from the graph to the innermost."""
    for inner in box.parts:
        _collect_chains(inner, (*chain, inner), chains)
    if not box.parts:
        chains.update(dict.fromkeys(box.rows, chain))


def _link_path(value: int, source: tuple[Box, ...], target: tuple[Box, ...]) -> Iterator[tuple[Box, BoxLink]]:
    """Yield (box, link in it) from the box that gives a value to the box that reads it."""
    common = 0
    while common < min(len(source), len(target)) and source[common] is target[common]:
        common += 1
    if common in (len(source), len(target)):
        return  # both ends are in one box whose inside is not drawn
    for outer, inner in zip(source[common:], source[common + 1 :], strict=False):
        yield outer, BoxLink(value, inner, None)
    yield source[common - 1], BoxLink(value, source[common], target[common])
    for outer, inner in zip(target[common:], target[common + 1 :], strict=False):
        yield outer, BoxLink(value, None, inner)
