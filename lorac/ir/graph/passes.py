"""What a pass is, and what it says about what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lorac.ir.graph.graph import Graph, Level


@dataclass(frozen=True)
class Skip:
    """Something a pass left as it was.

    Attributes:
        where: a site's path, a node's name, or the graph's where all of it was left.
        why: the reason, to be read after "left alone: ".
    """

    where: str
    why: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did to a graph.

    Attributes:
        changed: whether the graph is another than before.
        skipped: what the pass is for, but left as it was.
        notes: what a caller of the program should know about it, each in a sentence.
    """

    changed: bool
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a graph; its options are the dataclass's fields.

    A pass that stays on its level may run twice: the second run changes nothing and says so. One that leaves its level
    runs once, since the graph is no longer at the level it reads.

    Attributes:
        name: what pipelines, dumps and messages call it.
        reads: the level of the graphs it takes. The runner (``lorac.passes.pipelines``) sees to it.
        leaves: the level it brings them to. The runner sets it, so that a pass cannot claim one and leave another.
    """

    name: ClassVar[str]
    reads: ClassVar[Level]
    leaves: ClassVar[Level]

    @abstractmethod
    def apply(self, graph: Graph) -> PassResult:
        """Edit a graph of level ``reads`` in place; ``level`` itself is the runner's to set."""
