"""PEFT type LOHA.

Source: peft.tuners.loha and peft.tuners.lycoris_utils of PEFT 0.21, which rounds alpha/r to float32.
Shapes in a file, where in is the number of channels of a group:

    ===========================================  ========  ==================  =================
    site                                         w1_a …    w1_b …              t1, t2
    ===========================================  ========  ==================  =================
    linear, or convolution                       (out, r)  (r, in·kh·kw)       –
    convolution, kernel of more than one tap     (r, out)  (r, in)             (r, r, kh, kw)
    and use_effective_conv2d                                                   or (r, r, k, 1)
    ===========================================  ========  ==================  =================
"""

from __future__ import annotations

import torch

from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import LYCORIS, LYCORIS_KINDS, core_shape, mismatched_shapes, only
from lorac.formats.peft.peft_type import PeftType, Tensors
from lorac.ir.sites import Site
from lorac.variants.base import Variant
from lorac.variants.loha import LoHa

Tensor = torch.Tensor
FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")

check_site = only("LOHA", LYCORIS_KINDS, grouped=True)


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """The tensors of one site with cores flattened, and a site that they would do for.

    Raises:
        AdapterError: They do not belong together.
    """
    cored = set(stored) == {*FACTORS, *CORES} and all(stored[name].ndim == 4 for name in CORES)
    if not (cored or set(stored) == set(FACTORS)) or any(stored[name].ndim != 2 for name in FACTORS):
        raise mismatched_shapes(
            path, stored, "hada_w1_a is (out, r), hada_w1_b (r, in); with hada_t1 (r, r, kh, kw) (r, out)"
        )
    a, b = (stored[name] for name in FACTORS[:2])
    tensors = {name: stored[name] for name in FACTORS}
    if not cored:
        return matrix_site(path, a.shape[0], b.shape[1]), tensors
    site = conv_site(path, a.shape[1], b.shape[1], tuple(stored[CORES[0]].shape[2:]), 1)
    return site, tensors | {name: stored[name].flatten(2) for name in CORES}


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site in the file's shapes, by suffix.

    Raises:
        SiteError: PEFT has no such layer.
    """
    check_site(site, tensors)
    cores = {name: tensors[name].reshape(core_shape(site, tensors[name])) for name in CORES if name in tensors}
    return {**{name: tensors[name] for name in FACTORS}, **cores}


METHOD = PeftType(
    peft_type="LOHA",
    variants={LoHa: {}},
    fields=LYCORIS,
    suffixes=(*FACTORS, *CORES),
    read_site=read_site,
    write_site=write_site,
    # Flat factors do not tell a convolution from a linear layer, nor its groups.
    lays_out=False,
    check_site=check_site,
)
