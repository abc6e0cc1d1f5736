"""Break-for-Make's own files: diffusers' LoRA of a U-Net, with ``unet.`` twice before the path of a layer.

Source: ICTMCG/Break-for-make. Keys are ``unet.unet.<layer>.lora.up.weight`` and ``down``. The first half of the rows of
``up`` and of the columns of ``down`` is frozen; the scale is 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size
from lorac.formats._errors import unsupported_error
from lorac.variants.adapter import Adapter
from lorac.variants.plp import PLP


class BreakForMakeFormat(AuthorsFormat):
    """Break-for-Make's own files."""

    name = "break_for_make"
    looks_for = "a file with tensors unet.unet.<layer>.lora.up.weight"
    written_by = "Break-for-Make's authors"
    methods = (PLP,)
    refines = "diffusers"
    rows = tuple(KeyRow(f"unet.unet.*.lora.{half}.weight", "*", half) for half in ("up", "down"))
    mark = re.compile(r"^unet\.unet\..*\.lora\.(up|down)\.weight$")
    weights = "pytorch_lora_weights.safetensors"

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> PLP:
        find_size(tensors, "up", 1, file)
        return PLP(r=find_size(tensors, "down", 0, file, axes=2))

    def to_parameters(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        up, down = stored["up"], stored["down"]
        top, left = len(up) // 2, down.shape[1] // 2
        found = {"up_frozen": up[:top], "up_learned": up[top:]}
        found |= {"down_frozen": down[:, :left], "down_learned": down[:, left:]}
        return {name: part.contiguous() for name, part in found.items()}

    def to_stored(self, adapter: Adapter, path: str) -> Tensors:
        own = adapter.tensors[path]
        if getattr(adapter.variant, "identity_init", False):
            raise unsupported_error(
                f"adapter '{adapter.name}' leaves the product of its frozen halves out, which the format '{self.name}' "
                "cannot say",
                next_step="use format='native', or lorac.to_lora(adapter, model)",
            )
        return {
            "up": torch.cat([own["up_frozen"], own["up_learned"]]),
            "down": torch.cat([own["down_frozen"], own["down_learned"]], dim=1),
        }


FORMAT = BreakForMakeFormat()
