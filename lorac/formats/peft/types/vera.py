"""PEFT types VERA and PVERA, and their base class of types with random projections.

Source: peft.tuners.vera of PEFT 0.21. A module has `vera_lambda_b` (out,) and `vera_lambda_d` (r,). All modules share
`base_model.vera_A` (r, largest in) and `base_model.vera_B` (largest out, r). A file with save_projection=False omits
these, and they are drawn from projection_prng_key. No tensor shows the input features of a site.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, Field, Refused, TrainingOnly, read_number, read_size
from lorac.formats.peft.fields import COMMON, LAYERS, SEEDED, bias
from lorac.formats.peft.peft_type import PlainType
from lorac.variants.vera import PVeRA, RandomProjections, VeRA, draw_projections

P = TypeVar("P", bound=RandomProjections)


def projection_fields(name: str) -> Mapping[str, Field]:
    """Return the fields of a type with random projections; the name of its dropout field begins with ``name``."""
    return {
        **COMMON,
        **LAYERS,
        **SEEDED,
        "r": Applied(256, to="r", read=read_size),
        f"{name}_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "d_initial": TrainingOnly(0.1, to="d_initial", read=read_number),
        "bias": bias(name),
    }


class ProjectionsType(PlainType[P], Generic[P]):
    """A type with random projections A and B that all sites share, and with λ_b and λ_d for each site."""

    conv1d = True

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        [variant], r = self.variants, values["r"]
        assert issubclass(variant, RandomProjections)
        shapes = (variant(r=r).halves * r, in_features), (out_features, r)
        return draw_projections(*shapes, key=values["projection_prng_key"])


class VeraType(ProjectionsType[VeRA]):
    """VERA."""

    peft_type = "VERA"
    variants = {VeRA: {}}
    fields = projection_fields("vera")
    shared = ("vera_A", "vera_B")
    suffixes = ("vera_lambda_b", "vera_lambda_d")
    sizes = ("vera_lambda_b", 0), ("vera_A", 1)


class PveraType(ProjectionsType[PVeRA]):
    """PVERA.

    Source: peft.tuners.pvera of PEFT 0.21. A file is a VERA file with twice the rows in `pvera_A` (2r, largest in) and
    `pvera_lambda_d` (2r,). PEFT draws noise in training, and in evaluation too with sample_at_inference.
    """

    peft_type = "PVERA"
    variants = {PVeRA: {}}
    fields = {
        **projection_fields("pvera"),
        "sample_at_inference": Refused(False, next_step="set it to false: the mean is then the adapter's output"),
        "generator_seed": TrainingOnly(),
    }
    shared = ("pvera_A", "pvera_B")
    suffixes = ("pvera_lambda_b", "pvera_lambda_d")
    sizes = ("pvera_lambda_b", 0), ("pvera_A", 1)
