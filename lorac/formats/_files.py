"""Files, read with distrust and written so that equal input gives equal bytes.

safetensors: https://github.com/huggingface/safetensors#format. Its header is checked here before
the library sees the file, so that a lying one is reported by name; `lorac.storage.tensor_file` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorac.adapters.fit import check_finite
from lorac.errors import FormatError, LoracError, nearest_name
from lorac.formats._pickles import load_pickle
from lorac.limits import claim_memory, pause_clock
from lorac.storage.strict_json import dump_json, parse_object, read_json_text
from lorac.storage.tensor_file import DTYPES, hash_contents

Tensor = torch.Tensor
MAX_HEADER = 100_000_000
"""Longest header in bytes, the library's own limit."""
LONGEST_NAME = 1000
"""Characters of a tensor's name, which patterns are matched against."""
SEAL = "lorac_seal"
"""Metadata entry that holds the hash over a description and its tensors."""
HUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
"""What AdapterHub calls the tensors in its folders, whose configuration has the name of PEFT's."""
_ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class SafetensorsHeader:
    """A safetensors header that agrees with its file.

    Attributes:
        tensors: Name -> (dtype's name, shape, first byte, byte after the last), offsets from the
            start of the data.
        metadata: Its free text entries.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file, held against the file's size and itself.

    Raises:
        FormatError: Truncated, not JSON, an unknown dtype, shapes that do not fit the offsets,
            overlapping tensors, or bytes that belong to none.
    """
    raw, size = _raw_header(path)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(path, "its metadata is not a mapping of text to text")
    tensors = {name: _parse_entry(path, name, entry) for name, entry in raw.items()}
    _check_layout(path, tensors, size)
    return SafetensorsHeader(tensors, metadata)


def peek_metadata(path: Path) -> dict[str, str]:
    """The metadata of what may be a safetensors file; empty where it is not, or is damaged."""
    try:
        metadata = _raw_header(path)[0].get("__metadata__")
    except (LoracError, OSError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def peek_names(path: Path) -> frozenset[str]:
    """The names of the tensors of what may be a safetensors file; none where it is not, or is damaged."""
    try:
        return frozenset(_raw_header(path)[0])
    except (LoracError, OSError):
        return frozenset()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own, and its metadata.

    Raises:
        FormatError: As `read_header`.
        AdapterError: A tensor holds NaN or infinity.
    """
    header = read_header(path)
    try:
        with pause_clock():
            # The library maps the file; clones outlive whatever happens to it.
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, RuntimeError) as error:  # the latter by torch, of a file that is gone by now
        raise _corrupt(path, str(error)) from error
    check_finite(tensors, f"'{path}'")
    return tensors, dict(header.metadata)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, through `torch.load(weights_only=True)`.

    Raises:
        FormatError: Damaged, or holding anything but named dense tensors that lie in the file themselves.
        AdapterError: A tensor holds NaN or infinity.
        FormatError: Its tensors are larger than the file is.
    """
    loaded = load_pickle(path, lambda reason: _corrupt(path, reason))
    if not isinstance(loaded, dict):
        raise _corrupt(path, f"it holds a {type(loaded).__name__}, not named tensors")
    for name, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not dense:
            raise _corrupt(path, f"{str(name)[:LONGEST_NAME]!r} is not a dense tensor")
        _check_name(path, name)
    tensors = _share_views({name: value.detach() for name, value in loaded.items()})
    _check_storages(path, tensors)
    check_finite(tensors, f"'{path}'")
    return tensors


def _share_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those that are one view of one memory as one object."""
    first: dict[Any, Tensor] = {}
    views = {n: (t.data_ptr(), t.storage_offset(), t.dtype, t.shape, t.stride()) for n, t in tensors.items()}
    return {name: first.setdefault(views[name], tensor) for name, tensor in tensors.items()}


def _check_storages(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every value lies in the file: none is repeated by a stride, and together they are hardly more than it is."""
    for name, tensor in tensors.items():
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.itemsize > held:
            shape = tuple(tensor.shape)
            raise _corrupt(path, f"'{name}' is {tensor.dtype} {shape}, but has {held} bytes")
    distinct = {id(tensor): tensor.numel() * tensor.itemsize for tensor in tensors.values()}
    claim_memory(sum(distinct.values()) - path.stat().st_size, "its tensors are larger than the file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: Not JSON as `parse_object` wants it.
    """
    return parse_object(read_json_text(path), lambda reason: _corrupt(path, f"it {reason}"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, its own names sorted; nested ones keep their order, which may matter.

    Raises:
        FormatError: As `config_text`.
    """
    path.write_text(encode_config({name: value[name] for name in sorted(value)}, indent=2) + "\n", encoding="utf-8")


def encode_config(value: Mapping[str, Any], indent: int | None = None) -> str:
    """An adapter's description as JSON.

    Raises:
        FormatError: It holds NaN, infinity, or whatever else `read_json` would refuse.
    """
    try:
        return dump_json(value, indent)
    except ValueError as error:
        raise FormatError(
            f"the adapter's configuration cannot be written: {error}",
            next_step="give it finite numbers of ordinary size",
            code="unsupported_field",
        ) from error


def check_seal(path: Path, text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Hold a description and the tensors beside it against the hash that lorac wrote over both.

    Files of other tools have none, and are taken as they are.

    Raises:
        FormatError: They do not belong together.
    """
    with pause_clock():
        belongs = SEAL not in metadata or metadata[SEAL] == hash_contents(text, tensors)
    if not belongs:
        raise FormatError(
            f"the configuration and the tensors of '{path}' do not belong together: they, or one of them, were changed "
            "since lorac wrote both",
            next_step=f"{FormatError.usual_steps['corrupt_file']}; where the change is meant, remove '{SEAL}' from the "
            "tensors' metadata",
            code="corrupt_file",
        )


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON object, and the number of bytes after it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _corrupt(path, f"it promises {length} bytes of header, the file has {size} bytes")
        claim_memory(length, "its header")
        text = file.read(length)
    header = parse_object(text, lambda reason: _corrupt(path, f"its header {reason}"))
    return header, size - 8 - length


def _check_name(path: Path, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise _corrupt(path, f"a tensor's name has {len(name)} characters, more than {LONGEST_NAME}: '{name[:50]}…'")


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    _check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise _corrupt(path, f"the entry of '{name}' is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt(path, f"'{name}' has the unknown dtype {dtype!r}", nearest_name(str(dtype), DTYPES))
    if not (_is_natural_list(shape) and _is_natural_list(offsets) and len(offsets) == 2):
        raise _corrupt(path, f"the shape or offsets of '{name}' are not whole numbers")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise _corrupt(path, f"'{name}' is {dtype} {tuple(shape)}, but has {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _check_layout(path: Path, tensors: Mapping[str, tuple[str, Any, int, int]], size: int) -> None:
    """Tensors follow one another without overlap or hole, and fill the file."""
    reached = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise _corrupt(path, f"'{name}' {what}: it begins at byte {begin}, not {reached}")
        reached = end
    if reached != size:
        raise _corrupt(path, f"its header promises {reached} bytes of data, the file has {size}")


def _is_natural_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _corrupt(path: Path, reason: str, nearest: str | None = None) -> FormatError:
    return FormatError(f"'{path}' is damaged: {reason}", nearest=nearest, code="corrupt_file")
