"""PEFT type VERA.

Source: peft.tuners.vera of PEFT 0.21. A module has `vera_lambda_b` (out,) and `vera_lambda_d` (r,), all of them share
`base_model.vera_A` (r, largest in) and `base_model.vera_B` (largest out, r), which a file with save_projection=False
leaves out: they are then drawn from projection_prng_key. No tensor shows the number of inputs of a site.
"""

from collections.abc import Sequence

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, LAYERS, SEEDED, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.vera import VeRA, draw_projections


class VeraType(PeftType[VeRA]):
    """VERA."""

    peft_type = "VERA"
    variants = {VeRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        **SEEDED,
        "r": Applied(256, to="r", read=read_size),
        "vera_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "d_initial": TrainingOnly(0.1, to="d_initial", read=read_number),
        "bias": bias("vera"),
    }
    shared = ("vera_A", "vera_B")
    suffixes = ("vera_lambda_b", "vera_lambda_d")
    kinds = frozenset({SiteKind.LINEAR})
    conv1d = True

    def read_site(self, variant: VeRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict.fromkeys(self.shared, 2) | dict.fromkeys(self.suffixes, 1)
        expected = "vera_A is (r, in), vera_B (out, r), vera_lambda_b (out,), vera_lambda_d (r,)"
        tensors = take_tensors(path, stored, axes, expected)
        return matrix_site(path, tensors["vera_lambda_b"].shape[0], tensors["vera_A"].shape[1]), tensors

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        return draw_projections(values["r"], out_features, in_features, values["projection_prng_key"])
