"""Rotations of a layer's output: diag-OFT and BOFT.

Source: LyCORIS, lycoris/modules/diag_oft.py and boft.py; sd-scripts, networks/oft.py. ``oft_blocks`` is (n, k, k) for
diag-OFT and (m, n, k, k) for BOFT, with out = n·k; ``rescale`` is (out, 1, …). With Q = X − Xᵀ of a block X, R is (I +
Q)·(I − Q)⁻¹. ``alpha`` bounds Q: where the norm of all Q together exceeds alpha·out, they are scaled down to it.
diag-OFT multiplies the rows of a layer by Rᵀ, BOFT by R. LyCORIS interleaves the two halves of a BOFT block's rows;
``lorac.BOFT`` concatenates them.
"""

import torch
from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, ModuleLayout, StoredModule, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.boft import BOFT

_ROUNDING = 1e-8
"""LyCORIS adds this number to the norm before it compares it with the bound."""


class RotationLayout(ModuleLayout[BOFT]):
    """The blocks of BOFT, and of diag-OFT, which is a BOFT of one factor."""

    required = ("oft_blocks",)
    optional = ("rescale",)
    variants = (BOFT,)

    def read(self, module: StoredModule) -> Method:
        out, blocks = module.site.out_features, module.tensors["oft_blocks"]
        size = module.length("oft_blocks", max(blocks.ndim - 1, 2))
        factors = (blocks.shape[0],) if blocks.ndim == 4 else ()
        blocks = module.reshape("oft_blocks", *factors, out // max(size, 1), size, size)
        if module.alpha:
            norm, bound = float(torch.linalg.vector_norm(blocks - blocks.mT)) + _ROUNDING, module.alpha * out
            blocks = blocks * (bound / norm) if norm > bound else blocks
        rotation = _reorder(blocks, halves_first=True) * -2 if factors else blocks[None] * 2
        scale = module.matrix("rescale", out) if "rescale" in module.tensors else blocks.new_ones(out, 1)
        method = BOFT(block_size=size, n_butterfly_factor=len(rotation), rotates_output=True)
        return method, {"boft_R": rotation, "boft_s": scale}

    def write(self, variant: BOFT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if not variant.rotates_output:
            raise unsupported_error(
                f"LyCORIS rotates the outputs of a layer, and this adapter the inputs of '{site.path}'",
                next_step="use format='peft' or 'native'; lorac.BOFT(rotates_output=True) trains one for LyCORIS",
            )
        rotation, scale = tensors["boft_R"], tensors["boft_s"]
        blocks = rotation[0] / 2 if len(rotation) == 1 else _reorder(rotation, halves_first=False) / -2
        ones = (1,) * (len(site.kernel) - 1)
        return {"oft_blocks": blocks} | ({} if (scale == 1).all() else {"rescale": scale.reshape(-1, *ones)})

    def alpha(self, variant: BOFT) -> float:
        return 0.0


def _reorder(blocks: Tensor, *, halves_first: bool) -> Tensor:
    """Permute rows and columns of blocks (…, k, k) from lorac's order to LyCORIS's, or back."""
    size = blocks.shape[-1]
    order = torch.arange(size).reshape(size // 2, 2).t().flatten()
    order = order if halves_first else order.argsort()
    return blocks[..., order, :][..., order]
