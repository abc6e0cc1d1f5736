"""PEFT type VBLORA.

Source: peft.tuners.vblora of PEFT 0.21. With v the length of a vector and h their number, a site has the logits
`vblora_logits_A` (r, in/v, h) and `vblora_logits_B` (out/v, r, h), and all of them share
`base_model.vblora_vector_bank` (h, v).

With save_only_topk_weights a file has of each logits the k chosen `<name>_topk_indices` (…, k) and but the last of
their weights, `<name>_topk_weights` (…, k − 1), sorted down; they add up to 1. Such a file is read as logits that give
these weights and choose no other vector: it serves, and training it moves the chosen weights alone. What lorac writes
are logits.
"""

from __future__ import annotations

import torch

from lorac.errors import AdapterError
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft import config
from lorac.formats.peft.fields import PLACES, bias, mismatched_shapes
from lorac.formats.peft.peft_type import Field, FieldUse, PeftType, Tensors
from lorac.formats.peft.shared_tensors import linear
from lorac.ir.sites import Site
from lorac.limits import claim_memory
from lorac.variants.base import Variant
from lorac.variants.vblora import VBLoRA

Tensor = torch.Tensor
BANK = "vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
CHOSEN = {f"{name}_topk_{part}": name for name in LOGITS for part in ("indices", "weights")}

FIELDS = {
    **config.COMMON,
    **PLACES,
    "r": Field(FieldUse.APPLIED, 4, to="r", read=config.rank),
    "num_vectors": Field(FieldUse.APPLIED, 256, to="num_vectors", read=config.rank),
    "vector_length": Field(FieldUse.APPLIED, 256, to="vector_length", read=config.rank),
    "topk": Field(FieldUse.APPLIED, 2, to="topk", read=config.rank),
    # The keys of a file say which it is.
    "save_only_topk_weights": Field(FieldUse.IRRELEVANT, False, read=config.flag),
    "vblora_dropout": Field(FieldUse.TRAINING, 0.0, to="dropout", read=config.number),
    "init_vector_bank_bound": Field(FieldUse.TRAINING, 0.02, to="init_vector_bank_bound", read=config.number),
    "init_logits_std": Field(FieldUse.TRAINING, 0.1, to="init_logits_std", read=config.number),
    "bias": bias("vblora"),
}

check_site = linear("VBLORA")


def read_site(variant: Variant, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
    """Bank and logits of one site, and the site as they tell it.

    Raises:
        AdapterError: They do not belong together.
    """
    assert isinstance(variant, VBLoRA)
    bank, own = stored[BANK], {name: tensor for name, tensor in stored.items() if name != BANK}
    if bank.ndim == 2 and set(own) == set(CHOSEN):
        if bank.shape[0] != variant.num_vectors:
            raise mismatched_shapes(path, stored, f"the bank has num_vectors={variant.num_vectors} rows")
        own = {name: _logits(variant, path, name, own) for name in LOGITS}
    if set(own) != set(LOGITS) or bank.ndim != 2 or any(logits.ndim != 3 for logits in own.values()):
        raise mismatched_shapes(path, stored, "logits are (r, in/v, h) and (out/v, r, h), the bank is (h, v)")
    length, (down, up) = bank.shape[1], (own[name] for name in LOGITS)
    return matrix_site(path, up.shape[0] * length, down.shape[1] * length), {BANK: bank, LOGITS[0]: down, LOGITS[1]: up}


def _logits(variant: VBLoRA, path: str, name: str, stored: Tensors) -> Tensor:
    """Logits (…, h) that choose the stored vectors with the stored weights."""
    places, weights = stored[f"{name}_topk_indices"].to(torch.int64), stored[f"{name}_topk_weights"]
    expected = (*places.shape[:-1], variant.topk - 1)
    if places.shape[-1:] != (variant.topk,) or weights.shape != expected or not _among(places, variant.num_vectors):
        raise AdapterError(
            f"{name}_topk_indices {tuple(places.shape)} and {name}_topk_weights {tuple(weights.shape)} at '{path}' do "
            f"not choose {variant.topk} of {variant.num_vectors} vectors",
            next_step="topk and num_vectors must be those of the training",
            code="shape_mismatch",
        )
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    # Infinite ones would be taken for a diverged training: the lowest there are weigh as little.
    lowest = torch.finfo(weights.dtype).min
    chosen = weights.clamp(min=0).log().clamp(min=lowest / 2)
    size = places.numel() // variant.topk * variant.num_vectors
    claim_memory(size * weights.itemsize, f"the logits at '{path}' written out")
    return torch.full((*places.shape[:-1], variant.num_vectors), lowest, dtype=weights.dtype).scatter(
        -1, places, chosen
    )


def _among(places: Tensor, count: int) -> bool:
    return bool((places >= 0).all()) and bool((places < count).all())


def write_site(variant: Variant, site: Site, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of one site by suffix, the bank that all sites share among them.

    Raises:
        SiteError: PEFT's VB-LoRA adapts linear layers only.
    """
    check_site(site, tensors)
    return dict(tensors)


METHOD = PeftType(
    peft_type="VBLORA",
    variants={VBLoRA: {}},
    fields=FIELDS,
    suffixes=(*LOGITS, *CHOSEN),
    shared=(BANK,),
    read_site=read_site,
    write_site=write_site,
    check_site=check_site,
)
