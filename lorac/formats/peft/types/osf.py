"""PEFT type OSF.

Source: peft.tuners.osf of PEFT 0.21. A module has `osf_svd_params.U_low` (out, k), `.S_low` (k,) and `.V_low` (k, in);
the frozen parts are computed from the base's weight. PEFT searches for rank_pattern anywhere in a path (re.search).
"""

from collections.abc import Mapping

from torch import Tensor

from lorac.formats._config_fields import Applied, Irrelevant, TrainingOnly, read_number_pattern, read_optional_number
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.osf import OSF

PREFIX, TRAINED = "osf_svd_params.", ("U_low", "S_low", "V_low")
_ANYWHERE, _END = ".*(?:", ").*"


def read_searched(value: object) -> dict[str, float]:
    """Convert patterns that PEFT searches for within a path to patterns that match the end of a path."""
    return {f"{_ANYWHERE}{pattern}{_END}": rank for pattern, rank in read_number_pattern(value).items()}


def write_searched(value: Mapping[str, float]) -> dict[str, float] | None:
    """Convert patterns to those that PEFT searches for within a path; the inverse of ``read_searched``."""
    ranks = {}
    for pattern, rank in value.items():
        searched = pattern.startswith(_ANYWHERE) and pattern.endswith(_END)
        ranks[pattern[len(_ANYWHERE) : -len(_END)] if searched else rf"^(.*\.)?({pattern})$"] = rank
    return ranks or None


class OsfType(PeftType[OSF]):
    """OSF."""

    peft_type = "OSF"
    variants = {OSF: {}}
    fields = {
        **WITHOUT_FAN,
        "effective_rank": Applied(to="effective_rank", read=read_optional_number),
        "rank_pattern": Applied(to="rank_pattern", read=read_searched, write=write_searched),
        "init_weights": TrainingOnly(True),
        "target_svd_config": Irrelevant(preserved=True),
    }
    suffixes = tuple(PREFIX + name for name in TRAINED)
    needs_model = True
    derived = ("U_init", "S_init", "V_init", "U_high", "V_high")

    def read_site(self, variant: OSF, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict(zip(self.suffixes, (2, 1, 2), strict=True))
        tensors = take_tensors(path, stored, axes, "U_low is (out, k), S_low (k,), V_low (k, in)")
        parts = {suffix.removeprefix(PREFIX): tensor for suffix, tensor in tensors.items()}
        return matrix_site(path, len(parts["U_low"]), parts["V_low"].shape[1]), parts

    def write_site(self, variant: OSF, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        return {PREFIX + name: tensors[name] for name in TRAINED}
