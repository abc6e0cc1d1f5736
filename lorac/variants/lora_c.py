"""LoRA-C: low-rank factors as wide as a row of the kernel; DoRA-C adds a magnitude.

LoRA-C: arXiv 2410.16954, in the layout of loralib's convolutions; DoRA-C: arXiv 2508.01772. In the
unfolded layout, A (r, in·kh·kw) and B (out, r), the same method is convLoRA (arXiv 2402.04964): ``LoRA`` on a
convolution. ``DoRA`` there is convDoRA.
"""

from dataclasses import dataclass

import torch

from lorac.errors import SiteError
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, row_norms, zeros
from lorac.variants.low_rank import LowRankFields, rescale_rows


@dataclass(frozen=True, kw_only=True)
class LoRAC(LowRankFields, WeightVariant):
    """``W' = W + s·reshape(B·A)``, where the values of B·A, row by row, are those of the kernel, with s = alpha/r.

    A (r·k, I·k) and B (O/g·kⁿ⁻¹, r·k), for a kernel of n axes of size k, I input and O output channels and g groups;
    loralib has only n = 2. On a linear layer, k = 1, it is LoRA. The rank of the update is up to r·kⁿ.

    Attributes:
        r: rank, which may exceed the channels.
        dropout: rate of the dropout on the input, in training (loralib's convolutions accept a rate and ignore it).
        dora: whether to add a trained magnitude.
    """

    dora: bool = False

    name = "lora_c"
    paper = "LoRA-C: Parameter-Efficient Fine-Tuning of Robust CNN for IoT Devices, arXiv 2410.16954"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def check(self, site: Site) -> None:
        super().check(site)
        if site.conv is not None and len(set(site.conv.kernel)) > 1:
            raise SiteError(
                f"lora_c needs a square kernel; that of '{site.path}' is {' x '.join(map(str, site.conv.kernel))}",
                next_step="use LoRA or CPLoRA there, or add the module to exclude=",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, conv = site.out_features, site.conv
        # A linear layer counts as a convolution without spatial axes.
        channels, kernel, groups = (
            (site.in_features, (), 1) if conv is None else (conv.channels, conv.kernel, conv.groups)
        )
        k = kernel[0] if kernel else 1
        slices = torch.Size(kernel[1:]).numel()
        specs = {
            "lora_A": ParamSpec((self.r * k, channels * k), kaiming_uniform),
            "lora_B": ParamSpec((out // groups * slices, self.r * k), zeros),
        }
        if self.dora:
            specs["magnitude"] = ParamSpec((out,), row_norms)
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        (rows, columns), a, b = W.shape, p.lora_A, p.lora_B
        slices = columns // a.shape[1]
        groups = rows * slices // b.shape[0]
        if groups > 1:  # B·A in the blocks on the diagonal of W
            product = torch.block_diag(*(b @ a).reshape(rows, -1).chunk(groups))
        else:  # row o of the update is B[o, 0]·A, B[o, 1]·A, … concatenated: a product of wider factors
            product = b.reshape(rows, -1) @ torch.kron(torch.eye(slices, dtype=a.dtype, device=a.device), a)
        updated = W + self.scale * product
        return rescale_rows(updated, p.magnitude) if self.dora else updated
