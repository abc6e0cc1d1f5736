"""PEFT's folders: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

The PEFT types are the modules of ``types``; the rest is the same for all.
"""

from __future__ import annotations

from pathlib import Path

from lorac.formats._files import HUB_WEIGHTS, containing_folder
from lorac.formats._format import Format
from lorac.formats.peft.reader import PICKLED, read_folder
from lorac.formats.peft.writer import CONFIG, WEIGHTS, write_folder
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter


class PeftFormat(Format):
    """PEFT's folders."""

    name = "peft"
    looks_for = f"a folder with {CONFIG}"

    def recognises(self, path: Path) -> bool:
        folder = containing_folder(path, CONFIG, WEIGHTS, PICKLED)
        is_adapterhub = any((folder / name).is_file() for name in HUB_WEIGHTS)
        return (folder / CONFIG).is_file() and ((folder / WEIGHTS).is_file() or not is_adapterhub)

    def read(self, path: Path, view: ModelView | None, name: str | None) -> Adapter:
        return read_folder(containing_folder(path, CONFIG, WEIGHTS, PICKLED), view, name)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        write_folder(adapter, path, view)


FORMAT = PeftFormat()
