"""A choice of adapters that stays as it is while it is held."""

from lorac.errors import ChoiceError
from lorac.ir.slots.choice import Choice, describe_choice
from lorac.runtime.choice_states import ChoiceState
from lorac.target.engine import BoundProgram, Engine


class HeldChoice:
    """A choice of adapters that ``compiled.hold`` gives, and that calls take as ``adapters=``.

    Args:
        program: the engine's program with the choice.
        state: the choice.
    """

    def __init__(self, program: BoundProgram, state: ChoiceState) -> None:
        self._program: BoundProgram | None = program
        self._state: ChoiceState | None = state
        self.choice: Choice = state.choice

    @property
    def state(self) -> ChoiceState:
        """The state of the choice.

        Raises:
            ChoiceError: the block that held it has ended.
        """
        if self._state is None:
            raise ChoiceError("the block that held this choice has ended", next_step="hold it anew: compiled.hold(...)")
        return self._state

    def program_of(self, engine: Engine) -> BoundProgram:
        """Return the engine's program with the choice.

        Raises:
            ChoiceError: the block that held it has ended, or it is another model's.
        """
        state = self.state
        assert self._program is not None
        if self._program.engine is not engine:
            raise ChoiceError(
                f"the choice {describe_choice(state.choice)} is held by another model",
                next_step="hold one of this model's adapters",
            )
        return self._program

    def end(self) -> None:
        """Let go of the adapters; what is bound to them is freed when nothing else holds it."""
        self._program = self._state = None

    def __repr__(self) -> str:
        return f"<held choice of {', '.join(name for name, _ in self.choice) or 'no adapters'}>"
