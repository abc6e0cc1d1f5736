"""A compiled model as a program for torch's own tools, and the tensors of its slots."""

from collections.abc import Mapping

from torch import Tensor
from torch.export import ExportedProgram

from lorac.backends.aoti.dialect import make_plain_program
from lorac.frontend.components import check_component
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.graph.nodes import SLOTS_KEYWORD
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import compose_choice, fill_slots
from lorac.ir.slots.places import as_place
from lorac.session.lowering.lower import lower_model, retarget
from lorac.session.session import Session

_TARGET = "aoti"
"""The target whose graphs torch's tools take."""


def export_program(session: Session, choice: Choice, component: str) -> ExportedProgram:
    """Return a graph of a session's model as a program of aten ops (``Compiled.export_program``)."""
    other = retarget(session, _TARGET)
    graphs = lower_model(other, session.options.aux).graphs
    graph = graphs[check_component(component, graphs)]
    filled = fill_slots(graph.plans, compose_choice(other.plans, session.pool, choice, session.base), session.base)
    slots = collect_slot_tensors(graph.slots, graph.plans, filled)
    return make_plain_program(graph, slots, constant=session.mode == "baked")


def program_slots(session: Session, program: ExportedProgram, choice: Choice) -> dict[str, Tensor]:
    """Return the tensors of a choice for the slots of an exported program (``Compiled.program_slots``)."""
    _, named = program.example_inputs or ((), {})
    examples: Mapping[str, Tensor] = {**named}.get(SLOTS_KEYWORD, {})
    places = {name: name.rpartition(":") for name in examples}
    slots = {name: SlotInput(name, path, role, node="") for name, (path, _, role) in places.items()}
    plans = retarget(session, _TARGET).plans
    reached = select_reached_plans(slots, plans)
    filled = fill_slots(reached, compose_choice(plans, session.pool, choice, session.base), session.base)
    tensors = collect_slot_tensors(slots, reached, filled)
    return {
        name: tensor if tensor.dim() == examples[name].dim() else as_place(tensor, by_token=slots[name].by_token)
        for name, tensor in tensors.items()
    }
