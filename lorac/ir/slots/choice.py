"""Choices of active adapters, with strengths and ranks: as ``swap`` takes them, and in canonical form."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorac.argument_types import check_fields
from lorac.errors import AdapterNotFound, ChoiceError, list_some, nearest_name, short


@dataclass(frozen=True)
class Active:
    """The strength and rank with which an adapter is active.

    Attributes:
        strength: t in W + t·(W' − W).
        rank: number of first components to use, for methods that allow it; None uses all.
    """

    strength: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


AS_TRAINED = Active()
"""The value for an adapter that is activated by name only."""
Choice = tuple[tuple[str, Active], ...]
"""Active adapters sorted by name, the order in which mixtures are summed; () is the base."""

ChoiceSpec = str | Mapping[str, "float | Active"] | None


_STRENGTH_HINT = "a strength is a number: 0 is off, 1 is as trained"

_LISTED = 20
"""Number of adapters that a message names."""
UNSET: Any = object()
"""Value of a choice argument that was not passed: the active choice is used."""


def parse_choice(spec: ChoiceSpec, known: Collection[str]) -> Choice:
    """Convert a choice to its canonical form.

    Args:
        spec: a name, ``{name: strength or Active}``, or None for the base.
        known: the names of the adapters.

    Raises:
        AdapterNotFound: no adapter has one of the names.
        ChoiceError: ``spec`` is of another type, or a strength is not a finite number.
    """
    if spec is None:
        return ()
    if isinstance(spec, str):
        spec = {spec: 1.0}
    if not isinstance(spec, Mapping):
        step = "give a name, {name: strength}, or None"
        if isinstance(spec, list | set) and spec and all(isinstance(name, str) for name in spec):  # as PEFT takes it
            step = f"give {dict.fromkeys(sorted(spec), 1.0)}; a list is one choice per row, as adapters= in a call"
        raise ChoiceError(f"a choice of adapters cannot be {short(spec)}", next_step=step)
    active: dict[str, Active] = {}
    for name, value in spec.items():
        require_adapter(name, known)
        if isinstance(value, Active):
            active[name] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            active[name] = AS_TRAINED if value == 1 else Active(float(value))
        else:
            raise ChoiceError(f"the strength of '{name}' is {value!r}, which is not a number", next_step=_STRENGTH_HINT)
        strength, rank = active[name].strength, active[name].rank
        if not math.isfinite(strength):
            raise ChoiceError(f"the strength {strength} of '{name}' is not finite", next_step=_STRENGTH_HINT)
        if rank is not None and rank < 1:
            raise ChoiceError(f"'{name}' cannot be truncated to rank {rank}", next_step="ranks start at 1")
    return tuple((name, active[name]) for name in sorted(active) if active[name].strength != 0)


def choice_strengths(choice: Choice) -> dict[str, float]:
    """Return a choice as name -> strength."""
    return {name: active.strength for name, active in choice}


def describe_choice(choice: Choice) -> str:
    """Format a choice in one line."""
    return ", ".join(f"{name}*{active.strength:g}" for name, active in choice) or "none"


def require_adapter(name: object, known: Collection[str]) -> None:
    """Raise ``AdapterNotFound`` unless ``name`` is registered."""
    if name in known:
        return
    names = sorted(known)
    raise AdapterNotFound(
        f"no adapter is called {short(name)}",
        nearest=nearest_name(str(name), names) or list_some(names, _LISTED, quote="") or None,
        next_step="give it in adapters=, or add it by add_adapter(source, name=...)",
    )
