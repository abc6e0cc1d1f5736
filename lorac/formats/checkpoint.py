"""Checkpoints of a training: a file of the state dict of a compiled model, as transformers' Trainer writes it.

    adapter_tensors.<adapter>.<key>             a tensor of an adapter
    adapter_tensors.<adapter>._extra_state      its record, which says what each of the keys is

What of the host is in it is left. The record is as lorac's own format has it (``lorac.formats.native``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.errors import FormatError, nearest_name
from lorac.formats._files import encode_config, peek_names, read_safetensors
from lorac.formats._format import Format
from lorac.formats.native import assemble_adapter, build_variant, parse_record, tensor_key
from lorac.frontend.model_view import ModelView
from lorac.storage.strict_json import parse_object
from lorac.variants.adapter import Adapter

Tensor = torch.Tensor
FILE = "model.safetensors"
"""As Trainer calls it."""
_START, _RECORD = "adapter_tensors.", "._extra_state"


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _recognises(path: Path) -> bool:
    file = _file(path)
    return file.is_file() and any(_is_record(name) for name in peek_names(file))


def _is_record(name: str) -> bool:
    return _START in name and name.endswith(_RECORD)


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    file = _file(path)
    tensors, _ = read_safetensors(file)
    records = {}
    for key in filter(_is_record, tensors):
        told = parse_object(
            bytes(tensors[key].tolist()),
            lambda reason: FormatError(f"a record in '{file}' {reason}", code="corrupt_file"),
        )
        record = parse_record(file, encode_config(told["record"]))
        records[record["name"]] = (key.removesuffix(_RECORD), record, told["places"])
    start, record, places = records[_chosen(file, sorted(records), name)]
    adapter = assemble_adapter(file, record, _stored(file, tensors, start, places), name, build_variant)
    adapter.provenance["format"] = FORMAT.name
    adapter.tensors = sort_by_site(adapter.tensors, None if model is None else ModelView.of(model))
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    return adapter


def _chosen(file: Path, there: list[str], name: str | None) -> str:
    """Which adapter of a checkpoint is read: the only one, or the one of the name that is asked for."""
    if len(there) == 1:
        return there[0]
    if name not in there:
        raise FormatError(
            f"'{file}' holds the adapters {', '.join(there)}, and which is meant is not said",
            nearest=nearest_name(name or "", there),
            next_step=f"give name=, one of them: name={there[0]!r}",
        )
    return name


def _stored(file: Path, tensors: dict[str, Tensor], start: str, places: Any) -> dict[str, Tensor]:
    """The tensors of one adapter by the names of lorac's own format."""
    stored: dict[str, Tensor] = {}
    for key, named in places.items():
        if f"{start}.{key}" not in tensors:
            raise FormatError(
                f"'{file}' lacks the tensor '{start}.{key}', which its record promises", code="corrupt_file"
            )
        stored |= {tensor_key(site, name): tensors[f"{start}.{key}"] for site, name in named}
    return stored


FORMAT = Format(
    name="checkpoint",
    looks_for=f"{FILE} with the state dict of a compiled model",
    recognises=_recognises,
    load=_load,
)
