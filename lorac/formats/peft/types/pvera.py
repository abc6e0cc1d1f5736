"""PEFT type PVERA.

Source: peft.tuners.pvera of PEFT 0.21. A file is a VERA file with twice the rows in `pvera_A` (2r, largest in) and
`pvera_lambda_d` (2r,). PEFT draws noise in training, and in evaluation too with sample_at_inference.
"""

from lorac.formats._config_fields import Refused, TrainingOnly
from lorac.formats.peft.types.vera import ProjectionsType, projection_fields
from lorac.variants.pvera import PVeRA


class PveraType(ProjectionsType[PVeRA]):
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
