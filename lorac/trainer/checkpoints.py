"""Checkpoints of a training: what it is continued from, bound to the run that wrote it.

    checkpoint-<step>/model.safetensors          the adapters, and what the host keeps of its calls: a state dict
                      state.safetensors          optimizer and rules by the names of tensors, scheduler, scaler
                      random-<process>.safetensors   random states
                      …                          what Trainer writes; of that, trainer_state.json alone is read again
                      checkpoint.json            the run; size and hash of each file; a hash over all this

checkpoint.json is written last, so that a folder without it is no checkpoint. Nothing in a folder is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import lorac
from lorac.adapters.base_hash import compute_base_hash
from lorac.argument_types import matches_type
from lorac.errors import ArtifactError, ChoiceError, FormatError, Unavailable, short
from lorac.formats.checkpoint import FILE
from lorac.formats.native import variant_config
from lorac.limits import charge_reading
from lorac.session.saving import file_stems
from lorac.storage.artifact import describe_files, open_checked, seal_manifest
from lorac.storage.atomic_folders import flush_folder, replace_atomically
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import translate_os_errors
from lorac.storage.strict_json import Json, JsonObject, dump_json, parse_json, parse_object, read_json_text
from lorac.storage.tensor_file import TensorFile, write_safetensors
from lorac.trainer.recipe import Recipe
from lorac.variants.adapter import Adapter

MANIFEST: Final = "checkpoint.json"
STATE: Final = "state.safetensors"
PROGRESS: Final = "trainer_state.json"
VERSION = 1
_ENTRY = "state"
_FOLDER = re.compile(r"checkpoint-([0-9]{1,18})", re.ASCII)
_FIELDS: Mapping[str, object] = {
    "lorac_checkpoint": int,
    "step": int,
    "run": Mapping[str, object],
    "files": Mapping[str, object],
    "seal": str,
}
_UNBOUND = re.compile(
    r"arguments\.(logging_|log_|save_|hub_|push_to_hub|report_to|run_name|output_dir|project|disable_tqdm"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor))"
)
"""Settings of a run that change nothing of what it computes."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint, whose files have the hashes that its manifest says.

    Attributes:
        folder: where it lies.
        step: how many steps of the optimizer were taken.
        run: the run that wrote it (``describe_run``).
        files: its files by name, held open.
    """

    folder: Path
    step: int
    run: JsonObject
    files: Mapping[str, OpenFile]

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the adapters as they were at that step.

        Raises:
            FormatError: as ``lorac.load_adapter``.
        """
        return {name: lorac.load_adapter(self.folder / FILE, model, name) for name in self.run["adapters"]}

    def check_run(self, run: JsonObject) -> None:
        """Check that a run is the one that wrote the checkpoint.

        Raises:
            ChoiceError: it has another recipe, base or set of adapters, or another number of rows or processes.
        """
        for path, there, here in _iterate_differences(self.run, run):
            if not _UNBOUND.match(path):
                raise ChoiceError(
                    f"'{self.folder}' is of another run: {path} is {short(there)} there, and {short(here)} here",
                    next_step="continue with what it was written with, or begin a run in another folder",
                )

    @contextlib.contextmanager
    def restoring(self, name: str) -> Iterator[Any]:
        """Give the block what ``write_state`` wrote into a file.

        Raises:
            ArtifactError: the checkpoint has no such file, it is damaged, or the block cannot use it.
        """
        if name not in self.files:
            raise ArtifactError(f"the checkpoint '{self.folder}' lacks '{name}'")
        file = self.files[name]
        try:
            with charge_reading(file.where):
                stored = TensorFile(file)
                state = _unpack(parse_json(stored.notes[_ENTRY], ArtifactError), stored.load_all())
            yield state
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"'{file.where}' holds no state of this run: {error}") from error


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in a run's folder that was finished.

    Raises:
        ArtifactError: as ``open_checkpoint``.
    """
    found = [path for path in folder.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    finished = [path for path in found if (path / MANIFEST).is_file()]
    newest = max(finished, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else open_checkpoint(newest)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check all its files against its manifest.

    Raises:
        ArtifactError: it was not finished, is of another version, or a file is missing or changed.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        raise ArtifactError(
            f"'{folder}' is not a checkpoint, or one that was not finished: it has no {MANIFEST}",
            next_step="give the folder of an earlier checkpoint, or begin again",
        )
    with translate_os_errors(folder, ArtifactError, "read"):
        fields = _read_object(folder, manifest)
        _check_fields(folder, fields)
        files = {name: open_checked(folder, name, entry) for name, entry in fields["files"].items()}
        progress = _read_object(folder, files[PROGRESS].where)
    if progress.get("global_step") != fields["step"]:
        raise _damaged(
            folder, f"it is of step {fields['step']}, and {PROGRESS} of {short(progress.get('global_step'))}"
        )
    return Checkpoint(folder, fields["step"], fields["run"], files)


def finish_checkpoint(folder: Path, step: int, run: JsonObject) -> None:
    """Write the manifest of a folder that holds everything else.

    Raises:
        FormatError: the disk fails.
    """
    with translate_os_errors(folder, FormatError, "written", "unreadable"):
        flush_folder(folder)
        fields = {"lorac_checkpoint": VERSION, "step": step, "run": run, "files": describe_files(folder)}
        with replace_atomically(folder / MANIFEST) as staged:
            staged.write_text(dump_json(seal_manifest(fields), indent=1), encoding="utf-8")


def save_trained_adapters(adapters: Mapping[str, Adapter], folder: Path, model: nn.Module) -> dict[str, Path]:
    """Write each adapter as PEFT does, or where PEFT has no place for it in lorac's own format.

    Returns:
        Name -> what was written; a name that not every system accepts for a file, or that a checkpoint has, gives way
        to a number.
    """
    stems = file_stems(sorted(adapters), reserved=_FOLDER)
    return {name: _save_adapter(adapters[name], folder / stem, model) for name, stem in stems.items()}


def _save_adapter(adapter: Adapter, folder: Path, model: nn.Module) -> Path:
    try:
        lorac.save_adapter(adapter, folder, model=model)
    except FormatError as error:
        if error.code != "unsupported_field":
            raise
        folder = folder.with_name(f"{folder.name}.safetensors")
        lorac.save_adapter(adapter, folder, format="native", model=model)
    return folder


def _read_object(folder: Path, file: Path) -> JsonObject:
    with charge_reading(file):
        return parse_object(read_json_text(file), lambda reason: _damaged(folder, f"'{file.name}' {reason}"))


def _check_fields(folder: Path, fields: JsonObject) -> None:
    for field, kind in _FIELDS.items():
        if not matches_type(fields.get(field), kind):
            raise _damaged(folder, f"'{field}' is missing, or of another type")
    if fields["lorac_checkpoint"] != VERSION:
        raise ArtifactError(
            f"'{folder}' is version {fields['lorac_checkpoint']} of checkpoints, this lorac reads {VERSION}",
            next_step="continue it with the version of lorac that wrote it",
        )
    if seal_manifest(fields) != fields:
        raise _damaged(folder, "its seal shows that it was changed after it was written")
    missing = next((name for name in (FILE, STATE, PROGRESS) if name not in fields["files"]), None)
    if missing is not None or not matches_type(fields["run"].get("adapters"), Mapping[str, object]):
        raise _damaged(folder, f"it does not list {missing or 'adapters'}")


def _damaged(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the manifest of the checkpoint '{folder}' is damaged: {reason}")


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def hash_base(compiled: Any) -> str | None:
    """Return a hash of the base's weights, but for quantised ones, at all sites."""
    view = compiled.session.view
    return compute_base_hash(view, [path for path, site in view.sites.items() if not site.packed])


def describe_run(compiled: Any, recipe: Recipe, **facts: Json) -> JsonObject:
    """Return what a checkpoint is bound to: the recipe, the adapters of the model that trains, and further facts."""
    adapters = {
        name: {"method": adapter.variant.name, "settings": variant_config(adapter.variant)[0]}
        for name, adapter in sorted(compiled.adapters.items())
    }
    made: JsonObject = json.loads(dump_json({"adapters": adapters, "recipe": dataclasses.asdict(recipe), **facts}))
    return made


def _iterate_differences(there: Json, here: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Yield the dotted path of each part in which two values differ, and both parts; None stands for a missing one."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{path}.{key}" if path else key
            yield from _iterate_differences(there.get(key), here.get(key), inner.removeprefix("recipe."))
    elif there != here:
        yield path, there, here


# ── States ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_state(file: Path, state: object) -> None:
    """Write tensors, numbers and texts in lists, tuples and dicts as one file of tensors and a description.

    Raises:
        Unavailable: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = dump_json(_pack(state, tensors, ""))
    write_safetensors(file, tensors, {_ENTRY: text})


def _pack(value: object, tensors: dict[str, Tensor], path: str) -> Json:
    """Return a value as JSON; its tensors are put aside, named by their path."""
    if isinstance(value, dict):
        return {"dict": [[_pack(key, {}, path), _pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Unavailable(
        f"{path.strip('/')} is a {type(value).__name__}, which a checkpoint does not hold",
        next_step="use an optimizer and a scheduler whose state is tensors, numbers and texts",
    )


def _unpack(value: Json, tensors: dict[str, Tensor]) -> Any:
    """Return what ``_pack`` was given; each tensor stands in one place."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    match kind:
        case "dict":
            return {_unpack(key, tensors): _unpack(item, tensors) for key, item in held}
        case "tuple":
            return tuple(_unpack(item, tensors) for item in held)
        case "tensor":
            return tensors.pop(held)
    return float(held)


def get_random_state() -> dict[str, Any]:
    """Return the state of every generator that a training draws from."""
    version, internal, gauss = random.getstate()
    drawn: Any = np.random.get_state()
    algorithm, keys, *rest = drawn
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, keys.tolist(), *rest],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of ``get_random_state``."""
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
