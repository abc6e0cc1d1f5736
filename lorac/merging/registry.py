"""Registry of the ways of merging, and reader of their options."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from lorac.discovery import find_classes
from lorac.errors import ChoiceError, check_known, nearest_name, not_one_of
from lorac.merging import ways as _ways
from lorac.merging.way import Way


@functools.cache
def ways() -> dict[str, type[Way]]:
    """Return every way by name."""
    classes = find_classes(_ways, Way)  # type: ignore[type-abstract]  # the root of the search is abstract
    return {one.name: one for one in sorted(classes, key=operator.attrgetter("name"))}


SHORT: Mapping[str, Mapping[str, object]] = {"knots": {"space": "knots"}, "core": {"space": "core"}}
"""Short names for ``ties`` with certain options."""


def find_way(method: str) -> type[Way]:
    """Return the way with this name.

    Raises:
        OptionError: no way has this name.
    """
    name = "ties" if method in SHORT else method
    if name not in ways():
        raise not_one_of("there is no way of merging", method, [*ways(), *SHORT])
    return ways()[name]


def option_defaults(way: type[Way]) -> dict[str, object]:
    """Return the options of a way with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(way) if field.init}


def make_way(method: str, options: Mapping[str, object], names: Sequence[str]) -> Way:
    """Make a way with its options.

    Args:
        method: the name of the way.
        options: fields of the way; a value per adapter may be a mapping by adapter name.
        names: the adapters' names, in order.

    Raises:
        OptionError: there is no such way, the way has no such option, or a value is out of range.
        ChoiceError: an option is given per adapter, but not for exactly these adapters.
        WrongType: an option has another type.
    """
    way, options = find_way(method), {**SHORT.get(method, {}), **options}
    known = option_defaults(way)
    check_known(options, known, f"method '{method}' has no option")
    fields: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, list | tuple) and len(value) != len(names):
            raise ChoiceError(
                f"{name} has {len(value)} values for {len(names)} adapters",
                next_step="give one for all, or one for each",
            )
        fields[name] = tuple(order_by_name(name, value, names)) if isinstance(value, Mapping) else value
    return way(**fields)


def check_count(way: Way, count: int) -> None:
    """Raise ``ChoiceError`` if a way does not take this number of adapters."""
    if not way.least <= count <= (count if way.most is None else way.most):
        most = " or more" if way.most is None else "" if way.most == way.least else f" to {way.most}"
        raise ChoiceError(
            f"method '{way.name}' takes {way.least}{most} adapters, and there are {count}",
            next_step="give that many, or another method",
        )


def order_by_name(what: str, values: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """Return the values of a mapping in the order of the adapters.

    Raises:
        ChoiceError: an adapter has no value, or a value is for no adapter.
    """
    for name in [*values, *names]:
        if name not in names:
            raise ChoiceError(
                f"{what} names '{name}', which is not one of the adapters",
                nearest=nearest_name(str(name), names),
                next_step=f"they are {', '.join(names)}",
            )
        if name not in values:
            raise ChoiceError(f"{what} has no value for '{name}'", next_step="give one for each adapter")
    return [values[name] for name in names]
