"""PEFT type SUPERTUNING.

Source: peft.tuners.supertuning of PEFT 0.21. A module has `supertuning_values` (K,), `supertuning_indices` (K,) int32,
positions in the flattened weight, and with r `supertuning_lora_A.weight` (r, in) and `supertuning_lora_B.weight` (out,
r). With save_precomputed_indices=False the file omits the positions, which are computed from the base's weight; lorac
always writes them. In training PEFT applies dropout only to inputs of A.
"""

import torch
from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    Irrelevant,
    TrainingOnly,
    read_flag,
    read_number,
    read_optional_number,
    read_optional_size,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import Parameters, PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import BaseReader, Site
from lorac.variants.supertuning import SuperTuning

NAMES = {
    "supertuning_indices": "indices",
    "supertuning_values": "values",
    "supertuning_lora_A.weight": "lora_A",
    "supertuning_lora_B.weight": "lora_B",
}
"""Suffix in a file -> parameter."""


class SupertuningType(PeftType[SuperTuning]):
    """SUPERTUNING."""

    peft_type = "SUPERTUNING"
    variants = {SuperTuning: {}}
    fields = {
        **WITHOUT_FAN,
        "sparsity": Applied(0.99, to="sparsity", read=read_number),
        "select_top": Applied(True, to="select_top", read=read_flag),
        "r": Applied(to="r", read=read_optional_size),
        "lora_alpha": Applied(to="alpha", read=read_optional_number),
        "lora_dropout": TrainingOnly(0.0, preserved=True),
        # The keys of a file show its value.
        "save_precomputed_indices": Irrelevant(True, read=read_flag),
        "init_weights": TrainingOnly(True),
    }
    suffixes = tuple(NAMES)
    needs_model = True

    def read_site(self, variant: SuperTuning, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        if "supertuning_values" not in stored:
            raise mismatched_shapes(path, stored, "supertuning_values is (K,), supertuning_indices (K,)")
        return matrix_site(path, 1, 1), {NAMES[suffix]: tensor for suffix, tensor in stored.items()}

    def complete_site(self, variant: SuperTuning, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        if "indices" in tensors:
            flat, columns = tensors["indices"].to(torch.int64), site.in_features
            tensors = {**tensors, "indices": torch.stack((flat // columns, flat % columns))}
        return super().complete_site(variant, site, tensors, base)

    def write_site(self, variant: SuperTuning, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        rows, columns = tensors["indices"]
        flat = (rows * site.in_features + columns).to(torch.int32)
        return {
            suffix: flat if name == "indices" else tensors[name] for suffix, name in NAMES.items() if name in tensors
        }
