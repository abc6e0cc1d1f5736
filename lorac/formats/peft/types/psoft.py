"""PEFT type PSOFT.

Source: peft.tuners.psoft of PEFT 0.21. A module has `psoft_R.weight` (r(r−1)/2,), or (r, r) without psoft_orth, and the
vectors `psoft_R.vector_a` and `psoft_R.vector_b` (r,). PEFT computes the frozen factors from the base's weight, in
float32, so a file fits only the base that it was trained on.
"""

import torch
from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    TrainingOnly,
    read_choice,
    read_count,
    read_flag,
    read_int,
    read_number,
    read_optional_number,
    read_size,
    write_number,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, STARTED, own
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.psoft import PSOFT

NAMES = {"psoft_R.weight": "psoft_R", "psoft_R.vector_a": "psoft_a", "psoft_R.vector_b": "psoft_b"}
FLAGS = ("psoft_orth", "psoft_mag_a", "psoft_mag_b")


class PsoftType(PeftType[PSOFT]):
    """PSOFT."""

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
        **{flag: Applied(True, to=flag, read=read_flag) for flag in FLAGS},
        "use_cayley_neumann": Applied(False, to="use_cayley_neumann", read=read_flag),
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
