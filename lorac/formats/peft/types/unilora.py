"""PEFT type UNILORA.

Source: peft.tuners.unilora of PEFT 0.21. All modules share `base_model.unilora_theta_d` (theta_d_length,). With
save_indices a module also has `unilora_indices_A` (r, in) and `unilora_indices_B` (out, r), and the factors of their
entries, `unilora_scales_A` and `unilora_scales_B`. Otherwise the file has no keys of modules: proj_seed, and the order
and sizes of the targeted modules in the model, determine the indices.
"""

import torch
from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_count, read_flag, read_number, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, LAYERS, bias, own
from lorac.formats.peft.peft_type import Parameters, PeftType, Tensors, mismatched_shapes, take_tensors
from lorac.ir.sites.site import BaseReader, Site
from lorac.limits import claim_memory
from lorac.variants.unilora import UniLoRA

THETA = "unilora_theta_d"
INDICES, SCALES = ("unilora_indices_A", "unilora_indices_B"), ("unilora_scales_A", "unilora_scales_B")


class UniloraType(PeftType[UniLoRA]):
    """UNILORA."""

    peft_type = "UNILORA"
    variants = {UniLoRA: {}}
    fields = {
        **COMMON,
        **LAYERS,
        **own(read_size, r=4, theta_d_length=256),
        "proj_seed": Applied(42, to="proj_seed", read=read_count),
        # The keys of a file show its value; lorac writes no indices.
        "save_indices": Applied(False, read=read_flag),
        "unilora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "init_theta_d_bound": TrainingOnly(0.02, to="init_theta_d_bound", read=read_number),
        "init_weights": TrainingOnly(True),
        "bias": bias("unilora"),
    }
    shared = (THETA,)
    suffixes = (*INDICES, *SCALES)
    conv1d = True
    needs_model = True
    ordered = True
    names_no_site = True
    derived = ("unilora_places", "unilora_scales")

    def read_site(self, variant: UniLoRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = {THETA: 1} | (dict.fromkeys(self.suffixes, 2) if len(stored) > 1 else {})
        expected = "theta_d is (theta_d_length,); indices of its entries and scales are (r, in) and (out, r)"
        if stored[THETA].shape != (variant.theta_d_length,):
            raise mismatched_shapes(path, stored, expected)
        return matrix_site(path, 1, 1), take_tensors(path, stored, axes, expected)

    def complete_site(self, variant: UniLoRA, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        claim_memory(32 * variant.starts[""], "the assignment of theta_d to the factors of all sites")
        made = super().complete_site(variant, site, {THETA: tensors[THETA]}, base)
        given = {name: tensors[name].flatten() for name in self.suffixes if name in tensors}
        own = {INDICES: made["unilora_places"][0] % variant.theta_d_length, SCALES: made["unilora_scales"]}
        for names, ours in own.items():
            theirs = torch.cat([given[name] for name in names]) if given else ours
            slack = 0.0 if names == INDICES else 1e-3  # a file may store scales in half precision
            same = theirs.shape == ours.shape
            if not same or not torch.allclose(theirs.double(), ours.double(), rtol=0, atol=slack):
                raise unsupported_error(
                    f"{' and '.join(names)} at '{site.path}' are not those that proj_seed gives for this model",
                    next_step="load the base model that the adapter was trained on",
                )
        return made
