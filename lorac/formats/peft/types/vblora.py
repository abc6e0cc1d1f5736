"""PEFT type VBLORA.

Source: peft.tuners.vblora of PEFT 0.21. A bank has h vectors of length v. A module has the logits `vblora_logits_A` (r,
in/v, h) and `vblora_logits_B` (out/v, r, h), and all modules share the bank, `base_model.vblora_vector_bank` (h, v).

With save_only_topk_weights a file has for each logit vector the k chosen `<name>_topk_indices` (…, k), and all but the
last of their weights, `<name>_topk_weights` (…, k − 1), in descending order; the weights add up to 1. lorac reads such
a file as logits that give these weights and choose no other vector. Such an adapter runs, but training changes only the
chosen weights. lorac writes logits.
"""

import torch
from torch import Tensor

from lorac.errors import shape_error
from lorac.formats._config_fields import Irrelevant, TrainingOnly, read_flag, read_number, read_size
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, FILTERS, bias, own
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes, take_tensors
from lorac.ir.sites.site import Site
from lorac.limits import claim_memory
from lorac.variants.vblora import VBLoRA

BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
TOP_K = tuple(f"{name}_topk_{part}" for name in LOGITS for part in ("indices", "weights"))


class VbloraType(PeftType[VBLoRA]):
    """VBLORA."""

    peft_type = "VBLORA"
    variants = {VBLoRA: {}}
    fields = {
        **COMMON,
        **FILTERS,
        **own(read_size, r=4, num_vectors=256, vector_length=256, topk=2),
        # The keys of a file show its value.
        "save_only_topk_weights": Irrelevant(False, read=read_flag),
        "vblora_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "init_vector_bank_bound": TrainingOnly(0.02, to="init_vector_bank_bound", read=read_number),
        "init_logits_std": TrainingOnly(0.1, to="init_logits_std", read=read_number),
        "bias": bias("vblora"),
    }
    suffixes = (*LOGITS, *TOP_K)
    shared = (BANK,)
    conv1d = True
    shapes_tell_kind = True

    def read_site(self, variant: VBLoRA, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        bank = stored[BANK]
        if bank.ndim == 2 and set(stored) == {BANK, *TOP_K}:
            if bank.shape[0] != variant.num_vectors:
                raise mismatched_shapes(path, stored, f"the bank has num_vectors={variant.num_vectors} rows")
            stored = {BANK: bank, **{name: _expand_top_k(variant, path, name, stored) for name in LOGITS}}
        expected = "logits are (r, in/v, h) and (out/v, r, h), the bank is (h, v)"
        tensors = take_tensors(path, stored, {BANK: 2, **dict.fromkeys(LOGITS, 3)}, expected)
        length, (down, up) = bank.shape[1], (tensors[name] for name in LOGITS)
        return matrix_site(path, up.shape[0] * length, down.shape[1] * length), tensors


def _expand_top_k(variant: VBLoRA, path: str, name: str, stored: Tensors) -> Tensor:
    """Return logits (…, h) that choose the stored vectors with the stored weights."""
    indices, weights = stored[f"{name}_topk_indices"].to(torch.int64), stored[f"{name}_topk_weights"]
    fits = indices.shape[-1:] == (variant.topk,) and weights.shape == (*indices.shape[:-1], variant.topk - 1)
    if not fits or bool(((indices < 0) | (indices >= variant.num_vectors)).any()):
        raise shape_error(
            f"{name}_topk_indices {tuple(indices.shape)} and {name}_topk_weights {tuple(weights.shape)} at '{path}' do "
            f"not choose {variant.topk} of {variant.num_vectors} vectors",
            next_step="set topk and num_vectors to those of the training",
        )
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    # Infinite logits would count as a diverged training; the lowest finite logit has a weight of zero too.
    lowest = torch.finfo(weights.dtype).min
    chosen = weights.clamp(min=0).log().clamp(min=lowest / 2)
    size = indices.numel() // variant.topk * variant.num_vectors
    claim_memory(size * weights.itemsize, f"the logits at '{path}' written out")
    logits = torch.full((*indices.shape[:-1], variant.num_vectors), lowest, dtype=weights.dtype)
    return logits.scatter(-1, indices, chosen)
