"""JSON with one meaning for everyone, or an error, in reading and in writing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorac import FormatError
from lorac.storage.strict_json import MAX_DEPTH, dump_json, parse_json, parse_object
from tests.refusing import refuses


def refuse(reason: str) -> FormatError:
    return FormatError(f"the file {reason}", code="corrupt_file")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ('{"a": NaN}', "nan is not a finite number"),
        ('{"a": [-Infinity]}', "-inf is not a finite number"),
        ('{"a": 1e400}', "inf is not a finite number"),
        ('{"a": ' + "9" * 20 + "}", "an integer of 67 bits"),
        ('{"a": -' + "1" * 4000 + "}", "an integer of"),
        ('{"a": ' + "1" * 100_000 + "}", "not JSON"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        (r'{"\udfff": 1}', "surrogates not allowed"),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", f"deeper than {MAX_DEPTH} values"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
    ],
)
def test_rejects_invalid_json(text: str | bytes, reason: str) -> None:
    with refuses("corrupt_file", match=f"the file .*{reason}"):
        parse_object(text, refuse)


def test_round_trips_json_values() -> None:
    value = {"b": [2**64 - 1, -(2**64) + 1, 0.1, 1e-300, True, None], "a": {"é🙂": "\n"}, "c": {}}
    for indent in (None, 1, 2):
        text = dump_json(value, indent)
        assert text.isascii()
        found = parse_object(text, refuse)
        assert found == value
        assert list(found) == ["b", "a", "c"]
    assert parse_json(b"[1]", refuse) == [1]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, refuse)
    assert dump_json((1, 2)) == "[1,2]"


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, "\ud800", {"\ud800": 1}])
def test_rejects_values_that_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match=r"finite|integer|surrogates"):
        dump_json({"a": [value]})
