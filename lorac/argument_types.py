"""Whether a value is of the kind that an annotation says: fields of dataclasses, and what arguments are to be."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lorac.errors import WrongType, short

_NUMBERS = {int: numbers.Integral, float: numbers.Real}
"""Numbers of NumPy's are numbers too."""


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The kinds of a dataclass's fields; anything goes where an annotation means nothing outside its module."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers alone, or of a function's own
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls)}


def check_fields(value: object, owner: str | None = None) -> None:
    """Refuse a dataclass one of whose fields is of another kind than it is annotated with.

    Args:
        value: the dataclass.
        owner: what takes the fields, for the message; default: its class.

    Raises:
        WrongType: naming the field, its kind and its default.
    """
    cls: type = type(value)
    for spec in dataclasses.fields(value):  # type: ignore[arg-type]  # whoever calls is one
        given, kind = getattr(value, spec.name), field_types(cls)[spec.name]
        if not matches_type(given, kind):
            default = "" if spec.default is dataclasses.MISSING else f"; its default is {spec.default!r}"
            raise WrongType(
                f"{owner or cls.__name__} takes no {spec.name}={short(given)}",
                next_step=f"it takes {format_type(kind)}{default}",
            )


def check_type(value: object, kinds: type | tuple[type, ...], what: str, *, next_step: str) -> None:
    """Refuse an argument of another kind.

    Args:
        value: the argument.
        kinds: what it may be an instance of.
        what: what it is for, as the subject of a sentence: "the first argument of lorac.sites".
        next_step: what to give instead.

    Raises:
        WrongType: naming both.
    """
    if not isinstance(value, kinds):
        raise WrongType(f"{what} is {_describe_value(value)}", next_step=next_step)


def _describe_value(value: object) -> str:
    """A value by its kind, and as it is written where that is short."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    noun = type(value).__name__
    article = "an" if noun[0] in "AEIOUaeiou" else "a"
    written = f": {short(value)}" if isinstance(value, str | int | float | list | tuple | dict) else ""
    return f"{article} {noun}{written}"


def format_type(kind: Any) -> str:
    """An annotation as one writes it, without the modules that names come from."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(map(format_type, inner))
    if kind is type(None):
        return "None"
    name = getattr(typing.get_origin(kind) or kind, "__name__", str(kind))
    return (
        f"{name}[{', '.join('...' if one is Ellipsis else format_type(one) for one in inner)}]" if inner else str(name)
    )


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; lists count as tuples, and what is no kind of value admits anything."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and _items_match(value, inner or (Any, ...))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_keys, of_values = inner or (Any, Any)
        return isinstance(value, Mapping) and all(
            matches_type(k, of_keys) and matches_type(v, of_values) for k, v in value.items()
        )
    return _is_instance(value, origin)


def _is_instance(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that has no parts; true and false are no numbers."""
    if kind in _NUMBERS:
        return isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _items_match(items: Sequence[Any], kinds: Sequence[Any]) -> bool:
    """Items of ``tuple[kind, ...]`` or ``Sequence[kind]``, or of ``tuple[one, other]``."""
    if len(kinds) == 1 or (len(kinds) == 2 and kinds[1] is Ellipsis):
        return all(matches_type(item, kinds[0]) for item in items)
    return len(items) == len(kinds) and all(map(matches_type, items, kinds))
