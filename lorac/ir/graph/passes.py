"""The base class of passes, and their result."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lorac.ir.graph.graph import Graph, Level, Skip


@dataclass(frozen=True)
class PassResult:
    """The result of one pass.

    Attributes:
        changed: whether the pass changed the graph.
        skipped: the places that the pass left alone, with reasons.
        notes: sentences for whoever calls the program.
        details: further data, of a class that the pass defines, or None.
    """

    changed: bool
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    details: object = None


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a graph; its options are the dataclass's fields.

    A pass that keeps its level may run twice: the second run changes nothing and reports that. A pass that leaves its
    level runs once, since the graph is no longer at the level that it reads.

    Attributes:
        name: in pipelines, dumps and messages.
        reads: the level of the graphs that it takes, checked by ``lorac.ir.graph.pass_runner.run_pipeline``.
        leaves: the level of the graphs afterwards, set by the runner.
    """

    name: ClassVar[str]
    reads: ClassVar[Level]
    leaves: ClassVar[Level]

    @abstractmethod
    def apply(self, graph: Graph) -> PassResult:
        """Edit a graph of level ``reads`` in place, except its ``level``."""
