"""PEFT type C3A.

Source: peft.tuners.c3a of PEFT 0.21. A module has `c3a_kernel` (out/b, in/b, b). PEFT transforms in float32, for any
dtype of the model, and feeds the output of one active adapter to the next; lorac adds up the changes of all.
"""

from lorac.formats._config_fields import Applied, TrainingOnly, read_rank_pattern, read_size, write_number_pattern
from lorac.formats.peft.fields import LAYERS, WITHOUT_FAN, bias
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.c3a import C3A


class C3aType(PlainType[C3A]):
    """C3A."""

    peft_type = "C3A"
    variants = {C3A: {}}
    fields = {
        **WITHOUT_FAN,
        **LAYERS,
        "block_size": Applied(256, to="block_size", read=read_size),
        "block_size_pattern": Applied({}, to="block_size_pattern", read=read_rank_pattern, write=write_number_pattern),
        "bias": bias("c3a"),
        "init_weights": TrainingOnly("xavier_uniform"),
    }
    suffixes = ("c3a_kernel",)

    def measure(self, variant: C3A, stored: Tensors) -> tuple[int, int]:
        rows, columns, size = stored["c3a_kernel"].shape
        return rows * size, columns * size
