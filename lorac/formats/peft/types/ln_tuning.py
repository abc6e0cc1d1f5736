"""PEFT type LN_TUNING.

Source: peft.tuners.ln_tuning of PEFT 0.21 (config.py, layer.py). Keys are `<module>.ln_tuning_layers.<parameter>`: a
trained copy of every targeted module, including buffers, which replaces the module. PEFT runs one such adapter at a
time.
"""

from torch import Tensor

from lorac.formats._config_fields import Applied, read_pattern, write_pattern
from lorac.formats.peft.fields import EXCLUDE, WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site
from lorac.variants.ln_tuning import LNTuning


def read_modules(value: object) -> str | tuple[str, ...]:
    """Return names of modules or one regular expression; null is refused, since PEFT writes its default choice."""
    modules = read_pattern(value)
    if not modules:
        raise ValueError("expected names of modules, or a pattern")
    return modules


class LnTuningType(PeftType[LNTuning]):
    """LN_TUNING."""

    peft_type = "LN_TUNING"
    variants = {LNTuning: {}}
    fields = {
        **WITHOUT_FAN,
        "target_modules": Applied(to="targets", read=read_modules, write=write_pattern),
        **EXCLUDE,
    }
    copied = "ln_tuning_layers"

    def read_site(self, variant: LNTuning, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        raise mismatched_shapes(path, stored, "LN_TUNING replaces whole modules")

    def write_site(self, variant: LNTuning, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        raise mismatched_shapes(site.path, tensors, "LN_TUNING replaces whole modules")
