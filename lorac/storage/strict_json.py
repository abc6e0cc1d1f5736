"""JSON without the extensions that Python's parser accepts, for files of lorac and of others.

It refuses duplicate names, NaN and infinity, integers of more than 64 bits, and nesting so deep that a recursive
reader of the value would fail. A value that is refused on reading is not written either.
"""

import collections
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorac.errors import LoracError
from lorac.limits import check_time, claim_memory
from lorac.storage.open_file import OpenFile

MAX_DEPTH = 100
"""Depth of nesting; a model's skeleton, the deepest value that lorac writes, has a few dozen levels."""
Json = Any
"""A value of JSON; its reader checks the type."""
JsonObject = dict[str, Json]
_VALUES = operator.methodcaller("values")
_BITS = 64
_PER_VALUE = 64
"""The most bytes of a parsed value besides its text; every comma and bracket may begin a value."""


def read_json_text(path: Path) -> bytes:
    """Read a file of JSON, unless it is larger than files may be in memory.

    Raises:
        FormatError: it is too large.
        OSError: as ``OpenFile``.
    """
    file = OpenFile(path, follows_links=True)
    claim_memory(file.size, "its JSON")
    return file.read()


def parse_json(text: bytes | str, refuse: Callable[[str], LoracError]) -> Json:
    """Parse a JSON text.

    Args:
        text: JSON; bytes are UTF-8.
        refuse: makes the error from a phrase that begins with a verb.

    Raises:
        LoracError: made by ``refuse``, if the text is not JSON, or has a name twice, a number that is not finite, an
            integer of more than 64 bits, half of a surrogate pair, or more than ``MAX_DEPTH`` levels.
        FormatError: its values would take more memory, or time, than a file may.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        claim_memory(len(text) + _PER_VALUE * sum(map(text.count, ",[{")), "its JSON")
        value = json.loads(text, object_pairs_hook=_unique)
        check_time()
        _check(value)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not JSON: {error}") from error
    return value


def parse_object(text: bytes | str, refuse: Callable[[str], LoracError]) -> JsonObject:
    """Parse a JSON object (``parse_json``).

    Raises:
        LoracError: made by ``refuse``, also for a value that is not an object.
    """
    value = parse_json(text, refuse)
    if not isinstance(value, dict):
        raise refuse(f"holds a {type(value).__name__}, not an object")
    return value


def dump_json(value: Json, indent: int | None = None) -> str:
    """Return a value as JSON in ASCII, with names in their given order, and without spaces if ``indent`` is None.

    Raises:
        ValueError: ``parse_json`` would refuse the text.
    """
    _check(value)
    return json.dumps(value, indent=indent, separators=None if indent else (",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    value: JsonObject = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"'{twice}' is given twice")
    return value


def _check(value: Json) -> None:
    """Check every part of a value, level by level, so that depth needs no recursion."""
    level: list[Json] = [value]
    for _ in range(MAX_DEPTH):
        check_time()
        parts: list[Iterable[Json]] = []
        for kind in {*map(type, level)}:
            items: list[Json] = [item for item in level if type(item) is kind]
            if issubclass(kind, Mapping):
                parts += (*items, *map(_VALUES, items))
            elif issubclass(kind, list | tuple):
                parts += items
            elif issubclass(kind, str):
                "".join(items).encode("utf-8")  # half of a surrogate pair could neither be printed nor written
            elif issubclass(kind, float):
                if bad := [item for item in items if not math.isfinite(item)]:
                    raise ValueError(f"{bad[0]} is not a finite number")
            elif issubclass(kind, int):
                bits = max(max(items).bit_length(), min(items).bit_length())
                if bits > _BITS:
                    raise ValueError(f"it holds an integer of {bits} bits, more than {_BITS}")
        level = [*itertools.chain.from_iterable(parts)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} values")
