"""LoRAM's own files: for each pruned module, the rows that were removed from one of its layers.

Source: junzhang-zj/LoRAM. A folder holds ``model.layers.<n>.mlp.gate_proj.pt`` with hidden units, or
``model.layers.<n>.self_attn.k_proj.pt`` with the rows of heads of keys; a file is ``{"pruned_idx": positions}``, which
are a tensor, a list or an array of whole numbers.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorac.errors import FormatError, nearest_name
from lorac.limits import charge_reading
from lorac.storage.paths import translate_os_errors
from lorac.storage.pickled_tensors import load_pickle
from lorac.training.loram.pruning import make_pruning_records
from lorac.training.loram.pruning_record import PruningRecord
from lorac.training.loram.units import UnitGroup, find_unit_groups

_KEY = "pruned_idx"
_WHOLE = {torch.int16, torch.int32, torch.int64}


def read_removed_units(folder: str | Path, model: nn.Module) -> dict[str, PruningRecord]:
    """Read a folder of LoRAM's authors into the form of ``PrunedModel.kept``.

    Args:
        folder: holds their files; if heads and hidden units lie in two folders, join the two results.
        model: the large model, which tells sizes and the layers that are pruned together.

    Raises:
        FormatError: the folder has no such file, or one is damaged or of another model.
        SiteError: no module of the model has layers of known names.
    """
    folder, kept = Path(folder), dict[str, PruningRecord]()
    groups = {path: group for group in find_unit_groups(model) for path in group.rows}
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise FormatError(
            f"'{folder}' holds no file <path of a layer>.pt",
            next_step="give the folder that LoRAM's pruning wrote",
            code="corrupt_file",
        )
    for file in files:
        if file.stem not in groups or file.stem in kept:
            raise FormatError(
                f"'{file}' is not named after a layer whose rows are units, or is the second file for one module",
                nearest=nearest_name(file.stem, groups.keys() - kept.keys()),
                next_step="give the large model that was pruned, and one file for each module",
                code="corrupt_file",
            )
        group = groups[file.stem]
        kept |= make_pruning_records(model, [(group, _read_kept_units(file, group))])
    return kept


def write_removed_units(kept: Mapping[str, PruningRecord], folder: str | Path, model: nn.Module) -> None:
    """Write a folder as LoRAM's authors do, with a file for each pruned module; ``model`` is the large one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for group in find_unit_groups(model):
        path = min(group.rows, key=group.rows.__getitem__)
        if path in kept:
            is_removed = torch.ones(kept[path].shape[0], dtype=torch.bool)
            is_removed[kept[path].rows] = False
            torch.save({_KEY: is_removed.nonzero().flatten()}, Path(folder) / f"{path}.pt")


def _read_kept_units(file: Path, group: UnitGroup) -> Tensor:
    """Return the numbers of the units of a module that are left."""

    def refuse(reason: str) -> FormatError:
        return FormatError(f"'{file}' is damaged: {reason}", code="corrupt_file")

    with translate_os_errors(file, FormatError, "read", "unreadable"):
        loaded = charge_reading(file, lambda: load_pickle(file, refuse, arrays=True))
    removed = loaded.get(_KEY) if isinstance(loaded, dict) else None
    try:
        removed = torch.as_tensor(removed)
    except (TypeError, ValueError, RuntimeError):
        raise refuse(f"it has no whole numbers '{_KEY}'") from None
    if removed.ndim != 1 or removed.dtype not in _WHOLE:
        raise refuse(f"it has no whole numbers '{_KEY}'")
    removed = removed.long()
    width = group.rows[file.stem]
    units = removed[::width] // width
    whole = units[:, None] * width + torch.arange(width)
    is_left = torch.ones(group.count, dtype=torch.bool)
    if not torch.equal(whole.flatten(), removed) or not ((units >= 0) & (units < group.count)).all():
        raise refuse(f"its positions are not whole units: the layer has {group.count} of {width} rows each")
    is_left[units] = False
    if not is_left.any():
        raise refuse("it removes all units")
    return is_left.nonzero().flatten()
