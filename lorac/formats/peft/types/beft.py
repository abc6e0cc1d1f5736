"""PEFT type BEFT.

Source: peft.tuners.beft of PEFT 0.21. A module has only `beft_bias` (1, out), which does not show its input features.
"""

from lorac.formats._config_fields import TrainingOnly
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.beft import BEFT


class BeftType(PlainType[BEFT]):
    """BEFT."""

    peft_type = "BEFT"
    variants = {BEFT: {}}
    fields = {**WITHOUT_FAN, "init_weights": TrainingOnly(True)}
    suffixes = ("beft_bias",)

    def measure(self, variant: BEFT, stored: Tensors) -> tuple[int, int]:
        return stored["beft_bias"].shape[1], 1
