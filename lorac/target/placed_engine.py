"""The base of engines that run a stored program, whose slots are inputs and may have places for choices of rows."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from lorac.frontend.components import get_encoder_graph_name
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.placed_execution import why_shared
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import ROLES, branch_name, slot_name, strength_role
from lorac.ir.slots.rows import stack_places
from lorac.target.engine import BoundProgram, Engine

ContentT = TypeVar("ContentT")


class PlacedEngine(Engine[ContentT]):
    """Runs a program whose slots are inputs.

    Attributes:
        slots: slot inputs of all graphs by public name.
        shared_slots: graph -> the slots that all rows of a call share.
        plans: the slots of every site that the program reaches.
    """

    slots: Mapping[str, SlotInput]
    shared_slots: Mapping[str, frozenset[str]]
    plans: Mapping[str, SitePlan]

    @abstractmethod
    def slot_tensors(self, content: ContentT) -> Mapping[str, Tensor]:
        """Return the tensors of a choice by slot."""

    @abstractmethod
    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> BoundProgram[ContentT]:
        """Bind tensors to all slots."""

    def why_apart(self, snapshot: ComposedWeights, graph: str) -> str | None:
        both = (graph, get_encoder_graph_name(graph))
        shared = frozenset[str]().union(*(self.shared_slots[name] for name in both if name in self.shared_slots))
        for path, composed in snapshot.composed.items() if shared else ():
            branches = self.plans[path].branches if composed.branches and path in self.plans else ()
            roles = (*composed.roles, *(strength_role(branch_name(index)) for index in range(len(branches))))
            name = next((name for role in roles if (name := slot_name(path, role)) in shared), None)
            if name is not None:
                why = ROLES[self.slots[name].role].why_shared if self.slots[name].role in ROLES else ""
                why = why or why_shared(self.plans[path])
                return f"all rows of a call share '{name}'{why and f': {why}'}"
        return None

    def bind_rows(self, contents: Sequence[ContentT]) -> BoundProgram[ContentT]:
        """Lay out the choices' tensors one behind the other, in the slots that have places."""
        each = [self.placed_tensors(content) for content in contents]
        stacked = {name: stack_places([tensors[name] for tensors in each]) for name in each[0]}
        return dataclasses.replace(self.bind_places(contents[0], stacked), own=tuple(stacked.values()))

    def placed_tensors(self, content: ContentT) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.slot_tensors(content).items() if self.slots[name].placed}

    def bind_places(self, content: ContentT, places: Mapping[str, Tensor]) -> BoundProgram[ContentT]:
        return self.bind_tensors({**self.slot_tensors(content), **places})


def find_shared_slots(slots: Mapping[str, Mapping[str, SlotInput]]) -> dict[str, frozenset[str]]:
    """Return graph -> the slots that all rows of a call share, from the slot inputs of each graph."""
    return {graph: frozenset(slot.name for slot in own.values() if not slot.placed) for graph, own in slots.items()}
