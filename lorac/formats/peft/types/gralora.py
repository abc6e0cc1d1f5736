"""PEFT type GRALORA.

Source: peft.tuners.gralora of PEFT 0.21. With k = gralora_k a module has `gralora_A` (k, in/k, r) and `gralora_B`
(k, r, out/k), and with hybrid_r the factors `gralora_A_general.weight` and `gralora_B_general.weight` of a LoRA.
"""

from lorac.formats._config_fields import Applied, TrainingOnly, read_count, read_number, read_size, write_number
from lorac.formats.peft.fields import COMMON, LAYERS, bias
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.gralora import GraLoRA


class GraloraType(PlainType[GraLoRA]):
    """GRALORA."""

    peft_type = "GRALORA"
    variants = {GraLoRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        "r": Applied(32, to="r", read=read_size),
        "hybrid_r": Applied(0, to="hybrid_r", read=read_count),
        "alpha": Applied(64, to="alpha", read=read_number, write=write_number),
        "gralora_k": Applied(2, to="k", read=read_size),
        "gralora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "bias": bias("gralora"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")
    conv1d = True

    def measure(self, variant: GraLoRA, stored: Tensors) -> tuple[int, int]:
        a, b = stored["gralora_A"], stored["gralora_B"]
        return b.shape[0] * b.shape[2], a.shape[0] * a.shape[1]
