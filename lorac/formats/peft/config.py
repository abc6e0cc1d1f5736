"""adapter_config.json: read and written through the tables of fields.

Source: peft.config.PeftConfig and the configuration classes of PEFT 0.21. Its `save_pretrained`
sorts nested names too, so that of several patterns in rank_pattern the first by alphabet wins after
a reload; what counts here is the order in the file, as it does for PEFT when it reads one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorac.discovery import import_modules
from lorac.errors import FormatError, nearest_name, short
from lorac.formats.peft.peft_type import ABSENT, Field, FieldUse, PeftType
from lorac.ir.patterns import TARGET_KEYWORDS
from lorac.variants.base import Variant

ALL_LINEAR = "all-linear"
MAX_COUNT = 2**31 - 1
"""The largest rank, size or number of anything in a configuration; what it really is, tensors say."""
_TYPES = (
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT "
    "ADAPTION_PROMPT IA3 BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA "
    "XLORA HRA VBLORA UNILORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF "
    "DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT"
)
PEFT_TYPES = frozenset(_TYPES.split())
"""All that PEFT 0.21 knows."""


# Readers: a value of the file, None included, to lorac's


def flag(value: Any) -> bool:
    """A truth value; null is false, as PEFT has it."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("expected true or false")
    return bool(value)


def rank(value: Any) -> int:
    """A whole number above 0, of the size that a tensor can have."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise ValueError(f"expected a whole number above 0, at most {MAX_COUNT}")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("expected a number")
    return value


def names(value: Any) -> tuple[str, ...]:
    """A list of names, or one name, or null for none."""
    if isinstance(value, str):
        return (value,)
    if value is not None and not (isinstance(value, list) and _all(value, str)):
        raise ValueError("expected a list of names")
    return tuple(value or ())


def pattern(value: Any) -> str | tuple[str, ...]:
    """A list of names, or one regular expression, or null for none."""
    return value if isinstance(value, str) and value else names(value or None)


def targets(value: Any) -> str | tuple[str, ...] | None:
    """As `pattern`, but null stays apart: PEFT then has a choice of its own for every architecture."""
    found = None if value is None else pattern(value)
    if isinstance(found, str) and found in set(TARGET_KEYWORDS) - {ALL_LINEAR}:
        raise ValueError("that is a word of lorac's, which PEFT takes for a module's name")
    return ALL_LINEAR if isinstance(found, str) and found.lower() == ALL_LINEAR else found


def layers(value: Any) -> tuple[int, ...]:
    """A list of layer numbers, or one, or null for all."""
    found = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if found is not None and not (isinstance(found, list) and _all(found, int)):
        raise ValueError("expected a list of layer numbers")
    return tuple(found or ())


def ranks(value: Any) -> dict[str, int]:
    """Pattern -> rank, in the file's order; null for none."""
    return {key: rank(item) for key, item in _mapping(value).items()}


def numbers(value: Any) -> dict[str, float]:
    """Pattern -> number, in the file's order; null for none."""
    return {key: number(item) for key, item in _mapping(value).items()}


# Writers: a variant's value to the file's


def sorted_or_none(value: str | tuple[str, ...]) -> str | list[str] | None:
    """A list in order, one regular expression, or null for none."""
    return value if isinstance(value, str) and value else sorted(value) or None


def list_or_none(value: tuple[Any, ...]) -> list[Any] | None:
    """A list, or null for none."""
    return list(value) or None


def whole(value: float) -> float:
    """16 rather than 16.0, as PEFT annotates it."""
    return int(value) if float(value).is_integer() else value


def mapping(value: Mapping[str, float]) -> dict[str, float]:
    """A plain dictionary in the same order."""
    return {key: whole(item) for key, item in value.items()}


COMMON = {
    "peft_type": Field(FieldUse.APPLIED),
    "task_type": Field(FieldUse.IRRELEVANT, kept=True),
    "auto_mapping": Field(FieldUse.IRRELEVANT, kept=True),
    "peft_version": Field(FieldUse.IRRELEVANT),
    "base_model_name_or_path": Field(FieldUse.IRRELEVANT, kept=True),
    "revision": Field(FieldUse.IRRELEVANT, kept=True),
    "inference_mode": Field(FieldUse.IRRELEVANT, False),
    "target_modules": Field(FieldUse.APPLIED, to="targets", read=targets, write=sorted_or_none),
    "modules_to_save": Field(FieldUse.APPLIED, to="modules_to_save", read=names, write=list_or_none),
    # PEFT sets it right itself: what decides is the class of the module, and so it is here.
    "fan_in_fan_out": Field(FieldUse.IRRELEVANT, False, read=flag),
}
"""Fields that all types have."""


@functools.cache
def peft_types() -> dict[str, PeftType]:
    """The PEFT types that lorac reads, by name."""
    from lorac.formats.peft import types  # each of them builds on this module

    return {module.METHOD.peft_type: module.METHOD for module in import_modules(types)}


def peft_type_of(raw: Mapping[str, Any], path: Path) -> PeftType:
    """The PEFT type of a configuration.

    Raises:
        FormatError: No such type, or none named.
        FormatError: A type of PEFT that lorac does not read.
    """
    named = raw.get("peft_type")
    if isinstance(named, str) and named in peft_types():
        return peft_types()[named]
    readable = f"lorac reads {', '.join(sorted(peft_types()))}"
    if named is None:
        raise FormatError(f"'{path}' names no peft_type", next_step=readable, code="unknown_field")
    if str(named) in PEFT_TYPES:
        raise FormatError(f"'{path}' is of peft_type {named}", next_step=readable, code="unsupported_field")
    near = nearest_name(str(named).upper(), PEFT_TYPES)
    raise FormatError(
        f"'{path}' has the unknown peft_type {short(named)}", nearest=near, next_step=readable, code="unknown_field"
    )


def read_config(raw: Mapping[str, Any], method: PeftType, path: Path) -> dict[str, Any]:
    """Every field's value, checked and in lorac's types; defaults where the file has none.

    Raises:
        FormatError: A field that PEFT's configuration class does not have.
        FormatError: A field that changes the result in a way lorac does not build, or a value
            of another type.
    """
    for name in raw:
        if name not in method.fields and name not in method.retired:
            raise FormatError(
                f"'{path}' sets the unknown field '{name}' = {short(raw[name])}",
                nearest=nearest_name(name, method.fields),
                next_step="it may change the result, so it is not ignored; "
                "if it is from a newer PEFT, a newer lorac may know it",
                code="unknown_field",
            )
    fields = {**method.fields, **method.retired}
    return {name: _value(path, name, f, raw.get(name, f.default)) for name, f in fields.items()}


def variant_of(values: Mapping[str, Any], method: PeftType, path: Path) -> Variant:
    """The variant that a checked configuration describes.

    Raises:
        FormatError: A field is set that the variant it picks does not have.
    """
    kind = next(
        kind for kind, picks in method.variants.items() if all(values[name] == value for name, value in picks.items())
    )
    picks, own = method.variants[kind], {field.name for field in dataclasses.fields(kind)}
    chosen = {}
    for name, field in {**method.fields, **method.retired}.items():
        if field.to in own:
            chosen[field.to] = values[name]
        elif (
            field.use is FieldUse.APPLIED
            and field.to
            and name not in picks
            and values[name] != field.read(field.default)
        ):
            raise FormatError(
                f"'{path}' sets {name}={short(values[name])} together with "
                + ", ".join(f"{n}={v!r}" for n, v in picks.items()),
                next_step="PEFT does not combine them either",
                code="unsupported_field",
            )
    if isinstance(values["target_modules"], str) and values.get("layers_to_transform"):
        raise FormatError(
            f"'{path}' sets layers_to_transform together with a pattern of target_modules",
            next_step="PEFT wants a list of names with it",
            code="unsupported_field",
        )
    chosen["targets"] = values["target_modules"] or ()
    chosen["bias"] = bias_name(values.get("bias", "none"), kind.name)
    return kind(**chosen)


def write_config(
    variant: Variant, method: PeftType, given: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """A configuration that makes PEFT build what the variant describes.

    Args:
        variant: The method and its hyper-parameters.
        method: Its PEFT type.
        given: Fields that the variant alone does not determine; those PEFT lacks are left out.
        kept: The configuration it was read from; fields without consequence are taken over.
    """
    written = {}
    for name, field in method.fields.items():
        if field.default is ABSENT:
            continue
        written[name] = field.default
        if field.kept:
            written[name] = field.write(kept.get(name, field.default))
        elif field.to and hasattr(variant, field.to):
            written[name] = field.write(getattr(variant, field.to))
    written |= {"peft_type": method.peft_type, "inference_mode": True}
    written |= method.variants[type(variant)]
    return written | {name: value for name, value in given.items() if name in written}


def bias_name(value: str, prefix: str) -> str:
    """`none` and `all` as they are, `<anything>_only` as `<prefix>_only`."""
    return f"{prefix}_only" if value.endswith("_only") else value


def _value(path: Path, name: str, field: Field, value: Any) -> Any:
    if field.use is FieldUse.REFUSED:
        if value and value != field.default:
            raise FormatError(
                f"'{path}' sets {name}={short(value)}, which lorac does not build",
                next_step=field.instead,
                code="unsupported_field",
            )
        return field.default
    try:
        return field.read(value)
    except ValueError as error:
        raise FormatError(
            f"'{path}' sets {name}={short(value)}: {error}", next_step=field.instead, code="unsupported_field"
        ) from None


def _mapping(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected a mapping of patterns")
    return value or {}


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in values)
