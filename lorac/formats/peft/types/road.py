"""PEFT type ROAD.

Source: peft.tuners.road of PEFT 0.21. A module has `road_theta` and `road_alpha` of out/2, out or 2·out numbers, for
the variants road_1, road_2 and road_4. No tensor shows the input features. PEFT applies several active adapters in
sequence, each to the output of the previous one; lorac adds up the changes that each makes to the base.
"""

from lorac.formats._config_fields import Applied, TrainingOnly, read_choice, read_size
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.variants.road import RoAd

_FORMS = {"road_1": 2, "road_2": 1, "road_4": 0.5}
"""Variant -> outputs for each angle."""


class RoadType(PlainType[RoAd]):
    """ROAD."""

    peft_type = "ROAD"
    variants = {RoAd: {}}
    fields = {
        **WITHOUT_FAN,
        "variant": Applied("road_1", to="variant", read=read_choice(*_FORMS)),
        "group_size": Applied(64, to="group_size", read=read_size),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("road_theta", "road_alpha")

    def measure(self, variant: RoAd, stored: Tensors) -> tuple[int, int]:
        return int(len(stored["road_theta"]) * _FORMS[variant.variant]), 1
