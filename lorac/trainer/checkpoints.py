"""Where a run can go on: its adapters, what its optimizer and rule keep, its scheduler, and random states.

checkpoint-<step>/<adapter's name>/…      in lorac's own format
checkpoint-<step>/state.pt                tensors, numbers and texts, read without pickle's code
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lorac
from lorac.errors import FormatError
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import translate_os_errors
from lorac.variants.adapter import Adapter

PREFIX, STATE, NATIVE = "checkpoint-", "state.pt", ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """One on disk.

    Attributes:
        folder: where it lies.
        step: how many steps of the optimizer were done.
    """

    folder: Path
    step: int

    def adapters(self) -> dict[str, Mapping[str, Any]]:
        """Return its adapters as a recipe names them."""
        return {file.name.removesuffix(NATIVE): {"path": str(file)} for file in sorted(self.folder.glob(f"*{NATIVE}"))}

    def restore(self, optimizer: torch.optim.Optimizer, scheduler: Any, process: int) -> int:
        """Restore optimizer, scheduler and random states; return the number of steps done.

        Raises:
            FormatError: the state cannot be read, or is of another optimizer.
        """
        file = self.folder / STATE
        try:
            with translate_os_errors(file, FormatError, "read", "corrupt_file"):
                state = torch.load(file, weights_only=True, map_location="cpu")
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            _restore_random_state(state["random"][process])
        except (RuntimeError, ValueError, KeyError, IndexError, EOFError, pickle.UnpicklingError) as error:
            raise FormatError(
                f"'{file}' does not fit this run: {error}",
                next_step="resume with the recipe and the number of processes it was written with",
                code="corrupt_file",
            ) from error
        return self.step


def find_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a run."""
    found = [
        Checkpoint(path, int(number))
        for path in folder.glob(f"{PREFIX}*")
        if (number := path.name.removeprefix(PREFIX)).isdecimal() and (path / STATE).is_file()
    ]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def write_checkpoint(
    folder: Path, step: int, adapters: Mapping[str, Adapter], optimizer: Any, scheduler: Any, accelerator: Any
) -> None:
    """Write a checkpoint in one step; on several processes all have to come here, and the first one writes."""
    from accelerate.utils import gather_object

    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": gather_object([_random_state()]),
    }
    if accelerator.is_main_process:
        with (
            translate_os_errors(folder, FormatError, "written", "corrupt_file"),
            replace_atomically(folder / f"{PREFIX}{step}") as aside,
        ):
            _write_files(aside, adapters, state)
    accelerator.wait_for_everyone()


def save_trained_adapter(adapter: Adapter, folder: Path, model: nn.Module) -> Path:
    """Write a trained adapter as PEFT does, or where PEFT has no place for it in lorac's own format."""
    try:
        lorac.save_adapter(adapter, folder, model=model)
    except FormatError as error:
        if error.code != "unsupported_field":
            raise
        folder = folder.with_name(f"{folder.name}{NATIVE}")
        lorac.save_adapter(adapter, folder, format="native", model=model)
    return folder


def _write_files(folder: Path, adapters: Mapping[str, Adapter], state: Mapping[str, Any]) -> None:
    folder.mkdir()
    for name, adapter in adapters.items():
        lorac.save_adapter(adapter, folder / f"{name}{NATIVE}", format="native")
    torch.save(state, folder / STATE)


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    drawn: Any = np.random.get_state()
    algorithm, keys, *rest = drawn
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": [version, list(internal), gauss],
        "numpy": [algorithm, keys.tolist(), *rest],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
