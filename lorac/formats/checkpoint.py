"""Checkpoints of a training: files with the state dict of a compiled model, as transformers' Trainer writes them.

    adapter_tensors.<adapter>.<key>             a tensor of an adapter
        adapter_tensors.<adapter>._extra_state      the adapter's record, which describes each of these keys

The host's tensors are ignored. The record has the form of lorac's own format (``lorac.formats.native``). Trainer writes
no hash, so lorac adds a hash of the record and the adapter's tensors to the record when the state dict is made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.fit import check_adapter, sort_by_site
from lorac.argument_types import JsonMapping, matches_type
from lorac.errors import FormatError, nearest_name, unused_error
from lorac.formats._config_fields import encode_config
from lorac.formats._errors import corrupt_error
from lorac.formats._format import Evidence, Format
from lorac.formats.native import assemble_adapter, build_variant, parse_record, tensor_key
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.storage.strict_json import parse_object
from lorac.variants.adapter import Adapter

FILE = "model.safetensors"
"""The name that Trainer gives it."""
SEAL = "seal"
"""Entry of a record that holds the hash over its other entries and the tensors."""
_PREFIX, _RECORD = "adapter_tensors.", "._extra_state"
Places = Mapping[str, Sequence[tuple[str | None, str]]]
"""Key -> (site path or None, parameter) of every place that holds its tensor."""
Record = tuple[str, JsonMapping, Places]
"""How an adapter's keys begin, its record, and its places."""


class CheckpointFormat(Format):
    """Checkpoints of transformers' Trainer."""

    name = "checkpoint"
    looks_for = f"{FILE} with the state dict of a compiled model"
    written_by = "transformers' `Trainer`, of a compiled model"
    evidence = Evidence.METADATA

    def recognises(self, file: AdapterFile) -> bool:
        return any(map(_is_record, _find_state(file).peek_names()))

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        state = _find_state(file)
        tensors, records = _read_records(state)
        names = sorted(records)
        if name not in names and len(names) > 1:
            raise FormatError(
                f"'{state.path}' holds the adapters {', '.join(names)}, and name= chooses none of them",
                nearest=nearest_name(name or "", names),
                next_step=f"give name=, one of them: name={names[0]!r}",
            )
        chosen = records[names[0] if name is None or len(names) == 1 else name]
        return self._assemble(state.path, tensors, chosen, view, name)

    def read_all(self, file: AdapterFile, view: ModelView | None) -> dict[str, Adapter]:
        """Return every adapter of a checkpoint by its name; raises as ``read``."""
        state = _find_state(file)
        tensors, records = _read_records(state)
        return {name: self._assemble(state.path, tensors, record, view, name) for name, record in records.items()}

    def _assemble(
        self, file: Path, tensors: Mapping[str, Tensor], record: Record, view: ModelView | None, name: str | None
    ) -> Adapter:
        prefix, stored, places = record
        own = {
            tensor_key(site, parameter): tensors[f"{prefix}.{key}"]
            for key, parameters in places.items()
            for site, parameter in parameters
        }
        adapter = assemble_adapter(file, stored, build_variant(file, stored), own, name)
        adapter.provenance["format"] = self.name
        adapter.tensors = sort_by_site(adapter.tensors, view)
        check_adapter(adapter, view)
        return adapter


def _read_records(file: AdapterFile) -> tuple[Mapping[str, Tensor], dict[str, Record]]:
    """Return a checkpoint's tensors, and the record of each adapter by its name."""
    tensors = file.read_tensors()
    records: dict[str, Record] = {}
    for key in filter(_is_record, tensors):
        if tensors[key].dtype is not torch.uint8 or tensors[key].ndim != 1:
            raise corrupt_error(f"'{key}' in '{file}' is not a text")
        text = bytes(tensors[key].tolist())
        stored = parse_object(text, lambda reason: corrupt_error(f"a record in '{file}' {reason}"))
        prefix = key.removesuffix(_RECORD)
        if stored.keys() - {SEAL} != {"record", "places"} or not matches_type(stored.get("places"), Places):
            raise corrupt_error(f"a record in '{file}' does not consist of an adapter's record, places and seal")
        missing = next((one for one in stored["places"] if f"{prefix}.{one}" not in tensors), None)
        if missing is not None:
            raise corrupt_error(f"'{file}' lacks the tensor '{prefix}.{missing}', which its record promises")
        own = {one: tensors[f"{prefix}.{one}"] for one in stored["places"]}
        sealed = encode_config({name: stored[name] for name in ("record", "places")})
        if not file.agrees_with_seal(stored.get(SEAL), sealed, own):  # older records have no seal
            raise corrupt_error(
                f"the record and the tensors of '{prefix}' in '{file}' do not belong together: they, or one of them, "
                "were changed since the state dict was made",
                next_step="copy the file again, or save the adapter itself: lorac.save_adapter(adapter, path)",
            )
        parsed = parse_record(file.path, encode_config(stored["record"]))
        records[parsed["name"]] = (prefix, parsed, stored["places"])
    known = {f"{prefix}.{key}" for prefix, _, places in records.values() for key in places}
    unused = next((k for k in tensors if _PREFIX in k and not _is_record(k) and k not in known), None)
    if unused is not None:
        raise unused_error(f"'{file}' holds '{unused}', which no record in it names", next_step="copy the file again")
    return tensors, records


def _find_state(file: AdapterFile) -> AdapterFile:
    return file if file.is_file else file.inside(FILE)


def _is_record(name: str) -> bool:
    return _PREFIX in name and name.endswith(_RECORD)
