"""Graph: one captured computation, its level, and the slot inputs it has been given.

A Graph wraps a ``torch.export`` program. Its fx graph, signature and state belong together:
``lorac.ir.graph.edit`` is the only place that changes the signature.
"""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.fx
from torch.export import ExportedProgram

from lorac.ir.multimodal_positions import MultimodalPositions
from lorac.ir.output_structure import OutputStructure
from lorac.ir.row_layout import RowLayout
from lorac.ir.sites import Site
from lorac.ir.sizes import SizeConstraints
from lorac.ir.slots.plans import SitePlan


class Level(enum.IntEnum):
    """How far a graph has been lowered."""

    HOST = 0
    """As captured: each call of a site is one ``lorac`` op."""
    ADAPTED = 1
    """One ``adapted`` op per call of a touched site, its slots among its operands, still opaque."""
    EXPANDED = 2
    """Adapted sites lowered to aten in their normal form."""
    TARGET = 3
    """Only ops the backend claims."""


@dataclass(frozen=True)
class SlotInput:
    """A slot as an input of a graph.

    Attributes:
        name: public name: ``<site path>:<role>``; survives into the emitted program.
        site: path of the site, or of the pack.
        role: a row of the table of roles, or what a branch holds (``lorac.ir.slots.roles``).
        node: name of the placeholder.
        members: of a pack's slot the sites whose tensors lie in it.
        sizes: of each of them how many outputs it has.
    """

    name: str
    site: str
    role: str
    node: str
    members: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class FusedProjection:
    """Sites that read the same input, computed as one whose matrix is theirs, one below the other.

    Attributes:
        sites: their paths, in the order in which their outputs lie.
        sizes: how many outputs each has.
        plan: the slots of all of them, as those of one site; empty where none of them is adapted.
    """

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    plan: SitePlan


@dataclass(repr=False)
class Graph:
    """One captured computation.

    Attributes:
        name: which of the program's graphs it is.
        exported: the torch.export program.
        sites: every site of the host.
        plans: slots of the touched sites.
        level: how far it is lowered.
        slots: slot inputs by public name, in input order.
        packs: path -> sites that are computed as one; their calls bear the pack's path.
        extra_outputs: names of outputs added behind the host's own (``aux``).
        axes: torch's symbols for sizes that vary -> their names.
        sizes: which sizes the host's inputs may have.
        structure: what the host answers around the graph's tensors; None where that is for the program itself to say.
        kept: inputs of a graph that keeps a cache, by the names they bear outside -> their placeholders.
        longest: the longest text that positions in tables admit; None where there are none.
        fixed: arguments of the host that are constants of the graph, as they were given when it was captured.
        positions: what makes the positions of text for calls without; None where they are no input, or always given.
        rows: how a call of another number of rows is one of several; None where the graph takes it as it is, or not.
        notes: what whoever calls the program should know about it, each in a sentence.
        checks: of the extra outputs, those that say whether values are as the model wants them -> the line that asks.
        unused: paths of planned sites that no output depends on, and that have no slots therefore.
    """

    name: str
    exported: ExportedProgram
    sites: Mapping[str, Site]
    plans: Mapping[str, SitePlan]
    level: Level = Level.HOST
    slots: dict[str, SlotInput] = field(default_factory=dict)
    packs: dict[str, FusedProjection] = field(default_factory=dict)
    extra_outputs: list[str] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    sizes: SizeConstraints = field(default_factory=SizeConstraints)
    structure: OutputStructure | None = None
    kept: dict[str, str] = field(default_factory=dict)
    longest: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    positions: MultimodalPositions | None = None
    rows: RowLayout | None = None
    notes: list[str] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    @property
    def fx(self) -> torch.fx.Graph:
        """The fx graph."""
        return self.exported.graph

    def plan_of(self, path: str) -> SitePlan:
        """The slots of what is called under a path: those of a pack, or of a site, which may have none."""
        pack = self.packs.get(path)
        return self.plans[path] if pack is None else pack.plan

    def placeholders(self) -> list[torch.fx.Node]:
        """Input nodes, in signature order."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    def find(self, *targets: object) -> Iterator[torch.fx.Node]:
        """Call nodes of the given targets, safe against edits of the node at hand."""
        wanted = set(targets)
        return iter([n for n in self.fx.nodes if n.op == "call_function" and n.target in wanted])

    def reaching_outputs(self, besides: Collection[torch.fx.Node] = ()) -> set[torch.fx.Node]:
        """The nodes that an output is computed from, or one of those given besides.

        What is written into a tensor, or into a view of one, counts wherever that tensor does.
        """
        writes = [node for node in self.fx.nodes if find_written_operands(node)]
        live = self._reaching(besides)
        while found := {node for node in writes if node not in live and not live.isdisjoint(_whole(node))}:
            live = self._reaching({*live, *found})
        return live

    def _reaching(self, wanted: Collection[torch.fx.Node]) -> set[torch.fx.Node]:
        live = set(wanted)
        for node in reversed(self.fx.nodes):
            if node.op == "output" or any(user in live for user in node.users):
                live.add(node)
        return live

    def __repr__(self) -> str:
        return f"<graph {self.name} @{self.level.name.lower()}, {len(self.fx.nodes)} nodes>"

    def node(self, name: str) -> torch.fx.Node:
        """The node called ``name``."""
        return next(n for n in self.fx.nodes if n.name == name)


def find_written_operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operands that an op writes to, as its schema says."""
    return _aliased(node, writes=True)


def _aliased(node: torch.fx.Node, *, writes: bool) -> list[torch.fx.Node]:
    """The operands that an op writes to, or of which it answers views."""
    if node.op != "call_function":
        return []
    found = [node.args[place] for place in _aliased_places(node.target, writes) if place < len(node.args)]
    return [value for value in found if isinstance(value, torch.fx.Node)]


@functools.lru_cache(maxsize=4096)
def _aliased_places(target: object, writes: bool) -> tuple[int, ...]:
    """Which operands of an op those are, read from its schema once: a graph is asked after every pass."""
    arguments = enumerate(schema.arguments) if (schema := getattr(target, "_schema", None)) is not None else ()
    return tuple(i for i, told in arguments if told.alias_info is not None and told.alias_info.is_write is writes)


def _whole(write: torch.fx.Node) -> set[torch.fx.Node]:
    """What a write changes: its operands, and the tensors that those are views of."""
    changed: set[torch.fx.Node] = set()
    pending = find_written_operands(write)
    while pending:
        node = pending.pop()
        changed.add(node)
        item = [node.args[0]] if node.target is operator.getitem else []
        pending += [value for value in (*item, *_aliased(node, writes=False)) if isinstance(value, torch.fx.Node)]
    return changed
