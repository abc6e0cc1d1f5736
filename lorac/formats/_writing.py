"""Writing files so that equal input gives equal bytes, and the metadata entries that lorac writes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._errors import unsupported_error
from lorac.storage.strict_json import dump_json
from lorac.storage.tensor_file import write_safetensors
from lorac.storage.tensor_hash import hash_contents

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
