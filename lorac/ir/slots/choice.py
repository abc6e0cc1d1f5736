"""What ``swap`` takes, in one canonical spelling: which adapters are active, how strongly, cut to which rank."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorac.argument_types import check_fields
from lorac.errors import AdapterNotFound, ChoiceError, nearest_name


@dataclass(frozen=True)
class Active:
    """An adapter that is on.

    Attributes:
        strength: t in W + t·(W' − W).
        rank: keep only the first ``rank`` components, where the method allows it.
    """

    strength: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


Choice = tuple[tuple[str, Active], ...]
"""Active adapters sorted by name; () is the base. Mixtures are summed in this order, whoever wrote them how."""

ChoiceSpec = str | Mapping[str, "float | Active"] | None


_STRENGTH_HINT = "a strength is a number: 0 is off, 1 is as trained"

UNSET: Any = object()
"""No choice was given: use the active one."""


def parse_choice(spec: ChoiceSpec, known: Collection[str]) -> Choice:
    """The canonical choice for what a user wrote.

    Args:
        spec: a name, ``{name: strength or Active}``, or None for the base.
        known: names there are.

    Raises:
        AdapterNotFound: a name nobody registered.
        ChoiceError: a strength that is not a finite number, or something that is no choice.
    """
    if spec is None:
        return ()
    if isinstance(spec, str):
        spec = {spec: 1.0}
    if not isinstance(spec, Mapping):
        raise ChoiceError(
            f"{spec!r} is no choice of adapters",
            next_step="give a name, {name: strength}, or None",
        )
    active = {name: _parse_active(name, value, known) for name, value in spec.items()}
    return tuple((name, active[name]) for name in sorted(active) if active[name].strength != 0)


def choice_strengths(choice: Choice) -> dict[str, float]:
    """A choice as users write it: name -> strength."""
    return {name: how.strength for name, how in choice}


def describe_choice(choice: Choice) -> str:
    """A choice in one line."""
    return ", ".join(f"{name}*{how.strength:g}" for name, how in choice) or "none"


def require_adapter(name: str, known: Iterable[str]) -> None:
    """Raise ``AdapterNotFound`` unless ``name`` is registered."""
    known = list(known)
    if name not in known:
        raise AdapterNotFound(
            f"no adapter is called '{name}'",
            nearest=nearest_name(name, known) or ", ".join(sorted(known)) or None,
            next_step="adapters= of compile, or add_adapter(source, name=...), makes one known",
        )


def _parse_active(name: str, value: object, known: Collection[str]) -> Active:
    require_adapter(name, known)
    if isinstance(value, Active):
        how = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        how = Active(float(value))
    else:
        raise ChoiceError(f"the strength of '{name}' is {value!r}, which is no number", next_step=_STRENGTH_HINT)
    if not math.isfinite(how.strength):
        raise ChoiceError(f"the strength of '{name}' is {how.strength}, which is not finite", next_step=_STRENGTH_HINT)
    if how.rank is not None and how.rank < 1:
        raise ChoiceError(f"'{name}' cannot be cut to rank {how.rank}", next_step="ranks start at 1")
    return how
