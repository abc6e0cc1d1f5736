"""(IA)³ and GLoRA.

Source: LyCORIS, lycoris/modules/ia3.py and glora.py. The scale of (IA)³ is 1 + ``weight``, with ``weight`` (out,), or
(in,) where ``on_input`` is 1, and (1, channels, 1, …) at convolutions; the bias is not scaled. GLoRA has a1 (in, r), a2
(r, in), b1 (out, r) and b2 (r, in). At convolutions they have further axes: b2 those of the kernel, the others axes of
length 1. LyCORIS before 2 has the first and the second factor exchanged.
"""

import torch
from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, ModuleLayout, StoredModule, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.entrywise import IA3
from lorac.variants.glora import GLoRA

_EXCHANGED = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}


class ScaleLayout(ModuleLayout[IA3]):
    """(IA)³'s vector, and the flag that says whether it scales inputs or outputs."""

    required = ("weight", "on_input")
    variants = (IA3,)

    def read(self, module: StoredModule) -> Method:
        on_input = bool(module.matrix("on_input", 1))
        length = module.columns[0] if on_input else module.site.out_features
        axes = (1,) if module.site.conv is not None else ()
        change = module.matrix("weight", *axes, length).reshape(1, -1)
        scale = change.to(torch.promote_types(change.dtype, torch.float32)) + 1
        method = IA3(feedforward=".*" if on_input else (), scales_bias=on_input)
        return method, {"ia3_l": scale if on_input else scale.t()}

    def write(self, variant: IA3, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        on_input = variant.scales_input(site.path)
        if variant.scales_bias and not on_input and site.bias is not None:
            raise unsupported_error(
                f"LyCORIS's (IA)^3 does not scale the bias of '{site.path}', and this adapter does",
                next_step="use format='peft' or 'native'; lorac.IA3(scales_bias=False) trains one for LyCORIS",
            )
        axes = (1, -1, *(1,) * len(site.conv.kernel)) if site.conv is not None else (-1,)
        return {"weight": (tensors["ia3_l"] - 1).reshape(axes), "on_input": torch.tensor(int(on_input))}


class GloraLayout(ModuleLayout[GLoRA]):
    """GLoRA's two pairs of factors."""

    required = ("a1", "a2", "b1", "b2")
    variants = (GLoRA,)
    rows = ("b1",)

    def read(self, module: StoredModule) -> Method:
        out, (channels, *kernel) = module.site.out_features, module.columns
        rank = min(module.length("b1", 0), module.length("b1", 1))
        if module.length("b1", 0) == rank != out and module.length("a1", 0) == rank:
            module = module.renamed(_EXCHANGED)
        shapes = {"a1": (channels, rank), "a2": (rank, channels), "b1": (out, rank), "b2": (rank, channels, *kernel)}
        alpha = rank if module.alpha is None else module.alpha
        return GLoRA(r=rank, alpha=alpha), {name: module.matrix(name, *shape) for name, shape in shapes.items()}

    def write(self, variant: GLoRA, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if site.conv is None:
            return dict(tensors)
        ones, kernel = (1,) * len(site.conv.kernel), site.conv.kernel
        return {
            name: tensor.reshape(len(tensor), -1, *(kernel if name == "b2" else ones))
            for name, tensor in tensors.items()
        }
