"""Whether a value of a file is what a method's field takes, as its annotation says."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from lorac.variants.base import Variant, dataclass_fields


@functools.cache
def kinds_of(variant: type[Variant]) -> Mapping[str, Any]:
    """The types of a method's fields; anything goes where the annotation means nothing outside its module."""
    try:
        hints = typing.get_type_hints(variant)
    except NameError:  # a name that is imported for type checkers alone
        hints = {}
    return {name: hints.get(name, Any) for name in dataclass_fields(variant)}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON, methods in it already made, is of a kind: tuples are lists there."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list) and _items_fit(value, inner or (Any, ...))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        of_keys, of_values = inner or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, of_keys) and fits(v, of_values) for k, v in value.items())
    return _is(value, kind)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind that has no parts; true and false are no numbers."""
    if kind in (Any, object):
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)


def _items_fit(items: Sequence[Any], kinds: Sequence[Any]) -> bool:
    """Items of ``tuple[kind, ...]`` or ``Sequence[kind]``, or of ``tuple[one, other]``."""
    if len(kinds) == 1 or (len(kinds) == 2 and kinds[1] is Ellipsis):
        return all(fits(item, kinds[0]) for item in items)
    return len(items) == len(kinds) and all(map(fits, items, kinds))
