"""PEFT type LOHA.

Source: peft.tuners.loha and peft.tuners.lycoris_utils of PEFT 0.21, which rounds alpha/r to float32. Shapes in a file,
where in is the number of channels of a group:

    ===========================================  ========  ==================  =================
    site                                         w1_a …    w1_b …              t1, t2
    ===========================================  ========  ==================  =================
    linear, or convolution                       (out, r)  (r, in·kh·kw)       –
    convolution, kernel of more than one tap     (r, out)  (r, in)             (r, r, kh, kw)
    and use_effective_conv2d                                                   or (r, r, k, 1)
    ===========================================  ========  ==================  =================

Flat factors do not show whether a site is a convolution, nor its groups.
"""

from torch import Tensor

from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import LYCORIS
from lorac.formats.peft.layouts import core_shape
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.loha import LoHa

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
_EXPECTED = "hada_w1_a is (out, r), hada_w1_b (r, in); with hada_t1 (r, r, kh, kw) (r, out)"


class LohaType(PeftType[LoHa]):
    """LOHA."""

    peft_type = "LOHA"
    variants = {LoHa: {}}
    fields = LYCORIS
    suffixes = (*FACTORS, *CORES)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D})
    grouped = True

    def read_site(self, variant: LoHa, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict.fromkeys(FACTORS, 2) | (dict.fromkeys(CORES, 4) if CORES[0] in stored else {})
        tensors = take_tensors(path, stored, axes, _EXPECTED)
        a, b = (tensors[name] for name in FACTORS[:2])
        if CORES[0] not in tensors:
            return matrix_site(path, a.shape[0], b.shape[1]), tensors
        site = conv_site(path, a.shape[1], b.shape[1], tuple(tensors[CORES[0]].shape[2:]), 1)
        return site, tensors | {name: tensors[name].flatten(2) for name in CORES}

    def write_site(self, variant: LoHa, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        cores = {name: tensors[name].reshape(core_shape(site, tensors[name])) for name in CORES if name in tensors}
        return {**tensors, **cores}
