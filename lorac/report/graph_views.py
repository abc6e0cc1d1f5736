"""``compiled.graph``: what was captured and how the passes changed it, to print, compare and draw.

Kept is text only (``lorac.report.dump``), never the graph or a weight. The adapters at the sites are looked up when a
graph is printed, so they are those of that moment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorac.errors import Unavailable, nearest_name
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import Skip
from lorac.report.dump import Dump, dump
from lorac.report.graphviz import to_dot
from lorac.report.picture.page import to_html
from lorac.report.picture.page_data import PictureContext
from lorac.report.printer import AdapterNotes, diff_dumps, to_text
from lorac.report.sections import extract_module
from lorac.report.terms import describe_terms, describe_variant

CAPTURE, EMITTED = "capture", "emitted"
"""The first stage of a graph, and the one after all passes: the program that the target runs."""


class PassHistory:
    """What the passes did to each graph. An observer of ``run_pipeline``.

    Attributes:
        dumps: graph -> pass that changed it -> how it looked then.
        skips: graph -> pass -> what the pass left as it was, and why.
    """

    def __init__(self) -> None:
        self.dumps: dict[str, dict[str, Dump]] = {}
        self.skips: dict[str, dict[str, tuple[Skip, ...]]] = {}

    def record(self, stage: str, graph: Graph) -> None:
        """Note how a graph looks after ``stage``."""
        if stage == CAPTURE:
            self.dumps[graph.name] = {}
        self.dumps.setdefault(graph.name, {})[stage] = dump(graph)


def _no_emission() -> None:
    """Of a target that runs the host itself."""


class GraphView:
    """One graph: its latest stage, and the earlier ones.

    Args:
        dumps: stage -> dump, in order.
        facts: the adapters at the sites, as they now are, and what else a page tells.
        stage: which stage to show; default: the last.
        skipped: pass -> what it left as it was.
        emission: the program that the target runs; None where it runs the host itself.

    Attributes:
        skipped: pass -> what it left as it was, each with its place and the reason.
    """

    def __init__(
        self,
        dumps: Mapping[str, Dump],
        facts: Callable[[], PictureContext],
        stage: str | None = None,
        skipped: Mapping[str, tuple[Skip, ...]] | None = None,
        emission: Callable[[], Dump | None] = _no_emission,
    ) -> None:
        self._dumps, self._facts, self.skipped, self._emission = dumps, facts, dict(skipped or {}), emission
        self._stage = stage or list(dumps)[-1]

    @property
    def dump(self) -> Dump:
        """The rows shown."""
        return self._dumps[self._stage]

    @property
    def level(self) -> str:
        """``"host"``, ``"adapted"``, ``"expanded"`` or ``"target"``."""
        return self.dump.level

    @property
    def stages(self) -> tuple[str, ...]:
        """``"capture"`` and the passes that changed the graph, in order."""
        return tuple(self._dumps)

    def after(self, stage: str) -> GraphView:
        """The graph as it was after a pass.

        Raises:
            Unavailable: no such pass changed it.
        """
        if stage not in self._dumps:
            raise Unavailable(
                f"'{stage}' is no stage of this graph",
                nearest=nearest_name(stage, self._dumps) or ", ".join(self._dumps),
                next_step="`stages` lists them",
            )
        return self._with(self._dumps, stage)

    @property
    def emitted(self) -> GraphView:
        """The program that the target runs, after all its rewrites.

        Raises:
            Unavailable: the target runs the host's own modules.
        """
        found = self._emission()
        if found is None:
            raise Unavailable(
                "this target emits no program: it runs the host's own modules",
                next_step="lorac.compile(..., target='onnxruntime') emits one",
            )
        return self._with({**self._dumps, EMITTED: found}, EMITTED)

    def _with(self, dumps: Mapping[str, Dump], stage: str) -> GraphView:
        return GraphView(dumps, self._facts, stage, self.skipped, self._emission)

    def at(self, path: str) -> GraphView:
        """Only what lies inside a module.

        Raises:
            Unavailable: nothing of the graph lies there.
        """
        found = {
            stage: extract_module(dump, path) for stage, dump in self._dumps.items() if _contains_module(dump, path)
        }
        if self._stage not in found:
            raise Unavailable(
                f"nothing of graph '{self.dump.name}' lies inside '{path}'",
                nearest=nearest_name(path, self.dump.sites),
                next_step="print(compiled.graph) shows the modules",
            )
        return self._with(found, self._stage)

    def diff(self, other: GraphView | None = None) -> str:
        """What changed from the capture, or from another view, to this one; empty where nothing did."""
        before = next(iter(self._dumps.values())) if other is None else other.dump
        return diff_dumps(before, self.dump, self._facts().notes)

    def to_dot(self) -> str:
        """The graph in Graphviz's language."""
        return to_dot(self.dump, self._facts().notes)

    def to_html(self, path: str | Path) -> Path:
        """Write a page that draws the graph and needs nothing else; returns its path."""
        return _write_page(path, {self.dump.name: self}, self._facts())

    def drawn(self) -> dict[str, Dump]:
        """Stage -> how the graph looked then, what was emitted last."""
        found = self._emission()
        return dict(self._dumps) if found is None else {**self._dumps, EMITTED: found}

    def steps(self) -> Iterator[tuple[str, str]]:
        """(stage, what it changed) of each pass."""
        notes = self._facts().notes
        for before, after in itertools.pairwise(self._dumps):
            yield after, diff_dumps(self._dumps[before], self._dumps[after], notes)

    def __str__(self) -> str:
        return to_text(self.dump, self._facts().notes)

    def __repr__(self) -> str:
        return f"<graph {self.dump.name} @{self.level}, {len(self.dump.rows)} values>"


class GraphViews(Mapping[str, GraphView]):
    """Name -> graph; printing prints all."""

    def __init__(self, views: Mapping[str, GraphView], facts: Callable[[], PictureContext]) -> None:
        self._views, self._facts = views, facts

    def __getitem__(self, name: str) -> GraphView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def diff(self) -> str:
        """What the passes changed, graph by graph."""
        return "\n".join(text for view in self._views.values() if (text := view.diff()))

    def to_dot(self) -> str:
        """All graphs in Graphviz's language, one after another."""
        return "\n".join(view.to_dot() for view in self._views.values())

    def to_html(self, path: str | Path) -> Path:
        """Write a page that draws all graphs and needs nothing else; returns its path."""
        return _write_page(path, self._views, self._facts())

    def __str__(self) -> str:
        return "\n".join(str(view) for view in self._views.values())

    def __repr__(self) -> str:
        return f"<graphs {', '.join(self._views)}>"


def collect_graphs(compiled: Any) -> GraphViews:
    """The graphs of a compiled model; target eager captures its host now, in eval mode.

    Of a model that was loaded, the program that its target runs is all there is.

    Raises:
        Unavailable: it was loaded from a file, and its target runs no program.
        CaptureError, ExampleInputsNeeded: the host does not trace.
    """
    stages = compiled.services.stages()
    listing = functools.cache(compiled.engine.listing)
    dumps = stages.dumps or {name: {EMITTED: dump} for name, dump in listing().items()}
    if not dumps:
        raise Unavailable(
            "the graph of a model that was loaded from an artefact is not kept",
            next_step="compile from the model to print it",
        )
    captured = [stages[CAPTURE] for stages in dumps.values() if CAPTURE in stages]
    calls = {site: count for dump in captured for site, count in dump.calls.items()}

    def facts() -> PictureContext:
        return collect_facts(compiled, calls)

    def view(name: str) -> GraphView:
        skips, emission = stages.skips.get(name), functools.partial(_listed_graph, listing, name)
        return GraphView(dumps[name], facts, skipped=skips, emission=emission)

    return GraphViews({name: view(name) for name in dumps}, facts)


def _listed_graph(listing: Callable[[], Mapping[str, Dump]], name: str) -> Dump | None:
    return listing().get(name)


def collect_facts(compiled: Any, calls: Mapping[str, int]) -> PictureContext:
    """What a printed graph and a page tell of a compiled model's adapters."""
    adapters = compiled.adapters
    notes = AdapterNotes(
        adapters={name: describe_variant(adapter.variant) for name, adapter in adapters.items()},
        terms=describe_terms(compiled.pool, compiled.plans, mode=compiled.mode, snapshot=compiled.snapshot),
        trainable=_count_trainable(adapters),
        calls=calls,
    )
    return PictureContext(
        explanation=compiled.explain(),
        notes=notes,
        parameters={name: _count_parameters(adapter) for name, adapter in adapters.items()},
    )


def _count_parameters(adapter: Any) -> int:
    """Numbers that an adapter holds, positions aside; what several sites share counts once."""
    return sum(tensor.numel() for tensor in adapter.parameters() if tensor.is_floating_point())


def _count_trainable(adapters: Mapping[str, Any]) -> dict[str, int]:
    """Site path -> elements that train; a tensor shared by several sites counts at the first."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for path, tensor in itertools.chain.from_iterable(map(_tensors_by_module, adapters.values())):
        if tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            counts[path] = counts.get(path, 0) + tensor.numel()
    return counts


def _tensors_by_module(adapter: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter with the path of the module it belongs to."""
    yield from ((path, t) for path, tensors in adapter.tensors.items() for t in tensors.values())
    yield from ((fqn.rpartition(".")[0], t) for fqn, t in adapter.replaced.items())


def _contains_module(dump: Dump, path: str) -> bool:
    try:
        extract_module(dump, path)
    except KeyError:
        return False
    return True


def _write_page(path: str | Path, views: Mapping[str, GraphView], facts: PictureContext) -> Path:
    target = Path(path)
    target.write_text(to_html({name: view.drawn() for name, view in views.items()}, facts), encoding="utf-8")
    return target
