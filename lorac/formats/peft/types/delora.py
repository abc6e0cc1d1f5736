"""PEFT type DELORA.

Source: peft.tuners.delora of PEFT 0.21. A module has `delora_A` (r, in), `delora_B` (out, r), `delora_lambda` (1,) and
the norms `delora_w_norm` (in,) of the columns of the weight.
"""

from lorac.formats._config_fields import (
    Applied,
    TrainingOnly,
    read_number,
    read_number_pattern,
    read_size,
    write_number,
    write_number_pattern,
)
from lorac.formats.peft.fields import PATTERNS, STARTED, WITHOUT_FAN, bias
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.delora import DeLoRA


class DeloraType(PlainType[DeLoRA]):
    """DELORA."""

    peft_type = "DELORA"
    variants = {DeLoRA: {}}
    fields = {
        **WITHOUT_FAN,
        **STARTED,
        "r": Applied(8, to="r", read=read_size),
        "rank_pattern": PATTERNS["rank_pattern"],
        "delora_lambda": TrainingOnly(15, to="delora_lambda", read=read_number, write=write_number),
        "lambda_pattern": TrainingOnly({}, to="lambda_pattern", read=read_number_pattern, write=write_number_pattern),
        # Despite its name, PEFT applies it as dropout to inputs of the change.
        "module_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "bias": bias("delora"),
    }
    suffixes = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")

    def measure(self, variant: DeLoRA, stored: Tensors) -> tuple[int, int]:
        return stored["delora_B"].shape[0], stored["delora_A"].shape[1]
