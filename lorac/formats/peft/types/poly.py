"""PEFT type POLY.

Source: peft.tuners.poly of PEFT 0.21. A module has `poly_lora_A` (splits, skills, in/splits, r), `poly_lora_B` (splits,
skills, r, out/splits) and `poly_router.module_logits` (tasks, splits·skills). PEFT gets the task of each row as
task_ids; in lorac a task is an adapter.
"""

from collections.abc import Mapping

from lorac.argument_types import JsonMapping
from lorac.errors import warn
from lorac.formats._config_fields import Refused, TrainingOnly, read_size
from lorac.formats.peft.fields import EXCLUDE, WITHOUT_FAN, own
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.poly import Poly


class PolyType(PlainType[Poly]):
    """POLY."""

    peft_type = "POLY"
    variants = {Poly: {}}
    fields = {
        **WITHOUT_FAN,
        **EXCLUDE,
        **own(read_size, r=8, n_tasks=1, n_skills=4, n_splits=1),
        "poly_type": Refused("poly", next_step="PEFT has no other"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")

    def measure(self, variant: Poly, stored: Tensors) -> tuple[int, int]:
        a, b = stored["poly_lora_A"], stored["poly_lora_B"]
        return b.shape[0] * b.shape[3], a.shape[0] * a.shape[2]

    def refine_variant(self, variant: Poly, values: JsonMapping, stored: Mapping[str, Tensors]) -> Poly:
        if variant.n_tasks > 1:
            warn(
                f"the file has {variant.n_tasks} tasks, which PEFT chooses by task_ids, and the adapter acts as task 0",
                next_step="lorac.Poly.by_task(adapter) makes an adapter of each task; rows get theirs by adapters=",
            )
        return variant
