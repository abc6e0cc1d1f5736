"""Graph: one captured computation with its level and slot inputs.

A Graph wraps a ``torch.export`` program, whose fx graph, signature and state belong together. Only
``lorac.ir.graph.edit`` changes the signature.
"""

import enum
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch.fx
from torch.export import ExportedProgram

from lorac.ir.calls.interface import Interface
from lorac.ir.graph.nodes import find_sources
from lorac.ir.graph.symbolic_shapes import rename_symbols
from lorac.ir.sites.site import Site
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import is_parameter
from lorac.ir.traces.functions import find_aliased_arguments


class Level(enum.IntEnum):
    """The level to which a graph has been lowered."""

    TRACED = 0
    """As traced: repeated layers, and bodies of higher-order ops, are one op each."""
    HOST = 1
    """As captured: each call of a site is one ``lorac`` op."""
    ADAPTED = 2
    """One ``adapted`` op per call of a touched site; its slots are operands, and its computation is not expanded."""
    EXPANDED = 3
    """Adapted sites are lowered to aten, in their normal form."""
    TARGET = 4
    """Only ops that the backend supports."""


@dataclass(frozen=True)
class SlotInput:
    """A slot as an input of a graph.

    Attributes:
        name: public name, ``<site path>:<role>``, in the emitted program too.
        site: path of the site, or of the fused projection.
        role: a row of the table of roles, or a tensor of a branch (``lorac.ir.slots.roles``).
        node: name of the placeholder.
        members: the fused sites whose weights or biases are concatenated in the slot; empty for a single site.
        placed: whether it has a first axis of places, for rows with different adapters (``lorac.ir.slots.places``).
    """

    name: str
    site: str
    role: str
    node: str
    members: tuple[str, ...] = ()
    placed: bool = False

    @property
    def by_token(self) -> bool:
        """Whether its tensor is applied to each token of a segment; parameters of branches are not."""
        return not is_parameter(self.role)


@dataclass(frozen=True)
class FusedProjection:
    """Sites that read the same input, computed as one site with concatenated matrices.

    Attributes:
        sites: paths, in the order of their outputs.
        sizes: number of outputs of each site.
        plan: the slots of their weights and biases, which become constants; empty where slots are inputs.
    """

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    plan: SitePlan


@dataclass(frozen=True)
class Skip:
    """A place that a pass left unchanged.

    Attributes:
        where: a site's path, a node's name, or the graph's name for the whole graph.
        why: the reason, as it reads after "left alone: ".
    """

    where: str
    why: str


@dataclass(repr=False)
class Graph:
    """One captured computation.

    Attributes:
        name: which of the program's graphs it is.
        exported: the torch.export program.
        sites: every site of the model.
        plans: slots of the touched sites.
        interface: the inputs and outputs of a call, without slots and caches.
        level: the level to which it is lowered.
        slots: slot inputs by public name, in input order.
        projections: path -> sites that are computed as one; their calls have this path.
        axes: torch's symbols for sizes that vary -> their names.
        cache_inputs: public name of an input that holds a cache, its lengths or encoder outputs -> its placeholder.
        longest: the longest sequence that position tables admit; None without tables.
        skips: pass -> the places that it left unchanged, and why.
    """

    name: str
    exported: ExportedProgram
    sites: Mapping[str, Site]
    plans: Mapping[str, SitePlan]
    interface: Interface
    level: Level = Level.HOST
    slots: dict[str, SlotInput] = field(default_factory=dict)
    projections: dict[str, FusedProjection] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    cache_inputs: dict[str, str] = field(default_factory=dict)
    longest: int | None = None
    skips: dict[str, tuple[Skip, ...]] = field(default_factory=dict)

    @property
    def fx(self) -> torch.fx.Graph:
        """The fx graph."""
        return self.exported.graph

    def plan_of(self, path: str) -> SitePlan:
        """Return the plan at a path: of a fused projection, or of a site, whose plan may be empty."""
        projection = self.projections.get(path)
        return self.plans[path] if projection is None else projection.plan

    def add_outputs(self, nodes: Mapping[str, torch.fx.Node]) -> None:
        """Add extra outputs by name, after the other outputs."""
        from lorac.ir.graph.edit import add_outputs  # imports sympy, which loading a program does not need

        add_outputs(self.exported, nodes)
        known = self.interface
        outputs, extra = (*known.outputs, *nodes), (*known.extra_outputs, *nodes)
        self.interface = replace(known, outputs=outputs, extra_outputs=extra)

    def describe_types(self) -> None:
        """Record dtypes and sizes of the inputs and outputs in the interface."""
        inputs, outputs = self.interface.inputs, self.interface.outputs
        nodes: dict[str, object] = {node.name: node for node in self.placeholders() if node.name in inputs}
        (results,) = self.fx.output_node().args
        assert isinstance(results, tuple | list)
        nodes |= zip(outputs, list(results)[-len(outputs) :], strict=True) if outputs else ()
        types = {}
        for name, node in nodes.items():
            if isinstance(node, torch.fx.Node) and isinstance(value := node.meta.get("val"), torch.Tensor):
                sizes = ", ".join(rename_symbols(str(size), self.axes) for size in value.shape)
                types[name] = f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
        self.interface = replace(self.interface, types=types)

    def add_notes(self, *notes: str) -> None:
        """Add notes to the interface, for the program's callers."""
        self.interface = self.interface.with_notes(*notes)

    def replace_node(self, node: torch.fx.Node, value: torch.fx.Node) -> None:
        """Replace all uses of a node by another node, and erase the node."""
        node.replace_all_uses_with(value)
        self.fx.erase_node(node)

    def placeholders(self) -> list[torch.fx.Node]:
        """Return the input nodes, in signature order."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    def find(self, *targets: object) -> Iterator[torch.fx.Node]:
        """Return an iterator over the calls of the given targets; the current call may be edited."""
        wanted = set(targets)
        return iter([n for n in self.fx.nodes if n.op == "call_function" and n.target in wanted])

    def find_writes(self) -> list[torch.fx.Node]:
        """Return the calls of ops that write to an operand."""
        return [n for n in self.fx.nodes if n.op == "call_function" and find_aliased_arguments(n.target, True)]

    def reaching_outputs(self, further: Collection[torch.fx.Node] = ()) -> set[torch.fx.Node]:
        """Return the nodes from which an output or a node of ``further`` is computed.

        A write into a tensor, or into a view of the tensor, is among them where the tensor is.
        """
        writes, live = self.find_writes(), self._reaching(further)
        while found := {node for node in writes if node not in live and not live.isdisjoint(_whole(node))}:
            live = self._reaching({*live, *found})
        return live

    def _reaching(self, wanted: Collection[torch.fx.Node]) -> set[torch.fx.Node]:
        live = set(wanted)
        for node in reversed(self.fx.nodes):
            if node.op == "output" or not live.isdisjoint(node.users):
                live.add(node)
        return live

    def __repr__(self) -> str:
        return f"<graph {self.name} @{self.level.name.lower()}, {len(self.fx.nodes)} nodes>"

    def node(self, name: str) -> torch.fx.Node:
        """Return the node with this name."""
        return next(n for n in self.fx.nodes if n.name == name)


def find_written_operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the operands into which an op writes, by its schema."""
    return _aliased(node, writes=True)


def _aliased(node: torch.fx.Node, *, writes: bool) -> list[torch.fx.Node]:
    """Return the operands that an op writes into; without ``writes``, the operands that its results are views of."""
    if node.op != "call_function":
        return []
    places = [place for place, _ in find_aliased_arguments(node.target, writes) if place < len(node.args)]
    return [value for place in places if isinstance(value := node.args[place], torch.fx.Node)]


def _whole(write: torch.fx.Node) -> set[torch.fx.Node]:
    """Return the tensors that a write changes: the written operands, and the tensors of which they are views."""
    changed: set[torch.fx.Node] = set()
    pending = find_written_operands(write)
    while pending:
        node = pending.pop()
        changed.add(node)
        item = [node.args[0]] if node.target is operator.getitem else []
        pending += [value for value in (*item, *_aliased(node, writes=False)) if isinstance(value, torch.fx.Node)]
    return changed


def find_origins(node: torch.fx.Node) -> set[torch.fx.Node]:
    """Return a node, the nodes from which it is computed, and the writes into any of these."""
    writes, found, known = [each for each in node.graph.nodes if find_written_operands(each)], find_sources([node]), 0
    while len(found) != known:
        known = len(found)
        found |= find_sources(write for write in writes if not found.isdisjoint(_whole(write)))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """One or more graphs that are replaced together.

    Attributes:
        graphs: name -> graph: ``"main"`` for a single model, and another name for an encoder that runs by itself.
    """

    graphs: Mapping[str, Graph]

    @property
    def slots(self) -> dict[str, SlotInput]:
        """Slot inputs of all graphs by public name.

        A site that two graphs call, such as a shared embedding, has the same slots in both.
        """
        return {name: slot for graph in self.graphs.values() for name, slot in graph.slots.items()}

    def __repr__(self) -> str:
        return f"<program of {', '.join(map(repr, self.graphs.values()))}>"
