"""The adapters of a call of a pipeline, as each of its models takes them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real

from lorac.errors import ChoiceError
from lorac.ir.slots.choice import UNSET, ChoiceSpec, parse_choice
from lorac.runtime.choice_switch import HeldChoice
from lorac.session.compiled import Compiled

Adapters = ChoiceSpec | Sequence[ChoiceSpec]


@dataclass(frozen=True)
class RunningCall:
    """A call of a pipeline.

    Attributes:
        held: one choice for all images, or one for each prompt.
        shared: whether it is one for all.
        images: number of images of each prompt.
    """

    held: tuple[HeldChoice, ...]
    shared: bool
    images: int

    @property
    def choices(self) -> Adapters:
        """The choices, as ``adapters=`` of a call takes them."""
        each = [dict(one.choice) for one in self.held]
        return each[0] if self.shared else each

    def choose(self, rows: int) -> HeldChoice | list[HeldChoice]:
        """Return the choice for a call of a model, or one for each of its rows.

        A text encoder's rows are the prompts. A denoiser's are the images, and all of them again for each kind of
        guidance.

        Raises:
            ChoiceError: the rows are neither the prompts nor the images.
        """
        if self.shared:
            return self.held[0]
        each = list(self.held) if rows == len(self.held) else [one for one in self.held for _ in range(self.images)]
        times, rest = divmod(rows, len(each))
        if rest or not times:
            raise ChoiceError(
                f"there are {len(self.held)} choices of adapters for {rows} rows of a model",
                next_step="give one choice per prompt, or a single choice for all",
            )
        return each * times


@contextmanager
def hold_adapters(model: Compiled, adapters: Adapters, scale: float, images: int) -> Iterator[RunningCall]:
    """Hold the adapters of a call until it ends, so that a swap meanwhile takes effect in the next one.

    Args:
        adapters: a choice, or one for each prompt; ``UNSET`` for the active one.
        scale: multiplies the strengths.
        images: number of images of each prompt.

    Raises:
        AdapterNotFound, ChoiceError, Unavailable: as for ``compiled.hold``.
    """
    listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    choices: Sequence[ChoiceSpec] = adapters if listed else [adapters]  # type: ignore[assignment,list-item]  # either
    with ExitStack() as stack:
        held = [stack.enter_context(model.hold(_scale(model, choice, scale))) for choice in choices]
        yield RunningCall(tuple(held), shared=not listed, images=images)


def _scale(model: Compiled, choice: ChoiceSpec, scale: float) -> ChoiceSpec:
    if scale == 1:
        return choice
    scale = float(scale) if isinstance(scale, Real) else scale  # one of NumPy's too
    parse_choice({"scale": scale}, ["scale"])  # refuses all but numbers
    active = model.choice if choice is UNSET else parse_choice(choice, model.pool)
    return {name: replace(one, strength=one.strength * scale) for name, one in active}
