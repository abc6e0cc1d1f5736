"""Names of hyper-parameters in other libraries, and the error for a hyper-parameter that a method lacks."""

from collections.abc import Collection, Mapping, Sequence

from lorac.errors import FormatError, nearest_name, short

_ALIASES = {
    "target_modules": "targets",
    "target_parameters": "parameters",
    "layers_to_transform": "layers",
    "rank": "r",
}
"""Name in PEFT or in common use -> lorac's name."""
_SUFFIX = "_modules"
"""Suffix of some of PEFT's names, and of none of lorac's."""


def translate_name(name: str, known: Collection[str]) -> str | None:
    """Return lorac's name for a hyper-parameter that another library calls ``name``; None if there is none.

    PEFT prefixes some names with the method's name.
    """
    _, _, rest = name.partition("_")
    return next((own for own in (_ALIASES.get(name), rest, name.removesuffix(_SUFFIX)) if own in known), None)


def unknown_field_error(
    method: str, known: Sequence[str], common: Collection[str], values: Sequence[object], fields: Mapping[str, object]
) -> FormatError:
    """Return the error for unknown or positional hyper-parameters; it suggests the call that was probably meant.

    Args:
        method: the name of the method's class.
        known: the names of the method's hyper-parameters, in order.
        common: the names of the hyper-parameters that all methods have.
        values: the positional arguments.
        fields: the keyword arguments.
    """
    unknown = next((name for name in fields if name not in known), None)
    if unknown is None:
        own = [name for name in known if name not in common]
        call = _format_call(method, [*zip(own, values, strict=False), *fields.items()])
        return FormatError(
            f"{method} takes its hyper-parameters by name", next_step=f"write {call}", code="unknown_field"
        )
    translated = {name: name if name in known else translate_name(name, known) for name in fields}
    complete = None not in translated.values() and not values
    call = _format_call(method, [(translated[name] or name, value) for name, value in fields.items()])
    return FormatError(
        f"{method} has no hyper-parameter '{unknown}'",
        nearest=translated[unknown] or nearest_name(unknown, known),
        next_step=f"write {call}" if complete else f"it has {', '.join(known)}",
        code="unknown_field",
    )


def _format_call(method: str, arguments: Sequence[tuple[str, object]]) -> str:
    return f"{method}({', '.join(f'{name}={short(value)}' for name, value in arguments)})"
