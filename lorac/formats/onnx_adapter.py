"""ONNX Runtime's adapter files: ``.onnx_adapter``, with the factors of LoRAs under the names of a program's inputs.

        <path of a layer>.lora_A.weight, .lora_B.weight     from Olive (olive convert-adapters), with PEFT's prefix
                                                                                                                before
                                                                                                                paths
                                                                                                                that do
                                                                                                                not
                                                                                                                begin
                                                                                                                with
                                                                                                                "model."
        <path of a layer>:a, :b                             from the programs that lorac saves

Both store A as (in, r) and B as (r, out), with the scale multiplied into B, and no metadata.
"""

from pathlib import Path

from lorac.formats._format import Evidence, Format
from lorac.formats._lora_pairs import (
    A,
    B,
    check_pair,
    find_layers,
    group_by_layer,
    make_lora,
    require_plain_lora,
    settings_at,
    transpose_matrix,
)
from lorac.formats.engines import ENGINE, ENGINES
from lorac.formats.peft.keys import PREFIX
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.storage.onnx_adapter import MAGIC, read_onnx_adapter, write_onnx_adapter
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

_SUFFIXES = {".lora_A.weight": A, ".lora_B.weight": B, ":a": A, ":b": B}
_PLACED = 3
"""Axes of a program's slot, of which the first counts its places."""


class OnnxAdapterFormat(Format):
    """ONNX Runtime's adapter files."""

    name = "onnx_adapter"
    looks_for = f"a file with {MAGIC.decode()} at byte 4"
    written_by = "Olive's `convert-adapters`; programs that lorac saves"
    evidence = Evidence.LAYOUT
    magic = (4, MAGIC)
    methods = (LoRA,)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        path = file.path
        with file.open() as opened:
            found = read_onnx_adapter(opened, file.damaged)
        stored = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
        if len(stored) < len(found):
            raise file.damaged(f"it has a tensor with and without '{PREFIX}' in front of its name")
        layers = group_by_layer(stored, _SUFFIXES, path)
        tensors = {
            layer: {
                # Parameters of a program have a leading axis of slots; here it has length 1.
                key: transpose_matrix(stored[name].squeeze(0) if stored[name].ndim == _PLACED else stored[name])
                for key, name in names.items()
            }
            for layer, names in layers.items()
        }
        ranks = {layer: float(check_pair(path, layer, pair)) for layer, pair in tensors.items()}
        return make_lora(name, self.name, path, tensors, ranks, view)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the factors under Olive's names, with the scale multiplied into B.

        Raises:
            FormatError: the adapter is not a plain LoRA.
            SiteError: the adapter changes a layer that is not linear.
            BaseNeeded: the adapter was not read from a file, and no model is given.
        """
        variant = require_plain_lora(adapter, self.name)
        tensors = {}
        for layer in find_layers(adapter, view, self.name):
            here, own = settings_at(variant, layer), adapter.tensors[layer]
            tensors[f"{layer}.lora_A.weight"] = own[A].mT
            tensors[f"{layer}.lora_B.weight"] = (here.scale * own[B]).mT
        engine = ENGINES.get(adapter.provenance.get(ENGINE, ""))
        for ours, theirs in engine.renames.items() if engine else ():
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
        write_onnx_adapter(path, tensors)
