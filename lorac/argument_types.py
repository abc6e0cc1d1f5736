"""Check values against type annotations: fields of dataclasses, arguments of public functions, settings in files.

A field's limits are next to its type: ``Annotated[int, Bounds(1)]``, ``Annotated[str, OneOf(NAMES)]``.
NumPy's numbers count as numbers, lists count as tuples since files have lists, and booleans do not count as numbers.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias, cast

from lorac.errors import OptionError, WrongType, nearest_name, short

JsonMapping: TypeAlias = Mapping[str, typing.Any]
"""A JSON object, or values from it, that is only read; ``strict_json.JsonObject`` is the type for building one."""
Fields: TypeAlias = Mapping[str, typing.Any]
"""Values for a dataclass's fields by name, which the dataclass checks itself."""
Operands: TypeAlias = tuple[typing.Any, ...]
"""Operands of a node of a graph, or arguments of a call."""
_NUMBERS: Mapping[object, type] = {int: numbers.Integral, float: numbers.Real}


class Limit(ABC):
    """A limit of a field's values beyond their type; None and values of other types are ignored."""

    @abstractmethod
    def admits(self, value: object, fields: Mapping[str, object]) -> bool:
        """Return whether a field may have this value, given the other fields of its dataclass."""

    @abstractmethod
    def describe(self, fields: Mapping[str, object]) -> str:
        """Describe the admitted values, as the object of a sentence."""

    def nearest(self, value: object) -> str | None:
        """Return the admitted value most like ``value``, or None."""
        return None


@dataclass(frozen=True)
class Bounds(Limit):
    """A range of a number, or of every item of a list.

    Attributes:
        least: the smallest number.
        most: the largest number, or the name of the field that gives it; None: no limit.
        exclusive: exclude ``least`` itself.
    """

    least: float
    most: float | str | None = None
    exclusive: bool = False

    def admits(self, value: object, fields: Mapping[str, object]) -> bool:
        items = value if isinstance(value, Sequence) else [value]
        # Compared without a cast: as a float, an integer above 2**53 is inexact, and above 1e308 is an error.
        given = [cast(float, item) for item in items if isinstance(item, numbers.Real)]
        end = fields.get(self.most) if isinstance(self.most, str) else self.most
        most = cast(float, end) if isinstance(end, numbers.Real) else math.inf
        return all((self.least < one if self.exclusive else self.least <= one) and one <= most for one in given)

    def describe(self, fields: Mapping[str, object]) -> str:
        first = f"numbers above {self.least}" if self.exclusive else f"numbers from {self.least}"
        named = f"{self.most}={fields.get(self.most)}" if isinstance(self.most, str) else self.most
        return first if named is None else f"{first} to {named}"


@dataclass(frozen=True)
class OneOf(Limit):
    """A choice among names; ``also`` describes the admitted values that are not names."""

    names: Collection[str]
    also: str = ""

    def admits(self, value: object, fields: Mapping[str, object]) -> bool:
        return not isinstance(value, str) or value in self.names

    def describe(self, fields: Mapping[str, object]) -> str:
        return ", ".join(self.names) + self.also

    def nearest(self, value: object) -> str | None:
        return nearest_name(str(value), self.names)


Count: TypeAlias = Annotated[int, Bounds(1)]
Positive: TypeAlias = Annotated[float, Bounds(0, exclusive=True)]
Rate: TypeAlias = Annotated[float, Bounds(0, 1)]
Seed: TypeAlias = Annotated[int, Bounds(-(2**63), 2**64 - 1)]
"""A seed for ``torch.Generator.manual_seed``, an int64 or uint64."""


@functools.cache
def field_types(cls: type) -> Mapping[str, object]:
    """Return the types of a dataclass's fields; ``object`` where an annotation has no meaning outside its module."""
    hints = _read_hints(cls, limits=False)
    return {field.name: hints.get(field.name, object) for field in dataclasses.fields(cls)}


@functools.cache
def field_limits(cls: type) -> Mapping[str, tuple[Limit, ...]]:
    """Return field -> limits, for the fields of a dataclass that have limits."""
    found = {name: tuple(_iterate_limits(hint)) for name, hint in _read_hints(cls, limits=True).items()}
    return {name: limits for name, limits in found.items() if limits}


def _read_hints(cls: type, *, limits: bool) -> Mapping[str, object]:
    try:
        return typing.get_type_hints(cls, include_extras=limits)
    except NameError:  # a name that is imported for type checkers only, or that belongs to a function
        return {}


def _iterate_limits(annotation: object) -> Iterator[Limit]:
    if typing.get_origin(annotation) is Annotated:
        yield from (extra for extra in typing.get_args(annotation) if isinstance(extra, Limit))
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _iterate_limits(inner)


def broken_limit(cls: type, name: str, value: object, fields: Mapping[str, object]) -> Limit | None:
    """Return the first limit of a field that a value breaks, or None."""
    return next((limit for limit in field_limits(cls).get(name, ()) if not limit.admits(value, fields)), None)


def check_fields(value: object, owner: str | None = None) -> None:
    """Check the fields of a dataclass against their annotations.

    Args:
        value: the dataclass.
        owner: the name of the function or class that takes the fields, for the message; default: the class.

    Raises:
        WrongType: a value has the wrong type; the message names the field, its type and its default.
        OptionError: a value is outside the field's limits, which the message names.
    """
    cls: type = type(value)
    fields = {spec.name: getattr(value, spec.name) for spec in dataclasses.fields(cls)}
    for spec in dataclasses.fields(cls):
        given, expected = fields[spec.name], field_types(cls)[spec.name]
        what = f"{owner or cls.__name__} takes no {spec.name}={short(given)}"
        default = "" if spec.default is dataclasses.MISSING else f"; its default is {spec.default!r}"
        if not matches_type(given, expected):
            raise WrongType(what, next_step=f"it takes {format_type(expected)}{default}")
        if (limit := broken_limit(cls, spec.name, given, fields)) is not None:
            raise OptionError(
                what, nearest=limit.nearest(given), next_step=f"it takes {limit.describe(fields)}{default}"
            )


def check_type(value: object, expected: type | tuple[type, ...], what: str, *, next_step: str) -> None:
    """Check that an argument is an instance of an expected class.

    Args:
        value: the argument.
        expected: the classes that it may be an instance of.
        what: the argument as the subject of a sentence: "the first argument of lorac.sites".
        next_step: a step that corrects it.

    Raises:
        WrongType: the argument is an instance of none of these classes.
    """
    if not isinstance(value, expected):
        raise WrongType(f"{what} is {describe_value(value)}", next_step=next_step)


def describe_value(value: object) -> str:
    """Describe a value as the object of a sentence: its class, and its content if that is a number, text or a list."""
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
    name = {"Mapping": "dict", "Sequence": "list"}.get(name, name)
    return (
        f"{name}[{', '.join('...' if one is Ellipsis else format_type(one) for one in inner)}]" if inner else str(name)
    )


def matches_type(value: object, annotation: object) -> bool:
    """Return whether a value fits an annotation; an annotation that is not checkable fits everything."""
    if annotation is str:  # the fast path, for thousands of names in a description
        return isinstance(value, str)
    origin, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        each = inner or (object, ...)
        if len(each) == 1 or each[1:] == (Ellipsis,):  # Sequence[one] or tuple[one, ...], not tuple[one, other]
            return all(matches_type(item, each[0]) for item in value)
        return len(value) == len(each) and all(map(matches_type, value, each))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        keys, values = inner or (object, object)
        return isinstance(value, Mapping) and all(
            matches_type(k, keys) and matches_type(v, values) for k, v in value.items()
        )
    if origin in _NUMBERS:
        return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
    is_checkable = isinstance(origin, type) and origin is not typing.Any and not getattr(origin, "_is_protocol", False)
    return not is_checkable or isinstance(value, typing.cast(type, origin))
