"""CP-LoRA: a kernel's update as a sum of r outer products, one factor per axis; with a magnitude, CP-DoRA.

"LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation", 2025, arXiv 2508.01772. The
start values are lorac's: the output factor is 0, so that a fresh adapter changes nothing.
"""

import math
from dataclasses import dataclass

from lorac.variants._layer_shapes import expand_groups, kernel_columns
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import row_norms, uniform, zeros
from lorac.variants.low_rank import LowRankFields, rescale_rows

_AXES = ("cp_d", "cp_h", "cp_w")
"""Names of the factors of a kernel's axes; a kernel of n axes has the last n."""


@dataclass(frozen=True, kw_only=True)
class CPLoRA(LowRankFields, WeightVariant):
    """``W'[o,i,u,v] = W[o,i,u,v] + s·Σ_p a[o,p]·b[i,p]·c[u,p]·d[v,p]``, p up to r, with s = alpha/r.

    a is ``cp_out`` (O, r), b ``cp_in`` (I/g, r), c ``cp_h`` (kh, r), d ``cp_w`` (kw, r), for g groups; a 3-D kernel
    also has ``cp_d``, a 1-D kernel has only ``cp_w``, and a linear layer has none of the three, so that it is LoRA.

    Attributes:
        r: rank, which may exceed the channels.
        dora: whether to add a trained magnitude.
    """

    dora: bool = False

    name = "cp_lora"
    paper = "LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation, arXiv 2508.01772"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        lengths = {"cp_in": kernel_columns(site)[0]}
        if site.conv is not None:
            lengths |= dict(zip(_AXES[-len(site.conv.kernel) :], site.conv.kernel, strict=True))
        specs = {"cp_out": ParamSpec((site.out_features, self.r), zeros)}
        # kaiming_uniform with a = √5, over the length of the axis.
        specs |= {name: ParamSpec((n, self.r), uniform(1 / math.sqrt(n))) for name, n in lengths.items()}
        if self.dora:
            specs["magnitude"] = ParamSpec((site.out_features,), row_norms)
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        up, down = p.cp_out, p.cp_in.t()
        for axis in (getattr(p, name) for name in _AXES if hasattr(p, name)):
            down = (down[:, :, None] * axis.t()[:, None, :]).flatten(1)
        # A grouped kernel's update is computed in stored form: it has few values, so that no rank is kept.
        updated = W + self.scale * expand_groups(up @ down, W)
        return rescale_rows(updated, p.magnitude) if self.dora else updated
