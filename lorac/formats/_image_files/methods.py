"""One method of many sites, since files have a rank and an alpha per module, and its record in a file's metadata.

diffusers writes one JSON object, in which a field of a component's LoraConfig has the name ``<component>.<field>``.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorac.argument_types import Fields
from lorac.formats._config_fields import BASE_HASH, encode_config, read_fields
from lorac.formats._errors import corrupt_error
from lorac.formats.peft.config import peft_types, variant_of, write_config
from lorac.ir.sites.patterns import MAX_PATTERN_LENGTH
from lorac.storage.strict_json import parse_object
from lorac.variants.base import Variant
from lorac.variants.low_rank import ScaledRank
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


CONFIGS = "lora_adapter_metadata"
"""The metadata entry of diffusers."""
_LORA = "LORA"


def read_configs(metadata: Mapping[str, str], path: Path) -> dict[str, ScaledRank]:
    """Return component -> the LoRA that its configuration describes.

    Raises:
        FormatError: the entry is not JSON, or a configuration is not one that lorac builds.
    """
    text = metadata.get(CONFIGS, "{}")
    fields = parse_object(text, lambda reason: corrupt_error(f"the metadata entry '{CONFIGS}' of '{path}' {reason}"))
    configs: dict[str, dict[str, object]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        configs.setdefault(component, {})[field] = value
    peft_type, found = peft_types()[_LORA], {}
    for component, raw in configs.items():
        variant = variant_of(read_fields(raw, peft_type.fields, path), peft_type, path)
        assert isinstance(variant, ScaledRank)
        found[component] = variant
    return found


def write_configs(variants: Mapping[str, ScaledRank]) -> dict[str, str]:
    """Return components' configurations as a metadata entry; no entry where every scale is 1.

    diffusers assumes rank 8 for a component without a configuration, so either all components have one or none has.
    """
    if all(not one.alpha_pattern and not one.rank_pattern and one.scale == 1 for one in variants.values()):
        return {}
    fields: dict[str, object] = {}
    for component, variant in variants.items():
        config = write_config(variant, peft_types()[_LORA], {"target_modules": list(variant.targets)}, {})
        fields |= {f"{component}.{name}": value for name, value in config.items()}
    return {CONFIGS: encode_config(fields)}


def seal_text(metadata: Mapping[str, str]) -> str:
    """Return the part of the metadata that the seal covers with the tensors."""
    return encode_config({name: metadata[name] for name in (CONFIGS, BASE_HASH) if name in metadata})
