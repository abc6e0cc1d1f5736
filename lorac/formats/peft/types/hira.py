"""PEFT type HIRA.

Source: peft.tuners.hira of PEFT 0.21 (config.py, layer.py). Shapes in a file:

    ===========  ==================  =================
    site         A                   B
    ===========  ==================  =================
    linear       (r, in)             (out, r)
    embedding    (r, V)              (d, r)
    convolution  (r, in, *kernel)    (out, r, 1, …)
    ===========  ==================  =================

PEFT ignores rank_pattern where it wraps a layer (`dispatch_default`): every module has rank r.
"""

from torch import Tensor

from lorac.formats._config_fields import Applied, Irrelevant, TrainingOnly, read_number, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.fields import COMMON, STARTED
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes, read_factors, write_factors
from lorac.ir.sites.site import Site
from lorac.variants.base import MATRIX_KINDS
from lorac.variants.entrywise import HiRA

MATRICES = ("hira_A", "hira_B")
EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


class HiraType(PeftType[HiRA]):
    """HIRA."""

    peft_type = "HIRA"
    variants = {HiRA: {}}
    fields = {
        **COMMON,
        **STARTED,
        "r": Applied(32, to="r", read=read_size),
        "rank_pattern": Irrelevant({}),
        "hira_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
    }
    suffixes = (*MATRICES, *EMBEDDING)
    kinds = MATRIX_KINDS
    conv1d = True
    shapes_tell_kind = True

    def read_site(self, variant: HiRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        expected = "hira_A is (r, in), hira_B (out, r)"
        site, a, b = read_factors(path, stored, MATRICES, EMBEDDING, expected)
        if len(stored) != 2 or a.shape[0] != b.shape[1]:
            raise mismatched_shapes(path, stored, expected)
        return site, dict(zip(MATRICES, (a, b), strict=True))

    def write_site(self, variant: HiRA, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        a, b = (tensors[name] for name in MATRICES)
        if a.shape[0] != variant.r:
            raise unsupported_error(
                f"'{site.path}' is of rank {a.shape[0]} by rank_pattern, which PEFT's HIRA ignores",
                next_step="use format='native', or one r for all",
            )
        return write_factors(site, a, b, MATRICES, EMBEDDING)
