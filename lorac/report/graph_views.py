"""``compiled.graph``: the captured graphs at every stage, to print, compare and draw.

The adapters at the sites are looked up when a graph is printed, so that they are the present ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorac.errors import OptionError, Unavailable, nearest_name
from lorac.ir.graph.graph import Level, Skip
from lorac.report.dump import REF, Dump
from lorac.report.pass_history import CAPTURE, EMITTED
from lorac.report.picture.page import to_html
from lorac.report.picture.page_data import PictureContext
from lorac.report.printer import AdapterNotes, SectionPrinter, diff_dumps, to_text
from lorac.report.sections import Section, build_sections, extract_module, find_drawn, group_items
from lorac.storage.paths import translate_os_errors

if TYPE_CHECKING:
    import networkx

_TRACED = Level.TRACED.name.lower()


class GraphView:
    """One graph at one of its stages.

    Args:
        dumps: stage -> the graph after it, in order.
        context: returns the present adapters at the sites, and the other facts of a page.
        stage: the stage to show; default: the last.
        skipped: pass -> its skips.
        emission: returns the program that the target runs; None if it runs the model's own modules.

    Attributes:
        skipped: pass -> its skips, each with a place and the reason.
    """

    def __init__(
        self,
        dumps: Mapping[str, Dump],
        context: Callable[[], PictureContext],
        stage: str | None = None,
        skipped: Mapping[str, tuple[Skip, ...]] | None = None,
        emission: Callable[[], Dump | None] = lambda: None,
    ) -> None:
        self._dumps, self._context, self.skipped, self._emission = dumps, context, dict(skipped or {}), emission
        self._stage = stage or list(dumps)[-1]

    @property
    def dump(self) -> Dump:
        """The rows of the stage that is shown."""
        return self._dumps[self._stage]

    @property
    def level(self) -> str:
        """``"host"``, ``"adapted"``, ``"expanded"`` or ``"target"``."""
        return self.dump.level

    @property
    def stages(self) -> tuple[str, ...]:
        """``"trace"``, the passes that captured the graph, ``"capture"``, and the passes that lowered it, in order."""
        return tuple(self._dumps)

    def after(self, stage: str) -> GraphView:
        """Return the graph as it was after a stage.

        Raises:
            Unavailable: no pass of this name changed it.
        """
        if stage not in self._dumps:
            raise Unavailable(
                f"'{stage}' is not a stage of this graph",
                nearest=nearest_name(stage, self._dumps) or ", ".join(self._dumps),
                next_step="`stages` lists them",
            )
        return self._with(self._dumps, stage)

    @property
    def emitted(self) -> GraphView:
        """The program that the target runs, after all its rewrites.

        Raises:
            Unavailable: the target runs the model's own modules.
        """
        found = self._emission()
        if found is None:
            raise Unavailable(
                "this target emits no program: it runs the model's own modules",
                next_step="lorac.compile(..., target='onnxruntime') emits one",
            )
        return self._with({**self._dumps, EMITTED: found}, EMITTED)

    def _with(self, dumps: Mapping[str, Dump], stage: str) -> GraphView:
        return GraphView(dumps, self._context, stage, self.skipped, self._emission)

    def at(self, path: str) -> GraphView:
        """Return only the part of the graph inside a module.

        Raises:
            Unavailable: nothing of the graph lies there.
        """
        found = {stage: part for stage, dump in self._dumps.items() if (part := extract_module(dump, path))}
        if self._stage not in found:
            raise Unavailable(
                f"nothing of graph '{self.dump.name}' lies inside '{path}'",
                nearest=nearest_name(path, self.dump.sites),
                next_step="print(compiled.graph) shows the modules",
            )
        return self._with(found, self._stage)

    def diff(self, other: GraphView | None = None) -> str:
        """Return the changes from another view to this one; default: from the capture. Empty if there are none."""
        stage = CAPTURE if CAPTURE in self._dumps else self.stages[0]
        before = self._dumps[stage] if other is None else other.dump
        return diff_dumps(before, self.dump, self._context().notes)

    def to_dot(self) -> str:
        """Return the graph in Graphviz's language."""
        return to_dot(self.dump, self._context().notes)

    def to_networkx(self) -> networkx.DiGraph:
        """Return the graph of values for networkx: a node for each value, weight and slot, an edge to each reader.

        Nodes are called by the path of their module and their op, weights and slots by their own names. A node has the
        attributes ``kind`` ("in", "value", "out", "weight" or "slot"), ``op``, ``shape`` (dtype and sizes), ``source``
        (file and line), ``site`` and ``slot`` (its letter), each where there is one. An edge has the dtype and sizes of
        its value as ``value``.
        """
        return to_networkx(self.dump)

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page that draws the graph, and return its path."""
        return _write_page(path, {self.dump.name: self}, self._context())

    def drawn(self) -> dict[str, Dump]:
        """Return stage -> the graph after it, from the capture to the emitted program."""
        found = self._emission()
        stages = [stage for stage in self.stages if self._dumps[stage].level != _TRACED]
        return {stage: self._dumps[stage] for stage in stages} | ({} if found is None else {EMITTED: found})

    def __str__(self) -> str:
        return to_text(self.dump, self._context().notes)

    def __repr__(self) -> str:
        return f"<graph {self.dump.name} @{self.level}, {len(self.dump.rows)} values>"


class GraphViews(dict[str, GraphView]):
    """Name -> graph; printing prints all of them.

    Args:
        context: as of ``GraphView``.
    """

    def __init__(self, views: Mapping[str, GraphView], context: Callable[[], PictureContext]) -> None:
        super().__init__(views)
        self._context = context

    def diff(self) -> str:
        """Return the changes by the passes, graph by graph."""
        return "\n".join(text for view in self.values() if (text := view.diff()))

    def to_dot(self) -> str:
        """Return all graphs in Graphviz's language, one after another."""
        return "\n".join(view.to_dot() for view in self.values())

    def to_networkx(self) -> networkx.DiGraph:
        """Return all graphs for networkx; with several, a node's name begins with that of its graph and a colon."""
        import networkx

        graphs = [view.to_networkx() for view in self.values()]
        return networkx.union_all(graphs, rename=[f"{name}:" for name in self if len(self) > 1])

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page that draws all graphs, and return its path."""
        return _write_page(path, self, self._context())

    def __str__(self) -> str:
        return "\n".join(str(view) for view in self.values())

    def __repr__(self) -> str:
        return f"<graphs {', '.join(self)}>"


def _write_page(path: str | Path, views: Mapping[str, GraphView], context: PictureContext) -> Path:
    target = Path(path).expanduser()
    page = to_html({name: view.drawn() for name, view in views.items()}, context)
    with translate_os_errors(target, OptionError, "written"):
        target.write_text(page, encoding="utf-8")
    return target


def to_networkx(dump: Dump) -> networkx.DiGraph:
    """Return a dump as a graph of networkx (``GraphView.to_networkx``)."""
    import networkx

    graph, names = networkx.DiGraph(name=dump.name), list[str]()
    for name, shape in {name: shape for row in dump.rows for name, shape in row.stored.items()}.items():
        slot = {"slot": name.rpartition(":")[2], "site": dump.slots[name]} if name in dump.slots else {}
        graph.add_node(name, kind="slot" if slot else "weight", shape=shape, **slot)
    for row in dump.rows:
        name = f"{row.blocks[-1]}.{row.name}" if row.blocks else row.name or "output"
        while name in graph:
            name += "'"
        facts = {"op": row.op, "shape": row.type, "source": row.source, "site": row.site}
        graph.add_node(name, kind=row.kind, **{key: value for key, value in facts.items() if value})
        for operand in (*(names[ref] for ref in row.refs), *row.stored):
            graph.add_edge(operand, name, value=graph.nodes[operand].get("shape", ""))
        names.append(name)
    return graph


_COLORS = {"in": "#dbe9f6", "out": "#dbe9f6", "live": "#fde3c8", "fused": "#e4dcf3", "bare": "#f2f2f2"}


def to_dot(dump: Dump, notes: AdapterNotes | None = None) -> str:
    """Return a dump in Graphviz's language, with identical blocks drawn once."""
    root = build_sections(dump)
    body = SectionPrinter(dump, notes or AdapterNotes())
    drawn_as: dict[int, int] = {}  # of identical blocks, the rows of the first
    # Outer blocks come before inner ones.
    groups = (part for section in root.sections() for part in group_items(section) if isinstance(part, list))
    for blocks, (start, length) in ((group, run) for group in groups for run in body.runs(group)):
        for block in blocks[start + 1 : start + length]:
            drawn_as |= dict(zip(block.rows(), blocks[start].rows(), strict=True))
    shown_as = {index: find_drawn(index, drawn_as) for index in root.rows()}
    edges = {(shown_as[ref], shown_as[index]) for index, row in enumerate(dump.rows) for ref in row.refs}
    lines = [*_cluster_lines(root, dump, shown_as, "  "), *(f"  n{a} -> n{b};" for a, b in sorted(edges) if a != b)]
    head = [f"digraph {_quote(dump.name)} {{", '  node [shape=box, style=filled, fontname="monospace", fontsize=10];']
    return "\n".join([*head, *lines, "}"]) + "\n"


def _cluster_lines(section: Section, dump: Dump, shown_as: dict[int, int], indent: str) -> Iterator[str]:
    """Yield the lines of a block's rows, and of its inner blocks in frames; those drawn elsewhere are left out."""
    for item in section.items:
        if isinstance(item, Section):
            if any(shown_as[index] == index for index in item.rows()):
                yield f"{indent}subgraph {_quote('cluster_' + item.call)} {{ label={_quote(item.call)};"
                yield from _cluster_lines(item, dump, shown_as, indent + "  ")
                yield f"{indent}}}"
        elif shown_as[item] == item:
            row = dump.rows[item]
            label = row.text.replace(REF, "·") if row.kind == "value" else row.kind
            state = dump.sites.get(row.site or "", "bare") if row.kind == "value" else row.kind
            shown = "\\n".join(part for part in (row.name, label, row.type) if part)
            yield f"{indent}n{item} [label={_quote(shown)}, fillcolor={_quote(_COLORS[state])}];"


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
