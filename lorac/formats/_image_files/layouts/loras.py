"""Changes that are added to a weight: LoRA, in two factors or three (Tucker), and differences of whole weights.

Source: sd-scripts, networks/lora.py; LyCORIS, lycoris/modules/locon.py. Shapes in a file:

    ==============================  ==================  ==================  ===========
    site                            lora_down           lora_up             lora_mid
    ==============================  ==================  ==================  ===========
    linear                          (r, in)             (out, r)            –
    convolution                     (r, in, *kernel)    (out, r, 1, …)      –
    convolution, use_tucker         (r, in, 1, …)       (out, r, 1, …)      (r, r, *kernel)
    ==============================  ==================  ==================  ===========
"""

import torch
from torch import Tensor

from lorac.errors import SiteError
from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, ModuleLayout, StoredModule, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.dora import DoRA
from lorac.variants.edit import Edit
from lorac.variants.lora import LoRA
from lorac.variants.low_rank import ScaledRank


class LoraLayout(ModuleLayout[LoRA | DoRA]):
    """LoRA's factors, for DoRA too."""

    required = ("lora_down", "lora_up")
    optional = ("lora_mid", "lora_bias")
    variants = (LoRA, DoRA)
    rows = ("lora_B", "lora_bias", "magnitude")

    def read(self, module: StoredModule) -> Method:
        site, rank = module.site, module.length("lora_down")
        if site.conv is not None and site.conv.groups > 1:
            raise unsupported_error(
                f"'{module.keys['lora_down']}' is one factor for '{site.path}', a convolution of {site.conv.groups} "
                "groups that would have to share it",
                next_step="train it with a LoHa or LoKr there, or without the layer",
            )
        if "lora_mid" in module.tensors:  # A is a product, computed in at least float32
            channels, *kernel = module.columns
            first = module.matrix("lora_down", rank, channels)
            core = module.matrix("lora_mid", rank, rank, *kernel).unflatten(1, (rank, -1))
            wide = torch.promote_types(first.dtype, torch.float32)
            down = torch.einsum("ijt,jq->iqt", core.to(wide), first.to(wide)).flatten(1)
        else:
            down = module.matrix("lora_down", rank, *module.columns)
        tensors = {"lora_A": down, "lora_B": module.matrix("lora_up", site.out_features, rank)}
        if "lora_bias" in module.tensors:
            tensors["lora_bias"] = module.matrix("lora_bias", site.out_features).flatten()
        alpha = rank if module.alpha is None else module.alpha
        return LoRA(r=rank, alpha=alpha, lora_bias="lora_bias" in tensors), tensors

    def write(self, variant: LoRA | DoRA, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        down, up = tensors["lora_A"], tensors["lora_B"]
        if site.conv is not None:
            if site.conv.groups > 1:
                raise unsupported_error(
                    f"these files cannot store the factors of '{site.path}', a convolution of {site.conv.groups} "
                    "groups",
                    next_step="use format='native', or add the module to exclude=",
                )
            down, up = down.reshape(-1, *site.kernel[1:]), up.reshape(*up.shape, *(1,) * len(site.conv.kernel))
        written = {"lora_down": down, "lora_up": up}
        return written | ({"lora_bias": tensors["lora_bias"]} if "lora_bias" in tensors else {})

    def alpha(self, variant: LoRA | DoRA) -> float:
        return find_alpha(variant)


def find_alpha(variant: ScaledRank) -> float:
    """Return the alpha for which alpha/r is the scale, which rsLoRA's own alpha does not satisfy."""
    return variant.alpha if variant.alpha / variant.r == variant.scale else variant.scale * variant.r


_PARTS = {"diff": "delta", "diff_b": "e"}


class DifferenceLayout(ModuleLayout[Edit]):
    """The difference of a weight, and of its bias.

    Source: LyCORIS, lycoris/modules/full.py; sd-scripts' extractions. ``diff`` is W' − W (out, in, *kernel), ``diff_b``
    is b' − b (out,).
    """

    required = ("diff",)
    optional = ("diff_b",)
    variants = (Edit,)
    rows = ("delta", "e")

    def read(self, module: StoredModule) -> Method:
        tensors = {"delta": module.matrix("diff", module.site.out_features, *module.columns)}
        if "diff_b" in module.tensors:
            if module.site.bias is None:
                raise SiteError(
                    f"'{module.keys['diff_b']}' belongs to '{module.site.path}', which has no bias",
                    next_step="load the base model that the adapter was trained on",
                )
            tensors["e"] = module.matrix("diff_b", module.site.out_features).flatten()
        return Edit(parts=dict.fromkeys(tensors, 1)), tensors

    def write(self, variant: Edit, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if "delta" not in tensors or not tensors.keys() <= {*_PARTS.values()}:
            raise unsupported_error(
                f"this format stores an edit of '{site.path}' as a difference of weights, not as {', '.join(tensors)}",
                next_step="convert it by lorac.to_lora, or use format='native'",
            )
        written = {leaf: tensors[part] for leaf, part in _PARTS.items() if part in tensors}
        return {**written, "diff": written["diff"].reshape(site.kernel)}
