"""Merging the methods of single sites into one method, since files have a rank and an alpha per module."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorac.argument_types import Fields
from lorac.ir.sites.patterns import MAX_PATTERN_LENGTH
from lorac.variants.base import Variant
from lorac.variants.union import Union


def join_methods(methods: Mapping[str, Variant]) -> Variant:
    """Return one method that equals the given method at each path.

    Methods that differ only in fields with patterns, such as ranks, are merged into one method with patterns; methods
    that differ otherwise become parts of a ``Union``.
    """
    groups: list[tuple[Variant, dict[str, Variant]]] = []
    for path, method in methods.items():
        defaults: Fields = {field.name: field.default for field in dataclasses.fields(method)}
        patterned: Fields = {name: defaults[name] for name in method.patterned.values()}
        common = dataclasses.replace(method, **patterned)
        group = next((members for kind, members in groups if kind == common), None)
        if group is None:
            group = {}
            groups.append((common, group))
        group[path] = method
    parts = [_join_group(members) for _, members in groups]
    return parts[0] if len(parts) == 1 else Union.over(*parts)


def _join_group(methods: Mapping[str, Variant]) -> Variant:
    """Merge methods that differ only in fields with patterns; each pattern matches exactly the paths with its value."""
    first = next(iter(methods.values()))
    fields: dict[str, Any] = {"targets": tuple(methods)}
    for pattern, name in first.patterned.items():
        values = {path: getattr(method, name) for path, method in methods.items()}
        fields[name] = Counter(values.values()).most_common(1)[0][0]
        others = {path: value for path, value in values.items() if value != fields[name]}
        fields[pattern] = {}
        for value in dict.fromkeys(others.values()):  # with as few patterns as the maximum length of a pattern allows
            paths = [re.escape(path) for path, other in others.items() if other == value]
            for chunk in _split(paths):
                fields[pattern][f"^{chunk[0]}" if len(chunk) == 1 else f"^(?:{'|'.join(chunk)})"] = value
    return dataclasses.replace(first, **fields)


def _split(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names in chunks, each of at most half the maximum length of a pattern."""
    chunk: list[str] = []
    length = 0
    for name in names:
        if chunk and length + len(name) > MAX_PATTERN_LENGTH // 2:
            yield chunk
            chunk, length = [], 0
        chunk.append(name)
        length += len(name) + 1
    yield chunk
