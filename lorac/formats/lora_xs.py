"""Folders of LoRA-XS and LoRA-SB: PEFT's LoRA folder, plus a matrix (r, r) per layer.

Source: MohammadrezaBanaei/LoRA-XS, RaghavSinghal10/lora-sb; keys as in ``lorac.formats.peft.types.lora``.
PEFT itself reads such a folder as a LoRA without the matrices, so the format has a name of its own.
"""

from pathlib import Path

from lorac.formats._errors import wrong_method_error
from lorac.formats._format import Evidence, Format
from lorac.formats.peft.reader import PICKLED, read_folder
from lorac.formats.peft.types.lora import LATENT
from lorac.formats.peft.writer import CONFIG, WEIGHTS, write_folder
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.lora_xs import LoRAXS


class LoraXsFormat(Format):
    """LoRA-XS's folders."""

    name = "lora_xs"
    looks_for = f"a folder with {CONFIG}, and tensors <layer>_{LATENT}"
    written_by = "LoRA-XS's and LoRA-SB's authors"
    methods = (LoRAXS,)
    evidence = Evidence.LAYOUT
    refines = "peft"

    def recognises(self, file: AdapterFile) -> bool:
        folder = file.folder_with(CONFIG, WEIGHTS, PICKLED)
        weights = next((name for name in (WEIGHTS, PICKLED) if folder.has(CONFIG, name)), None)
        return weights is not None and any(name.endswith(LATENT) for name in folder.inside(weights).peek_names())

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        adapter = read_folder(file.folder_with(CONFIG, WEIGHTS, PICKLED), view, name)
        adapter.provenance["format"] = self.name
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the folder.

        Raises:
            FormatError: the adapter is of another method.
            BaseNeeded: the adapter comes from no file and no model is given.
        """
        if type(adapter.variant) is not LoRAXS:
            raise wrong_method_error(adapter, self.name, LoRAXS.name)
        write_folder(adapter, path, view, of_fork=True)


FORMAT = LoraXsFormat()
