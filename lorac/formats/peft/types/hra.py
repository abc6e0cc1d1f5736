"""PEFT type HRA.

Source: peft.tuners.hra of PEFT 0.21 (config.py, layer.py). In a file a module has `hra_u` (in, r), at convolutions
(in·kh·kw, r). At a dilated convolution PEFT ignores the dilation until it merges; lorac uses the merged weight.
"""

from torch import Tensor

from lorac.formats._config_fields import Applied, read_flag, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import STARTED, WITHOUT_FAN, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.hra import HRA

VECTORS = "hra_u"


class HraType(PeftType[HRA]):
    """HRA."""

    peft_type = "HRA"
    variants = {HRA: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        "r": Applied(8, to="r", read=read_size),
        "apply_GS": Applied(False, to="apply_GS", read=read_flag),
        "bias": bias("hra"),
    }
    suffixes = (VECTORS,)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV2D})

    def read_site(self, variant: HRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return U (in, r), and a site of which only the input features are known."""
        tensors = take_tensors(path, stored, {VECTORS: 2}, f"{VECTORS} is (in, r)")
        return matrix_site(path, 1, tensors[VECTORS].shape[0]), tensors
