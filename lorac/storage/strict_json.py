"""JSON without the liberties that Python's parser takes, for files of others and for our own.

A name given twice has two meanings, NaN and ``1e400`` are no numbers of JSON, an integer of a thousand digits fits no
tensor, and a thousand brackets exhaust whoever walks the value afterwards. What is refused when read is never written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorac.errors import LoracError
from lorac.limits import check_time, claim_memory

MAX_DEPTH = 100
"""Values that may lie in one another; a model's skeleton, the deepest thing written, has a few dozen."""
_BITS = 64
_PER_VALUE = 64
"""Bytes that a value takes at most once it is parsed, but for its text; every comma and bracket may begin one."""


def read_json_text(path: Path) -> bytes:
    """The bytes of a file of JSON, unless they are more than what a file may take in memory.

    Raises:
        FormatError: it is too large.
    """
    with path.open("rb") as file:
        claim_memory(os.fstat(file.fileno()).st_size, "its JSON")
        return file.read()


def parse_json(text: bytes | str, refuse: Callable[[str], LoracError]) -> Any:
    """The value that a text says.

    Args:
        text: JSON; bytes are UTF-8.
        refuse: (what is wrong, a phrase that begins with a verb) -> the error to raise.

    Raises:
        LoracError: ``refuse``'s, where the text is not JSON, gives a name twice, holds a number that is not finite, an
            integer of more than 64 bits or half of a character, or is nested deeper than ``MAX_DEPTH``.
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


def parse_object(text: bytes | str, refuse: Callable[[str], LoracError]) -> dict[str, Any]:
    """A JSON object; otherwise as ``parse_json``.

    Raises:
        LoracError: ``refuse``'s, also where it is no object.
    """
    value = parse_json(text, refuse)
    if not isinstance(value, dict):
        raise refuse(f"holds a {type(value).__name__}, not an object")
    return value


def dump_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON in ASCII, names in their order; without ``indent`` as short as it can be.

    Raises:
        ValueError: it holds what ``parse_json`` would refuse.
    """
    _check(value)
    return json.dumps(value, indent=indent, separators=None if indent else (",", ":"), allow_nan=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"'{name}' is given twice")
        value[name] = item
    return value


def _check(value: Any) -> None:
    """Hold every part of a value against what JSON can say to everyone; level by level, so that depth costs nothing."""
    level = [value]
    for _ in range(MAX_DEPTH):
        for index, item in enumerate(level):
            check_time(index)
            _check_one(item)
        level = [inner for item in level for inner in _parts(item)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} values")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple) else ()


def _check_one(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise ValueError(f"it holds an integer of {value.bit_length()} bits, more than {_BITS}")
    if isinstance(value, str):
        value.encode("utf-8")  # half of a surrogate pair is no text: it could be neither printed nor written
