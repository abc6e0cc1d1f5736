"""Checkpoints of a training: Trainer's own, with optimizer and rules by the names of tensors, bound to one run.

    checkpoint-<step>/model.safetensors   the adapters, and the host's buffers that its calls change: a state dict
                      optimizer.pt, scheduler.pt, rng_state.pth, …  as Trainer writes them
                      checkpoint.json     the run; size and hash of every other file; a hash over all this

checkpoint.json is written last: a folder without it is not a checkpoint.
"""

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorac.errors import ArtifactError, ChoiceError, FormatError, short
from lorac.formats import load_checkpoint
from lorac.formats.checkpoint import FILE
from lorac.storage.artifact import check_manifest, describe_files, open_checked, read_manifest, write_manifest
from lorac.storage.atomic_folders import flush_folder, replace_atomically
from lorac.storage.paths import translate_os_errors
from lorac.storage.pickled_tensors import check_archive
from lorac.storage.strict_json import Json, JsonObject
from lorac.variants.adapter import Adapter

MANIFEST = "checkpoint.json"
FOLDER = re.compile(r"checkpoint-([0-9]{1,18})", re.ASCII)
ROWS_HASH = "rows_hash"
"""Entry of a run: the hash of its rows."""
_FIELDS = {"lorac_checkpoint": int, "step": int, "adapters": dict, "recipe": dict, "files": dict, "seal": str}
_UNBOUND = re.compile(
    r"(model|out|merge|push)$|arguments\.(logging_|log_|save_|hub_|push_to_hub|report_to|run_name|project|disable_tqdm"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor))"
)
"""Settings of a run that change none of its results."""
_LENGTHS = ("arguments.max_steps", "arguments.num_train_epochs")
"""Settings of a run that may grow where it goes on."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint, whose files have the hashes that its manifest says.

    Attributes:
        folder: where it lies.
        step: number of the optimizer's steps until then.
        run: the run that wrote it, among the manifest's other fields: its adapters, recipe, base, rows, processes.
    """

    folder: Path
    step: int
    run: JsonObject

    def adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the adapters as they were at that step.

        Raises:
            ArtifactError: they are not those of the manifest.
            LoracError: as ``lorac.load_adapter``.
        """
        found, written = load_checkpoint(self.folder / FILE, model), sorted(self.run["adapters"])
        if sorted(found) != written:
            raise ArtifactError(f"'{self.folder}' has adapters {short(sorted(found))}, its manifest {short(written)}")
        return found

    def check_run(self, run: JsonObject) -> None:
        """Check that a run is the one that wrote the checkpoint.

        Raises:
            ChoiceError: it has another recipe, base or set of adapters, other rows, or another number of processes.
        """
        # Older checkpoints lack the hash.
        bound = {name: here for name, here in run.items() if name != ROWS_HASH or name in self.run}
        for path, there, here in _iterate_differences({name: self.run.get(name) for name in bound}, bound):
            numbers = [value for value in (there, here) if isinstance(value, int | float)]
            is_longer = path in _LENGTHS and len(numbers) == 2 and numbers[0] < numbers[1]
            if not _UNBOUND.match(path) and not is_longer:
                raise ChoiceError(
                    f"'{self.folder}' is of another run: {path} is {short(there)} there, and {short(here)} here",
                    next_step="continue with the same recipe, model and data, or begin a run in another folder",
                )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a run's folder, the newest last."""
    found = [path for path in folder.glob("checkpoint-*") if FOLDER.fullmatch(path.name)]
    finished = [path for path in found if (path / MANIFEST).is_file()]
    return sorted(finished, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(folder: Path) -> Checkpoint:
    """Open the newest finished checkpoint in a run's folder.

    Raises:
        ChoiceError: there is none.
        ArtifactError, FormatError: as ``open_checkpoint``.
    """
    if not (found := list_checkpoints(folder)):
        what = f"'{folder}' holds no finished checkpoint"
        raise ChoiceError(what, next_step="train without resuming; save_steps says how often one is written")
    return open_checkpoint(found[-1])


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and check all its files against its manifest.

    Raises:
        ArtifactError: it was not finished, or a file is missing or changed.
        FormatError: a file takes more memory than its size explains.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).is_symlink():
        raise ArtifactError(
            f"'{folder}' is not a checkpoint, or one that was not finished: it has no {MANIFEST}",
            next_step="give the folder of an earlier checkpoint, or begin again",
        )
    with translate_os_errors(folder, ArtifactError, "read"):
        fields = read_manifest(folder / MANIFEST)
        check_manifest(folder, fields, _FIELDS)
        files = [open_checked(folder, name, entry).where for name, entry in fields["files"].items()]
        for file in (file for file in files if file.suffix in (".pt", ".pth")):
            check_archive(file, functools.partial(_damaged, file))
    return Checkpoint(folder, fields["step"], fields)


def _damaged(file: Path, reason: str) -> FormatError:
    return FormatError(f"'{file}' is damaged: {reason}", code="corrupt_file")


def finish_checkpoint(folder: Path, step: int, run: JsonObject) -> None:
    """Write the manifest of a folder that holds everything else; raises ``FormatError`` if the disk fails."""
    with translate_os_errors(folder, FormatError, "written", "unreadable"):
        flush_folder(folder)
        files = {name: entry for name, entry in describe_files(folder).items() if name != MANIFEST}
        with replace_atomically(folder / MANIFEST) as staged:
            write_manifest(staged, {**run, "lorac_checkpoint": 1, "step": step, "files": files})


def _iterate_differences(there: Json, here: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Yield the dotted path of each part that differs in two values, and both parts; a missing one is None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{path}.{key}" if path else key
            yield from _iterate_differences(there.get(key), here.get(key), inner.removeprefix("recipe."))
    elif there != here:
        yield path, there, here
