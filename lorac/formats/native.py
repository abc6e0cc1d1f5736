"""lorac's own format: one safetensors file for any method.

    tensors/<site path>/<parameter>    of a site, in the matrix convention
    replaced/<parameter's name>        modules_to_save and trained biases

Everything else is one JSON object in the metadata entry "lorac"; of a method that is not lorac's
own it names the module of the class too, which no reader imports. The entry "lorac_seal" holds a
hash over it and the tensors. Tensors that are one and the same object are stored once, under the
first name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.argument_types import field_types, matches_type
from lorac.errors import (
    FormatError,
    UnknownMethod,
    nearest_name,
    short,
)
from lorac.formats._files import SEAL, check_seal, encode_config, peek_metadata, read_safetensors
from lorac.formats._format import Format
from lorac.formats._site_layouts import LAYOUT, is_site_json
from lorac.frontend.model_view import ModelView
from lorac.limits import charge_reading
from lorac.storage.strict_json import parse_object
from lorac.storage.tensor_file import hash_contents, write_safetensors
from lorac.variants import find_variant, variants
from lorac.variants._missing_method import MissingMethod, class_modules
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, dataclass_fields

Tensor = torch.Tensor
Record = Mapping[str, Any]
VERSION = 1
_ENTRY = "lorac"
_OTHER_VERSION = "it was written by another version of lorac"
_LOCAL_PROVENANCE = {"source", "format", "base", "left_out"}
"""Provenance that is about one file on one machine, and stays out of the next."""
_FIELDS = {
    "version": int,
    "name": str,
    "variant": str,
    "config": dict,
    "left_out": list,
    "shared": dict,
    "provenance": dict,
    "base": (str, type(None)),
}
_MODULES_FIELD = "modules"
"""Field of a record: method -> the module of its class, where that is not lorac's own."""
_StringMap = Mapping[str, str]
_PROVENANCE_TYPES = {
    "copies": _StringMap,
    "tied": _StringMap,
    "config": Mapping[str, Any],
    LAYOUT: Mapping[str, Mapping[str, Any]],
}
"""What is known of an adapter's provenance, and is read again; whatever else lies there is only kept."""


def _recognises(path: Path) -> bool:
    return path.is_file() and _ENTRY in peek_metadata(path)


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    adapter = _adapter(path, name, build_variant)
    adapter.tensors = sort_by_site(adapter.tensors, None if model is None else ModelView.of(model))
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    return adapter


def load_record(path: Path, name: str) -> Adapter:
    """An adapter as its file has it, held against nothing, of whose method this process may have no class.

    Raises:
        FormatError: as ``load_adapter``.
    """
    with charge_reading(path):
        return _adapter(path, name, _build_or_stand_in)


def _adapter(path: Path, name: str | None, made: Callable[[Path, Record], Variant]) -> Adapter:
    stored, metadata = read_safetensors(path)
    record = parse_record(path, metadata[_ENTRY])
    check_seal(path, metadata[_ENTRY], stored, metadata)
    return assemble_adapter(path, record, stored, name, made)


def assemble_adapter(
    path: Path,
    record: Mapping[str, Any],
    stored: dict[str, Tensor],
    name: str | None,
    made: Callable[[Path, Record], Variant],
) -> Adapter:
    """The adapter of a record and its tensors.

    Args:
        path: the file they are from.
        record: as ``record_from`` gives it.
        stored: its tensors, by the names of this format (``key_of``).
        name: the adapter's; None for the recorded one.
        made: (path, record) -> the method: ``method_in``, or another.
    """
    for alias, first in record["shared"].items():
        if not isinstance(first, str) or first not in stored or alias in stored:
            raise FormatError(
                f"'{path}' says that '{alias}' is {short(first)}, which its tensors belie", code="corrupt_file"
            )
        stored[alias] = stored[first]
    adapter = Adapter(
        name=name or record["name"],
        variant=made(path, record),
        provenance={
            **record["provenance"],
            "format": "native",
            "source": str(path),
            "base": record["base"],
            "left_out": record["left_out"],
        },
    )
    for key, tensor in stored.items():
        _place(path, adapter, key, tensor)
    return adapter


def _save(adapter: Adapter, path: Path, model: nn.Module | None, target: Path) -> None:
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    tensors, shared = _stored(adapter)
    base = compute_base_hash(ModelView.of(model), adapter.tensors) if model else adapter.provenance.get("base")
    # Names are not sorted here: the order of patterns matters, that of the record is fixed.
    text = encode_config(make_record(adapter, shared, base))
    write_safetensors(path, tensors, {_ENTRY: text, SEAL: hash_contents(text, tensors)})


def make_record(adapter: Adapter, shared: Mapping[str, str], base: str | None) -> dict[str, Any]:
    """All that this format says of an adapter beside its tensors.

    Args:
        adapter: the adapter.
        shared: further names of tensors -> the name they are stored by.
        base: the hash of the base weights, where it is known.
    """
    config, left_out = variant_config(adapter.variant)
    origin = {k: v for k, v in adapter.provenance.items() if k not in _LOCAL_PROVENANCE and _is_json(v)}
    modules = class_modules(adapter.variant)
    return {
        "version": VERSION,
        "name": adapter.name,
        "variant": adapter.variant.name,
        "config": config,
        "left_out": left_out or adapter.provenance.get("left_out", []),
        "shared": shared,
        "provenance": origin,
        "base": base,
        **({_MODULES_FIELD: modules} if modules else {}),
    }


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """The same of an adapter whose tensors somebody else keeps, each once."""
    return make_record(adapter, {}, adapter.provenance.get("base"))


def tensor_key(path: str | None, name: str) -> str:
    """What a tensor is called: a site's parameter, or where there is no site what is replaced whole."""
    return f"replaced/{name}" if path is None else f"tensors/{path}/{name}"


def _stored(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to write, and for every further name of a tensor the first."""
    named = {tensor_key(p, n): t for p, at in adapter.tensors.items() for n, t in at.items()}
    named |= {tensor_key(None, name): tensor for name, tensor in adapter.replaced.items()}
    first: dict[int, str] = {}
    shared = {}
    for key, tensor in named.items():
        if first.setdefault(id(tensor), key) != key:
            shared[key] = first[id(tensor)]
    return {key: tensor for key, tensor in named.items() if key not in shared}, shared


def _place(path: Path, adapter: Adapter, key: str, tensor: Tensor) -> None:
    kind, _, rest = key.partition("/")
    site, _, parameter = rest.rpartition("/")
    if kind == "tensors" and site:
        adapter.tensors.setdefault(site, {})[parameter] = tensor
    elif kind == "replaced" and rest:
        adapter.replaced[rest] = tensor
    else:
        raise FormatError(
            f"'{path}' holds '{key}', which is no name of this format",
            next_step="names are tensors/<site>/<parameter> and replaced/<parameter>",
            code="unused_tensors",
        )


def parse_record(path: Path, text: str) -> dict[str, Any]:
    """The record that a text says, checked.

    Raises:
        FormatError: it is none, or something in it is missing or of another type.
        FormatError: it is of another version of the format.
    """
    record = parse_object(
        text, lambda reason: FormatError(f"the description in '{path}' {reason}", code="corrupt_file")
    )
    if not isinstance(record.get("version"), int):
        raise FormatError(f"the description in '{path}' has no version", code="corrupt_file")
    if record["version"] > VERSION:
        raise FormatError(
            f"'{path}' is version {record['version']} of the format, this lorac reads {VERSION}",
            next_step="pip install -U lorac",
            code="unsupported_field",
        )
    for field in record:
        if field not in _FIELDS and field != _MODULES_FIELD:
            near = nearest_name(field, _FIELDS)
            raise FormatError(
                f"'{path}' has the unknown field '{field}'",
                nearest=near,
                next_step=_OTHER_VERSION,
                code="unknown_field",
            )
    for field, kind in _FIELDS.items():
        if field not in record or not isinstance(record[field], kind):  # type: ignore[arg-type]  # a type or a tuple of types
            raise FormatError(
                f"the description in '{path}' lacks '{field}', or it is of another type", code="corrupt_file"
            )
    _check_provenance(path, record["provenance"])
    _check_homes(path, record.get(_MODULES_FIELD, {}))
    if not matches_type(record["left_out"], tuple[str, ...]):
        raise FormatError(f"the description in '{path}' has 'left_out' of another type", code="corrupt_file")
    return record


def _check_provenance(path: Path, provenance: Mapping[str, Any]) -> None:
    for entry, kind in _PROVENANCE_TYPES.items():
        if entry in provenance and not matches_type(provenance[entry], kind):
            raise FormatError(
                f"the description in '{path}' has '{entry}' of another type in its provenance", code="corrupt_file"
            )
    for site, described in provenance.get(LAYOUT, {}).items():
        if not is_site_json(described):
            raise FormatError(
                f"the description in '{path}' does not tell the layout of '{site}': {short(described)}",
                code="corrupt_file",
            )


def _check_homes(path: Path, modules: Any) -> None:
    """The modules of methods are only ever named to people: they are names."""
    named = matches_type(modules, _StringMap) and all(
        part.isidentifier() for name in modules.values() for part in name.split(".")
    )
    if not named:
        raise FormatError(
            f"the description in '{path}' has '{_MODULES_FIELD}' that are no modules: {short(modules)}",
            code="corrupt_file",
        )


def build_variant(path: Path, record: Record) -> Variant:
    """The method of a record.

    Raises:
        UnknownMethod: its class is not imported.
        FormatError: its hyper-parameters are not the method's.
    """
    return _build_named_variant(path, record["variant"], record["config"], record.get(_MODULES_FIELD, {}))


def _build_or_stand_in(path: Path, record: Record) -> Variant:
    """The method, or what stands in its place where it, or one in its fields, has no class here."""
    modules = record.get(_MODULES_FIELD, {})
    try:
        return build_variant(path, record)
    except UnknownMethod:
        unknown = [name for name in modules if name not in variants()]
        if not unknown:
            raise
        return MissingMethod(
            method_name=record["variant"], hyper_parameters=record["config"], modules=modules, missing=unknown[0]
        )


def _build_named_variant(path: Path, name: str, config: Mapping[str, Any], modules: Mapping[str, str]) -> Variant:
    variant = find_variant(name, modules)
    known = dataclass_fields(variant)
    for field in config:
        if field not in known:
            raise FormatError(
                f"'{path}' sets '{field}', which {variant.name} does not have",
                nearest=nearest_name(field, known),
                next_step=_OTHER_VERSION,
                code="unknown_field",
            )
    default, kinds = _defaults(variant), field_types(variant)
    revived = {field: _revive(path, value, modules) for field, value in config.items()}
    for field, value in revived.items():
        if not matches_type(value, kinds[field]):
            raise FormatError(
                f"'{path}' sets {field}={short(config[field])}, which {variant.name} does not take",
                next_step=f"its default is {default[field]!r}" if field in default else f"it takes {kinds[field]}",
                code="unsupported_field",
            )
    try:
        return variant(**revived)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise FormatError(
            f"'{path}' configures {variant.name} wrongly: {error}", next_step=_OTHER_VERSION, code="unsupported_field"
        ) from error


def _revive(path: Path, value: Any, modules: Mapping[str, str]) -> Any:
    """A field's value, with the methods in it (``_plain``) made again."""
    if isinstance(value, list):
        return [_revive(path, item, modules) for item in value]
    match value:
        case {"variant": str(name), "config": dict(config), **rest} if not rest:
            return _build_named_variant(path, name, config, modules)
        case dict():
            return {key: _revive(path, item, modules) for key, item in value.items()}
    return value


def _defaults(variant: type[Variant]) -> dict[str, Any]:
    """Default values by field, of those fields that have one."""
    found = {}
    for field in dataclasses.fields(variant):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def variant_config(variant: Variant) -> tuple[dict[str, Any], list[str]]:
    """A variant's fields as JSON, and those that have no such form and fall back to their default."""
    values = variant.settings
    left_out = sorted(name for name, value in values.items() if not _is_json(value))
    return {n: _to_json(v) for n, v in values.items() if n not in left_out}, left_out


def _is_json(value: Any) -> bool:
    if isinstance(value, Variant):
        return not variant_config(value)[1]
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _to_json(value: Any) -> Any:
    if isinstance(value, Variant):
        return {"variant": value.name, "config": variant_config(value)[0]}
    if isinstance(value, Mapping):
        return {k: _to_json(v) for k, v in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list | tuple) else value


FORMAT = Format(
    name="native",
    looks_for="a safetensors file with lorac's description in its metadata",
    recognises=_recognises,
    load=_load,
    save=_save,
)
