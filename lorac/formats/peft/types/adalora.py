"""PEFT type ADALORA.

Source: peft.tuners.adalora of PEFT 0.21. A module has `lora_A` (r, in), with a kernel flattened, `lora_E` (r, 1) and
`lora_B` (out, r) for the r singular values that training kept; rank_pattern marks these among the init_r. The scale
remains lora_alpha / (init_r + 1e-5). PEFT ignores the LORA fields that are irrelevant here.
"""

from collections.abc import Mapping

from lorac.formats._config_fields import (
    Applied,
    Irrelevant,
    Refused,
    TrainingOnly,
    read_mapping,
    read_number,
    read_size,
    write_number,
)
from lorac.formats.peft.fields import trained
from lorac.formats.peft.peft_type import PlainType
from lorac.formats.peft.types.lora import FIELDS as LORA_FIELDS
from lorac.ir.sites.site import SiteKind
from lorac.variants.adaptive_rank import AdaLoRA

_NEVER = "train the adapter again without it: PEFT's AdaLoRA refuses it, too"


def read_scale(value: object) -> float:
    """Return a number above 0; a smaller one is refused, since PEFT would replace it by the rank."""
    if read_number(value) <= 0:
        raise ValueError("expected a number above 0")
    return float(read_number(value))


def read_masks(value: object) -> dict[str, tuple[bool, ...]]:
    """Return path of a module -> mask of the singular values that were kept."""
    masks = {}
    for key, mask in read_mapping(value).items():
        path, _, adapter = key.rpartition(".lora_E")
        if not path or "." in adapter[1:] or not isinstance(mask, list) or not all(isinstance(m, bool) for m in mask):
            raise ValueError("expected a mapping of <path>.lora_E to lists of true and false")
        masks[path] = tuple(mask)
    return masks


def write_masks(masks: Mapping[str, tuple[bool, ...]]) -> dict[str, list[bool]] | None:
    """Return the rank_pattern of a file; null where no module has a mask."""
    return {f"{path}.lora_E": list(mask) for path, mask in masks.items()} or None


class AdaloraType(PlainType[AdaLoRA]):
    """ADALORA."""

    peft_type = "ADALORA"
    variants = {AdaLoRA: {}}
    fields = {
        **LORA_FIELDS,
        "init_r": Applied(12, to="r", read=read_size),
        "lora_alpha": Applied(8, to="alpha", read=read_scale, write=write_number),
        "rank_pattern": Applied(to="rank_pattern", read=read_masks, write=write_masks),
        "r": Irrelevant(8),
        "use_rslora": Irrelevant(False),
        "lora_bias": Irrelevant(False),
        "alpha_pattern": Irrelevant({}),
        "use_dora": Refused(False, next_step=_NEVER),
        "alora_invocation_tokens": Refused(next_step="train the adapter again without it: AdaLoRA acts on every token"),
        "use_qalora": Refused(False, next_step=_NEVER),
        "loftq_config": Refused({}, next_step=_NEVER),
        **trained(target_r=8, tinit=0, tfinal=0, deltaT=1, beta1=0.85, beta2=0.85, orth_reg_weight=0.5),
        # PEFT refuses a configuration without a number of steps.
        "total_step": TrainingOnly(preserved=True, write=lambda steps: steps or 1),
    }
    suffixes = ("lora_A", "lora_E", "lora_B")
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV2D})
    conv1d = True

    sizes = ("lora_B", 0), ("lora_A", 1)
