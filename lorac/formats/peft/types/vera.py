"""PEFT type VERA.

Source: peft.tuners.vera of PEFT 0.21. A module has `vera_lambda_b` (out,) and `vera_lambda_d` (r,), all of them share
`base_model.vera_A` (r, largest in) and `base_model.vera_B` (largest out, r), which a file with save_projection=False
leaves out: they are then drawn from projection_prng_key. No tensor shows the number of inputs of a site.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, Field, TrainingOnly, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, LAYERS, SEEDED, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants._random_projections import draw_projections
from lorac.variants.vera import VeRA


def projection_fields(name: str) -> Mapping[str, Field]:
    """Return the fields of a type with random projections; those of its own begin with its name."""
    return {
        **COMMON,
        **LAYERS,
        **SEEDED,
        "r": Applied(256, to="r", read=read_size),
        f"{name}_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "d_initial": TrainingOnly(0.1, to="d_initial", read=read_number),
        "bias": bias(name),
    }


def read_projections(name: str, rows: str, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """Return the site and the tensors of a type with random projections.

    Args:
        name: the beginning of the tensors' names.
        rows: the number of rows of A, for messages.
    """
    axes = {f"{name}_A": 2, f"{name}_B": 2, f"{name}_lambda_b": 1, f"{name}_lambda_d": 1}
    expected = f"{name}_A is ({rows}, in), {name}_B (out, r), {name}_lambda_b (out,), {name}_lambda_d ({rows},)"
    tensors = take_tensors(path, stored, axes, expected)
    return matrix_site(path, len(tensors[f"{name}_lambda_b"]), tensors[f"{name}_A"].shape[1]), tensors


class VeraType(PeftType[VeRA]):
    """VERA."""

    peft_type = "VERA"
    variants = {VeRA: {}}
    fields = projection_fields("vera")
    shared = ("vera_A", "vera_B")
    suffixes = ("vera_lambda_b", "vera_lambda_d")
    kinds = frozenset({SiteKind.LINEAR})
    conv1d = True

    def read_site(self, variant: VeRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        return read_projections("vera", "r", path, stored)

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        shapes = (values["r"], in_features), (out_features, values["r"])
        return draw_projections(*shapes, key=values["projection_prng_key"])
