"""lorac's own format: one safetensors file for any method.

        tensors/<site path>/<parameter>    a parameter of a site, in the matrix convention
    replaced/<name of a parameter>     modules_to_save and trained biases

All other content is one JSON object in the metadata entry "lorac". For a method from outside lorac it also names the
module of the class, which readers do not import. The entry "lorac_seal" is a hash of that object and the tensors. A
tensor that several keys share is stored once, under the first key.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorac.adapters.base_hash import compute_base_hash
from lorac.adapters.fit import check_adapter, check_values, sort_by_site
from lorac.argument_types import Fields, JsonMapping, field_types, matches_type
from lorac.errors import UnknownMethod, short, unused_error
from lorac.formats._config_fields import encode_config, write_sealed
from lorac.formats._errors import corrupt_error, unknown_name_error, unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats._site_layouts import LAYOUT, is_site_json
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.limits import charge_reading
from lorac.storage.strict_json import parse_object
from lorac.variants import find_variant, variants
from lorac.variants._missing_method import MissingMethod, class_modules
from lorac.variants.adapter import TOKEN_ROWS, Adapter
from lorac.variants.base import Variant, dataclass_fields

VERSION = 1
_ENTRY = "lorac"
_OTHER_VERSION = "it was written by another version of lorac"
_LOCAL_PROVENANCE = {"source", "format", "base", "left_out"}
"""Provenance about one file on one machine, which is not written to the next."""
_StringMap = Mapping[str, str]
_FIELDS: Mapping[str, object] = {
    "version": int,
    "name": str,
    "variant": str,
    "config": JsonMapping,
    "left_out": tuple[str, ...],
    "shared": _StringMap,
    "provenance": JsonMapping,
    "base": str | None,
}
_MODULES = "modules"
"""Field of a record: method -> the module of its class, where that is not lorac's own."""
_PROVENANCE_TYPES: Mapping[str, object] = {
    "copies": _StringMap,
    "tied": _StringMap,
    "config": JsonMapping,
    LAYOUT: Mapping[str, JsonMapping],
    TOKEN_ROWS: Mapping[str, tuple[int, ...]],
    "labels": tuple[str, ...],
}
"""The entries of an adapter's provenance that lorac reads again; others are only stored."""


class NativeFormat(Format):
    """lorac's own format."""

    name = "native"
    looks_for = "a safetensors file with lorac's description in its metadata"
    written_by = "lorac"
    evidence = Evidence.METADATA
    invocations = True

    def recognises(self, file: AdapterFile) -> bool:
        return _ENTRY in file.peek_metadata()

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        stored, record = _read_file(file)
        adapter = assemble_adapter(file.path, record, build_variant(file.path, record), stored, name)
        adapter.tensors = sort_by_site(adapter.tensors, view)
        check_adapter(adapter, view)
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        check_adapter(adapter, view)
        tensors, shared = _name_tensors(adapter)
        base = compute_base_hash(view, adapter.tensors) if view else adapter.provenance.get("base")
        # Names are not sorted here: the order of patterns matters, and the record's order is fixed.
        text = encode_config({**describe_adapter(adapter), "shared": shared, "base": base})
        write_sealed(path, tensors, {_ENTRY: text}, text)


def load_record(path: Path, name: str) -> Adapter:
    """Read the adapter of a file without checking it against a model; the class of its method may be missing.

    Raises:
        FormatError: as ``load_adapter``.
    """

    def read() -> Adapter:
        stored, record = _read_file(AdapterFile(path))
        modules = record.get(_MODULES, {})
        try:
            variant = build_variant(path, record)
        except UnknownMethod:  # of the method, or of a method in its fields
            unknown = [one for one in modules if one not in variants()]
            if not unknown:
                raise
            variant = MissingMethod(
                method_name=record["variant"], hyper_parameters=record["config"], modules=modules, missing=unknown[0]
            )
        adapter = assemble_adapter(path, record, variant, stored, name)
        check_values(adapter)
        return adapter

    return charge_reading(path, read)


def read_record(path: Path) -> JsonMapping:
    """Return the record of a file, without its tensors.

    Raises:
        FormatError: the file is damaged, or has no record.
    """

    def read() -> JsonMapping:
        text = AdapterFile(path).metadata.get(_ENTRY)
        if text is None:
            raise corrupt_error(f"'{path}' does not describe an adapter in its metadata")
        return parse_record(path, text)

    return charge_reading(path, read)


def _read_file(file: AdapterFile) -> tuple[dict[str, Tensor], JsonMapping]:
    stored, text = file.read_tensors(), file.metadata[_ENTRY]
    record = parse_record(file.path, text)
    file.check_seal(text, stored)
    return stored, record


def assemble_adapter(
    path: Path, record: JsonMapping, variant: Variant, stored: dict[str, Tensor], name: str | None
) -> Adapter:
    """Build an adapter from its record and tensors.

    Args:
        stored: the tensors, by the keys of this format (``tensor_key``).
        name: the name of the adapter; None for the recorded one.
    """
    for alias, first in record["shared"].items():
        if first not in stored or alias in stored:
            raise corrupt_error(f"'{path}' says that '{alias}' is {short(first)}, which its tensors contradict")
        stored[alias] = stored[first]
    provenance = {
        **record["provenance"],
        "format": "native",
        "source": str(path),
        "base": record["base"],
        "left_out": record["left_out"],
    }
    adapter = Adapter(name or record["name"], variant, provenance=provenance)
    for key, tensor in stored.items():
        kind, _, rest = key.partition("/")
        site, _, parameter = rest.rpartition("/")
        if kind == "tensors" and site:
            adapter.tensors.setdefault(site, {})[parameter] = tensor
        elif kind == "replaced" and rest:
            adapter.replaced[rest] = tensor
        else:
            raise unused_error(
                f"'{path}' holds '{key}', which is not a name of this format",
                next_step="names are tensors/<site>/<parameter> and replaced/<parameter>",
            )
    for weight, numbers in provenance.get(TOKEN_ROWS, {}).items():
        found = adapter.replaced.get(weight)
        if found is None or found.ndim != 2 or not {*numbers} <= {*range(len(found))} or len({*numbers}) < len(numbers):
            raise corrupt_error(f"'{path}' names rows of '{weight}' that its tensors do not have")
    return adapter


def describe_adapter(adapter: Adapter) -> dict[str, object]:
    """Return the record of an adapter whose tensors are stored separately and once each."""
    config, left_out = variant_config(adapter.variant)
    provenance = {k: v for k, v in adapter.provenance.items() if k not in _LOCAL_PROVENANCE and _is_json(v)}
    modules = class_modules(adapter.variant)
    return {
        "version": VERSION,
        "name": adapter.name,
        "variant": adapter.variant.name,
        "config": config,
        "left_out": left_out or adapter.provenance.get("left_out", []),
        "shared": {},
        "provenance": provenance,
        "base": adapter.provenance.get("base"),
        **({_MODULES: modules} if modules else {}),
    }


def tensor_key(path: str | None, name: str) -> str:
    """Return the key of a site's parameter; if ``path`` is None, of a replaced parameter of the model."""
    return f"replaced/{name}" if path is None else f"tensors/{path}/{name}"


def _name_tensors(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write by key, and a map from each further key of a tensor to its first key."""
    named = {tensor_key(path, name): t for path, tensors in adapter.tensors.items() for name, t in tensors.items()}
    named |= {tensor_key(None, name): tensor for name, tensor in adapter.replaced.items()}
    first: dict[int, str] = {}
    shared = {}
    for key, tensor in named.items():
        if first.setdefault(id(tensor), key) != key:
            shared[key] = first[id(tensor)]
    return {key: tensor for key, tensor in named.items() if key not in shared}, shared


def parse_record(path: Path, text: str) -> JsonMapping:
    """Parse a record and check its fields.

    Raises:
        FormatError: the text is not a record, has another version of the format, or has a field that is missing or of a
            wrong type.
    """
    subject = f"the description in '{path}'"
    record = parse_object(text, lambda reason: corrupt_error(f"{subject} {reason}"))
    version = record.get("version")
    if not isinstance(version, int):
        raise corrupt_error(f"{subject} has no version")
    if version > VERSION:
        raise unsupported_error(
            f"'{path}' is version {version} of the format, this lorac reads {VERSION}", next_step="pip install -U lorac"
        )
    for field in record:
        if field not in _FIELDS and field != _MODULES:
            raise unknown_name_error(f"'{path}' has the unknown field '{field}'", field, _FIELDS, _OTHER_VERSION)
    for field, expected in _FIELDS.items():
        if field not in record or not matches_type(record[field], expected):
            raise corrupt_error(f"{subject} lacks '{field}', or has it with another type")
    provenance = record["provenance"]
    for entry, expected in _PROVENANCE_TYPES.items():
        if entry in provenance and not matches_type(provenance[entry], expected):
            raise corrupt_error(f"{subject} has '{entry}' of another type in its provenance")
    for site, layout in provenance.get(LAYOUT, {}).items():
        if not is_site_json(layout):
            raise corrupt_error(f"{subject} has no valid layout of '{site}': {short(layout)}")
    modules = record.get(_MODULES, {})
    names = (
        [part for name in modules.values() for part in name.split(".")] if matches_type(modules, _StringMap) else [""]
    )
    if not all(name.isidentifier() for name in names):
        raise corrupt_error(f"{subject} has '{_MODULES}' that are not modules: {short(modules)}")
    return record


def build_variant(path: Path, record: JsonMapping) -> Variant:
    """Return the method that a record describes.

    Raises:
        UnknownMethod: the class of the method is not imported.
        FormatError: a hyper-parameter does not belong to the method.
    """
    return _build_named_variant(path, record["variant"], record["config"], record.get(_MODULES, {}))


def _build_named_variant(path: Path, name: str, config: JsonMapping, modules: Mapping[str, str]) -> Variant:
    cls = find_variant(name, modules)
    known = dataclass_fields(cls)
    for field in config:
        if field not in known:
            fault = f"'{path}' sets '{field}', which {cls.name} does not have"
            raise unknown_name_error(fault, field, known, _OTHER_VERSION)
    types = field_types(cls)
    values: Fields = {field: _revive(path, value, modules) for field, value in config.items()}
    for field, value in values.items():
        if not matches_type(value, types[field]):
            given = next(one for one in dataclasses.fields(cls) if one.name == field)
            default = given.default if given.default_factory is dataclasses.MISSING else given.default_factory()
            raise unsupported_error(
                f"'{path}' sets {field}={short(config[field])}, which {cls.name} does not take",
                next_step=f"it takes {types[field]}"
                if default is dataclasses.MISSING
                else f"its default is {default!r}",
            )
    try:
        return cls(**values)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise unsupported_error(f"'{path}' configures {cls.name} wrongly: {error}", next_step=_OTHER_VERSION) from error


def _revive(path: Path, value: object, modules: Mapping[str, str]) -> object:
    """Return the value of a field; build methods from the JSON that ``_to_json`` made."""
    if isinstance(value, list):
        return [_revive(path, item, modules) for item in value]
    match value:
        case {"variant": str(name), "config": dict(config), **rest} if not rest:
            return _build_named_variant(path, name, config, modules)
        case dict():
            return {key: _revive(path, item, modules) for key, item in value.items()}
    return value


def variant_config(variant: Variant) -> tuple[dict[str, object], list[str]]:
    """Return the fields of a variant as JSON, and the names of fields without a JSON form, which get their defaults."""
    left_out = sorted(name for name, value in variant.settings.items() if not _is_json(value))
    return {n: _to_json(v) for n, v in variant.settings.items() if n not in left_out}, left_out


def _is_json(value: object) -> bool:
    if isinstance(value, Variant):
        return not variant_config(value)[1]
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _to_json(value: object) -> object:
    if isinstance(value, Variant):
        return {"variant": value.name, "config": variant_config(value)[0]}
    if isinstance(value, Mapping):
        return {k: _to_json(v) for k, v in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, list | tuple) else value
