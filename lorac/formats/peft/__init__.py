"""PEFT's folders: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

Each module of ``types`` defines PEFT types; the other modules are shared by all types.
"""

from pathlib import Path

from lorac.formats._format import Evidence, Format
from lorac.formats.peft.reader import PICKLED, read_folder
from lorac.formats.peft.renamed_folder import read_renamed
from lorac.formats.peft.writer import CONFIG, WEIGHTS, write_folder
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter


class PeftFormat(Format):
    """PEFT's folders."""

    name = "peft"
    looks_for = f"a folder with {CONFIG}"
    written_by = "PEFT"
    evidence = Evidence.LAYOUT
    invocations = True

    def recognises(self, file: AdapterFile) -> bool:
        return file.folder_with(CONFIG, WEIGHTS, PICKLED).has(CONFIG)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        return read_folder(file.folder_with(CONFIG, WEIGHTS, PICKLED), view, name)

    def read_renamed(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        return read_renamed(file.folder_with(CONFIG, WEIGHTS, PICKLED), view, name)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        write_folder(adapter, path, view)
