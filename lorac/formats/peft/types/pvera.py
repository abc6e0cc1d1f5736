"""PEFT type PVERA.

Source: peft.tuners.pvera of PEFT 0.21. A file is one of VERA with twice the rows in `pvera_A` (2r, largest in) and
`pvera_lambda_d` (2r,). PEFT draws noise in training, and with sample_at_inference in evaluation, too.
"""

from collections.abc import Sequence

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Refused, TrainingOnly
from lorac.formats.peft.peft_type import PeftType, Tensors
from lorac.formats.peft.types.vera import projection_fields, read_projections
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants._random_projections import draw_projections
from lorac.variants.pvera import PVeRA


class PveraType(PeftType[PVeRA]):
    """PVERA."""

    peft_type = "PVERA"
    variants = {PVeRA: {}}
    fields = {
        **projection_fields("pvera"),
        "sample_at_inference": Refused(False, next_step="set it to false: the mean is then the adapter's output"),
        "generator_seed": TrainingOnly(),
    }
    shared = ("pvera_A", "pvera_B")
    suffixes = ("pvera_lambda_b", "pvera_lambda_d")
    kinds = frozenset({SiteKind.LINEAR})
    conv1d = True

    def read_site(self, variant: PVeRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        return read_projections("pvera", "2r", path, stored)

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        shapes = (2 * values["r"], in_features), (out_features, values["r"])
        return draw_projections(*shapes, key=values["projection_prng_key"])
