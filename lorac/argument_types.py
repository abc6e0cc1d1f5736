"""Check values against type annotations: fields of dataclasses, arguments of public functions, settings in files.

NumPy's numbers count as numbers, lists count as tuples since files hold lists, and booleans do not count as numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping, Sequence

from lorac.errors import WrongType, short

_NUMBERS: Mapping[object, type] = {int: numbers.Integral, float: numbers.Real}


@functools.cache
def field_types(cls: type) -> Mapping[str, object]:
    """Return the types of a dataclass's fields; ``object`` where an annotation has no meaning outside its module."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a name that is imported for type checkers only, or that belongs to a function
        hints = {}
    return {field.name: hints.get(field.name, object) for field in dataclasses.fields(cls)}


def check_fields(value: object, owner: str | None = None) -> None:
    """Check the fields of a dataclass against their annotations.

    Args:
        value: the dataclass.
        owner: the name of whatever takes the fields, for the message; default: the class.

    Raises:
        WrongType: naming the field, its type and its default.
    """
    cls: type = type(value)
    for spec in dataclasses.fields(cls):
        given, expected = getattr(value, spec.name), field_types(cls)[spec.name]
        if not matches_type(given, expected):
            default = "" if spec.default is dataclasses.MISSING else f"; its default is {spec.default!r}"
            raise WrongType(
                f"{owner or cls.__name__} takes no {spec.name}={short(given)}",
                next_step=f"it takes {format_type(expected)}{default}",
            )


def check_type(value: object, expected: type | tuple[type, ...], what: str, *, next_step: str) -> None:
    """Check an argument.

    Args:
        value: the argument.
        expected: the classes that it may be an instance of.
        what: the argument as the subject of a sentence: "the first argument of lorac.sites".
        next_step: what to give instead.

    Raises:
        WrongType: the argument is an instance of none of them.
    """
    if not isinstance(value, expected):
        raise WrongType(f"{what} is {describe_value(value)}", next_step=next_step)


def describe_value(value: object) -> str:
    """Return a value as the object of a sentence: its class, and what it holds if that is a number, text or a list."""
    if value is None or isinstance(value, type):
        return "None" if value is None else f"the class {value.__name__}"
    noun = type(value).__name__
    article = "an" if noun[0] in "AEIOUaeiou" else "a"
    return f"{article} {noun}" + (
        f": {short(value)}" if isinstance(value, str | int | float | list | tuple | dict) else ""
    )


def format_type(annotation: object) -> str:
    """Return an annotation as it is written, without the names of modules."""
    inner = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(map(format_type, inner))
    if annotation is type(None):
        return "None"
    name = getattr(typing.get_origin(annotation) or annotation, "__name__", str(annotation))
    return (
        f"{name}[{', '.join('...' if one is Ellipsis else format_type(one) for one in inner)}]" if inner else str(name)
    )


def matches_type(value: object, annotation: object) -> bool:
    """Return whether a value fits an annotation; an annotation that is not checkable fits everything."""
    origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and _items_match(value, inner or (object, ...))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        keys, values = inner or (object, object)
        return isinstance(value, Mapping) and all(
            matches_type(k, keys) and matches_type(v, values) for k, v in value.items()
        )
    if origin in _NUMBERS:
        return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
    is_checkable = isinstance(origin, type) and origin is not typing.Any and not getattr(origin, "_is_protocol", False)
    return not is_checkable or isinstance(value, typing.cast(type, origin))


def _items_match(items: Sequence[object], annotations: Sequence[object]) -> bool:
    """Match the items of ``tuple[one, ...]``, ``Sequence[one]`` or ``tuple[one, other]``."""
    if len(annotations) == 1 or (len(annotations) == 2 and annotations[1] is Ellipsis):
        return all(matches_type(item, annotations[0]) for item in items)
    return len(items) == len(annotations) and all(map(matches_type, items, annotations))
