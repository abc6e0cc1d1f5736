"""Fields of configuration files: their kinds, and the readers and writers of their values.

A table maps the name of every field to one of four kinds; a field that the table lacks is refused. The functions
``read_*`` convert a value of the file, which may be None, to lorac's; ``write_*`` convert a value of the variant to the
file's. Files are written so that equal input gives equal bytes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lorac.argument_types import JsonMapping, broken_limit, field_types, format_type, matches_type
from lorac.errors import short
from lorac.formats._errors import unknown_name_error, unsupported_error
from lorac.ir.sites.patterns import TARGET_KEYWORDS
from lorac.storage.strict_json import dump_json
from lorac.storage.tensor_file import write_safetensors
from lorac.storage.tensor_hash import hash_contents

T = TypeVar("T")
ALL_LINEAR = "all-linear"
MAX_COUNT = 2**31 - 1
"""The largest rank, size or count in a configuration. The tensors bound it further."""


def _identity(value: object) -> object:
    return value


@dataclass(frozen=True)
class Field(ABC):
    """One field of a configuration.

    Attributes:
        default: the library's default.
        to: the field of the variant that this field sets, if any.
        read: value in the file -> value in lorac; raises ValueError with the expected values.
        write: value of the variant -> value in the file.
        preserved: whether the value is written back as it was read.
        written: False for a field of older releases or forks only, which the library never writes.
        next_step: the next step in the error for a refused value.
        nested: the fields of a configuration within this one.
    """

    default: object = None
    to: str | None = None
    read: Callable[[object], object] = _identity
    write: Callable[[Any], object] = _identity
    preserved: bool = False
    written: bool = True
    next_step: str | None = None
    nested: Mapping[str, "Field"] = dataclass_field(default_factory=dict)

    @property
    @abstractmethod
    def use(self) -> str:
        """How lorac uses the field, for the documentation."""

    def parse(self, value: object, name: str, path: Path) -> object:
        """Convert a value of the file to lorac's.

        Raises:
            FormatError: the value is not one of those that the field takes.
        """
        try:
            return self.read(value)
        except ValueError as error:
            raise unsupported_error(f"'{path}' sets {name}={short(value)}: {error}", next_step=self.next_step) from None


class Applied(Field):
    """A field that changes the computation, in lorac as in the library."""

    use = "applied"


class TrainingOnly(Field):
    """A field that only training reads; its effect is already in the trained tensors."""

    use = "training only"


class Irrelevant(Field):
    """A field that does not change any number."""

    use = "irrelevant"


class Refused(Field):
    """A field that lorac supports only at its default, since another value changes the computation."""

    use = "refused away from its default"

    def parse(self, value: object, name: str, path: Path) -> object:
        if value and value != self.default:
            raise unsupported_error(
                f"'{path}' sets {name}={short(value)}, which lorac does not build", next_step=self.next_step
            )
        return self.default


def read_fields(raw: JsonMapping, fields: Mapping[str, Field], path: Path) -> JsonMapping:
    """Return the value of every field of a table; a field that the file lacks gets its default.

    Raises:
        FormatError: the file has a field that the table lacks, or a value that the field does not accept.
    """
    refuse_unknown_fields(raw, fields, path)
    return {name: field.parse(raw.get(name, field.default), name, path) for name, field in fields.items()}


def refuse_unknown_fields(raw: JsonMapping, known: Iterable[str], path: Path) -> None:
    """Refuse fields that the library does not have.

    Raises:
        FormatError: naming the first such field.
    """
    names = set(known)
    for name in raw:
        if name not in names:
            raise unknown_name_error(
                f"'{path}' sets the unknown field '{name}' = {short(raw[name])}",
                name,
                names,
                "the field may change the result, so it is not ignored; a newer lorac may know the field of a newer "
                "library",
            )


def check_field_type(cls: type, name: str, value: object, path: Path) -> None:
    """Refuse a value that a field of a dataclass does not accept.

    Raises:
        FormatError: naming the field, and its type or limits.
    """
    expected, limit = format_type(field_types(cls)[name]), None
    if matches_type(value, field_types(cls)[name]):
        limit = broken_limit(cls, name, value, {})
        if limit is None:
            return
        expected = limit.describe({})
    nearest = None if limit is None else limit.nearest(value)
    raise unsupported_error(f"'{path}' sets {name}={short(value)}", nearest=nearest, next_step=f"it takes {expected}")


def read_flag(value: object) -> bool:
    """Return a truth value; null is false, as PEFT has it."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("expected true or false")
    return bool(value)


def read_int(value: object) -> int:
    """Return a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


def read_count(value: object) -> int:
    """Return a whole number from 0."""
    return _read_bounded(value, 0, "a whole number from 0")


def read_size(value: object) -> int:
    """Return a whole number above 0."""
    return _read_bounded(value, 1, "a whole number above 0")


def read_optional_size(value: object) -> int | None:
    """Return a whole number above 0, or None for null."""
    return None if value is None else read_size(value)


def _read_bounded(value: object, least: int, expected: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_COUNT:
        raise ValueError(f"expected {expected}, at most {MAX_COUNT}")
    return value


def read_number(value: object) -> float:
    """Return a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("expected a number")
    return value


def read_optional_number(value: object) -> float | None:
    """Return a finite number, or None for null."""
    return None if value is None else read_number(value)


def read_choice(*choices: object) -> Callable[[object], object]:
    """Return a reader that accepts only the given names, and true or false."""

    def read(value: object) -> object:
        if value not in choices:
            *names, last = (str(one).lower() if isinstance(one, bool) else str(one) for one in choices)
            raise ValueError(f"expected {', '.join(names)} or {last}")
        return value

    return read


def read_nested(fields: Mapping[str, Field]) -> Callable[[object], dict[str, object]]:
    """Return a reader of a nested configuration; it reads null as an empty one."""

    def read(value: object) -> dict[str, object]:
        given = read_mapping(value)
        if given.keys() - fields.keys():
            raise ValueError(f"expected the fields {', '.join(fields)}")
        return {name: field.read(given.get(name, field.default)) for name, field in fields.items()} if given else {}

    return read


def read_names(value: object) -> tuple[str, ...]:
    """Return a list of names; one name counts as a list, and null as an empty one."""
    return _read_list(value, str, "names")


def read_pattern(value: object) -> str | tuple[str, ...]:
    """Return one regular expression, or a list of names; null is an empty list."""
    return value if isinstance(value, str) and value else read_names(value or None)


def read_targets(value: object) -> str | tuple[str, ...] | None:
    """Return a pattern as ``read_pattern`` does, but None for null: PEFT then chooses by the architecture."""
    pattern = None if value is None else read_pattern(value)
    if isinstance(pattern, str) and pattern in set(TARGET_KEYWORDS) - {ALL_LINEAR}:
        raise ValueError("lorac reserves that word, and PEFT takes it for a module's name")
    return ALL_LINEAR if isinstance(pattern, str) and pattern.lower() == ALL_LINEAR else pattern


def read_layers(value: object) -> tuple[int, ...]:
    """Return a list of layer numbers; one number counts as a list, and null as an empty one."""
    return _read_list(value, int, "layer numbers")


def _read_list(value: object, item_type: type[T], plural: str) -> tuple[T, ...]:
    items = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(item) is not item_type for item in items):
        raise ValueError(f"expected a list of {plural}")
    return tuple(items)


def read_rows(value: object) -> tuple[int, ...]:
    """Return row numbers of an embedding; at least one, and no number twice."""
    rows = read_layers(value)
    if not rows or min(rows) < 0 or len(set(rows)) < len(rows):
        raise ValueError("expected numbers of rows, each once")
    return rows


def read_token_ids(value: object) -> tuple[int, ...]:
    """Return token ids; null is empty."""
    if min(ids := _read_list(value, int, "token ids"), default=0) < 0:
        raise ValueError("expected token ids")
    return ids


def read_rank_pattern(value: object) -> dict[str, int]:
    """Return pattern -> rank in the file's order; null is empty."""
    return {key: read_size(item) for key, item in read_mapping(value).items()}


def read_number_pattern(value: object) -> dict[str, float]:
    """Return pattern -> number in the file's order; null is empty."""
    return {key: read_number(item) for key, item in read_mapping(value).items()}


def read_mapping(value: object) -> dict[str, object]:
    """Return a mapping; null is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value or {}


def write_pattern(value: str | tuple[str, ...]) -> str | list[str] | None:
    """Return a regular expression unchanged, or names as a sorted list; null for an empty list."""
    return value if isinstance(value, str) and value else sorted(value) or None


def write_list(value: tuple[object, ...]) -> list[object] | None:
    """Return a list; null for an empty one."""
    return list(value) or None


def write_number(value: float) -> float:
    """Return a whole number as an int, since PEFT's configurations have 16 rather than 16.0."""
    return int(value) if float(value).is_integer() else value


def write_number_pattern(value: Mapping[str, float]) -> dict[str, float]:
    """Return a plain dictionary in the same order, with whole numbers as ints."""
    return {key: write_number(item) for key, item in value.items()}


SEAL = "lorac_seal"
"""Metadata entry that holds the hash over a description and its tensors."""
EXPERTS = "lorac_experts"
"""Metadata entry that holds the seals of an X-LoRA's experts by name."""
BASE_HASH = "lorac_base"
"""Metadata entry that holds the hash over the base weights."""


def write_json(path: Path, value: JsonMapping) -> None:
    """Write a JSON object with sorted top-level names; nested objects keep their order, which may matter.

    Raises:
        FormatError: as ``encode_config``.
    """
    path.write_text(encode_config({name: value[name] for name in sorted(value)}, indent=2) + "\n", encoding="utf-8")


def encode_config(value: JsonMapping, indent: int | None = None) -> str:
    """Return the description of an adapter as JSON.

    Raises:
        FormatError: the description contains NaN, infinity, or another value that ``AdapterFile.read_json`` refuses.
    """
    try:
        return dump_json(value, indent)
    except ValueError as error:
        raise unsupported_error(
            f"the adapter's configuration cannot be written: {error}",
            next_step="give it finite numbers of ordinary size",
        ) from error


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str) -> None:
    """Write a safetensors file with a seal in its metadata: a hash of the tensors and a text that describes them."""
    write_safetensors(path, tensors, {**metadata, SEAL: hash_contents(text, tensors)})
