"""adapter_config.json: read and written by the tables of fields.

Source: peft.config.PeftConfig and the configuration classes of PEFT 0.21. PEFT's `save_pretrained` also sorts nested
names, so after a reload the alphabetically first matching pattern of rank_pattern wins. lorac follows the order in the
file, as PEFT's own reader does.
"""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

from lorac.argument_types import JsonMapping
from lorac.discovery import find_classes
from lorac.errors import FormatError, nearest_name, short
from lorac.formats._config_fields import Applied
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.fields import rename_bias
from lorac.formats.peft.peft_type import GIVEN, AnyPeftType, PeftType
from lorac.variants.base import Variant

REFUSED_TYPES = {
    "SHADOW": (
        "a second model of the base's architecture, which runs next to the base with a cache of its own and "
        "changes the input of each block: no formula of a layer holds it",
        "run it by PEFT, or compile the second model alone, which unload_shadow of PEFT's model returns",
    )
}
"""PEFT type that lorac does not read -> the reason and the next step; it reads all others that PEFT 0.21 has."""


@functools.cache
def peft_types() -> dict[str, AnyPeftType]:
    """Return the PEFT types that lorac reads, by name: the concrete classes in the modules of ``types``."""
    package = importlib.import_module("lorac.formats.peft.types")
    classes: list[type[AnyPeftType]] = find_classes(package, PeftType)  # type: ignore[type-abstract]  # as a root
    return {one.peft_type: one for one in (cls() for cls in classes)}


def peft_type_of(raw: JsonMapping, path: Path) -> AnyPeftType:
    """Return the PEFT type of a configuration.

    Raises:
        FormatError: the type is missing, unknown to PEFT, or not supported by lorac.
    """
    named = raw.get("peft_type")
    for name, one in peft_types().items():
        if named in (name, *one.former_names):
            return one
    readable = f"lorac reads {', '.join(sorted(peft_types()))}"
    if named is None:
        raise FormatError(f"'{path}' names no peft_type", next_step=readable, code="unknown_field")
    if str(named) in REFUSED_TYPES:
        reason, step = REFUSED_TYPES[str(named)]
        raise unsupported_error(f"'{path}' is of peft_type {named}, {reason}", next_step=step)
    near = nearest_name(str(named).upper(), peft_types())
    raise FormatError(
        f"'{path}' has the unknown peft_type {short(named)}", nearest=near, next_step=readable, code="unknown_field"
    )


def variant_of(values: JsonMapping, peft_type: AnyPeftType, path: Path) -> Variant:
    """Return the variant that a checked configuration describes.

    Raises:
        FormatError: the file sets a field that the variant does not have.
    """
    cls, selection = next(
        (cls, selection)
        for cls, selection in peft_type.variants.items()
        if all(values[name] == value for name, value in selection.items())
    )
    known = {field.name for field in dataclasses.fields(cls)}
    settings: dict[str, Any] = {}
    for name, field in peft_type.fields.items():
        may_differ = not isinstance(field, Applied) or not (field.to or field.nested) or name in selection
        nested = values[name] if field.nested else {}
        settings |= {
            inner.to: nested[key] for key, inner in field.nested.items() if key in nested and inner.to in known
        }
        if field.to in known:
            settings[field.to] = values[name]
        elif not may_differ and values[name] != field.read(field.default):
            selected = ", ".join(f"{n}={v!r}" for n, v in selection.items())
            raise unsupported_error(
                f"'{path}' sets {name}={short(values[name])} together with {selected}",
                next_step="leave one of them out: PEFT does not combine them either",
            )
    if isinstance(values["target_modules"], str) and values.get("layers_to_transform"):
        raise unsupported_error(
            f"'{path}' sets layers_to_transform together with a pattern of target_modules",
            next_step="write target_modules as a list of names, as PEFT wants",
        )
    settings["targets"] = values["target_modules"] or ()
    settings["bias"] = rename_bias(values.get("bias", "none"), cls.name)
    return cls(**settings)


def write_config(
    variant: Variant, peft_type: AnyPeftType, given: JsonMapping, original: JsonMapping
) -> dict[str, object]:
    """Return a configuration that makes PEFT build the variant.

    Args:
        variant: the method and its hyper-parameters.
        given: values of fields that the variant does not determine; fields that the type lacks are ignored.
        original: the configuration that the variant was read from; its fields without effect are kept.
    """
    config: dict[str, object] = {}
    for name, field in peft_type.fields.items():
        if not field.written:
            continue
        config[name] = field.default
        if field.nested and name in peft_type.variants[type(variant)]:
            own = {key: inner.write(getattr(variant, inner.to)) for key, inner in field.nested.items() if inner.to}
            defaults = {key: inner.default for key, inner in field.nested.items()}
            config[name] = {**defaults, **(original.get(name) or {}), **own}
        elif field.preserved:
            config[name] = field.write(original.get(name, field.default))
        elif field.to and hasattr(variant, field.to):
            config[name] = field.write(getattr(variant, field.to))
    config |= {"peft_type": peft_type.peft_type, "inference_mode": True}
    config |= {name: value for name, value in peft_type.variants[type(variant)].items() if value is not GIVEN}
    return config | {name: value for name, value in given.items() if name in config}
