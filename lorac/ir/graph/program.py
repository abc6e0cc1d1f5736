"""Program: the named graphs that are compiled together, over one set of weights, sites and slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorac.ir.graph.graph import Graph, SlotInput


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """One or more graphs that are swapped together.

    Attributes:
        graphs: name -> graph: ``"main"`` for a single model, and another name for its encoder if that runs by itself.
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
