"""PEFT type DEFT.

Source: peft.tuners.deft of PEFT 0.21. A module has `deft_P` (out, r) and, without para, `deft_R` (r, in). The rank is
at most out, and alpha is divided by that rank. PEFT computes in float32, for any dtype of the model.
"""

from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    TrainingOnly,
    read_choice,
    read_flag,
    read_number,
    read_optional_number,
    read_size,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, STARTED, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.deft import DEFT


class DeftType(PeftType[DEFT]):
    """DEFT."""

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

    def read_site(self, variant: DEFT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict.fromkeys(self.suffixes[: 1 if variant.para else 2], 2)
        tensors = take_tensors(path, stored, axes, "deft_P is (out, r), deft_R (r, in), which para has not")
        return matrix_site(path, len(tensors["deft_P"]), 1 if variant.para else tensors["deft_R"].shape[1]), tensors
