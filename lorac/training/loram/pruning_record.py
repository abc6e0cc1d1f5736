"""Records of the rows and columns that a pruned layer keeps, and their file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorac.errors import ArtifactError, FormatError
from lorac.limits import charge_reading
from lorac.storage.open_file import OpenFile
from lorac.storage.paths import translate_os_errors
from lorac.storage.tensor_file import TensorFile, write_safetensors
from lorac.storage.tensor_hash import agrees_with_hash, hash_contents

_SEAL = "lorac_seal"
_RECORD_PARTS = ("shape", "rows", "columns")


@dataclass(frozen=True, eq=False)
class PruningRecord:
    """The rows and columns of a layer that are kept.

    Attributes:
        shape: (out, in) of the large model's weight.
        rows, columns: the positions kept, in order; all of them if the layer is pruned along the other axis only.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor

    @property
    def small(self) -> tuple[int, int]:
        """(out, in) of the smaller model's weight."""
        return len(self.rows), len(self.columns)


def write_pruning_record(kept: Mapping[str, PruningRecord], path: str | Path) -> None:
    """Write which positions are kept, by path of a layer, as a safetensors file with a hash over its tensors."""
    tensors: dict[str, Tensor] = {}
    for name, one in kept.items():
        values = (torch.tensor(one.shape), one.rows, one.columns)
        tensors |= {f"{name}:{part}": value.to(torch.int64) for part, value in zip(_RECORD_PARTS, values, strict=True)}
    write_safetensors(Path(path), tensors, {"format": "pt", _SEAL: hash_contents("", tensors)})


def read_pruning_record(path: str | Path) -> dict[str, PruningRecord]:
    """Read the file of ``write_pruning_record``.

    Raises:
        FormatError: the file cannot be read or was changed, or positions are missing or outside the layer.
    """
    path = Path(path)

    def read() -> tuple[Mapping[str, str], dict[str, Tensor]]:
        file = TensorFile(OpenFile(path))
        return file.notes, file.load_all()

    try:
        with translate_os_errors(path, FormatError, "read", "unreadable"):
            notes, stored = charge_reading(path, read)
    except ArtifactError as error:
        raise FormatError(error.what, code="corrupt_file") from error
    if _SEAL in notes and not agrees_with_hash(notes[_SEAL], "", stored):
        raise FormatError(f"'{path}' was changed since lorac wrote it", code="corrupt_file")
    names = list(dict.fromkeys(key.rpartition(":")[0] for key in stored))
    found = {}
    for name in names:
        keys = [f"{name}:{part}" for part in _RECORD_PARTS]
        is_complete = all(key in stored and stored[key].dtype is torch.int64 and stored[key].ndim == 1 for key in keys)
        if not is_complete or len(stored[keys[0]]) != 2:
            raise FormatError(f"'{path}' lacks the shape, rows or columns of '{name}'", code="corrupt_file")
        out, columns = (int(size) for size in stored[f"{name}:shape"])
        one = PruningRecord((out, columns), stored[f"{name}:rows"], stored[f"{name}:columns"])
        if not (_are_valid_positions(one.rows, out) and _are_valid_positions(one.columns, columns)):
            raise FormatError(
                f"'{path}' keeps positions of '{name}' that a weight of {[out, columns]} does not have",
                code="corrupt_file",
            )
        found[name] = one
    return found


def _are_valid_positions(positions: Tensor, size: int) -> bool:
    """Whether positions rise, and are below a size."""
    rising = bool((positions.diff() > 0).all())
    return len(positions) > 0 and rising and int(positions[0]) >= 0 and int(positions[-1]) < size
