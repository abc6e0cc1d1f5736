"""Checkpoints of a training: a file of the state dict of a compiled model, as transformers' Trainer writes it.

    adapter_tensors.<adapter>.<key>             a tensor of an adapter
    adapter_tensors.<adapter>._extra_state      its record, which says what each of the keys is

The tensors of the host are ignored. The record is that of lorac's own format (``lorac.formats.native``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.errors import FormatError, nearest_name
from lorac.formats._config_fields import JsonObject
from lorac.formats._errors import corrupt_error
from lorac.formats._files import encode_config, peek_names, read_safetensors
from lorac.formats._format import Format
from lorac.formats.native import assemble_adapter, build_variant, parse_record, tensor_key
from lorac.frontend.model_view import ModelView
from lorac.storage.strict_json import parse_object
from lorac.variants.adapter import Adapter

FILE = "model.safetensors"
"""The name that Trainer gives it."""
_PREFIX, _RECORD = "adapter_tensors.", "._extra_state"
Places = Mapping[str, Sequence[tuple[str | None, str]]]
"""Key -> (site path or None, parameter) of every place that holds its tensor."""


class CheckpointFormat(Format):
    """Checkpoints of transformers' Trainer."""

    name = "checkpoint"
    looks_for = f"{FILE} with the state dict of a compiled model"

    def recognises(self, path: Path) -> bool:
        file = _checkpoint_file(path)
        return file.is_file() and any(_is_record(name) for name in peek_names(file))

    def read(self, path: Path, view: ModelView | None, name: str | None) -> Adapter:
        file = _checkpoint_file(path)
        tensors, _ = read_safetensors(file)
        records: dict[str, tuple[str, JsonObject, Places]] = {}
        for key in filter(_is_record, tensors):
            text = bytes(tensors[key].tolist())
            stored = parse_object(text, lambda reason: corrupt_error(f"a record in '{file}' {reason}"))
            parsed = parse_record(file, encode_config(stored["record"]))
            records[parsed["name"]] = (key.removesuffix(_RECORD), parsed, stored["places"])
        prefix, record, places = records[_choose_adapter(file, sorted(records), name)]
        stored_tensors = _select_tensors(file, tensors, prefix, places)
        adapter = assemble_adapter(file, record, build_variant(file, record), stored_tensors, name)
        adapter.provenance["format"] = self.name
        adapter.tensors = sort_by_site(adapter.tensors, view)
        if view is not None:
            check_adapter(adapter, view)
        return adapter


def _checkpoint_file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _is_record(name: str) -> bool:
    return _PREFIX in name and name.endswith(_RECORD)


def _choose_adapter(file: Path, names: list[str], name: str | None) -> str:
    """Return the only adapter of a checkpoint, or the one of the given name."""
    if len(names) == 1:
        return names[0]
    if name not in names:
        raise FormatError(
            f"'{file}' holds the adapters {', '.join(names)}, and name= chooses none of them",
            nearest=nearest_name(name or "", names),
            next_step=f"give name=, one of them: name={names[0]!r}",
        )
    return name


def _select_tensors(file: Path, tensors: Mapping[str, Tensor], prefix: str, places: Places) -> dict[str, Tensor]:
    """Return the tensors of one adapter by the names of lorac's own format."""
    selected: dict[str, Tensor] = {}
    for key, parameters in places.items():
        if f"{prefix}.{key}" not in tensors:
            raise corrupt_error(f"'{file}' lacks the tensor '{prefix}.{key}', which its record promises")
        selected |= {tensor_key(site, name): tensors[f"{prefix}.{key}"] for site, name in parameters}
    return selected


FORMAT = CheckpointFormat()
