"""The metadata of files: the LoraConfigs that diffusers writes, and lorac's own entries.

diffusers writes one JSON object, in which a field of a component's LoraConfig has the name ``<component>.<field>``.
"""

from collections.abc import Mapping
from pathlib import Path

from lorac.formats._config_fields import read_fields
from lorac.formats._errors import corrupt_error
from lorac.formats._writing import BASE_HASH, encode_config
from lorac.formats.peft.config import peft_types, variant_of, write_config
from lorac.storage.strict_json import parse_object
from lorac.variants.low_rank import ScaledRank

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
