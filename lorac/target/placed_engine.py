"""The base class of engines that run a stored program with slots as inputs, which may have one place per choice."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from lorac.errors import InputMismatch, LoracError
from lorac.frontend.components import get_encoder_graph_name
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.buffers import FusedBuffer, make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.placed_execution import why_shared
from lorac.ir.slots.places import stack_places
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES, branch_name, slot_name, strength_role
from lorac.target.backend import OptionsT
from lorac.target.engine import BoundProgram, Engine, ProgramFiles


class ProgramGraph(Protocol):
    """One graph of a program.

    Attributes:
        interface: its inputs and outputs.
        slots: its slot inputs, by public name.
    """

    @property
    @abstractmethod
    def interface(self) -> Interface: ...

    @property
    @abstractmethod
    def slots(self) -> Mapping[str, SlotInput]: ...


GraphT = TypeVar("GraphT", bound=ProgramGraph)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedProgram(Generic[GraphT, OptionsT]):
    """A stored program with its graphs loaded, and everything else that an engine needs.

    Attributes:
        graphs: name -> the loaded graph.
        plans: the slots of every site.
        base: a reader of base weights that does not need the model.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the open files of the program and the base weights.
    """

    graphs: Mapping[str, GraphT]
    plans: Mapping[str, SitePlan]
    base: BaseReader
    mode: str
    files: ProgramFiles
    options: OptionsT


class PlacedEngine(Engine, Generic[GraphT]):
    """An engine for a program whose slots are inputs.

    Attributes:
        slots: the slot inputs of all graphs, by public name.
        shared_slots: graph -> the slots that all rows of a call share.
        plans: the slots of every site that the program computes.
        memory: in fused mode, slot -> the memory into which its weight is written.
    """

    files: ProgramFiles

    def __init__(self, program: LoadedProgram[GraphT, Any]) -> None:
        self.graphs, self.base, self.mode, self.files = program.graphs, program.base, program.mode, program.files
        self.fused = self.mode == "fused"
        self.interfaces = {name: graph.interface for name, graph in self.graphs.items()}
        self.slots = {name: slot for graph in self.graphs.values() for name, slot in graph.slots.items()}
        self.shared_slots = {
            name: frozenset(slot.name for slot in graph.slots.values() if not slot.placed)
            for name, graph in self.graphs.items()
        }
        self.plans = select_reached_plans(self.slots, program.plans)
        self.buffers, self.memory = self.allocate_weights() if self.fused else ({}, {})

    def allocate_weights(self) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
        """Allocate buffers for weights that are written in place; return them by site path, and memory by slot."""
        return make_fused_buffers(self.plans, self.base)

    @abstractmethod
    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> PlacedProgram:
        """Bind tensors to all slots."""

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> PlacedProgram:
        """Bind the tensors of a choice to the slots; a program with constant weights has none."""
        return self.bind_tensors({} if self.constant else collect_slot_tensors(self.slots, self.plans, slots))

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Do nothing, since graphs read the memory that was written."""

    def why_apart(self, snapshot: ComposedWeights, graph: str) -> str | None:
        if snapshot.prefix is not None and self.cache_spec(graph) is None:
            return "virtual tokens make its rows longer"
        both = (graph, get_encoder_graph_name(graph))
        shared = frozenset[str]().union(*(self.shared_slots[name] for name in both if name in self.shared_slots))
        for path, composed in snapshot.composed.items() if shared else ():
            branches = self.plans[path].branches if composed.branches and path in self.plans else ()
            roles = (*composed.roles, *(strength_role(branch_name(index)) for index in range(len(branches))))
            name = next((name for role in roles if (name := slot_name(path, role)) in shared), None)
            if name is not None:
                role = self.slots[name].role
                why = self.plans[path].why_shared(role) if role in ROLES else ""
                why = why or why_shared(self.plans[path])
                return f"all rows of a call share '{name}'{why and f': {why}'}"
        return None

    def bind_rows(self, programs: Sequence[BoundProgram]) -> BoundProgram:
        """Concatenate the choices' tensors along the axis of places, and bind them to the placed slots."""
        each = [program.placed_tensors() for program in programs]
        stacked = {name: stack_places([tensors[name] for tensors in each]) for name in each[0]}
        return dataclasses.replace(programs[0].with_places(stacked), own=tuple(stacked.values()))


@contextmanager
def translate_program_errors() -> Iterator[None]:
    """Translate errors of a stored program that runs inside the block.

    Raises:
        InputMismatch: the program raised, for example because ids are out of range.
    """
    try:
        yield
    except LoracError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputMismatch(
            f"the stored program cannot compute with these inputs: {type(error).__name__}: {reason}",
            next_step="compare them with its example inputs; if they agree, save the artifact again",
        ) from error


@dataclass(frozen=True, eq=False)
class PlacedProgram(BoundProgram, ABC):
    """A stored program with the tensors of one choice of adapters.

    Attributes:
        tensors: the tensor of each slot, by public name.
    """

    engine: PlacedEngine[Any]
    tensors: Mapping[str, Tensor]

    def placed_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if self.engine.slots[name].placed}

    def with_places(self, places: Mapping[str, Tensor]) -> PlacedProgram:
        return self.engine.bind_tensors({**self.tensors, **places})
