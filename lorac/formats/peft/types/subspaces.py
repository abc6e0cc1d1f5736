"""PEFT types DEFT, OSF and PSOFT, which change the weight within a subspace."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    Irrelevant,
    TrainingOnly,
    read_choice,
    read_count,
    read_flag,
    read_int,
    read_number,
    read_number_pattern,
    read_optional_number,
    read_size,
    write_number,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, STARTED, WITHOUT_FAN, bias, own
from lorac.formats.peft.peft_type import PeftType, PlainType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.deft import DEFT
from lorac.variants.osf import OSF
from lorac.variants.psoft import PSOFT


class DeftType(PlainType[DEFT]):
    """DEFT.

    Source: peft.tuners.deft of PEFT 0.21. A module has `deft_P` (out, r) and, without para, `deft_R` (r, in). The rank
    is at most out, and alpha is divided by that rank. PEFT computes in float32, for any dtype of the model.
    """

    peft_type = "DEFT"
    variants = {DEFT: {}}
    fields = {
        **COMMON,
        **STARTED,
        "r": Applied(8, to="r", read=read_size),
        "alpha": Applied(None, to="alpha", read=read_optional_number),
        "decomposition_method": Applied("relu", to="decomposition_method", read=read_choice("relu", "qr")),
        "para": Applied(False, to="para", read=read_flag),
        # PEFT applies dropout only to inputs of the injection.
        "deft_dropout": TrainingOnly(0.0, preserved=True, read=read_number),
        "init_scale": TrainingOnly(1.0, preserved=True, read=read_number),
        "bias": bias("deft"),
    }
    suffixes = ("deft_P", "deft_R")
    conv1d = True

    sizes = ("deft_P", 0), ("deft_R", 1)


PREFIX = "osf_svd_params."
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


class OsfType(PlainType[OSF]):
    """OSF.

    Source: peft.tuners.osf of PEFT 0.21. A module has `osf_svd_params.U_low` (out, k), `.S_low` (k,) and `.V_low` (k,
    in); the frozen parts are computed from the base's weight. PEFT searches for rank_pattern anywhere in a path
    (re.search).
    """

    peft_type = "OSF"
    variants = {OSF: {}}
    fields = {
        **WITHOUT_FAN,
        "effective_rank": Applied(to="effective_rank", read=read_optional_number),
        "rank_pattern": Applied(to="rank_pattern", read=read_searched, write=write_searched),
        "init_weights": TrainingOnly(True),
        "target_svd_config": Irrelevant(preserved=True),
    }
    names = {PREFIX + name: name for name in ("U_low", "S_low", "V_low")}
    suffixes = tuple(names)
    sizes = (f"{PREFIX}U_low", 0), (f"{PREFIX}V_low", 1)
    needs_model = True
    derived = ("U_init", "S_init", "V_init", "U_high", "V_high")


NAMES = {"psoft_R.weight": "psoft_R", "psoft_R.vector_a": "psoft_a", "psoft_R.vector_b": "psoft_b"}


class PsoftType(PeftType[PSOFT]):
    """PSOFT.

    Source: peft.tuners.psoft of PEFT 0.21. A module has `psoft_R.weight` (r(r−1)/2,), or (r, r) without psoft_orth, and
    the vectors `psoft_R.vector_a` and `psoft_R.vector_b` (r,). PEFT computes the frozen factors from the base's weight,
    in float32, so a file fits only the base that it was trained on.
    """

    peft_type = "PSOFT"
    variants = {PSOFT: {}}
    fields = {
        **COMMON,
        **STARTED,
        **own(read_size, r=32, num_cayley_neumann_terms=5),
        "psoft_alpha": Applied(32, to="alpha", read=read_number, write=write_number),
        "psoft_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "ab_svd_init": Applied("psoft_init", to="ab_svd_init", read=read_choice("psoft_init", "pissa_init")),
        "psoft_svd": Applied("full", to="psoft_svd", read=read_choice("full", "lowrank")),
        "psoft_svd_lowrank_niter": Applied(10, to="psoft_svd_lowrank_niter", read=read_count),
        "random_seed": Applied(0, to="random_seed", read=read_int),
        **own(read_flag, psoft_orth=True, psoft_mag_a=True, psoft_mag_b=True, use_cayley_neumann=False),
        "cayley_neumann_eps": Applied(None, to="cayley_neumann_eps", read=read_optional_number),
    }
    suffixes = tuple(NAMES)
    needs_model = True
    derived = ("psoft_A", "psoft_B")

    def read_site(self, variant: PSOFT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        trained = dict(zip(NAMES, (True, variant.psoft_mag_a, variant.psoft_mag_b), strict=True))
        axes = {suffix: 1 for suffix in NAMES if trained[suffix]} | (
            {} if variant.psoft_orth else {"psoft_R.weight": 2}
        )
        expected = "psoft_R.weight is (r(r − 1)/2,), or (r, r) without psoft_orth, and the vectors are (r,)"
        tensors = take_tensors(path, stored, axes, expected)
        return matrix_site(path, 1, 1), {NAMES[suffix]: tensor for suffix, tensor in tensors.items() if tensor.numel()}

    def write_site(self, variant: PSOFT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        empty = {} if "psoft_R" in tensors else {"psoft_R.weight": torch.zeros(0)}  # for rank 1
        return empty | {suffix: tensors[name] for suffix, name in NAMES.items() if name in tensors}
