"""What hyper-parameters are called elsewhere, and the error for one that a method does not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lorac.errors import FormatError, nearest_name, short

_ALIASES = {
    "target_modules": "targets",
    "target_parameters": "parameters",
    "layers_to_transform": "layers",
    "rank": "r",
}
"""Name of PEFT's, or in use -> the name of the same here. Of others of PEFT's a part falls away."""
_PART = "_modules"


def translate_name(name: str, known: Collection[str]) -> str | None:
    """The hyper-parameter that another library calls ``name``, or None: in PEFT the method's name stands before it."""
    _, _, rest = name.partition("_")
    return next((own for own in (_ALIASES.get(name), rest, name.removesuffix(_PART)) if own in known), None)


def unknown_field_error(
    method: str, known: Sequence[str], common: Collection[str], values: Sequence[object], fields: Mapping[str, object]
) -> FormatError:
    """The error for a method that is given what it does not have, with the call that is meant.

    Args:
        method: name of its class.
        known, common: names of its hyper-parameters, in order; of those that all methods have.
        values, fields: what it was given without a name, and by name.
    """
    strange = [name for name in fields if name not in known]
    if not strange:
        own = [name for name in known if name not in common]
        meant = [*zip(own, values, strict=False), *fields.items()]
        return FormatError(
            f"{method} takes its hyper-parameters by name",
            next_step=f"write {_call(method, meant)}",
            code="unknown_field",
        )
    first = strange[0]
    found = translate_name(first, known)
    meant = [
        (translate_name(name, known) or name if name in strange else name, value) for name, value in fields.items()
    ]
    whole = all(name in known for name, _ in meant) and not values
    return FormatError(
        f"{method} has no hyper-parameter '{first}'",
        nearest=found or nearest_name(first, known),
        next_step=f"write {_call(method, meant)}" if whole else f"it has {', '.join(known)}",
        code="unknown_field",
    )


def _call(method: str, meant: Sequence[tuple[str, object]]) -> str:
    return f"{method}({', '.join(f'{name}={short(value)}' for name, value in meant)})"
