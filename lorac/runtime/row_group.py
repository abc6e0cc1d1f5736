"""Rows of a batch that one call computes."""

from dataclasses import dataclass, field

from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.held_choice import HeldChoice


@dataclass(eq=False)
class RowGroup:
    """Rows of a batch that one call computes, with one choice of adapters or each with its own.

    Attributes:
        choice: the choice of the first row.
        rows: the rows, in the order of the batch.
        states: the choice of each row, if rows of several choices may share a call; else empty.
    """

    choice: ChoiceSpec | HeldChoice
    rows: list[int] = field(default_factory=list)
    states: list[ChoiceState] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """Whether the rows have several choices."""
        return any(state is not self.states[0] for state in self.states)
